"""A run that is looked at before its first step, and tells its objectives how far it is."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from lightning_distill.models.class_names import check_data_classes
from lightning_distill.objectives.objective import Objective
from lightning_distill.step.checks import StepCheck
from lightning_distill.step.forwards import Forwards
from lightning_distill.step.pairing import bind
from lightning_distill.tasks import Task
from lightning_distill.teachers.module import TeacherModule
from lightning_distill.teachers.precision import warn_of_slow_bf16
from lightning_distill.training import parallel
from lightning_distill.training.finite_loss import FiniteLoss


class CheckedRun(TeacherModule):
    """A LightningModule of student, teacher and objectives that refuses a run which would do something else than meant.

    Its loss and gradients are looked at by :class:`FiniteLoss`, its schedules follow the share of the steps that are
    done, and under ``ModelParallelStrategy`` its models are split.
    """

    student: nn.Module
    objectives: nn.ModuleDict
    forwards: Forwards
    _task: Task
    _check: StepCheck

    def _each_objective(self) -> dict[str, Objective]:
        """Those of the stage, by name: what a callback adds is learned in training alone."""
        every: dict[str, Objective] = dict(self.objectives.items())  # type: ignore[arg-type]
        if self._trainer is not None and self.trainer.training:
            return every
        return {name: objective for name, objective in every.items() if objective.total == "loss"}

    def add_objectives(self, objectives: Sequence[Objective]) -> None:
        """Learn something more in a fit, as a callback does in its ``setup``.

        Args:
            objectives: With names of their own, and a :attr:`~lightning_distill.objectives.Objective.total` that is not
                ``"loss"``.

        Raises:
            ValueError: If a name is taken, the total is not their own, or an objective does not fit the models.
        """
        added = {objective.name: objective for objective in objectives}
        if taken := sorted(added.keys() & self.objectives.keys()):
            raise ValueError(
                f"Expected argument `objectives` to have other names than the module's, but got {taken}. Give those of "
                "the module other names: `name=...`."
            )
        if own := [name for name, objective in added.items() if objective.total == "loss"]:
            raise ValueError(f"Expected argument `objectives` to have a `total` of their own, but got 'loss' of {own}.")
        bind(self.student, self.teacher, self._task, added)
        self.objectives.update(added)
        self.forwards.release_hooks()  # which record what was asked for before

    def remove_objectives(self, names: Iterable[str]) -> None:
        """Learn no more what was added; a name that is not there is left alone.

        Args:
            names: Those of the objectives.
        """
        for name in [name for name in names if name in self.objectives]:
            del self.objectives[name]
        self.forwards.release_hooks()

    def configure_callbacks(self) -> list[L.Callback]:
        """A loss that is not finite stops the run before the update, unless the Trainer's own callback says else."""
        given, strategy = self.trainer.callbacks, self.trainer.strategy  # type: ignore[attr-defined]
        if isinstance(strategy, ModelParallelStrategy):
            # Nowhere else is there anything to do, and a module that has this hook is warned of by WeightAveraging.
            self.configure_model = self.shard  # type: ignore[method-assign]
        own = any(isinstance(callback, FiniteLoss) for callback in given)
        return [*super().configure_callbacks(), *([] if own else [FiniteLoss()])]

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would train or save something else than is meant, and data of other classes.

        A CPU that emulates bfloat16 is said.
        """
        super().setup(stage)
        if not self._task.of_words:
            check_data_classes(self.student, getattr(self.trainer, "datamodule", None))
        models = {"student": self.student, "teacher": self.teacher}
        warn_of_slow_bf16(str(self.trainer.precision), models, self.trainer.strategy.root_device)
        if stage == "fit":
            parallel.check_trainer(self.trainer, self.student, self.teacher)
            parallel.look_for_unused(self.trainer.strategy, self._each_objective().values())

    def shard(self) -> None:
        """Under ``ModelParallelStrategy``: split student, teacher and objectives by plan and shard them by layer."""
        mesh = self.device_mesh
        if mesh is None or parallel.is_parallel(self):
            return
        if mesh["tensor_parallel"].size() > 1:
            parallel.check_requests(self._each_objective().values())
        parallel.parallelize(self.student, self.teacher, self.objectives, mesh)

    def on_fit_start(self) -> None:
        """Refuse an optimizer that would divide by 0."""
        for optimizer in self.trainer.optimizers:
            check_eps(optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the batch, and tell the objectives how much of the training is done, for their schedules."""
        self._set_progress()
        self._look_at(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the batch."""
        self._look_at(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the batch."""
        self._look_at(batch)

    def _look_at(self, batch: Any) -> None:
        stage = self.trainer.state.stage
        # What the config of a body says of classes is a default that nobody chose.
        config = None if "student" in self.forwards.pairing.headless else getattr(self.student, "config", None)
        fields = (getattr(config, name, None) for name in self._task.num_classes_fields)
        num_classes = next((size for size in fields if size is not None), None)
        if self._check.is_first_batch(batch, stage.value if stage else "", num_classes):
            self.forwards.look_again()

    def on_validation_start(self) -> None:
        """Tell the objectives too: a run that resumes at its validation has not had a training batch yet."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._set_progress()

    def _set_progress(self) -> None:
        # Read from the step, not counted here, so that a resumed run stands where it stood.
        steps = self.trainer.estimated_stepping_batches
        for objective in self._each_objective().values():
            objective.set_progress(min(1.0, self.global_step / steps) if steps else 0.0)

    def on_fit_end(self) -> None:
        """Refuse a fit in which there was nothing to learn from."""
        if self.trainer.num_training_batches == 0 and self.trainer.limit_train_batches != 0:
            raise ValueError("Expected the training data to have at least one batch, but got none. Give it rows.")


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
