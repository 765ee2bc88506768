"""One class a pixel or step, where a model gives its classes in dimension 1."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.binary import two_logits
from lightning_distill.models.batch import IGNORE_INDEX, labels_of
from lightning_distill.tasks.task import Task
from lightning_distill.tasks.token_classification import counted

#: The label of pixels that do not count, in data of 8 bits; -100 is one as well.
_VOID = 255


class Segmentation(Task):
    """One class a pixel or step, of logits ``[B, C, H, W]``, ``[B, C, T]`` or ``[B, C, D, H, W]``.

    Labels have the shape of the logits without their classes; pixels of the class 255 or -100 do not count. Pictures
    whose logits are of another size than their labels are interpolated to it, as by the losses of transformers' models
    for segmentation, SegFormer's among them. One logit is that of two classes. What comes out has the classes last.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> labels = torch.tensor([[[0, 1, 255, 2]]])
        >>> logits, labels, mask = TASKS["segmentation"].align(torch.zeros(1, 3, 1, 4), (None, labels))
        >>> logits.shape, labels.tolist(), mask.tolist()
        (torch.Size([1, 1, 4, 3]), [[[0, 1, -100, 2]]], [[[True, True, False, True]]])
    """

    name = "segmentation"
    names_classes = True

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`Task.align`: pixels with a label count, and all of pictures that have none."""
        labels = labels_of(batch)
        if not logits.shape[-1]:  # nothing but the labels says how many pixels there are
            logits = logits if labels is None else logits.new_empty(*labels.shape, 0)
        else:
            logits = self.answers(_of_size(logits, labels))
        if labels is None:
            return logits, None, None
        labels = self.targets(logits, labels)
        return logits, labels, counted(labels)

    def answers(self, logits: Tensor) -> Tensor:
        """Logits with at least two classes, which are moved to the last dimension."""
        if logits.ndim < 3:
            raise ValueError(
                "Expected the logits of segmentation to have the shape [rows, classes, ...], with a dimension of "
                f"steps or two of pixels, but got {list(logits.shape)}. For one class a row pass "
                "`task='classification'`."
            )
        return two_logits(logits.movedim(1, -1))

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[-1] > _VOID:
            raise ValueError(
                f"Expected at most {_VOID} classes in segmentation, where the label {_VOID} does not count, but got "
                f"{logits.shape[-1]}. Move the classes to the last dimension in the model's forward, label what does "
                f"not count {IGNORE_INDEX} and pass `task='token_classification'`."
            )
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"Expected the labels of segmentation to have the shape {list(logits.shape[:-1])}, a class for each "
                f"pixel, but got {labels.dtype} of shape {list(labels.shape)} beside classes in dimension 1 of the "
                "logits."
            )
        return super()._targets(logits, _without_void(labels))

    def has_count(self, batch: Any) -> bool:
        """Whether there are labels, which alone say how many pixels there are."""
        return labels_of(batch) is not None

    def _any_label(self, labels: Tensor) -> bool:
        return super()._any_label(_without_void(labels))

    def check_labels(self, labels: Tensor, num_classes: int | None, where: str) -> None:
        """Refuse labels that name no class; those of 255 count nothing."""
        super().check_labels(_without_void(labels), num_classes, where)


def _without_void(labels: Tensor) -> Tensor:
    labels = labels if labels.is_floating_point() else labels.long()
    return labels.where(labels != _VOID, IGNORE_INDEX)


def _of_size(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Logits ``[B, C, h, w]`` of the size of labels ``[B, H, W]``."""
    if labels is None or logits.ndim != 4 or labels.ndim != 3 or logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
