"""Linear layers and embeddings that hold packed integers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.quantization.gptq import QuantizedWeight, find_grid
from lightning_distill.quantization.packing import pack, pack_zeros, unpack, unpack_zeros

#: Up to this many tokens, torch's int4 kernel beats dequantising and a float multiplication (measured on AVX2).
KERNEL_TOKENS = 64


class QuantLinear(nn.Module):
    """A linear layer whose weight is packed integers; its state dict is the common GPTQ checkpoint.

    Buffers: ``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]`` (version 1),
    ``scales`` float16 ``[groups, out]``, ``g_idx`` int32 ``[in]`` and ``bias``. The weight exists in floating point
    only while a forward uses it. Gradients reach the inputs, not the weight.

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

    weight: None = None  # there is none; T5 looks at its dtype where it is a tensor
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    _kernel_weight: Tensor | None
    _kernel_grid: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int, bias: bool = True) -> None:
        super().__init__()
        reason = why_not_packable(in_features, out_features, bits)
        if reason:
            raise ValueError(reason)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = in_features if group_size == -1 else group_size
        groups = -(-in_features // self.group_size)
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // self.group_size)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
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
        return layer

    def dequantize(self) -> Tensor:
        """The weight, float32 of shape ``[out, in]``."""
        codes = unpack(self.qweight, self.bits)
        zeros = unpack_zeros(self.qzeros, self.bits)
        groups = self.g_idx.long()
        return (self.scales.float()[groups] * (codes - zeros[groups])).T

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
        rows = inputs.reshape(-1, self.in_features).to(torch.bfloat16)
        outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._kernel_weight, self.group_size, self._kernel_grid
        )
        outputs = outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)

    def use_kernel(self) -> str | None:
        """Take torch's int4 kernel for few tokens on the CPU, with activations and scales rounded to bfloat16.

        Returns:
            None if the layer takes it, else why it cannot.
        """
        sizes = (32, 64, 128, 256)
        checks = {
            f"{self.bits} bits, the kernel has 4": self.bits != 4,
            f"group size {self.group_size}, the kernel has {sizes}": self.group_size not in sizes,
            f"{self.in_features} inputs do not divide by the group": self.in_features % self.group_size != 0,
            f"{self.out_features} outputs do not divide by 16": self.out_features % 16 != 0,
            f"it is on {self.qweight.device}, not on the CPU": self.qweight.device.type != "cpu",
        }
        reason = next((reason for reason, failed in checks.items() if failed), None)
        if reason is None and not torch.equal(
            self.g_idx.cpu(), torch.arange(self.in_features, dtype=torch.int32) // self.group_size
        ):
            reason = "its groups are not neighbouring inputs"
        if reason is None:
            codes = unpack(self.qweight, 4).T.contiguous()
            zeros, scales = unpack_zeros(self.qzeros, 4), self.scales.float()
            self._kernel_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
            # The kernel computes (code - 8) * scale + offset.
            self._kernel_grid = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16).contiguous()
        return reason

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        self._kernel_weight = self._kernel_grid = None  # a form for the CPU alone
        return _apply_but_keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        """Widths, bits and group size."""
        widths = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{widths}, bits={self.bits}, group_size={self.group_size}"


class QuantEmbedding(nn.Module):
    """An embedding whose rows are packed integers with one scale each.

    Buffers: ``qweight`` int32 ``[rows, width * bits / 32]`` and ``scales`` float16 ``[rows]``; zero is the middle code.

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
        layer.qweight, layer.scales = pack(codes.T, bits).T.contiguous(), scales.half()
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        """``indices [...]`` to ``[..., width]`` in the dtype the module was cast to; unpacks only these rows."""
        flat = indices.reshape(-1)
        codes = unpack(self.qweight[flat].T.contiguous(), self.bits).T
        rows = (codes - 2 ** (self.bits - 1)) * self.scales[flat].float()[:, None]
        return rows.to(self.dtype).view(*indices.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return _apply_but_keep_scales(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def _apply_but_keep_scales(module: Any, apply: Any, fn: Any, recurse: bool) -> Any:
    # `.bfloat16()` and the like are meant for activations: a checkpoint's scales are float16 and stay so.
    scales = module.scales
    apply(fn, recurse)
    if module.scales.dtype != torch.float16:
        module.scales = scales.to(module.scales.device)
    return module


def why_not_packable(in_features: int, out_features: int, bits: int) -> str | None:
    """Why the checkpoint format cannot hold a layer of these widths, or None if it can."""
    if in_features % 32:
        return f"its {in_features} inputs do not divide by 32"
    multiple = 32 if bits == 3 else 32 // bits
    if out_features % multiple:
        return f"its {out_features} outputs do not divide by {multiple}"
    return None
