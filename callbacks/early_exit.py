"""EarlyExit: give a student ramps and train them, in the same fit or behind a frozen backbone."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_distill.arguments import between, one_of, typed
from lightning_distill.early_exit.criteria import Criterion
from lightning_distill.early_exit.losses import RampLoss
from lightning_distill.early_exit.ramps import Exits, RampKind, Ramps, find_stack, make_ramps
from lightning_distill.early_exit.walk import first_tensor
from lightning_distill.models.batch import token_mask
from lightning_distill.models.calling import logits_of
from lightning_distill.optim.own_group import give_own_group
from lightning_distill.signals.description import get_submodule
from lightning_distill.signals.signals import Signals
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
        self._batch: Any = None  # the batch under way, which the ramps read their mask from
        self._trains = False  # whether it is a batch of training
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
        stack = ramps.stack(student)
        for layer in ramps.exits:
            self._handles.append(stack[layer].register_forward_hook(partial(self._answer, ramps, layer)))
        self._handles.append(student.register_forward_hook(partial(self._keep_logits, "student")))
        if self._freezes:
            self._handles.append(student.register_forward_hook(self._tie))
        if isinstance(teacher, nn.Module) and self.teacher_weight and not hasattr(pl_module, "loss_terms"):
            self._handles.append(teacher.register_forward_hook(partial(self._keep_logits, "teacher")))
        if stage == "fit":
            self._prepare_fit(pl_module, student, ramps, len(stack))

    def _prepare_fit(self, pl_module: L.LightningModule, student: nn.Module, ramps: Ramps, depth: int) -> None:
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
        if (terms := getattr(pl_module, "loss_terms", None)) is not None:
            terms["ramps"] = partial(self._add_in_module, pl_module, depth)
            return
        step = pl_module.training_step

        @wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            batch = kwargs["batch"] if "batch" in kwargs else args[0]
            output = step(*args, **kwargs)
            if output is None:
                return None
            own: Any = output["loss"] if isinstance(output, dict) else output
            total = self._add(pl_module, depth, batch, own)
            return {**output, "loss": total} if isinstance(output, dict) else total

        # On the object, not its class, until `teardown`: no hook lies between a step and its backward that may add to
        # the loss, and inside the step is where DDP looks for what takes part in it.
        pl_module.training_step = training_step  # type: ignore[method-assign]

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

    def _answer(self, ramps: Ramps, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._listens:
            self._answers[layer] = ramps.ask(layer, first_tensor(output), token_mask(self._batch))

    @property
    def _listens(self) -> bool:
        # In training, what runs without gradient only counts other batches of the step.
        return self._batch is not None and (torch.is_grad_enabled() or not self._trains)

    def _keep_logits(self, who: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._listens and not isinstance(module, L.LightningModule):
            self._logits[who] = logits_of(output).detach()

    def _tie(self, module: nn.Module, args: Any, output: Any) -> Any:
        # FSDP2 learns from the gradient of a module's output that backward has come to it. With the backbone frozen the
        # output would have none, and the ramps' gradients would never reach the sharded parameters.
        if not isinstance(module, FSDPModule) or not self._answers:
            return output
        nothing = 0.0 * torch.stack([logits.float().sum() for logits, _ in self._answers.values()]).sum()
        return tree_map_only(Tensor, lambda x: x + nothing.to(x.dtype) if x.is_floating_point() else x, output)

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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Listen no more."""
        self._end()

    def _add_in_module(
        self,
        pl_module: L.LightningModule,
        depth: int,
        own: Tensor,
        batch: Any,
        student: Signals,
        teacher: Signals | None,
    ) -> Tensor:
        """The loss of a step of a ``DistillationModule`` with that of the ramps."""
        if self.teacher_weight:
            if teacher is None:
                teacher = pl_module.teacher_step(batch)  # type: ignore[operator]
            if teacher.top_k:
                raise ValueError(
                    "Expected argument `teacher_weight` of `EarlyExit` to come with whole logits of the teacher, "
                    "but got the best classes alone. Use `TeacherCache(..., top_k=None)`."
                )
            self._logits["teacher"] = teacher.logits.detach()
        return self._add(pl_module, depth, batch, own)

    def _add(self, pl_module: L.LightningModule, depth: int, batch: Any, own: Tensor) -> Tensor:
        """The loss of a step with that of the ramps."""
        loss = self._loss(pl_module, self._find_student(pl_module), depth, batch)
        rows = len(next(iter(self._answers.values()))[0])
        self._answers, self._logits = {}, {}
        pl_module.log("train_ramps_loss", loss.detach(), batch_size=rows)
        if self.training == "alternate" and pl_module.global_step % 2 == 0:
            loss = 0.0 * loss  # not left out: under DDP every parameter takes part in every step
        if self._freezes:
            return loss + 0.0 * own if own.requires_grad else loss  # see `_tie`
        return own + loss

    def _begin(self, batch: Any) -> None:
        self._batch, self._answers, self._logits, self._trains = batch, {}, {}, False

    def _end(self) -> None:
        self._batch, self._answers, self._logits = None, {}, {}

    def _loss(self, pl_module: L.LightningModule, student: nn.Module, depth: int, batch: Any) -> Tensor:
        ramps = student.ramps
        assert isinstance(ramps, Ramps)
        if missing := sorted(set(ramps.exits) - self._answers.keys()):
            raise RuntimeError(f"Expected `training_step` to run the student's layers {missing}, but it did not.")
        from_student, task = self.training == "self_distill", TASKS[ramps.task]
        for who, needed in (("student", from_student), ("teacher", self.teacher_weight > 0)):
            if needed and who not in self._logits:
                raise RuntimeError(f"Expected `training_step` to call the {who} itself, for its logits; it did not.")
        if not from_student:
            # Looked for until one is found: looking makes a device wait.
            self._has_label = self._has_label or task.has_label(batch)

        def mean(name: str, value: Tensor, count: Callable[[Any], Tensor]) -> Tensor:
            # Over all batches of the step.
            if not isinstance(pl_module, AccumulatingModule):
                return value
            return pl_module.mean_over_step(name, value, batch, count)

        loss = RampLoss(from_student, self.teacher_weight, self.temperature)
        losses = loss(task, self._answers, batch, self._logits, mean)
        return torch.stack([self._weight(layer, depth) * one for layer, one in losses.items()]).sum()

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
            logits, labels = task.scored(logits, labels, mask)
            count = len(labels)
            if task.has_classes:
                name, value = "accuracy", (logits.argmax(-1) == labels).sum() / max(count, 1)
            else:
                name, value = "mse", F.mse_loss(logits, labels)
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
        vars(pl_module).pop("training_step", None)
        getattr(pl_module, "loss_terms", {}).pop("ramps", None)
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
