"""The weight of a layer that holds integers, for those who read it as a tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def packed_weight(
    dense: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A :class:`PackedWeight`, or its numbers where a graph is made: there, what nobody uses is not computed."""
    return dense().to(dtype) if torch.compiler.is_compiling() else PackedWeight(dense, shape, dtype, device)


class PackedWeight(Tensor):
    """A weight that is unpacked where its numbers are used; shape, dtype and device are known without.

    Modules read the weight of their children: to compute with it themselves, to look at its type, or to choose a fused
    path, which torch does not take where a tensor is of a class of its own. It cannot be written to.

    Args:
        dense: Gives the numbers, float32.
        shape: Their shape.
        dtype: What they are cast to.
        device: Where they are.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization.packed_weight import PackedWeight
        >>> weight = PackedWeight(lambda: torch.ones(2, 3), (2, 3), torch.bfloat16, torch.device("cpu"))
        >>> weight.shape, weight.dtype, weight.sum()
        (torch.Size([2, 3]), torch.bfloat16, tensor(6., dtype=torch.bfloat16))
    """

    _dense: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, dense: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "PackedWeight":
        """Without memory for the numbers."""
        new = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        new._dense = dense
        return new

    def unpack(self) -> Tensor:
        """The numbers as a plain tensor."""
        return self._dense().to(self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({self.unpack()!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Answers are plain tensors, not of this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for argument, declared in zip(args, func._schema.arguments, strict=False):
            if isinstance(argument, cls) and declared.alias_info is not None and declared.alias_info.is_write:
                raise TypeError(
                    f"Expected the weight of a quantised layer to be read only, but `{func}` writes to it. Change the "
                    "float model and quantise it again."
                )
        args, kwargs = tree_map_only(cls, cls.unpack, (args, kwargs or {}))
        return func(*args, **kwargs)
