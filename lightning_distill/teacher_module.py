"""A LightningModule that holds a teacher where nothing that walks the module can reach it."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_distill.precision import TeacherPrecision, keeping_dtype
from lightning_distill.teacher import freeze


class TeacherModule(L.LightningModule):
    """A LightningModule that holds a teacher out of reach.

    ``module.teacher`` is no submodule, so nothing that walks the module meets it: no optimizer, no checkpoint, no
    broadcast of DDP, no callback that prunes, averages or resets what it finds, no ``apply``, ``train`` or
    ``requires_grad_``. It moves with the module all the same. From being set to the end of a run, or its failure, it
    is frozen and in eval; then it is as it was given, and so is the student.
    """

    #: The model that is imitated, or None.
    teacher: nn.Module | None
    #: The dtype of the teacher where it is its own, which a cast of the module leaves alone.
    teacher_precision: TeacherPrecision | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "teacher":
            super().__setattr__(name, value)
            return
        vars(self)[name] = value
        self._teacher_as_given = None if value is None else _state(value)
        if value is not None:
            freeze(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TeacherModule":
        super()._apply(fn, recurse)
        if (teacher := vars(self).get("teacher")) is not None:
            # bf16-true would undo the choice of a precision.
            teacher._apply(fn if self.teacher_precision is None else keeping_dtype(fn))
        return self

    def train(self, mode: bool = True) -> "TeacherModule":
        """Set the mode of everything but the teacher, which is never put into train mode."""
        super().train(mode)
        if not mode and (teacher := vars(self).get("teacher")) is not None:
            teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        """Freeze the teacher again if an earlier run has given it back."""
        self._student_as_given = _state(self.student)  # type: ignore[arg-type]
        if self.teacher is not None:
            freeze(self.teacher)
            if isinstance(self.trainer.strategy, FSDPStrategy):
                self.teacher.to(self.trainer.strategy.root_device)  # it moves what it wraps and no more

    def configure_callbacks(self) -> list[L.Callback]:
        """Give the models back where a run fails, too."""
        return [_GiveBack()]

    def teardown(self, stage: str) -> None:
        """Give the models back as they were given."""
        super().teardown(stage)
        self.give_back()

    def give_back(self) -> None:
        """Put both models into the modes they were given in, and let the teacher's parameters ask for gradients."""
        if self.teacher is not None and self._teacher_as_given is not None:
            _restore(self.teacher, self._teacher_as_given, gradients=True)
        if (given := vars(self).pop("_student_as_given", None)) is not None:
            _restore(self.student, given, gradients=False)  # type: ignore[arg-type]


class _GiveBack(L.Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, TeacherModule):
            pl_module.give_back()


# By name and not by object, for sharding replaces parameters.
_State = tuple[dict[str, bool], dict[str, bool]]


def _state(model: nn.Module) -> _State:
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _restore(model: nn.Module, state: _State, *, gradients: bool) -> None:
    modes, grads = state
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
    if gradients:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(grads.get(name, False))
