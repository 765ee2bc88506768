"""InitPolicy: initialise weights before training by the activation that follows, and say what was done."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.functional.tensors import whole
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.students.activations import LAYERS, following_activations
from lightning_distill.students.from_teacher import copy_from_teacher
from lightning_distill.students.initialization import Initialized, Policy, Residual, initialize, materialize
from lightning_distill.students.layer_map import Layers
from lightning_distill.students.untouched import untouched_parameters


@typed
class InitPolicy(L.Callback):
    """Initialises weights before training, and writes an audit of it to ``init_policy.json`` and ``init_policy.png``.

    It acts at ``setup``: before ``configure_model``, so before FSDP2 shards, and before a checkpoint is loaded, whose
    weights a resumed run has from then on. What is on the meta device gets memory there, or where
    ``ModelParallelStrategy`` gives it some; that, and what only ``configure_model`` builds, is drawn at
    ``on_fit_start``, each process filling its shards. A second ``fit`` is left alone. Seed and name alone decide a
    parameter's numbers, so every process draws the same.

    ``"auto"`` takes Xavier where tanh or sigmoid follows a layer (with gain), He for ReLU and leaky ReLU (with its
    slope), LeCun for SELU, the truncated normal of transformers for GELU and SiLU, Xavier with gain 1 where another
    layer or the end follows, and He when unsure. Biases become zero, norms one, padding rows zero; tied weights are
    drawn once. ``"from_teacher"`` copies from the teacher as :func:`~lightning_distill.students.student_from_teacher`
    does (layers by the map, width by slices, heads kept whole), and takes ``"auto"`` for what has no teacher.

    ``init_policy.png`` shows how large the output of each layer and the gradient at it are, in the first batch that is
    trained on anyway: flat is good.

    Args:
        policy: ``"auto"``, ``"from_teacher"``, or one rule for all layers, see
            :func:`lightning_distill.students.initialization.init_weight_`.
        only: ``"new"`` leaves alone what was loaded, copied, trained or frozen, see
            :func:`lightning_distill.students.untouched.untouched_parameters`; ``"all"`` touches every trainable
            parameter; or patterns on names of modules, such as ``["student.classifier*"]``.
        residual: scaling by depth, ``"gpt2"`` or ``"deepnorm"``, see
            :func:`lightning_distill.students.initialization.initialize`.
        std: standard deviation for embeddings and the truncated normal; None takes the ``initializer_range`` of the
            transformers config around, or 0.02.
        teacher: for ``"from_teacher"``: a model, folder or hub id; None takes the module's own ``teacher``.
        layers: for ``"from_teacher"``: which of the teacher's layers, see
            :func:`lightning_distill.students.layer_map.layer_map`.
        seed: seed of the random numbers.
        output_dir: folder of audit and picture; by default the Trainer's ``default_root_dir``.

    Attributes:
        audit: one line for each weight drawn or copied.

    Raises:
        ValueError: an argument is out of its range, a pattern matches nothing, ``residual`` finds no blocks, there is
            no teacher or no student like it, or a module on the meta device cannot reset itself.

    Example:
        >>> InitPolicy("kaiming_normal", only=["head*"]).policy
        'kaiming_normal'

    Source: Glorot and Bengio 2010 (Xavier); He et al. 2015; Klambauer et al. 2017 (LeCun for SELU).
    """

    def __init__(
        self,
        policy: Policy | Literal["from_teacher"] = "auto",
        *,
        only: str | Sequence[str] = "new",
        residual: Residual | None = None,
        std: float | None = None,
        teacher: nn.Module | str | None = None,
        layers: Layers = "uniform",
        seed: int = 0,
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        one_of("policy", policy, [*get_args(Policy), "from_teacher"])
        if residual is not None:
            one_of("residual", residual, get_args(Residual))
        if std is not None:
            between("std", std, 0)
        if not only:
            raise ValueError(f"Expected argument `only` to be 'new', 'all' or patterns, but got {only!r}.")
        if teacher is not None and policy != "from_teacher":
            raise ValueError(f"Expected argument `teacher` to be left out for policy {policy!r}, but got one.")
        self.policy: Policy | Literal["from_teacher"] = policy
        self.only = only
        patterns = () if only in ("new", "all") else (only,) if isinstance(only, str) else tuple(only)
        self._patterns: tuple[str, ...] = patterns
        self.residual, self.std, self.teacher, self.layers = residual, std, teacher, layers
        self.seed, self.output_dir = seed, output_dir
        self.audit: list[Initialized] = []
        self._left: set[str] = set()
        self._seen: set[str] | None = None  # None: this run is not to be touched
        self._waiting: set[str] = set()
        self._watches = False
        self._watch: _Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Initialise what there is, unless the module has been trained already."""
        self.audit, self._left, self._seen = [], set(), None
        if stage != "fit" or trainer.global_step > 0 or trainer.ckpt_path is not None:
            return
        chosen = self._chosen(pl_module)
        names = dict(pl_module.named_parameters(remove_duplicate=False))
        self._waiting = {name for name in chosen if names[name].is_meta}
        if self._waiting and not isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)):
            materialize(pl_module)
            self._waiting = set()
        self._seen = set(names)
        self._left = {name for name, _ in pl_module.named_parameters()} - chosen
        self._draw(pl_module, chosen - self._waiting)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Initialise what there was not at ``setup``."""
        if self._seen is None or isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            return  # these two flatten what they shard
        names = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
        chosen = (self._chosen(pl_module) - self._seen) | (self._waiting & names)
        self._left |= names - self._seen - chosen
        self._draw(pl_module, chosen)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop here: the weights are the checkpoint's. That there is one is not known at ``setup``."""
        self.audit, self._seen = [], None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was done."""
        if self._seen is None:
            return
        self._seen = None
        self._check_patterns(pl_module)
        self._watches = bool(self.audit)
        if self.audit:
            self._report(trainer)
        else:
            rank_zero_warn(
                "InitPolicy has left everything alone: nothing in the module is new. Name what to initialise, as in "
                f"only=['head*'], or take only='all' (it is {self.only!r})."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first batch."""
        if self._watches and trainer.is_global_zero:
            self._watch = _Watch(pl_module)
        self._watches = False

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture after the first backward."""
        if self._watch is None:
            return
        variances = self._watch.take(getattr(trainer.precision_plugin, "scaler", None))
        self._watch = None
        if variances:
            file = self._file(trainer, "json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"variances": variances}, indent=1))
            plot_variances(variances, f"InitPolicy {self.policy}").savefig(self._file(trainer, "png"), dpi=120)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take off the hooks, if no batch came."""
        if self._watch is not None:
            self._watch.take()
            self._watch = None

    def _chosen(self, pl_module: L.LightningModule) -> set[str]:
        if self.only == "new":
            return untouched_parameters(pl_module)
        if self.only == "all":
            return {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        named = ((name, name.rpartition(".")[0]) for name, _ in pl_module.named_parameters())
        return {name for name, module in named if any(fnmatchcase(module, pattern) for pattern in self._patterns)}

    def _check_patterns(self, pl_module: L.LightningModule) -> None:
        names = [name for name, _ in pl_module.named_modules()]
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Expected argument `only` to match names of modules, but {pattern!r} matches none; they look like "
                    f"{names[1:4]}."
                )

    def _draw(self, pl_module: L.LightningModule, names: set[str]) -> None:
        if not names:
            return
        policy: Policy = "auto" if self.policy == "from_teacher" else self.policy
        if self.policy == "from_teacher":
            names = names - self._copy(pl_module, names)
        self.audit += initialize(pl_module, policy, names, std=self.std, residual=self.residual, seed=self.seed)

    def _copy(self, pl_module: L.LightningModule, names: set[str]) -> set[str]:
        own = getattr(pl_module, "teacher", None)
        teacher = own if self.teacher is None else load_pretrained(self.teacher, "teacher")
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                "Expected argument `teacher` to be a model, a folder or a hub id for a module without a `teacher` of "
                f"its own, but got {self.teacher!r}."
            )
        modules = pl_module.named_modules()
        alike = ((n, m) for n, m in modules if type(m) is type(teacher) and m not in (own, teacher))
        path, student = next(alike, (None, None))
        if student is None:
            raise ValueError(
                f"Expected a student of the teacher's class in the module, but there is no other "
                f"`{type(teacher).__name__}`; see argument `policy`."
            )
        prefix = f"{path}." if path else ""
        wanted = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        copied = copy_from_teacher(student, teacher, self.layers, wanted)
        activations, parameters = following_activations(student), dict(student.named_parameters())
        for name in copied:
            if parameters[name].ndim > 1:
                fans = nn.init._calculate_fan_in_and_fan_out(parameters[name])
                activation, _ = activations.get(name.rpartition(".")[0], ("linear", 0.0))
                std = whole(parameters[name].detach()).float().std().item()
                self.audit.append(Initialized(f"{prefix}{name}", activation, "from_teacher", *fans, None, std))
        return {f"{prefix}{name}" for name in copied}

    def _file(self, trainer: L.Trainer, ending: str) -> Path:
        folder = Path(self.output_dir if self.output_dir is not None else trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"init_policy.{ending}"

    @rank_zero_only
    def _report(self, trainer: L.Trainer) -> None:
        lines, file = [line.as_dict() for line in self.audit], self._file(trainer, "json")
        report = {"policy": self.policy, "weights": lines, "left_alone": sorted(self._left)}
        file.write_text(json.dumps(report, indent=1))
        table = Table(*lines[0], title=f"InitPolicy {self.policy}", box=SIMPLE)
        for line in lines:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values()))
        # Wider than a narrow terminal: a name that is cut off says nothing.
        Console(stderr=True, width=max(Console(stderr=True).width, 140)).print(table)
        rank_zero_info(
            f"InitPolicy: {len(lines)} weights initialised, {len(self._left)} parameters left alone, all in {file}"
        )


class _Watch:
    """Notes the mean squares of each trained layer's output and of the gradient at it, in one forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LAYERS) and m.weight.requires_grad)
        self._handles = [layer.register_forward_hook(partial(self._note, name)) for name, layer in layers]

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        def note_gradient(gradient: Tensor) -> None:
            self._gradients[name] = gradient.detach().float().square().mean()

        if isinstance(output, Tensor) and output.requires_grad:
            self._outputs.setdefault(name, output.detach().float().square().mean())
            output.register_hook(note_gradient)

    def take(self, scaler: Any = None) -> list[dict[str, Any]]:
        """Take the hooks off; by layer, in the order of the forward, what was noted."""
        for handle in self._handles:
            handle.remove()
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        return [
            {"layer": name, "activation": float(output), "gradient": float(self._gradients[name]) / scale**2}
            for name, output in self._outputs.items()
            if name in self._gradients
        ]


def plot_variances(variances: list[dict[str, Any]], title: str = "InitPolicy") -> Figure:
    """Draw the variance of activation and gradient by layer, on logarithmic axes; needs no display.

    Args:
        variances: for each layer, in the order of the forward, ``layer``, ``activation`` and ``gradient``.
        title: the title.

    Example:
        >>> figure = plot_variances([{"layer": "0", "activation": 1.0, "gradient": 0.1}])
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['activation', 'gradient']
    """
    figure = Figure(figsize=(max(8.0, min(16.0, 3 + 0.22 * len(variances))), 5.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    places, labels = range(len(variances)), _short([line["layer"] for line in variances])
    for axes, quantity, color in zip(panels, ("activation", "gradient"), ("C0", "C1"), strict=True):
        values = torch.tensor([line[quantity] for line in variances])
        axes.plot(places, values, "o-", color=color, markersize=4, linewidth=1.5)
        axes.set_ylabel(quantity)
        if len(positive := values[values > 0]):
            axes.set_yscale("log")
            low, middle, high = (
                value.item() for value in (positive.min(), positive.log().mean().exp(), positive.max())
            )
            # At least three decades, or a flat curve would fill the panel with its noise.
            axes.set_ylim(min(middle / 10**1.5, low / 2), max(middle * 10**1.5, high * 2))
        axes.grid(alpha=0.3)
    step = max(1, len(variances) // 40)
    panels[1].set_xticks(list(places)[::step], labels[::step], rotation=90, fontsize=8)
    panels[0].set_title(
        f"{title}\nmean square of each layer's output and of the gradient at it, first batch: flat is good"
    )
    return figure


def _short(names: list[str]) -> list[str]:
    """The last parts of each name, as many as tell them all apart, and four where there are so many."""
    for count in range(4, 1 + max((name.count(".") for name in names), default=0)):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return names
