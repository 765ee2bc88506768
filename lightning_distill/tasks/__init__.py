"""What a batch asks for: which logits answer its labels, what counts, how an answer is scored.

Here belongs all that differs from task to task; no other room asks which task it is. Nothing here runs a model.
"""

from lightning_distill.models.heads import LANGUAGE_MODELS, TOKEN_TASKS, Task
from lightning_distill.tasks.task import (
    agreement,
    align,
    answers,
    check_range,
    default_metric,
    flatten,
    has_label,
    infer_task,
    settle,
    targets,
    values,
)

__all__ = [
    "LANGUAGE_MODELS",
    "TOKEN_TASKS",
    "Task",
    "agreement",
    "align",
    "answers",
    "check_range",
    "default_metric",
    "flatten",
    "has_label",
    "infer_task",
    "settle",
    "targets",
    "values",
]
