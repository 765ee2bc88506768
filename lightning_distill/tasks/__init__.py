"""What a batch asks for: which logits answer its labels, what counts, how an answer is scored.

Here belongs all that differs from task to task, one file a task; no other room asks which task it is. Nothing here
runs a model.
"""

from typing import get_args

from torch import nn

from lightning_distill.arguments import one_of
from lightning_distill.models.heads import TaskName, task_of_class
from lightning_distill.models.wrapped import inside
from lightning_distill.tasks.classification import Classification
from lightning_distill.tasks.language_models import CausalLM, MaskedLM
from lightning_distill.tasks.multi_label import MultiLabel
from lightning_distill.tasks.regression import Regression
from lightning_distill.tasks.segmentation import Segmentation
from lightning_distill.tasks.sentence_embedding import SentenceEmbedding
from lightning_distill.tasks.seq2seq_lm import Seq2SeqLM
from lightning_distill.tasks.task import Task
from lightning_distill.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task", "TaskName", "infer_task", "task_named"]

#: Every task by its name; a new one is a file and a row.
TASKS: dict[TaskName, Task] = {
    task.name: task
    for task in (
        Classification(),
        MultiLabel(),
        Regression(),
        TokenClassification(),
        Segmentation(),
        MaskedLM(),
        CausalLM(),
        Seq2SeqLM(),
        SentenceEmbedding(),
    )
}


def task_named(task: str, model: nn.Module) -> Task:
    """The task of a name; ``"auto"`` reads it off a model, see :func:`infer_task`.

    Args:
        task: A name.
        model: The model that answers.

    Raises:
        ValueError: If there is no such task, or the model has no head for one.
    """
    one_of("task", task, ("auto", *TASKS))
    return TASKS[infer_task(model) if task == "auto" else task]  # type: ignore[index]


def infer_task(model: nn.Module) -> TaskName:
    """Read the task off a transformers class and its config; any other module classifies.

    Args:
        model: A model, usually the student.

    Returns:
        The name of the task.

    Raises:
        ValueError: If it is a transformers model with a head that no task here answers.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.tasks import infer_task
        >>> infer_task(nn.Linear(4, 2))
        'classification'
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return "classification"
    model = inside(model)
    name, task = type(model).__name__, task_of_class(type(model))
    problem = getattr(config, "problem_type", None)
    if task is None:
        raise ValueError(
            f"Expected argument `student` to have a head for one of {list(get_args(TaskName))}, but got a `{name}`. "
            "Load the model with such a head, or pass `task=...` and override `student_step` and `teacher_step`."
        )
    if task == "classification" and problem == "multi_label_classification":
        return "multi_label"
    if task == "classification":
        # As in transformers: one logit is a value, unless the config says that it classifies.
        one = getattr(config, "num_labels", 2) == 1 and problem is None
        return "regression" if one or problem == "regression" else task
    return task
