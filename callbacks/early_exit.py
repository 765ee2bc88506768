"""EarlyExit: give a student ramps and train them, in the same fit or behind a frozen backbone."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.early_exit.criteria import Criterion
from lightning_distill.early_exit.losses import RampObjective, loss_of_ramps, ramp_objectives, tied
from lightning_distill.early_exit.ramps import Exits, RampKind, Ramps, find_stack, make_ramps
from lightning_distill.early_exit.walk import first_tensor
from lightning_distill.models.batch import IGNORE_INDEX, token_mask
from lightning_distill.models.calling import logits_of
from lightning_distill.module import DistillationModule
from lightning_distill.optim.own_group import give_own_group
from lightning_distill.signals.description import get_submodule
from lightning_distill.step.accumulation import AccumulatingModule
from lightning_distill.students.initialization import Policy
from lightning_distill.tasks import TASKS, TaskName

Training = Literal["joint", "two_stage", "alternate", "self_distill"]
LossWeights = Literal["uniform", "depth"] | Callable[[int, int], float]


@typed
class EarlyExit(L.Callback):
    r"""Puts ramps behind layers of a student and trains them; :class:`EarlyExitModel` then lets rows leave there.

    Works with any LightningModule that is optimised automatically, alone or with ``DistillationModule``. The ramps are
    made at ``setup``, so before the optimizer and before a checkpoint is loaded, and become ``student.ramps``: they
    are in the module's checkpoints and in ``export``. Whatever ``configure_optimizers`` does, they end up in a
    parameter group of their own, named ``"ramps"``, with the settings of the first group, under the same schedule.

    With the module's own loss :math:`L` and the ramps' losses :math:`L_i`, a step minimises

    - ``"joint"``: :math:`L + \sum_i w_i L_i`;
    - ``"alternate"``: :math:`L` on even steps and :math:`L + \sum_i w_i L_i` on odd ones (BERxiT);
    - ``"two_stage"``: :math:`\sum_i w_i L_i` with everything but the ramps frozen and the student in eval (DeeBERT);
    - ``"self_distill"``: the same, towards the student's own last logits and without labels (FastBERT).

    Logged: ``train_ramps_loss`` and, in validation, ``val_exit<layer>_accuracy`` (``_mse`` in regression).

    Args:
        exits: ``"all"``, ``"every_<n>"``, or layers (from 0); the last layer has the student's own head.
        criterion: When an exit is sure; kept with the ramps. :class:`LearnedGate` gives them gates. Default:
            :class:`Confidence`, its thresholds to be found by :func:`calibrate`.
        training: See above.
        ramp: ``"linear"``, ``"pooler"``, ``"attention"`` or ``"auto"``, see :class:`lightning_distill.early_exit.Ramp`.
        loss_weights: The :math:`w_i`: ``"uniform"`` (1), ``"depth"`` ((layer + 1) / depth), or a function of layer
            and depth.
        teacher_weight: Share of each :math:`L_i` that is learned from the teacher of a ``DistillationModule``.
        temperature: Of soft targets.
        lr: Learning rate of the ramps; None for that of the first group.
        init: How their weights are drawn, see :func:`lightning_distill.students.initialization.initialize`.
        seed: Seed of that.
        student: Path of the student in the LightningModule, ``""`` for the module itself; None finds it.
        layers: Path of the stack of layers in the student; None finds that of a transformers model.
        task: What the student answers; ``"auto"`` reads it off the student.
        widths: Size of the layers' outputs; None reads it off the student.
        num_outputs: Number of classes; None reads it off the student.

    Raises:
        ValueError: If an argument is out of its set, or student, layers or exits cannot be found.

    Example:
        >>> from lightning_distill.callbacks import EarlyExit
        >>> EarlyExit(exits=[2, 4], training="two_stage").exits
        [2, 4]

    Source: Xin et al., "DeeBERT", 2020; Liu et al., "FastBERT", 2020; Xin et al., "BERxiT", 2021.
    """

    def __init__(
        self,
        exits: str | Sequence[int] = "all",
        criterion: Criterion | None = None,
        training: Training = "joint",
        ramp: RampKind = "auto",
        loss_weights: Literal["uniform", "depth"] | Callable[[int, int], float] = "uniform",
        *,
        teacher_weight: float = 0.0,
        temperature: float = 1.0,
        lr: float | None = None,
        init: Policy = "auto",
        seed: int = 0,
        student: str | None = None,
        layers: str | None = None,
        task: TaskName | Literal["auto"] = "auto",
        widths: int | Sequence[int] | None = None,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(exits, str) and exits != "all" and not exits.startswith("every_"):
            raise ValueError(f"Expected argument `exits` to be 'all', 'every_<n>' or layers, but got {exits!r}.")
        if criterion is not None and not isinstance(criterion, Criterion):
            raise TypeError(f"Expected argument `criterion` to be a Criterion, but got {criterion!r}.")
        one_of("training", training, get_args(Training))
        one_of("ramp", ramp, get_args(RampKind))
        if not callable(loss_weights):
            one_of("loss_weights", loss_weights, ("uniform", "depth"))
        between("teacher_weight", teacher_weight, 0, 1, closed=True)
        between("temperature", temperature, 0)
        if lr is not None:
            between("lr", lr, 0)
        one_of("init", init, get_args(Policy))
        self.exits: Exits = exits
        self.criterion, self.training, self.ramp, self.loss_weights = criterion, training, ramp, loss_weights
        self.teacher_weight, self.temperature, self.lr = teacher_weight, temperature, lr
        self.init, self.seed, self.student, self.layers, self.task = init, seed, student, layers, task
        self.widths, self.num_outputs = widths, num_outputs
        self._handles: list[RemovableHandle] = []
        self._has_label = False  # whether any batch had one
        self._frozen: list[str] = []  # by name: sharding replaces parameters
        self._learned: list[RampObjective] = []  # what the ramps learn in a fit
        self._joins = False  # whether a DistillationModule learns it among its own objectives
        self._batch: Any = None  # the batch under way
        self._trains = False  # whether it is a batch of training
        self._mask: Tensor | None = None  # what the student was told of padding
        self._answers: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._logits: dict[str, Tensor] = {}

    # -- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the ramps, and let them answer whenever the student runs."""
        student = self._find_student(pl_module)
        if not isinstance(getattr(student, "ramps", None), Ramps):
            student.ramps = make_ramps(
                student,
                self.exits,
                kind=self.ramp,
                criterion=self.criterion,
                task=self.task,
                layers=self.layers,
                widths=self.widths,
                num_outputs=self.num_outputs,
                init=self.init,
                seed=self.seed,
            )
        ramps = student.ramps
        assert isinstance(ramps, Ramps)
        ramps.check_classes(student)
        teacher = getattr(pl_module, "teacher", None)
        if self.teacher_weight and not isinstance(teacher, nn.Module):
            raise ValueError(
                f"Expected argument `teacher_weight` to be 0 for a module without a teacher, but got "
                f"{self.teacher_weight}."
            )
        if stage == "fit":
            self._prepare_fit(pl_module, student, ramps)
        stack = ramps.stack(student)
        self._handles.append(student.register_forward_pre_hook(self._hear, with_kwargs=True))
        for layer in ramps.exits:
            self._handles.append(stack[layer].register_forward_hook(partial(self._answer, ramps, layer)))
        if stage == "fit" and isinstance(trainer.strategy, ParallelStrategy):
            self._handles.append(stack[-1].register_forward_hook(self._tie))
        if self._learned and not self._joins:
            self._handles.append(student.register_forward_hook(partial(self._keep_logits, "student")))
            if isinstance(teacher, nn.Module):
                self._handles.append(teacher.register_forward_hook(partial(self._keep_logits, "teacher")))

    def _prepare_fit(self, pl_module: L.LightningModule, student: nn.Module, ramps: Ramps) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "Expected a LightningModule with automatic optimization, because the ramps' loss is added to what its "
                "`training_step` returns, but got one without."
            )
        if self._freezes:
            # Now and not later: DDP wants to know what trains when it wraps the module.
            own = set(ramps.parameters())
            for name, parameter in pl_module.named_parameters():
                if parameter.requires_grad and parameter not in own:
                    self._frozen.append(name)
                    parameter.requires_grad_(False)
        distilled = pl_module.student if isinstance(pl_module, DistillationModule) else student
        path = next((name for name, part in distilled.named_modules() if part is ramps), None)
        depth = len(ramps.stack(student))
        self._learned = ramp_objectives(
            ramps,
            {layer: self._weight(layer, depth) for layer in ramps.exits},
            path=path or "ramps",
            from_student=self.training == "self_distill",
            teacher_weight=self.teacher_weight,
            temperature=self.temperature,
        )
        self._joins = isinstance(pl_module, DistillationModule) and path is not None
        if self._joins:
            assert isinstance(pl_module, DistillationModule)
            pl_module.add_objectives(self._learned)

    def _find_student(self, pl_module: L.LightningModule) -> nn.Module:
        if self.student is not None:
            return get_submodule(pl_module, self.student) if self.student else pl_module
        if isinstance(own := getattr(pl_module, "student", None), nn.Module):
            return own
        found = [name for name, child in pl_module.named_children() if _has_stack(child)]
        if len(found) != 1:
            raise ValueError(
                "Expected argument `student` to be the path of the model in the LightningModule that gets ramps, but "
                f"got None, and there are {found or 'no transformers models with a stack of layers'} among "
                f"{[name for name, _ in pl_module.named_children()]}. Pass `student=...`, and `layers=...` for a "
                "model that is not from transformers."
            )
        return pl_module.get_submodule(found[0])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the ramps a parameter group of their own, before the state of the optimizers is loaded."""
        ramps = self._find_student(pl_module).ramps
        assert isinstance(ramps, Ramps)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        give_own_group(trainer.optimizers, schedules, list(ramps.parameters()), "ramps", self.lr)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _hear(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = token_mask(kwargs)

    def _answer(self, ramps: Ramps, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        # In training, what runs without gradient only counts other batches of the step.
        listens = self._batch is not None and (torch.is_grad_enabled() or not self._trains)
        if not listens and not self._joins:
            return
        mask = token_mask(self._batch) if self._mask is None and listens else self._mask
        answer = ramps.ask(layer, first_tensor(output), mask)
        if listens:
            self._answers[layer] = answer

    def _keep_logits(self, who: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._batch is not None and not isinstance(module, L.LightningModule):
            self._logits[who] = logits_of(output).detach()

    def _tie(self, module: nn.Module, args: Any, output: Any) -> Any:
        # DDP looks in what a step returns for the parameters that take part, and FSDP2 at the gradient of a module's
        # output for whether backward has come to it: both have to find the ramps there, also behind a frozen backbone.
        if not torch.is_grad_enabled() or not self._answers:
            return output
        return tied(output, [logits for logits, _ in self._answers.values()])

    @property
    def _freezes(self) -> bool:
        return self.training in ("two_stage", "self_distill")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen to the ramps; where only they learn, the student stands still."""
        if self._freezes:
            student = self._find_student(pl_module)
            student.eval()
            student.ramps.train()  # type: ignore[union-attr]
        self._begin(batch)
        self._trains = True
        for objective in self._learned:
            objective.learns = self.training != "alternate" or pl_module.global_step % 2 == 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Listen no more."""
        if self._learned and self.training != "self_distill":
            # Looked for until one is found: looking makes a device wait.
            self._has_label = self._has_label or self._learned[0].task.has_label(batch)
        self._end()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the ramps' loss to that of any other module than a ``DistillationModule``."""
        if self._joins or not self._learned:
            return
        over_step = pl_module.mean_over_step if isinstance(pl_module, AccumulatingModule) else None
        with trainer.precision_plugin.forward_context():
            own = loss_of_ramps(self._learned, self._answers, self._logits, self._batch, over_step)
        rows = len(next(iter(self._answers.values()))[0])
        self._answers, self._logits = {}, {}
        pl_module.log("train_ramps_loss", own.detach(), batch_size=rows)
        # In place, because the loop goes on with this very tensor, divided and scaled by now as this one is here.
        own = own / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_(own if scaler is None else scaler.scale(own))

    def _begin(self, batch: Any) -> None:
        self._batch, self._answers, self._logits, self._trains = batch, {}, {}, False

    def _end(self) -> None:
        self._batch, self._mask, self._answers, self._logits = None, None, {}, {}

    def _weight(self, layer: int, depth: int) -> float:
        if callable(self.loss_weights):
            return float(self.loss_weights(layer, depth))
        return (layer + 1) / depth if self.loss_weights == "depth" else 1.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse data without a label where the ramps learn from labels."""
        if self.training != "self_distill" and self.teacher_weight < 1 and not self._has_label:
            raise ValueError(
                f"Expected batches with `labels` for training={self.training!r}, but not one had a label; "
                "'self_distill' needs none."
            )

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen to the ramps."""
        self._begin(batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log how good each ramp's answers are."""
        ramps = self._find_student(pl_module).ramps
        assert isinstance(ramps, Ramps)
        task = TASKS[ramps.task]
        for layer, (answer, _) in self._answers.items():
            logits, labels, mask = task.align(answer, batch)
            if labels is None:
                break
            if task.has_classes:
                classes = task.classes(labels)
                labelled = classes != IGNORE_INDEX if mask is None else mask & (classes != IGNORE_INDEX)
                count = int(labelled.sum())
                name, value = "accuracy", (logits.argmax(-1) == classes)[labelled].sum() / max(count, 1)
            else:
                logits, labels = task.scored(logits, labels, mask)
                name, value, count = "mse", F.mse_loss(logits, labels), len(labels)
            pl_module.log(f"val_exit{layer}_{name}", value, batch_size=count, sync_dist=True)
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Likewise where a run fails."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was, but with its ramps."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if isinstance(pl_module, DistillationModule):
            pl_module.remove_objectives([objective.name for objective in self._learned])
        self._learned, self._joins = [], False
        self._end()
        if self._frozen:
            self._find_student(pl_module).train()
        for name in self._frozen:
            pl_module.get_parameter(name).requires_grad_(True)
        self._frozen = []


def _has_stack(module: nn.Module) -> bool:
    try:
        return bool(find_stack(module))
    except ValueError:
        return False
