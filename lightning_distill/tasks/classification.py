"""One class a row."""

from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.tasks.task import Task, row_logits


class Classification(Task):
    """One class a row; a model of one logit has two classes."""

    name = "classification"
    names_classes = True
    problem_type = "single_label_classification"

    def answers(self, logits: Tensor) -> Tensor:
        """Logits ``[B, C]`` of at least two classes."""
        return two_logits(row_logits(self, logits, "rows, classes"))

    def _settled(self, logits: Tensor) -> Tensor:
        return two_logits(logits)
