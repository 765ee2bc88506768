"""What makes a teacher a teacher: frozen, always in eval, outside every checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_distill.class_names import class_order

_TEACHER = "teacher."


def freeze(teacher: nn.Module) -> nn.Module:
    """Take a model out of training: no parameter asks for a gradient, every submodule is in eval.

    Args:
        teacher: The model to freeze, in place.

    Returns:
        The same model.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.teacher import freeze
        >>> teacher = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
        (False, False)
    """
    return teacher.requires_grad_(False).eval()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Have models in eval, and each of their modules as it was when the block ends.

    Args:
        *models: The models.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.teacher import evaluating
        >>> model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1).eval())
        >>> with evaluating(model):
        ...     print(model.training)
        False
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def keep_out_of_checkpoints(module: nn.Module) -> None:
    """Leave ``module.teacher`` out of ``module.state_dict()`` and do not ask for it when loading.

    The hooks know the exact prefix they are called with, so a module that is itself wrapped (weight averaging, DDP)
    behaves the same, and a missing student key is still an error. They are functions of this file, not closures, so
    that the module can be copied and pickled.

    Args:
        module: The module that holds the teacher as its attribute ``teacher``.
    """
    module.register_state_dict_post_hook(_drop_teacher)
    module.register_load_state_dict_pre_hook(_remember_prefix)
    module.register_load_state_dict_post_hook(_forgive_teacher)


def _drop_teacher(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + _TEACHER)]:
        del state_dict[key]


def _remember_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # The post hook is not told where in the tree it is; this hook of the same call is.
    module._teacher_prefix = prefix + _TEACHER  # type: ignore[assignment]


def _forgive_teacher(module: nn.Module, incompatible_keys: _IncompatibleKeys) -> None:
    prefix = module._teacher_prefix
    assert isinstance(prefix, str)
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.startswith(prefix)]


def tensor_names(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of all parameters and buffers, those that no state dict holds too.

    Args:
        module: The module.
        prefix: Put before each.
    """
    return [prefix + name for tensors in (module.named_parameters(), module.named_buffers()) for name, _ in tensors]


def align_labels(student_labels: dict[str, int], teacher_labels: dict[str, int]) -> torch.Tensor | None:
    """Index that puts the teacher's classes in the student's order.

    Args:
        student_labels: The student's ``label2id``.
        teacher_labels: The teacher's ``label2id``.

    Returns:
        None where the orders agree (transformers' placeholder ``LABEL_0`` stands for class 0, whatever its name);
        otherwise an int64 tensor ``index`` of shape ``[classes]`` so that ``teacher_logits[..., index]`` is in the
        student's order.

    Raises:
        ValueError: If the names differ, so that no order can be right; see
            :func:`lightning_distill.class_names.class_order`.

    Example:
        >>> from lightning_distill.teacher import align_labels
        >>> align_labels({"no": 0, "yes": 1}, {"yes": 0, "no": 1})
        tensor([1, 0])
    """
    student_names, teacher_names = (
        sorted(labels, key=labels.__getitem__) for labels in (student_labels, teacher_labels)
    )
    return class_order(student_names, teacher_names)


def has_placeholder_labels(labels: dict[str, int]) -> bool:
    """Whether a ``label2id`` holds only the names that transformers makes up: ``LABEL_0``, ``LABEL_1`` ..."""
    return all(name == f"LABEL_{index}" for name, index in labels.items())
