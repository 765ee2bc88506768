"""Questions asked before the first step, and of every batch, each answered by an error that says what to do."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_distill.models.batch import labels_of
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.signals import Signals
from lightning_distill.tasks import Task
from lightning_distill.tasks.task import check_range


class StepCheck:
    """Refuses a batch without a real token or with an impossible label, and a first step that compares nothing.

    Every batch on the CPU, where looking is free; elsewhere the first one of each stage, as each look would make the
    device wait.

    Args:
        task: What a batch asks for.
        objectives: By name.
        same_answers: Whether the classes of student and teacher mean the same.
    """

    def __init__(self, task: Task, objectives: Mapping[str, Objective], *, same_answers: bool) -> None:
        self.task, self.same_answers = task, same_answers
        # A language model's labels are what all objectives compare at.
        self.needy = [name for name, objective in objectives.items() if objective.needs_labels or task.of_words]
        self._seen: set[str] = set()
        self._has_compared = False
        self._has_warned = False

    def is_first_batch(self, batch: Any, stage: str, num_classes: int | None) -> bool:
        """Look at a batch; say once that one has no label.

        Args:
            batch: The batch.
            stage: What the data are for, such as ``"train"``.
            num_classes: Number of classes; None where it is not known.

        Returns:
            Whether it is the first of its stage.

        Raises:
            ValueError: If no token is real, or a label is below 0 (and not -100) or too large.
        """
        first, labels = stage not in self._seen, labels_of(batch)
        if labels is None or labels.is_cpu or first:
            self._warn_of_no_label(batch, stage)
        if first or (labels is not None and labels.is_cpu):
            self.task.check_batch(batch, num_classes, f"a batch of the {stage} data")
        self._seen.add(stage)
        return first

    def first_signals(self, student: Signals, teacher: Signals | None) -> None:
        """Refuse predictions of the first step in training that no objective can compare.

        Args:
            student: The student's signals.
            teacher: The teacher's signals, or None where nobody asked the teacher.

        Raises:
            ValueError: If the logits' shapes differ, or the teacher's are not finite.
        """
        if self._has_compared:
            return
        self._has_compared = True
        labels = student.labels
        of_student, of_teacher = student.logits, None if teacher is None else teacher.logits
        if of_teacher is not None and teacher is not None and (student.deferred is not None or teacher.top_k):
            # Of logits that were not computed, the tokens are compared; words are compared chunk by chunk.
            of_student, of_teacher = of_student[..., :0], of_teacher[..., :0]
        if self.task.of_vectors and of_teacher is not None:
            # Widths may differ, where the objectives allow it.
            of_student, of_teacher = of_student[..., :0], of_teacher[..., :0]
        if of_teacher is not None and self.same_answers and of_student.shape != of_teacher.shape:
            raise ValueError(
                "Expected arguments `student` and `teacher` to give logits of the same shape, but got "
                f"{list(of_student.shape)} and {list(of_teacher.shape)}. They must answer the same classes for the "
                "same tokens."
            )
        seen = None if teacher is None else teacher.logits if teacher.deferred is None else teacher.deferred.hidden
        if seen is not None and not bool(torch.isfinite(seen).all()):
            raise ValueError(
                "Expected argument `teacher` to give finite logits, but got NaN or infinity on the first batch. Check "
                "that its weights were loaded, and run it in float32 or bfloat16 rather than float16."
            )
        if (
            labels is not None
            and not labels.is_floating_point()
            and not student.regression
            and student.logits.shape[-1] > 1
        ):
            check_range(labels, student.logits.shape[-1], "the first batch")

    def _warn_of_no_label(self, batch: Any, stage: str) -> None:
        if self.needy and not self._has_warned and not self.task.has_label(batch):
            self._has_warned = True
            warnings.warn(
                f"A batch of the {stage} data has no label, so it counts nothing for {self.needy}; neither will "
                "others.",
                stacklevel=2,
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
