"""A model's own forward, with rows that leave it between two layers.

The forward is the model's: its embeddings, its masks, its position embeddings, its head. Only the calls of its layers
are caught. Behind an exit the rows that are sure are taken out of what a layer gives, and out of what the model hands
to the layers after it; behind the last layer the rest is put back in place, so that the head sees the batch it expects.
Which dimension of which argument is the batch is not guessed: it is the one that grows when the batch gets a row more.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_distill.models.calling import call_model

Call = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Signature = tuple[int | None, ...]


@contextmanager
def caught_layers(student: nn.Module, layers: Sequence[nn.Module], call: Call) -> Iterator[None]:
    """Send the calls of a student's layers through a function.

    Args:
        student: The student; where it is compiled as a whole, it runs uncompiled around its layers.
        layers: Its layers, in the order they are called.
        call: Called with the position in the stack, the layer (compiled where it is), and its arguments.
    """
    position = -1

    def through(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal position
        position += 1
        return call(position, inner, args, kwargs)

    # What `layer.compile()` sets: a call goes through it before anything else, and so still runs the layer's hooks.
    name = "_compiled_call_impl"
    before = {module: vars(module).get(name) for module in (student, *layers)}
    try:
        vars(student)[name] = None
        for layer in layers:
            vars(layer)[name] = partial(through, before[layer] or layer._call_impl)
        yield
    finally:
        for module, own in before.items():
            vars(module)[name] = own
            if own is None:
                del vars(module)[name]


def count_rows(batch: Any) -> int:
    """Number of rows of a batch: the first dimension of its first tensor."""
    return next(len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim)


def first_tensor(output: Any) -> Tensor:
    """The hidden state in what a layer gave."""
    value = output if isinstance(output, Tensor) else output[0]
    assert isinstance(value, Tensor)
    return value


class UnknownArgumentsError(Exception):
    """A layer was called with arguments of which it is not known which dimension is the batch."""


class BatchDimensions:
    """Which dimension of each argument and output of each layer is the batch."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, Signature], list[int | None]] = {}

    def of(self, position: int, where: str, leaves: list[Any]) -> list[int | None]:
        """The dimension of each leaf, None where it has none."""
        try:
            return self._known[position, where, _signature(leaves)]
        except KeyError:
            raise UnknownArgumentsError from None

    def learn(self, student: nn.Module, layers: Sequence[nn.Module], batch: Any) -> None:
        """Run the student on the batch, and on the batch with its first row once more, and see what grew."""
        rows = count_rows(batch)
        index = [*range(rows), 0]
        small, large = (
            self._shapes(student, layers, grown) for grown in (fresh(batch), _take_rows(batch, rows, index))
        )
        for key, shapes in small.items():
            pairs = zip(shapes, large[key], strict=True)
            self._known[key] = [
                None if a is None else next((dim for dim, size in enumerate(a) if size != b[dim]), None)
                for a, b in pairs
            ]

    @staticmethod
    def _shapes(student: nn.Module, layers: Sequence[nn.Module], batch: Any) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        before: Tensor | None = None

        def call(position: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal before
            if before is not None and first_tensor(args or tuple(kwargs.values())) is not before:
                # A sum with what came before, say, would be of other rows.
                raise ValueError(
                    f"Expected the student to hand what layer {position - 1} gives to layer {position} as it is, but "
                    "it changes it in between. Move that (a residual sum, an activation) into the layers."
                )
            output = inner(*args, **kwargs)
            before = first_tensor(output)
            for where, value in (("in", (args, kwargs)), ("out", output)):
                leaves = tree_flatten(value)[0]
                shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
                seen[position, where, _signature(leaves)] = shapes
            return output

        with caught_layers(student, layers, call):
            call_model(student, batch)
        return seen


def _signature(leaves: list[Any]) -> Signature:
    return tuple(leaf.ndim if isinstance(leaf, Tensor) else None for leaf in leaves)


def fresh(batch: Any) -> Any:
    """The batch with copies of the caches in it, which a forward changes."""
    return tree_map(lambda leaf: copy.deepcopy(leaf) if hasattr(leaf, "batch_select_indices") else leaf, batch)


def _take_rows(batch: Any, rows: int, index: list[int]) -> Any:
    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows:
            return leaf[index]
        if hasattr(leaf, "batch_select_indices"):
            leaf.batch_select_indices(torch.tensor(index))
        return leaf

    return tree_map(take, fresh(batch))


class Cost:
    """What a row costs in a layer and what it costs to keep one in a cut, in seconds: the least measured so far.

    The least, because a pause of the machine must not decide anything for good.
    """

    def __init__(self) -> None:
        self.layer = self.cut = float("inf")

    def worth_cutting(self, leaving: int, staying: int, num_layers: int) -> bool:
        """Whether a cut costs less than carrying the leaving rows through the layers up to the next exit."""
        if self.layer == float("inf") or self.cut == float("inf"):
            return True
        return leaving * num_layers * self.layer > staying * self.cut


class Rows:
    """The rows that are still under way, and the arguments without the others.

    Args:
        count: Rows of the batch.
        device: Where it is.
        token_mask: Bool ``[B, T]``, or None.
        dimensions: Which dimensions are the batch.
    """

    def __init__(
        self, count: int, device: torch.device, token_mask: Tensor | None, dimensions: BatchDimensions
    ) -> None:
        self.total, self.token_mask, self._dimensions = count, token_mask, dimensions
        self.index = torch.arange(count, device=device)  # where in the batch each row belongs
        self._cut: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def arguments(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer for these rows alone."""
        if len(self) == self.total:
            return args, kwargs
        leaves, tree = tree_flatten((args, kwargs))
        for place, dim in enumerate(self._dimensions.of(position, "in", leaves)):
            leaf = leaves[place]
            # What came out of the layer before has these rows already.
            if dim is not None and leaf.shape[dim] == self.total:
                # The model hands the same mask to layer after layer. The tensor is kept beside its cut: its id is
                # its own only while it lives.
                if id(leaf) not in self._cut:
                    self._cut[id(leaf)] = leaf, leaf.index_select(dim, self.index)
                leaves[place] = self._cut[id(leaf)][1]
        return tree_unflatten(leaves, tree)

    def keep(self, position: int, keep: Tensor, arguments: Any, output: Any) -> Any:
        """Keep some rows; returns a layer's output for them."""
        prefix = bool((keep == torch.arange(len(keep), device=keep.device)).all())

        def take(leaf: Tensor, dim: int = 0) -> Tensor:
            return leaf.narrow(dim, 0, len(keep)) if prefix else leaf.index_select(dim, keep)

        leaves, tree = tree_flatten(output)
        dimensions = self._dimensions.of(position, "out", leaves)
        leaves = [leaf if dim is None else take(leaf, dim) for leaf, dim in zip(leaves, dimensions, strict=True)]
        self.index, self._cut = take(self.index), {}
        if self.token_mask is not None:
            self.token_mask = take(self.token_mask)
        for cache in {
            id(leaf): leaf for leaf in tree_flatten(arguments)[0] if hasattr(leaf, "batch_select_indices")
        }.values():
            cache.batch_select_indices(keep)
        return tree_unflatten(leaves, tree)

    def put_back(self, position: int, output: Any) -> Any:
        """A layer's output with the rows in their places of the batch, and zeros where rows have left."""
        if len(self) == self.total:
            return output
        leaves, tree = tree_flatten(output)
        for place, dim in enumerate(self._dimensions.of(position, "out", leaves)):
            if dim is not None:
                shape = list(leaves[place].shape)
                shape[dim] = self.total
                leaves[place] = leaves[place].new_zeros(shape).index_copy(dim, self.index, leaves[place])
        return tree_unflatten(leaves, tree)
