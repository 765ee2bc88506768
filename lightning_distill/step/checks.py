"""Questions asked before the first step, each answered by an error that says what to do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill import tasks
from lightning_distill.models.batch import has_real_item, labels_of
from lightning_distill.models.calling import gives_logits
from lightning_distill.models.class_names import class_names, class_order
from lightning_distill.models.heads import LANGUAGE_MODELS, Task
from lightning_distill.models.tokenizers import (
    ANOTHER_TOKENIZER,
    OWN_INPUTS,
    check_equal,
    check_sizes,
    check_tokenizers,
)

if TYPE_CHECKING:
    from lightning_distill.objectives import Objective
    from lightning_distill.signals.signals import Signals


def check_forward(model: nn.Module, name: str) -> None:
    """Refuse a module without a forward of its own, such as a LightningModule that computes all in its steps.

    Args:
        model: The module.
        name: What the argument is called.

    Raises:
        TypeError: If so.
    """
    # A module says that it has none by a function of its base class that raises.
    if type(model).forward in (nn.Module.forward, L.LightningModule.forward) and "forward" not in vars(model):
        raise TypeError(
            f"Expected argument `{name}` to be a module with a forward, but got a `{type(model).__name__}` that "
            "has none. Define `forward` to return logits, or pass the network inside it."
        )


def check_answers(model: nn.Module, name: str, objectives: Mapping[str, "Objective"]) -> bool:
    """Whether a model gives logits; one that gives none is refused where an objective reads them.

    Args:
        model: The model.
        name: What the argument is called: ``"student"`` or ``"teacher"``.
        objectives: By name.

    Returns:
        False for a transformers model without a head, True for any other module.

    Raises:
        TypeError: If it has no head and an objective needs one.
    """
    if gives_logits(model):
        return True
    if readers := [key for key, o in objectives.items() if o.reads_logits and (name == "student" or o.needs_teacher)]:
        raise TypeError(
            f"Expected argument `{name}` to be a model that gives `logits`, which {readers} read, but got a "
            f"`{type(model).__name__}`. Load it with a head, for example by `AutoModelForSequenceClassification`, or "
            "leave only objectives on hidden states, attention or modules."
        )
    return False


def check_pair(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    *,
    any_vocabulary: bool = False,
    same_answers: bool = True,
    own_inputs: bool = False,
) -> Tensor | None:
    """Refuse a student and a teacher that cannot be compared.

    Args:
        student: The model that learns.
        teacher: The model that is imitated.
        task: The name of the task.
        any_vocabulary: Whether no objective compares word with word, so that a language model's vocabularies may
            differ.
        same_answers: Whether both answer, so that their classes must be the same ones.
        own_inputs: Whether the teacher reads inputs of its own, so that their tokenizers may differ.

    Returns:
        None where the classes are in the same order; otherwise the index that puts the teacher's classes in the
        student's order (see :func:`lightning_distill.models.class_names.class_order`).

    Raises:
        ValueError: If the two share a parameter, or their vocabularies, tokenizers, numbers of classes or label names
            differ.
    """
    check_not_shared(student, teacher)
    words = task in LANGUAGE_MODELS
    if words and same_answers and not any_vocabulary:
        check_sizes(student, teacher, padded=True, advice=ANOTHER_TOKENIZER)
    if not any_vocabulary and not own_inputs:
        check_tokenizers(student, teacher, ANOTHER_TOKENIZER if words else OWN_INPUTS)
    if words or not same_answers:
        return None
    student_config, teacher_config = getattr(student, "config", None), getattr(teacher, "config", None)
    check_equal("num_labels", student_config, teacher_config, "Load both with the same number of classes.")
    names, teacher_names = class_names(student, "student"), class_names(teacher, "teacher")
    return None if names is None or teacher_names is None else class_order(names, teacher_names)


def check_data_classes(model: nn.Module, data: Any) -> None:
    """Refuse data whose classes are numbered in another order than those of a model.

    Args:
        model: The model that learns from the data, or is tested on it.
        data: A LightningDataModule with ``label_names``, as :class:`lightning_distill.data.TextClassificationData`;
            anything else is taken as it is.

    Raises:
        ValueError: If both name their classes, and their numbers or names differ, or their order.
    """
    names, of_data = class_names(model, "student"), getattr(data, "label_names", None)
    # Labels that are whole numbers are the names of nothing.
    if (
        not names
        or not of_data
        or not isinstance(of_data, (list, tuple))
        or all(str(name).lstrip("-").isdigit() for name in of_data)
    ):
        return
    if class_order(names, of_data, "student", "the data") is not None:
        raise ValueError(
            f"Expected the data to number their classes as the student does, {names}, but got {list(of_data)}. Pass "
            f"`label_names={names}` to the data."
        )


def check_not_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that would train the teacher with it, because they share a parameter."""
    owned = {parameter.data_ptr(): name for name, parameter in teacher.named_parameters() if not parameter.is_meta}
    owned.pop(0, None)
    for name, parameter in student.named_parameters():
        if not parameter.is_meta and parameter.data_ptr() in owned:
            raise ValueError(
                f"Expected argument `student` to have its own parameters, but got `{name}`, which is the teacher's "
                f"`{owned[parameter.data_ptr()]}`. Copy the teacher first (`copy.deepcopy`), or make the student with "
                "`student_from_teacher`."
            )


def check_objectives(task: Task, objectives: Mapping[str, Any]) -> None:
    """Refuse objectives on classes where a task has none.

    Args:
        task: The name of the task.
        objectives: By name.

    Raises:
        ValueError: If so.
    """
    wrong = [name for name, objective in objectives.items() if objective.needs_classes]
    if task == "regression" and wrong:
        raise ValueError(
            f"Expected objectives on real values in regression, but got {wrong}, which compare classes. Use "
            "`SoftTarget` or `LogitsMSE`."
        )


def check_batch(task: Task, batch: Any, num_classes: int | None, where: str) -> None:
    """Refuse a batch of padding alone, or with a label that names no class.

    Args:
        task: The name of the task.
        batch: The batch.
        num_classes: Number of classes, or None where it is not known.
        where: Words that name the batch in the error.

    Raises:
        ValueError: If no token is real, or a label is below 0 (and not -100) or too large.
    """
    if not has_real_item(batch):
        raise ValueError(
            f"Expected {where} to have a real token, but got one in which everything is padding. Remove empty rows "
            "from the data."
        )
    labels = labels_of(batch)
    if labels is None or task == "regression" or num_classes is None or labels.is_floating_point():
        return
    # One logit is that of two classes.
    tasks.check_range(labels.long(), max(num_classes, 2), where)


def check_signals(student: "Signals", teacher: "Signals | None", *, any_vocabulary: bool = False) -> None:
    """Refuse predictions that no objective can compare.

    Args:
        student: The student's signals.
        teacher: The teacher's signals, or None where nobody asked the teacher.
        any_vocabulary: Whether they may answer different tokens in different words.

    Raises:
        ValueError: If the logits' shapes differ, or the teacher's are not finite.
    """
    labels = student.labels
    of_student, of_teacher = student.logits, None if teacher is None else teacher.logits
    if of_teacher is not None and teacher is not None and (student.deferred is not None or teacher.top_k):
        # Of logits that were not computed, the tokens are compared; words are compared chunk by chunk.
        of_student, of_teacher = of_student[..., :0], of_teacher[..., :0]
    if of_teacher is not None and not any_vocabulary and of_student.shape != of_teacher.shape:
        raise ValueError(
            "Expected arguments `student` and `teacher` to give logits of the same shape, but got "
            f"{list(of_student.shape)} and {list(of_teacher.shape)}. They must answer the same classes for the "
            "same tokens."
        )
    seen = None if teacher is None else teacher.logits if teacher.deferred is None else teacher.deferred.hidden
    if seen is not None and not bool(torch.isfinite(seen).all()):
        raise ValueError(
            "Expected argument `teacher` to give finite logits, but got NaN or infinity on the first batch. Check that "
            "its weights were loaded, and run it in float32 or bfloat16 rather than float16."
        )
    if (
        labels is not None
        and not labels.is_floating_point()
        and not student.regression
        and student.logits.shape[-1] > 1
    ):
        tasks.check_range(labels, student.logits.shape[-1], "the first batch")


def check_eps(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose ``eps`` is 0 in the type of its parameters, as 1e-8 is in float16.

    Args:
        optimizer: The optimizer, with the parameters as they are trained.

    Raises:
        ValueError: If so: where a squared gradient is 0 in that type too, the step would be 0 / 0.
    """
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps == 0:
            continue
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if torch.tensor(eps, dtype=torch.float64).to(dtype) == 0:
                raise ValueError(
                    f"Expected argument `eps` of the optimizer to be above 0 in {dtype}, but got {eps}, which is 0 "
                    "there: the step would be 0 / 0. Use `precision='bf16-true'` or `'16-mixed'`, or pass `eps=1e-4`."
                )


def enable_gradient_checkpointing(student: nn.Module) -> None:
    """Let the layers of a transformers model run again in the backward instead of keeping what they computed.

    Args:
        student: The model, in place.

    Raises:
        ValueError: If it is no transformers model, or one without layers that can.
    """
    model: Any = student
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            "Expected argument `gradient_checkpointing` to come with a transformers model that can, but got "
            f"{type(student).__name__}; call `torch.utils.checkpoint.checkpoint` in its forward instead."
        )
    # Reentrant checkpointing would run the layers without a gradient, and what is recorded in them would have none.
    # The second name is that of transformers before 5.20.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
