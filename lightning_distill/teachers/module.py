"""A LightningModule that holds a teacher where nothing that walks the module can reach it."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_distill.teachers.precision import TeacherPrecision, keeping_dtype


def freeze(teacher: nn.Module) -> nn.Module:
    """Take a model out of training: no parameter asks for a gradient, every submodule is in eval.

    Args:
        teacher: The model to freeze, in place.

    Returns:
        The same model.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.teachers.module import freeze
        >>> teacher = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
        (False, False)
    """
    return teacher.requires_grad_(False).eval()


class TeacherModule(L.LightningModule):
    """A LightningModule that holds a teacher out of reach.

    ``module.teacher`` is no submodule, so nothing that walks the module meets it: no optimizer, no checkpoint, no
    broadcast of DDP, no callback that prunes, averages or resets what it finds, no ``apply``, ``train`` or
    ``requires_grad_``. It moves with the module all the same. From being set to the end of a run, or its failure, it
    is frozen and in eval; then it is as it was given, and so are the modes of the student.

    A precision that casts weights (``bf16-true``) rounds them for the run. The weights of a module that was handed over
    are kept meanwhile, which takes their memory; those of a folder or hub id are nobody's but the run's.
    """

    #: The model that is imitated, or None.
    teacher: nn.Module | None
    #: The dtype of the teacher where it is its own, which a cast of the module leaves alone.
    teacher_precision: TeacherPrecision | None = None
    #: Whether the teacher is an object of the user's, who may go on with it.
    teacher_is_given = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "teacher":
            super().__setattr__(name, value)
            return
        vars(self)[name] = value
        self._teacher_as_given = None if value is None else _state(value)
        self._exact: dict[str, Tensor] = {}  # what a cast has rounded, by name
        if value is not None:
            freeze(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TeacherModule":
        super()._apply(fn, recurse)
        if (teacher := vars(self).get("teacher")) is not None:
            # bf16-true would undo the choice of a precision.
            fn = fn if self.teacher_precision is None else keeping_dtype(fn)
            if self.teacher_is_given:
                self._exact = _changed(teacher, fn) | self._exact
            teacher._apply(fn)
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
        """Put both models into the modes they were given in; the teacher's weights and who asks for gradients, too."""
        if self.teacher is not None and self._teacher_as_given is not None:
            _put_back(self.teacher, self._exact)
            self._exact = {}
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


def _changed(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers that a function gives another type, as they are; of sharded ones none are whole."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # Asked of an empty tensor: the question is the type alone.
    return {
        name: tensor.data
        for name, tensor in tensors.items()
        if not isinstance(tensor, DTensor)
        and fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype != tensor.dtype
    }


def _put_back(model: nn.Module, exact: dict[str, Tensor]) -> None:
    for name, value in exact.items():
        place, _, leaf = name.rpartition(".")
        part = model.get_submodule(place)
        if leaf in part._buffers:
            part._buffers[leaf] = value
        elif not isinstance(getattr(part, leaf), DTensor):
            getattr(part, leaf).data = value
