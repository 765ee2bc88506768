"""Ramps: the small heads that answer after a layer."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.arguments import integer, one_of, typed
from lightning_distill.early_exit.criteria import Confidence, Criterion, criterion_from
from lightning_distill.models.class_names import class_names, class_order
from lightning_distill.models.files import BROKEN, Tensors, one_line, read_json
from lightning_distill.signals.description import describe, find_layers, get_submodule
from lightning_distill.students.initialization import Policy, initialize
from lightning_distill.tasks import TaskName, infer_task

RampKind = Literal["auto", "linear", "pooler", "attention"]
Pooling = Literal["first", "last", "none"]
Exits = str | Sequence[int]

_TASKS = ("classification", "multi_label", "regression", "token_classification")
WEIGHTS, CONFIG = "ramps.safetensors", "early_exit.json"


@typed
class Ramp(nn.Module):
    """A head after one layer: norm, pooling, an optional hidden layer, a linear layer.

    Args:
        width: Size of the layer's output.
        num_outputs: Number of classes or labels; 1 in regression.
        kind: ``"linear"``; ``"pooler"`` puts a layer with tanh before it; ``"attention"`` weighs all real tokens by a
            learned query where the others read one; ``"auto"`` is ``"attention"``, or ``"linear"`` per token.
        pooling: The token that is read: the ``"first"``, the ``"last"`` real one, or ``"none"``: an answer per token.
        gate: Whether to give the chance of being right too, for :class:`LearnedGate`.

    Example:
        >>> import torch
        >>> from lightning_distill.early_exit import Ramp
        >>> logits, gate = Ramp(8, 3)(torch.randn(2, 5, 8))
        >>> logits.shape, gate
        (torch.Size([2, 3]), None)
    """

    def __init__(
        self, width: int, num_outputs: int, kind: RampKind = "auto", pooling: Pooling = "first", *, gate: bool = False
    ) -> None:
        super().__init__()
        if kind == "auto":
            # One token says little of a sequence in the lower layers of an encoder: behind the first layers of MiniLM
            # a linear ramp on it was no better than chance on SST-2, where attention reached 84 %.
            kind = "linear" if pooling == "none" else "attention"
        self.pooling = pooling
        # Hidden states of a stack that normalises before its layers have no scale of their own.
        self.norm = nn.LayerNorm(width)
        # Zeros weigh all tokens alike; from random numbers training often ends in a worse place.
        self.query = nn.Parameter(torch.zeros(width)) if kind == "attention" else None
        self.dense = nn.Sequential(nn.Linear(width, width), nn.Tanh()) if kind == "pooler" else None
        self.output = nn.Linear(width, num_outputs)
        self.gate = nn.Linear(width, 1) if gate else None

    def forward(self, hidden_state: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Answer.

        Args:
            hidden_state: The layer's output: ``[B, T, D]``, ``[B, D]``, or ``[B, D, H, W]``, which is averaged.
            token_mask: Bool ``[B, T]`` of the real tokens; None where all are.

        Returns:
            Logits ``[B, C]`` (per token ``[B, T, C]``) and the gate's logit without the last dimension, or None.
        """
        x = hidden_state.flatten(2).mean(-1) if hidden_state.ndim == 4 else hidden_state
        if self.query is not None and x.ndim == 2:
            x = x[:, None]
        if x.ndim == 3 and self.query is None and self.pooling != "none":
            x = self._one_token(x, token_mask)
        x = self.norm(x)
        if self.query is not None:
            mask = None if token_mask is None else token_mask[:, None, None]
            query = self.query.to(x.dtype).expand(x.shape[0], 1, 1, -1)
            x = F.scaled_dot_product_attention(query, x[:, None], x[:, None], mask, scale=1.0)[:, 0, 0]
        if self.dense is not None:
            x = self.dense(x)
        # The gate learns what the answer is worth; it must not move what the answer is read from.
        gate = None if self.gate is None else self.gate(x.detach()).squeeze(-1)
        return self.output(x), gate

    def _one_token(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        if self.pooling == "first":
            return x[:, 0]
        if token_mask is None:
            return x[:, -1]
        last = (token_mask * torch.arange(x.shape[1], device=x.device)).argmax(1)
        return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


class Ramps(nn.ModuleDict):
    """The ramps of a student by their layer, with what is needed to build them again.

    Args:
        exits: Layers (from 0) with a ramp.
        widths: The width of each one's output.
        num_outputs: See :class:`Ramp`, also for ``kind`` and ``pooling``.
        layers: Path of the stack of layers in the student; None for a transformers model's own.
        task: What the student answers.
        criterion: When an exit is sure, as :meth:`Criterion.config` describes it; one that needs gates gives the
            ramps gates. None for :class:`Confidence`.
        class_names: The names of the classes in the order of the logits, where the student has names.
    """

    def __init__(
        self,
        exits: Sequence[int],
        widths: Sequence[int],
        num_outputs: int,
        kind: RampKind = "auto",
        pooling: Pooling = "first",
        *,
        layers: str | None = None,
        task: TaskName = "classification",
        criterion: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        sureness = Confidence() if criterion is None else criterion_from(criterion)
        gate = sureness.needs_gate
        ramps = (Ramp(width, num_outputs, kind, pooling, gate=gate) for width in widths)
        super().__init__({str(layer): ramp for layer, ramp in zip(exits, ramps, strict=True)})
        self.exits, self.layers, self.task, self.criterion = tuple(exits), layers, task, sureness
        self.config: dict[str, Any] = {
            "exits": list(exits),
            "widths": list(widths),
            "num_outputs": num_outputs,
            "kind": kind,
            "pooling": pooling,
            "layers": layers,
            "task": task,
            "criterion": sureness.config(),
            "class_names": class_names,
        }

    def forward(self, x: Any) -> Any:
        """What it is given: in a student that is an ``nn.Sequential``, the ramps are the last part in the row."""
        return x

    def stack(self, student: nn.Module) -> list[nn.Module]:
        """The student's layers."""
        return find_stack(student, self.layers)

    def ask(self, layer: int, hidden_state: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits and gate of the ramp behind a layer; see :meth:`Ramp.forward`."""
        if token_mask is not None and hidden_state.ndim == 3:
            token_mask = token_mask[:, -hidden_state.shape[1] :]  # a cache may hold what came before
        logits, gate = self[str(layer)](hidden_state, token_mask)
        return logits, gate

    def check_classes(self, student: nn.Module) -> None:
        """Refuse a student whose classes have other names than those of the ramps, or another order."""
        names, own = class_names(student, "student"), self.config["class_names"]
        if names and own and class_order(own, names, "ramps", "student") is not None:
            raise ValueError(
                f"Expected argument `student` to have the ramps' classes in their order, {own}, but got {names}. "
                "Load the student that the ramps were trained behind."
            )

    def save(self, folder: Path, **config: Any) -> None:
        """Write ``ramps.safetensors`` and ``early_exit.json``, with what else the latter is to hold."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps({"ramps": self.config, **config}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> tuple["Ramps", dict[str, Any]]:
        """The ramps that :meth:`save` wrote, in eval mode, and all of ``early_exit.json``.

        Raises:
            ValueError: If there are none, or they are not whole.
        """
        if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
            raise ValueError(
                f"Expected argument `folder` to hold a student with ramps, but {folder} has no {CONFIG} or no "
                f"{WEIGHTS}. Train the student with the callback EarlyExit and export it, or save an EarlyExitModel."
            )
        config, stored = read_json(folder / CONFIG), Tensors()
        stored.add(folder / WEIGHTS)
        described: Any = config.get("ramps")
        count = len(stored.shapes)
        exits = described.get("exits") if isinstance(described, dict) else None
        if not isinstance(exits, list) or len(exits) > count:  # each ramp has some tensors
            raise ValueError(f"Expected {folder / CONFIG} to describe the {count} tensors of ramps in {WEIGHTS}.")
        try:
            with torch.device("meta"):
                shapes = {name: tuple(tensor.shape) for name, tensor in cls(**described).state_dict().items()}
            if shapes != stored.shapes:
                raise ValueError(f"the ramps it describes are not those in {WEIGHTS}")
            ramps = cls(**described)
            ramps.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except BROKEN as error:
            raise ValueError(f"Expected {folder / CONFIG} to describe ramps, but got: {one_line(error)}") from error
        return ramps.eval(), config

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Said here and not by torch, which would list every weight of every ramp as missing.
        if not any(key.startswith(prefix) for key in state_dict):
            raise ValueError(
                f"Expected the checkpoint to hold ramps for the layers {list(self.exits)}, but it has none under "
                f"{prefix!r}. Load it into the student before the ramps are made: into the module without EarlyExit, "
                "then train that module with EarlyExit and no `ckpt_path`."
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def find_stack(student: nn.Module, path: str | None = None) -> list[nn.Module]:
    """The layers of a student in order.

    Args:
        student: The student.
        path: Path of its stack, an ``nn.ModuleList`` or ``nn.Sequential``; None finds a transformers model's own.

    Raises:
        ValueError: If there are none; the message lists the stacks there are.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.early_exit.ramps import find_stack
        >>> len(find_stack(nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), nn.ReLU())}), "body"))
        2
    """
    stacks = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    if path is not None:
        stack = get_submodule(student, path) if path else student
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) < 2:
            raise ValueError(
                f"Expected argument `layers` to be the path of a ModuleList or Sequential of at least two layers, but "
                f"got {path!r}, a `{type(stack).__name__}`. There are {sorted(stacks)}."
            )
        return [layer for layer in stack if not isinstance(layer, Ramps)]
    try:
        found = find_layers(student)
    except ValueError:
        found = nn.ModuleList()
    if len(found) < 2 or getattr(student.config, "is_encoder_decoder", False):
        raise ValueError(
            f"Expected a student with a stack of at least two layers, but found none in a `{type(student).__name__}`. "
            f"Name it by path, `layers=...`; there are {sorted(stacks) or 'no ModuleList and no Sequential'}."
        )
    return list(found)


def resolve_exits(exits: Exits, depth: int) -> list[int]:
    """The layers (from 0) that get a ramp, in order; never the last, whose answer is the student's own.

    Args:
        exits: ``"all"``, ``"every_<n>"``, or layers.
        depth: Number of layers.

    Raises:
        ValueError: If one is beyond the depth, named twice, or there is none.

    Example:
        >>> from lightning_distill.early_exit.ramps import resolve_exits
        >>> resolve_exits("all", 4), resolve_exits("every_2", 6), resolve_exits([3, 1], 6)
        ([0, 1, 2], [1, 3], [1, 3])
    """
    if isinstance(exits, str):
        every = re.fullmatch(r"every_([1-9]\d*)", exits)
        if exits != "all" and every is None:
            raise ValueError(f"Expected argument `exits` to be 'all', 'every_<n>' or layers, but got {exits!r}.")
        step = int(every.group(1)) if every else 1
        chosen = list(range(step - 1, depth - 1, step))
    else:
        chosen = sorted(exits)
    wrong = [layer for layer in chosen if not 0 <= layer < depth - 1]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"Expected argument `exits` to name different layers from 0 to {depth - 2} of a student of {depth} layers "
            f"(the last has the student's own head), but got {exits!r}."
        )
    return chosen


@typed
def make_ramps(
    student: nn.Module,
    exits: Exits = "all",
    *,
    kind: RampKind = "auto",
    criterion: Criterion | None = None,
    task: TaskName | Literal["auto"] = "auto",
    layers: str | None = None,
    widths: int | Sequence[int] | None = None,
    num_outputs: int | None = None,
    init: Policy = "auto",
    seed: int = 0,
) -> Ramps:
    """Make untrained ramps for a student, on its device.

    Args:
        student: A transformers model with a head, or any module with a stack of layers.
        exits: See :func:`resolve_exits`.
        kind: See :class:`Ramp`.
        criterion: When an exit is sure; :class:`LearnedGate` gives the ramps gates. Default: :class:`Confidence`.
        task: ``"classification"``, ``"multi_label"``, ``"regression"`` or ``"token_classification"``; ``"auto"`` reads
            it off the student.
        layers: Path of the stack; see :func:`find_stack`.
        widths: Size of the layers' outputs; None reads it off config or modules.
        num_outputs: Number of classes; None reads it off config or the last linear layer.
        init: How the weights are drawn, see :func:`lightning_distill.students.initialization.initialize`.
        seed: Seed of that.

    Raises:
        ValueError: If an exit is beyond the depth, or layers, widths or classes cannot be found.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.early_exit import make_ramps
        >>> student = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8)), nn.Linear(8, 2))
        >>> make_ramps(student, layers="0").config["widths"]
        [8, 6]
    """
    one_of("kind", kind, get_args(RampKind))
    one_of("init", init, get_args(Policy))
    if task == "auto":
        task = infer_task(student)
    if task not in _TASKS:
        raise ValueError(
            f"Expected argument `task` to be one of {_TASKS}, but got {task!r}. Language models do not leave early "
            "here."
        )
    if task == "multi_label" and criterion is not None and criterion.needs_gate:
        raise ValueError(
            f"Expected argument `criterion` to need no gate in multi_label, but got {criterion!r}: a gate says whether "
            "one answer is right. Use `Confidence()`, which waits for the least sure label."
        )
    stack = find_stack(student, layers)
    chosen = resolve_exits(exits, len(stack))
    if kind == "attention" and task == "token_classification":
        raise ValueError("Expected argument `kind` to be 'linear' or 'pooler' for one answer per token.")
    config = getattr(student, "config", None)
    if widths is None:
        widths = getattr(config, "hidden_size", None) or [_width(stack[: layer + 1]) for layer in chosen]
    widths = [widths] * len(chosen) if isinstance(widths, int) else list(widths)
    for width in widths:
        integer("widths", width, 1)
    if len(widths) != len(chosen):
        raise ValueError(f"Expected argument `widths` to have one per exit ({len(chosen)}), but got {widths}.")
    if num_outputs is None:
        num_outputs = getattr(config, "num_labels", None) or _width([student])
    integer("num_outputs", num_outputs, 1)
    causal = any(getattr(module, "is_causal", False) for module in stack[0].modules())
    pooling: Pooling = "none" if task == "token_classification" else "last" if causal else "first"
    described = None if criterion is None else criterion.config()
    names = class_names(student, "student")
    how: dict[str, Any] = {"layers": layers, "task": task, "criterion": described, "class_names": names}
    made = Ramps(chosen, widths, num_outputs, kind, pooling, **how)
    # Each ramp alone: as a dictionary they would look like layers that follow each other.
    for index, ramp in enumerate(made.values()):
        initialize(ramp, init, seed=seed + index)
    weight = next(student.parameters(), None)
    return made if weight is None or weight.is_meta else made.to(weight.device)


def _width(modules: Sequence[nn.Module]) -> int:
    """Width of what a sequence of modules gives: that of the last one whose class tells."""
    for module in reversed(modules):
        for width in reversed([*describe(nn.ModuleList([module])).modules.values()]):
            if width is not None:
                return width
    raise ValueError(
        "Expected arguments `widths` and `num_outputs` to be given for a student whose modules do not tell the size of "
        "their output, but got None."
    )
