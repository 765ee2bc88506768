"""Validation and test of a student beside its teacher."""

from functools import partial
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.signals import Signals
from lightning_distill.step.counting import Counted
from lightning_distill.step.pairing import Pairing
from lightning_distill.tasks import Task
from lightning_distill.tasks.scores import Metrics, Scores


class EvaluatedModule(L.LightningModule):
    """A LightningModule that logs losses, the student's metrics and its agreement with the teacher.

    What a subclass gives are the signals of a batch, the means of the losses with what they count, and their total.
    """

    teacher: nn.Module | None
    pairing: Pairing
    _counted: Counted

    def _each_objective(self) -> dict[str, Objective]:
        raise NotImplementedError

    def _score_by(self, task: Task, metrics: Metrics | None) -> None:
        self._scores = nn.ModuleDict({stage: Scores(task, metrics) for stage in ("val", "test")})

    def signals(self, batch: Any, *, with_teacher: bool) -> tuple[Signals, Signals | None]:
        """What both forwards leave behind."""
        raise NotImplementedError

    def mean_losses(self, student: Signals, teacher: Signals | None) -> tuple[dict[str, Tensor], Tensor]:
        """Each objective's mean over what counts, and how much counts for each."""
        raise NotImplementedError

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the objectives' losses."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses, the student's metric and its agreement with the teacher."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`, logged as ``test_...``."""
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits of the student."""
        logits: Tensor = self(batch)
        return logits

    def _evaluate(self, batch: Any, stage: str, dataloader_idx: int) -> None:
        student, teacher = self.signals(batch, with_teacher=self.teacher is not None)
        losses, counts = self.mean_losses(student, teacher)
        # Weights of classes make fractions of them.
        sizes: list[Any] = [int(count) if count.is_integer() else count for count in counts.tolist()]
        for (name, value), size in zip(losses.items(), sizes, strict=True):
            self.log(f"{stage}_{name}", value, batch_size=size, sync_dist=True)
        self.log(f"{stage}_loss", self.total_loss(losses), batch_size=max(sizes), sync_dist=True)

        scores, path = self.scores(stage, dataloader_idx), f"_scores.{_key(stage, dataloader_idx)}"
        compares = teacher is not None and self.pairing.same_answers
        scored = student.labels is not None and "student" not in self.pairing.headless
        scores.update(student, teacher if compares else None, scored)
        if compares:
            self.log(f"{stage}_agreement", scores.agreement, prog_bar=True, metric_attribute=f"{path}.agreement")
        # One process of several may not have met a label yet; they compute together.
        if scored and (scores.has_scores or self.trainer.world_size > 1):
            for name, metric in scores.metrics.items():
                attribute = f"{path}.metrics.{name}"
                self.log(f"{stage}_{name}", metric, prog_bar=True, metric_attribute=attribute)  # type: ignore[arg-type]

    def scores(self, stage: str, dataloader_idx: int = 0) -> Scores:
        """What the student is scored by on one dataloader.

        Args:
            stage: ``"val"`` or ``"test"``.
            dataloader_idx: Which of several dataloaders.
        """
        key = _key(stage, dataloader_idx)
        if key not in self._scores:
            self._scores[key] = self.scores(stage).fresh()
        scores = self._scores[key]
        assert isinstance(scores, Scores)
        return scores

    # -- hooks: data without a label are an error, a batch is not ------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Refuse training data without a label; see :class:`lightning_distill.step.counting.Counted`."""
        self._counted.check("train", self._each_objective(), lambda counts: counts)

    def on_validation_epoch_end(self) -> None:
        """Refuse validation data without a label."""
        self._check_counted("validate")

    def on_test_epoch_end(self) -> None:
        """Refuse test data without a label."""
        self._check_counted("test")

    def _check_counted(self, stage: str) -> None:
        over_ranks = partial(self.trainer.strategy.reduce, reduce_op="sum")
        self._counted.check(stage, self._each_objective(), over_ranks)


def _key(stage: str, dataloader_idx: int) -> str:
    return f"{stage}_{dataloader_idx}" if dataloader_idx else stage
