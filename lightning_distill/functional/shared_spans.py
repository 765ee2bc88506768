"""Which tokens of two tokenizers cover the same stretch of a text."""

import torch
from torch import Tensor

# Beyond the end of any text, and small enough for rows to be told apart in one integer.
_FAR = 2**40


def shared_spans(student_offsets: Tensor, teacher_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Number the shortest stretches of a text that the tokens of both tokenizers cut out alike.

    A stretch ends where a token of both ends that no later token reaches back into. White space may belong to the token
    after it or to none: only ends are compared. The first stretch counts only where both begin at one place.

    Args:
        student_offsets: Integer ``[B, T, 2]``, where each token begins and ends in the row's text, as a fast
            tokenizer's ``offset_mapping`` has it; bytes or characters, of both the same. Tokens of no text (begin and
            end of sequence, padding) are empty.
        teacher_offsets: Integer ``[B, U, 2]``, of the same texts.

    Returns:
        Integer ``[B, T]`` and ``[B, U]``: the number of each token's stretch in its row, from 0; -1 for a token of
        no text and for what follows the last end that both share.

    Raises:
        ValueError: If shapes do not fit, or tokens of a row are not in the order of its text.

    Example:
        >>> import torch
        >>> from lightning_distill import functional
        >>> student = torch.tensor([[[0, 0], [0, 3], [3, 5], [5, 9]]])  # <s> tok en ized
        >>> teacher = torch.tensor([[[0, 5], [5, 7], [7, 9]]])  # token iz ed
        >>> functional.shared_spans(student, teacher)
        (tensor([[-1,  0,  0,  1]]), tensor([[0, 1, 1]]))
    """
    offsets = {"student_offsets": student_offsets, "teacher_offsets": teacher_offsets}
    for name, given in offsets.items():
        if given.ndim != 3 or given.shape[-1] != 2 or given.is_floating_point() or len(given) != len(student_offsets):
            raise ValueError(
                f"Expected argument `{name}` to be integers of shape [{len(student_offsets)}, tokens, 2], but got "
                f"{given.dtype} of shape {list(given.shape)}."
            )
    sides = [_cuts(name, given.long()) for name, given in offsets.items()]
    (real, begins, cuts, ends), (other_real, other_begins, other_cuts, other_ends) = sides
    begin_alike = begins == other_begins
    return (
        _number(real, cuts & torch.isin(ends, other_ends[other_cuts]), begin_alike),
        _number(other_real, other_cuts & torch.isin(other_ends, ends[cuts]), begin_alike),
    )


def _cuts(name: str, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether tokens have text, where each row begins, after which tokens it can be cut, and where, in one integer."""
    start, end = offsets.unbind(-1)
    real = end > start
    ends = end.masked_fill(~real, 0).cummax(1).values
    latest = start.masked_fill(~real, 0).cummax(1).values
    # The device waits once; rows that hold two texts would else count next to nothing without a word.
    if bool((real & (start < latest)).any()):
        raise ValueError(
            f"Expected argument `{name}` to rise along each row, but got a token that begins before an earlier one. "
            "Put one text into a row."
        )
    following = start.masked_fill(~real, _FAR).flip(1).cummin(1).values.flip(1)
    cuts = real & (ends <= torch.nn.functional.pad(following[:, 1:], (0, 1), value=_FAR))
    rows = _FAR * torch.arange(len(offsets), device=offsets.device)[:, None]
    return real, following[:, :1], cuts, ends + rows


def _number(real: Tensor, ends: Tensor, begin_alike: Tensor) -> Tensor:
    number = ends.cumsum(1) - ends.long()
    inside = real & (number < ends.sum(1, keepdim=True)) & (begin_alike | (number > 0))
    return number.where(inside, -1)
