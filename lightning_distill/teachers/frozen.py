"""What makes a teacher a teacher: frozen, always in eval, outside every checkpoint."""

import torch
from torch import nn

from lightning_distill.models.class_names import class_order


def freeze(teacher: nn.Module) -> nn.Module:
    """Take a model out of training: no parameter asks for a gradient, every submodule is in eval.

    Args:
        teacher: The model to freeze, in place.

    Returns:
        The same model.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.teachers.frozen import freeze
        >>> teacher = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
        >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
        (False, False)
    """
    return teacher.requires_grad_(False).eval()


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
            :func:`lightning_distill.models.class_names.class_order`.

    Example:
        >>> from lightning_distill.teachers.frozen import align_labels
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
