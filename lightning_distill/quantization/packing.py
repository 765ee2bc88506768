"""Integers of 2, 3, 4 or 8 bits in the int32 words of the common GPTQ checkpoint."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the first dimension, low bits first.

    The codes of a column are one stream of bits; 32 codes fill ``bits`` words. With 3 bits a code may lie across two
    words.

    Args:
        codes: Integers below ``2**bits``, shape ``[n, m]``; ``n * bits`` must be a multiple of 32.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 of shape ``[n * bits / 32, m]``.

    Raises:
        ValueError: If the codes do not fill whole words.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.packing import pack
        >>> f"{pack(torch.arange(8)[:, None], bits=4).item():#x}"
        '0x76543210'
    """
    if len(codes) * bits % 32:
        raise ValueError(
            f"Expected argument `codes` to fill whole 32-bit words along its first dimension, but got {len(codes)} "
            f"codes of {bits} bits."
        )
    # A unit is the shortest run of codes that fills whole words: 32 codes of 3 bits, one word of the others.
    length, words = (32, 3) if bits == 3 else (32 // bits, 1)
    units = codes.to(torch.int64).reshape(-1, length, codes.shape[1])
    packed = units.new_zeros(len(units), words, codes.shape[1])
    for position in range(length):
        word, offset = divmod(position * bits, 32)
        packed[:, word] |= units[:, position] << offset
        if offset + bits > 32:
            packed[:, word + 1] |= units[:, position] >> (32 - offset)
    packed &= 0xFFFFFFFF
    signed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return signed.to(torch.int32).view(-1, codes.shape[1])


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: int32 of shape ``[words, m]``.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 codes of shape ``[words * 32 / bits, m]``.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.packing import pack, unpack
        >>> unpack(pack(torch.tensor([[1], [7]] * 16), bits=3), bits=3)[:3, 0]
        tensor([1, 7, 1], dtype=torch.int32)
    """
    mask = 2**bits - 1
    if bits != 3:
        # An arithmetic shift fills with the sign, which the mask takes off again.
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)[None, :, None]
        return ((packed[:, None] >> shifts) & mask).reshape(-1, packed.shape[1])
    units = packed.reshape(-1, 3, packed.shape[1])
    codes = units.new_empty(len(units), 32, packed.shape[1])
    for position in range(32):
        word, offset = divmod(position * 3, 32)
        codes[:, position] = units[:, word] >> offset
        if offset > 29:
            low = 32 - offset
            codes[:, position] &= 2**low - 1
            codes[:, position] |= units[:, word + 1] << low
    return codes.bitwise_and_(mask).view(-1, packed.shape[1])


def pack_zeros(zeros: Tensor, bits: int, version: int = 1) -> Tensor:
    """Pack zero points along the outputs, as a checkpoint stores them.

    Args:
        zeros: Integers of shape ``[groups, out]``, at least 1 in version 1 (which stores the zero less one).
        bits: 2, 3, 4 or 8.
        version: 1 (``gptq``) or 2 (``gptq_v2``).

    Returns:
        int32 of shape ``[groups, out * bits / 32]``.

    Raises:
        ValueError: If version 1 is to hold a zero of 0, which it would wrap to the other end of the grid.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.packing import pack_zeros
        >>> f"{pack_zeros(torch.full((1, 8), 8), bits=4).item():#x}"
        '0x77777777'
    """
    if version == 1 and bool((zeros == 0).any()):
        raise ValueError("Expected argument `zeros` to be at least 1 in version 1 of the format; write version 2.")
    stored = zeros.to(torch.int64) - (1 if version == 1 else 0)
    return pack(stored.T, bits).T.contiguous()


def unpack_zeros(packed: Tensor, bits: int, version: int = 1) -> Tensor:
    """Undo :func:`pack_zeros`.

    Args:
        packed: int32 of shape ``[groups, out * bits / 32]``.
        bits: 2, 3, 4 or 8.
        version: 1 or 2.

    Returns:
        int32 zero points of shape ``[groups, out]``.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.packing import unpack_zeros
        >>> unpack_zeros(torch.tensor([[0x77777777]], dtype=torch.int32), bits=4)
        tensor([[8, 8, 8, 8, 8, 8, 8, 8]], dtype=torch.int32)
    """
    stored = unpack(packed.T.contiguous(), bits).T
    # Tools that let version 1 wrap wrote -1 as the largest code.
    return (stored + 1) & (2**bits - 1) if version == 1 else stored
