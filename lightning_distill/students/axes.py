"""Which entries of a model's parameters belong together, found by following one forward on the meta device.

Shapes cannot tell the rows of a query from the channels it reads: in BERT both are ``hidden_size`` long. What the
forward does with them can. Every entry along an axis of a parameter has a number; each operator that meets two entries
in one place (a sum, a product, both sides of a matrix product) unites their numbers, and what moves entries around
moves the numbers too. Entries that end up united are one channel, one neuron or one head, in whichever order a fused
weight keeps them. That takes no table of architectures; an operator that is not known here is refused.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Axis = tuple[str, int]
"""The name of a parameter and one of its axes."""
Unit = dict[Axis, list[int]]
"""One channel, neuron or head: the indices that it has along axes of parameters."""
# A slot numbers the entries of a tensor, from 1 on, 0 for none; its size is 1 along dimensions that make no difference.
Slot = Tensor

_SAME = "clone contiguous detach alias _to_copy lift_fresh softmax _softmax log_softmax _log_softmax cumsum"
_VIEWS = "view _unsafe_view reshape _reshape_alias"
_MOVES = (
    "t transpose permute expand unsqueeze squeeze slice select split split_with_sizes unbind repeat roll flip "
    "constant_pad_nd diagonal tril triu"
)
_SUMS = "sum mean var std amax amin max min prod linalg_vector_norm norm logsumexp var_mean any all argmax argmin topk"
_LOOKUPS = "embedding index _unsafe_index gather index_select"
_WRITES = "copy index_add index_put index_copy scatter scatter_add slice_scatter select_scatter"
_NORMS = "native_layer_norm _fused_rms_norm"
_CHANNEL_NORMS = "native_batch_norm native_group_norm _native_batch_norm_legit_no_training"


def units(model: nn.Module, axes: dict[Axis, int], inputs: dict[str, Tensor]) -> list[Unit]:
    """The channels, neurons and heads that some axes of a model's parameters consist of.

    Args:
        model: A model on the meta device, in eval mode.
        axes: The axes to follow, and their sizes.
        inputs: What its forward takes, on the meta device.

    Returns:
        What belongs together; each entry of each axis is in one of them.

    Raises:
        NotImplementedError: If an operator of the forward is not known here.

    Example:
        >>> with torch.device("meta"):
        ...     model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.empty(1, 2)
        >>> units(model.eval(), {("0.weight", 0): 3, ("0.bias", 0): 3, ("2.weight", 1): 3}, {"input": x})[1]
        {('0.weight', 0): [1], ('0.bias', 0): [1], ('2.weight', 1): [1]}
    """
    follow = _Follow(dict(model.named_parameters()), axes)
    with torch.no_grad(), follow:
        model(**inputs)
    roots = _components(follow.total, follow.united).tolist()
    found: dict[int, Unit] = {}
    for axis, first in follow.first.items():
        for index in range(axes[axis]):
            found.setdefault(roots[first + index], {}).setdefault(axis, []).append(index)
    return list(found.values())


def kind_of(unit: Unit) -> tuple[tuple[Axis, int], ...]:
    """Which axes a unit is of and how many entries it has along each: the same for all heads of a layer, say.

    Example:
        >>> kind_of({("query.weight", 0): [8, 9], ("query.bias", 0): [8, 9]})
        ((('query.bias', 0), 2), (('query.weight', 0), 2))
    """
    return tuple(sorted((axis, len(indices)) for axis, indices in unit.items()))


def _components(total: int, pairs: list[Tensor]) -> Tensor:
    """The least number that each is united with."""
    root = torch.arange(total)
    if not pairs:
        return root
    a, b = torch.cat(pairs, 1)
    while True:
        least = torch.minimum(root[a], root[b])
        lower = root.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
        # What was a root itself goes with its entries.
        lower = lower.scatter_reduce(0, root, lower, "amin")
        lower = lower[lower]
        if torch.equal(lower, root):
            return root
        root = lower


def _varying(slot: Slot) -> set[int]:
    return {dim for dim, size in enumerate(slot.shape) if size > 1}


def _narrowed(slot: Slot) -> Slot:
    """A slot with size 1 along the dimensions that make no difference."""
    for dim in _varying(slot):
        one = slot.narrow(dim, 0, 1)
        if slot.stride(dim) == 0 or bool((slot == one).all()):
            slot = one
    return slot


class _Follow(TorchDispatchMode):
    """Gives every tensor that a forward makes out of the followed parameters its slots."""

    def __init__(self, parameters: dict[str, Tensor], axes: dict[Axis, int]) -> None:
        super().__init__()
        self.first: dict[Axis, int] = {}
        self.slots = WeakIdKeyDictionary()
        self.united: list[Tensor] = []
        self.total = 1
        for (name, axis), size in axes.items():
            parameter = parameters[name]
            shape = [size if dim == axis else 1 for dim in range(parameter.ndim)]
            numbers = torch.arange(self.total, self.total + size).view(shape)
            self.slots.setdefault(parameter, []).append(numbers)
            self.first[name, axis] = self.total
            self.total += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        # What depends on values that are not there. Any answer will do: it decides which rows go where, not how wide.
        if name == "_local_scalar_dense":
            return 0
        if name == "equal":
            return True
        if name == "nonzero":
            return args[0].new_empty((1, args[0].ndim), dtype=torch.long)
        out = func(*args, **kwargs)
        if any(self.of(x) for x in tree_leaves((args, kwargs))):
            name = name if name.startswith("_") else name.rstrip("_")
            several = isinstance(out, (tuple, list))
            outs = [x for x in (out if several else [out]) if isinstance(x, Tensor)]
            for x, slots in zip(outs, self.rule(func, name)(name, func, args, kwargs, outs), strict=True):
                if joined := self.joined(slots):
                    self.slots[x] = joined
        return out

    def rule(self, func: Any, name: str) -> Callable[..., list[list[Slot]]]:
        for names, rule in (
            (_SAME, self.same), (_VIEWS, self.view), (_MOVES, self.move), (_SUMS, self.sum), (_LOOKUPS, self.look_up),
            (_WRITES, self.write), (_NORMS, self.norm), (_CHANNEL_NORMS, self.channel_norm), ("cat stack", self.cat),
            ("mm bmm addmm baddbmm", self.product), ("convolution", self.convolution),
        ):  # fmt: skip
            if name in names.split():
                return rule
        if torch.Tag.pointwise in func.tags or name in ("where", "masked_fill"):
            return self.pointwise
        if name.startswith("new_") or name.endswith("_like"):
            return lambda name, func, args, kwargs, outs: [[] for _ in outs]
        raise NotImplementedError(f"torch's operator `{name}`")

    def of(self, x: Any) -> list[Slot]:
        return self.slots.get(x, []) if isinstance(x, Tensor) else []

    def unite(self, a: Slot, b: Slot) -> Slot:
        a, b = torch.broadcast_tensors(a, b)
        both = (a > 0) & (b > 0) & (a != b)
        self.united.append(torch.stack([a[both], b[both]]))
        return torch.where(a > 0, a, b)

    def joined(self, slots: Iterable[Slot]) -> list[Slot]:
        """Slots that vary along dimensions of their own; others are united."""
        done: list[Slot] = []
        for slot in map(_narrowed, slots):
            while (i := next((i for i, o in enumerate(done) if _varying(o) & _varying(slot)), None)) is not None:
                slot = _narrowed(self.unite(done.pop(i), slot))
            if slot.numel() > 1:
                done.append(slot)
        return done

    def summed(self, slot: Slot, dims: Sequence[int]) -> Slot:
        """A slot after a sum, of size 1 along the dimensions: a head where entries of heads were summed."""
        along = _varying(slot) & set(dims)
        if along and along == _varying(slot):
            return slot.new_zeros([1] * slot.ndim)
        for dim in along:
            first = slot.amax(dim, keepdim=True)
            self.unite(slot, first)
            slot = first
        return slot

    def same(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        return [self.of(args[0]) for _ in outs]

    def view(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        return [[slot.expand(args[0].shape).reshape(outs[0].shape) for slot in self.of(args[0])]]

    def move(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        moved = [func(slot.expand(args[0].shape), *args[1:], **kwargs) for slot in self.of(args[0])]
        return [list(of_one) for of_one in zip(*moved, strict=True)] if len(outs) > 1 else [[*map(_only, moved)]]

    def sum(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        x, at = args[0], 2 if name in ("linalg_vector_norm", "norm", "topk") else 1
        dims = kwargs.get("dim", args[at] if len(args) > at else -1 if name == "topk" else None)
        dims = [dims] if isinstance(dims, int) else dims or range(x.ndim)
        dims = sorted((dim % x.ndim for dim in dims), reverse=True)
        slots = [self.summed(slot, dims) for slot in self.of(x)]
        if outs[0].ndim < x.ndim:
            for dim in dims:
                slots = [slot.select(dim, 0) for slot in slots]
        return [slots for _ in outs]

    def product(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        """A matrix product is the sum of a product of ``[.., T, C, 1]`` and ``[.., 1, C, O]`` along C."""
        *added, a, b = (x for x in args if isinstance(x, Tensor))
        slots = self.joined([s.unsqueeze(-1) for s in self.of(a)] + [s.unsqueeze(-3) for s in self.of(b)])
        slots = [self.summed(slot, [a.ndim - 1]).select(a.ndim - 1, 0) for slot in slots]
        return [slots + [_behind(slot, outs[0].ndim) for x in added for slot in self.of(x)]]

    def convolution(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        x, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        reads = 0 if transposed else 1
        slots = [_in_channels(slot, x.ndim) for slot in self.of(bias)]
        for slot in self.of(weight):
            if groups == 1 and reads in _varying(slot):
                for other in self.of(x):
                    self.unite(other.flatten(), slot.flatten())
            else:
                slots.append(_in_channels(slot.flatten(), x.ndim))
        if groups > 1 and groups != x.shape[1]:
            raise NotImplementedError("a convolution in groups")
        return [slots + (self.of(x) if groups > 1 else [])]

    def look_up(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        """Which rows are taken is not known, and makes no difference as long as they have no numbers."""
        x, *rest = args[: 2 if name == "embedding" else 3]
        rest = [[_any_index(i) for i in item] if isinstance(item, (tuple, list)) else _any_index(item) for item in rest]
        return [[func(slot.expand(x.shape), *rest) for slot in self.of(x)]]

    def write(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        """What is written into rows of another tensor is as wide."""
        written = [x for x in args[1:] if isinstance(x, Tensor)][-1:]
        return [self.of(args[0]) + [_behind(slot, outs[0].ndim) for x in written for slot in self.of(x)]]

    def norm(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        slots = self.of(args[0]) + [_behind(slot, args[0].ndim) for x in args[2:4] for slot in self.of(x)]
        return [slots] + [[] for _ in outs[1:]]

    def channel_norm(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        slots = [_in_channels(slot, args[0].ndim) for x in args[1:5] for slot in self.of(x)]
        return [self.of(args[0]) + slots] + [[] for _ in outs[1:]]

    def cat(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
        parts = [[s.unsqueeze(dim) if name == "stack" else s for s in self.of(x)] for x in tensors]
        still = [slot for slots in parts for slot in slots if dim not in _varying(slot)]
        moving = [next((s for s in slots if dim in _varying(s)), None) for slots in parts]
        if all(slot is None for slot in moving):
            return [still]
        sizes = [1 if name == "stack" else x.shape[dim] for x in tensors]
        shape = list(torch.broadcast_shapes(*(_without(s.shape, dim) for s in moving if s is not None)))
        none = torch.zeros([1] * outs[0].ndim, dtype=torch.long)
        pieces = [
            (none if slot is None else slot).expand(*shape[:dim], size, *shape[dim + 1 :])
            for slot, size in zip(moving, sizes, strict=True)
        ]
        return [[*still, torch.cat(pieces, dim)]]

    def pointwise(self, name: str, func: Any, args: Any, kwargs: Any, outs: Any) -> list[list[Slot]]:
        slots = [_behind(slot, outs[0].ndim) for x in tree_leaves((args, kwargs)) for slot in self.of(x)]
        return [slots for _ in outs]


def _only(x: Any) -> Tensor:
    return x[0] if isinstance(x, (tuple, list)) else x


def _behind(slot: Slot, ndim: int) -> Slot:
    """A slot with as many dimensions as the tensor that it is broadcast to."""
    while slot.ndim > ndim and slot.shape[0] == 1:
        slot = slot[0]
    return slot.reshape(*[1] * (ndim - slot.ndim), *slot.shape)


def _in_channels(slot: Slot, ndim: int) -> Slot:
    return slot.reshape(1, -1, *[1] * (ndim - 2))


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [1 if d == dim else size for d, size in enumerate(shape)]


def _any_index(index: Any) -> Any:
    if not isinstance(index, Tensor):
        return index
    return (
        torch.zeros(index.shape, dtype=torch.long)
        if index.dtype != torch.bool
        else torch.ones_like(index, device="cpu")
    )
