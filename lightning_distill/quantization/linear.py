"""Linear layers and embeddings that hold packed integers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_distill.quantization.gptq import QuantizedWeight
from lightning_distill.quantization.grid import find_grid, narrowest
from lightning_distill.quantization.packed_weight import packed_weight
from lightning_distill.quantization.packing import pack, pack_zeros, unpack, unpack_zeros

#: Up to this many tokens, torch's packed kernels beat a float multiplication: on AVX-512 always (measured up to 512).
KERNEL_TOKENS = 2**31 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64


class QuantLinear(nn.Module):
    """A linear layer whose weight is packed integers; its state dict is the common GPTQ checkpoint.

    Buffers: ``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]`` (version 1),
    ``scales`` ``[groups, out]``, ``g_idx`` int32 ``[in]`` and ``bias``. Scales are float16, or float32 where float16
    cannot tell them apart (see :func:`narrowest`). The weight exists in floating point only while a forward, or who
    reads :attr:`weight`, uses it. Gradients reach the inputs, not the weight.

    Args:
        in_features: Width of the inputs, a multiple of 32.
        out_features: Width of the outputs, a multiple of 32 for 3 bits and of ``32 / bits`` otherwise.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        bias: Whether there is a bias.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import QuantLinear, gptq_layer
        >>> _ = torch.manual_seed(0)
        >>> linear = nn.Linear(64, 32)
        >>> quantized = QuantLinear.from_weight(gptq_layer(linear.weight, None, bits=4, group_size=32), linear.bias)
        >>> quantized(torch.ones(1, 64)).shape, quantized.qweight.shape
        (torch.Size([1, 32]), torch.Size([8, 32]))
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    _kernel_weight: Tensor | None
    _kernel_grid: Tensor | None
    _ordered: bool  # groups are neighbouring inputs

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int, bias: bool = True) -> None:
        super().__init__()
        reason = why_not_packable(in_features, out_features, bits)
        if reason:
            raise ValueError(reason)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = in_features if group_size == -1 else group_size
        self.dtype, self.transposed = torch.float32, False  # of `weight`, as others read it
        groups = -(-in_features // self.group_size)
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // self.group_size)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._look_at_order()
        self.register_buffer("_kernel_weight", None, persistent=False)
        self.register_buffer("_kernel_grid", None, persistent=False)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "QuantLinear":
        """Pack a quantised weight of shape ``[out, in]`` and take over the bias."""
        out_features, in_features = weight.codes.shape
        layer = cls(in_features, out_features, weight.bits, weight.group_size, bias is not None)
        layer.qweight = pack(weight.codes.T, weight.bits)
        layer.qzeros = pack_zeros(weight.zeros, weight.bits)
        layer.scales, layer.g_idx = weight.scales.clone(), weight.g_idx.clone()
        layer.bias = None if bias is None else bias.detach().clone()
        layer._look_at_order()
        return layer

    def take_place_of(self, layer: nn.Module) -> None:
        """Be to others what a float layer was: its weight's dtype and orientation, and what else was kept on it."""
        assert isinstance(layer.weight, Tensor)
        self.dtype, self.transposed = layer.weight.dtype, isinstance(layer, Conv1D)
        for name, value in vars(layer).items():
            vars(self).setdefault(name, value)

    def beside(self, layer: nn.Module) -> "QuantLinear":
        """The layer itself, or one with the same integers for a float layer of the same weight and another bias."""
        if _equal(self.bias, layer.bias):
            return self
        other = QuantLinear(self.in_features, self.out_features, self.bits, self.group_size, layer.bias is not None)
        other._buffers.update(
            self._buffers, bias=layer.bias.detach().clone() if isinstance(layer.bias, Tensor) else None
        )
        other._look_at_order()
        other.take_place_of(layer)
        return other

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it, ``[out, in]`` (``[in, out]`` in the place of a ``Conv1D``)."""
        if self.transposed:
            shape, dense = (self.in_features, self.out_features), lambda: self.dequantize().T
        else:
            shape, dense = (self.out_features, self.in_features), self.dequantize
        return packed_weight(dense, shape, self.dtype, self.qweight.device)

    def dequantize(self) -> Tensor:
        """The weight, float32 of shape ``[out, in]``."""
        codes = unpack(self.qweight, self.bits).float()
        zeros, scales = unpack_zeros(self.qzeros, self.bits).float(), self.scales.float()
        if self._ordered:
            # A scale is broadcast over its group instead of being copied for each input.
            groups = codes.view(len(scales), -1, self.out_features)
            groups.sub_(zeros[:, None]).mul_(scales[:, None])
        else:
            codes.sub_(zeros[self.g_idx]).mul_(scales[self.g_idx])
        return codes.T

    def _look_at_order(self) -> None:
        # Once, not in each forward: a comparison on a GPU would wait for it, and a compiled graph would break.
        expected = torch.arange(self.in_features, device=self.g_idx.device) // self.group_size
        self._ordered = self.in_features % self.group_size == 0 and bool((self.g_idx == expected).all())

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs [..., in]`` to ``[..., out]`` in the inputs' dtype, or autocast's."""
        if (
            self._kernel_weight is not None
            and not inputs.requires_grad
            and inputs.numel() <= KERNEL_TOKENS * self.in_features
        ):
            return self._kernel_forward(inputs)
        weight = self.dequantize().to(inputs.dtype)
        return F.linear(inputs, weight, None if self.bias is None else self.bias.to(inputs.dtype))

    def _kernel_forward(self, inputs: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        rows = inputs.reshape(-1, self.in_features).to(torch.bfloat16)
        if self.bits == 4:
            outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self._kernel_weight, self.group_size, self._kernel_grid
            )
        else:
            outputs = torch.ops.aten._weight_int8pack_mm(rows, self._kernel_weight, self._kernel_grid)
        outputs = outputs.to(dtype).view(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias.to(dtype)

    def use_kernel(self) -> str | None:
        """Take torch's int4 or int8 kernel on the CPU, with activations and scales rounded to bfloat16.

        It holds the integers a second time, in the kernel's own order, and is given up when the layer is moved.

        Returns:
            None if the layer takes it, else why it cannot.
        """
        reason = self._why_no_kernel()
        if reason is None:
            codes = unpack(self.qweight, self.bits).T.contiguous()
            zeros, scales = unpack_zeros(self.qzeros, self.bits), self.scales.float()
            if self.bits == 4:
                self._kernel_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
                # The kernel computes (code - 8) * scale + offset.
                grid = torch.stack([scales, (8 - zeros) * scales], dim=-1)
            else:
                self._kernel_weight, grid = (codes - 128).to(torch.int8), scales[0]
            self._kernel_grid = grid.to(torch.bfloat16).contiguous()
        return reason

    def _why_no_kernel(self) -> str | None:
        if self.qweight.device.type != "cpu":
            return f"it is on {self.qweight.device}, not on the CPU"
        if not self._ordered:
            return "its groups are not neighbouring inputs of one size"
        if self.bits == 4:
            sizes = (32, 64, 128, 256)
            if self.group_size not in sizes:
                return f"group size {self.group_size}, the int4 kernel has {sizes}"
            return f"its {self.out_features} outputs do not divide by 16" if self.out_features % 16 else None
        if self.bits == 8:
            if len(self.scales) > 1:
                return f"group size {self.group_size}, the int8 kernel has one scale per output"
            symmetric = bool((unpack_zeros(self.qzeros, 8) == 128).all())
            return None if symmetric else "its zero is not in the middle, as the int8 kernel has it"
        return f"{self.bits} bits, torch's kernels have 4 and 8"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _take_scales_dtype(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._kernel_weight = self._kernel_grid = None  # of other numbers
        self._look_at_order()

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        # The kernel's form is for the CPU alone, and no cast is meant for it.
        kernel, self._kernel_weight, self._kernel_grid = (self._kernel_weight, self._kernel_grid), None, None
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        _apply_but_keep_scales(self, super()._apply, fn, recurse)
        if self.qweight.device.type == "cpu":
            self._kernel_weight, self._kernel_grid = kernel
        return self

    def extra_repr(self) -> str:
        """Widths, bits and group size."""
        widths = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{widths}, bits={self.bits}, group_size={self.group_size}"


def use_kernels(model: nn.Module) -> dict[str, str]:
    """Take the fastest path that torch has on the CPU in every quantised layer that it fits.

    Activations are rounded to bfloat16 in these layers, so answers differ in the third digit. Layers that no kernel
    fits go on as they are, exact.

    Args:
        model: A model with :class:`QuantLinear` layers, in place.

    Returns:
        Names of the layers that no kernel fits, and why.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import quantize, use_kernels
        >>> model, _ = quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), [torch.randn(64, 64)],
        ...     group_size=32, bits_by_pattern={"1": 2})
        >>> use_kernels(model)
        {'1': "2 bits, torch's kernels have 4 and 8"}
    """
    reasons = {name: layer.use_kernel() for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


class QuantEmbedding(nn.Module):
    """An embedding whose rows are packed integers with one scale each.

    Buffers: ``qweight`` int32 ``[rows, width * bits / 32]`` and ``scales`` ``[rows]``, float16 or float32 as in
    :class:`QuantLinear`; zero is the middle code.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row; must fill whole 32-bit words.
        bits: 4 or 8.
        padding_idx: Kept for code that asks for it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import QuantEmbedding
        >>> embedding = QuantEmbedding.from_embedding(nn.Embedding(10, 8), bits=4)
        >>> embedding(torch.tensor([[1, 2]])).shape, embedding.qweight.shape
        (torch.Size([1, 2, 8]), torch.Size([10, 1]))
    """

    qweight: Tensor
    scales: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, padding_idx: int | None = None) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"Expected argument `embedding_bits` to be 4 or 8, but got {bits}.")
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.padding_idx, self.dtype = padding_idx, torch.float32
        self.register_buffer("qweight", torch.zeros(num_embeddings, embedding_dim * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(num_embeddings, dtype=torch.float16))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int) -> "QuantEmbedding":
        """Round each row of an embedding to the nearest point of its own symmetric grid."""
        weight = embedding.weight.detach().float()
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, bits, embedding.padding_idx)
        scales, zeros = find_grid(weight, bits)
        codes = ((weight / scales[:, None]).round() + zeros[:, None]).clamp(0, 2**bits - 1)
        layer.qweight, layer.scales = pack(codes.T, bits).T.contiguous(), narrowest(scales)
        layer.dtype = embedding.weight.dtype
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight ``[rows, width]`` for code that reads it."""
        shape = (self.num_embeddings, self.embedding_dim)
        return packed_weight(self.dequantize, shape, self.dtype, self.qweight.device)

    def dequantize(self) -> Tensor:
        """All rows, float32 of shape ``[rows, width]``."""
        codes = unpack(self.qweight.T.contiguous(), self.bits).T
        return (codes - 2 ** (self.bits - 1)) * self.scales.float()[:, None]

    def forward(self, indices: Tensor) -> Tensor:
        """``indices [...]`` to ``[..., width]`` in the dtype the module was cast to; unpacks only these rows."""
        flat = indices.reshape(-1)
        codes = unpack(self.qweight[flat].T.contiguous(), self.bits).T
        rows = (codes - 2 ** (self.bits - 1)) * self.scales[flat].float()[:, None]
        return rows.to(self.dtype).view(*indices.shape, self.embedding_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _take_scales_dtype(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return _apply_but_keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def _equal(one: Any, other: Any) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _take_scales_dtype(module: Any, state_dict: dict[str, Any], prefix: str) -> None:
    scales = state_dict.get(f"{prefix}scales")
    if isinstance(scales, Tensor) and scales.dtype == torch.float32:
        module.scales = module.scales.float()


def _apply_but_keep_scales(module: Any, apply: Any, fn: Any, recurse: bool) -> Any:
    # `.bfloat16()` and the like are meant for activations: the scales keep the precision that they need.
    scales = module.scales
    apply(fn, recurse)
    if module.scales.dtype != scales.dtype:
        module.scales = scales.to(module.scales.device)
    return module


def why_not_packable(in_features: int, out_features: int, bits: int) -> str | None:
    """Why the checkpoint format cannot hold a layer of these widths, or None if it can."""
    if not in_features or not out_features:
        return "it has no weights"
    if in_features % 32:
        return f"its {in_features} inputs do not divide by 32"
    multiple = 32 if bits == 3 else 32 // bits
    if out_features % multiple:
        return f"its {out_features} outputs do not divide by {multiple}"
    return None
