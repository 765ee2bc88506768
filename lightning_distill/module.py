"""DistillationModule: a teacher and a student as one LightningModule."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_distill import tasks
from lightning_distill.arguments import one_of
from lightning_distill.functional.clipping import gradient_of, group_tensors, total_norm
from lightning_distill.functional.projection import TopK
from lightning_distill.models import tokenizers
from lightning_distill.models.batch import batch_of, labels_of
from lightning_distill.models.calling import call_model, evaluating, logits_of
from lightning_distill.models.heads import LANGUAGE_MODELS, Task
from lightning_distill.models.pretrained import export, load_pretrained
from lightning_distill.models.wrapped import compile_parts_in_place
from lightning_distill.objectives import HardLabel, Loss, Objective, SoftTarget
from lightning_distill.objectives.deferred import deferred_losses
from lightning_distill.objectives.objective import named
from lightning_distill.signals.description import describe
from lightning_distill.signals.signals import Signals
from lightning_distill.step import checks as preflight
from lightning_distill.step.accumulation import AccumulatingModule
from lightning_distill.step.counting import Counted
from lightning_distill.step.forwards import Forwards, before
from lightning_distill.tasks.scores import Metrics, Scores
from lightning_distill.teachers import precision
from lightning_distill.teachers.holder import TeacherModule
from lightning_distill.teachers.precision import TeacherPrecision, cast_floats, load_teacher, own_precision
from lightning_distill.training import parallel
from lightning_distill.training.adapters import AdapterCheckpoints
from lightning_distill.training.finite_loss import FiniteLoss

_STAGES = ("val", "test")


class DistillationModule(AdapterCheckpoints, TeacherModule, AccumulatingModule):
    r"""Trains a student to imitate a frozen teacher.

    One step: the teacher's forward under ``no_grad``, the student's forward, each objective on what the two forwards
    left behind, the weighted sum :math:`\sum_i w_i L_i`. Each :math:`L_i` is a mean over the items that count (rows,
    or real tokens), over all ranks and over the batches that ``accumulate_grad_batches`` puts into one step: the
    gradient does not depend on how a batch is split. (The batches of a step are fetched and moved to the device
    together. What a subclass adds to the loss is averaged over them, or weighed by :meth:`mean_over_step`. For an
    objective of one's own without :meth:`~lightning_distill.objectives.Objective.count`, one on module paths, and for
    overridden steps, both models run once more, without gradient, to find out what counts.)

    Logged: ``train_loss``, ``train_<objective>``, ``grad_norm`` (before clipping), and for validation and test
    ``<stage>_loss``, ``<stage>_<objective>``, ``<stage>_<metric>`` (the student's) and ``<stage>_agreement``: the share
    of predictions in which student and teacher agree (in regression, their Pearson correlation).

    A NaN or infinite loss stops the run before the update, see :class:`~lightning_distill.callbacks.FiniteLoss`.

    The teacher moves with the module but is no submodule of it: no optimizer, checkpoint, callback or ``apply`` reaches
    it. It is frozen and in eval until the end of a run, and then as it was given, as is the student's mode. Nor does a
    checkpoint hold the frozen base of a student with adapters (peft): give the student with its base to load it.

    Args:
        teacher: The model to imitate: a module, a transformers folder, or a hub id. With None the student learns from
            the labels alone: fine-tuning, for a teacher-to-be or as the baseline that distillation must beat.
        student: The model that learns, likewise; put into train mode.
        objectives: A list of objectives, or a dictionary that names them. Default:
            ``[SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)]``, without a teacher ``[HardLabel()]``.
        task: What the batch asks for; ``"auto"`` reads it off the student's class. A batch is a mapping with the
            models' inputs and ``labels`` (or ``label``, ``label_ids``), or a pair ``(inputs, labels)``. A plain module
            classifies: one logit is that of two classes, and ``"regression"`` says that logits are real values.
        optimizer: Called with the trainable parameters. Default: AdamW with learning rate 5e-5 for a transformers
            student and 1e-3 for any other.
        lr_scheduler: Called with the optimizer; returns any scheduler of torch, Lightning's dictionary of scheduler,
            interval and monitor, or None for no schedule.
        lr_scheduler_interval: How often a scheduler moves: once an ``"epoch"`` or every optimizer ``"step"``.
        lr_scheduler_monitor: The logged metric that a plateau waits for.
        metrics: torchmetrics called with logits and labels of the items that have one (``Binary...`` with the
            probability of class 1): one, logged by its class in short (``val_f1`` of ``MulticlassF1Score``), or a
            dictionary or collection, by the names in it. Default: accuracy, perplexity for language models, Pearson
            correlation for regression.
        tokenizer: Saved beside the student by :meth:`export`.
        teacher_precision: What the teacher computes in, whatever the Trainer's ``precision`` is: ``"32"``, ``"bf16"``,
            ``"16"`` (a module is cast in place), or ``"int8"``, ``"nf4"``, ``"fp4"`` (transformers models, by
            bitsandbytes, all but the classifier). None: what the Trainer says.
        gradient_checkpointing: Whether the layers of a transformers student keep only their inputs and run again in the
            backward: less memory for one more forward of them.
        own_teacher_inputs: Whether each batch has the teacher's inputs under keys that begin with ``teacher_``
            (``teacher_input_ids``, ``teacher_attention_mask``), because its tokenizer is another one.

    Raises:
        ValueError: If student and teacher cannot be compared (shared parameters; other numbers of classes,
            vocabularies, tokenizers or label names), two objectives have one name, or an objective does not fit the
            pair.
        TypeError: If a model has no forward, or gives no logits and an objective reads them.

    Example:
        >>> import lightning as L, torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_distill import DistillationModule
        >>> _ = L.seed_everything(0, verbose=False)
        >>> teacher = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> module = DistillationModule(teacher, student)
        >>> sorted(module.state_dict())
        ['student.0.bias', 'student.0.weight', 'student.2.bias', 'student.2.weight']
        >>> x = torch.randn(8, 4)
        >>> {name: loss.shape for name, loss in module.losses((x, torch.arange(8) % 3)).items()}
        {'soft_target': torch.Size([]), 'hard_label': torch.Size([])}

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(
        self,
        teacher: nn.Module | str | None,
        student: nn.Module | str,
        objectives: list[Objective] | dict[str, Objective] | None = None,
        *,
        task: Task | Literal["auto"] = "auto",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau | dict] | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str | None = None,
        metrics: Metrics | None = None,
        tokenizer: Any = None,
        teacher_precision: TeacherPrecision | None = None,
        gradient_checkpointing: bool = False,
        own_teacher_inputs: bool = False,
    ) -> None:
        super().__init__()
        # It is about sharding, and `configure_model` does nothing without it.
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
        # Only paths and names are written to checkpoints: a module or a callable in the hyper-parameters would keep
        # the checkpoint from loading under `weights_only`.
        ignored = ["objectives", "optimizer", "lr_scheduler", "metrics", "tokenizer"]
        models = {"teacher": teacher, "student": student}
        ignored += [name for name, model in models.items() if not isinstance(model, str)]
        ignored += [] if own_teacher_inputs else ["own_teacher_inputs"]
        self.save_hyperparameters(ignore=ignored)

        self.student = compile_parts_in_place(load_pretrained(student, "student")).train()
        if gradient_checkpointing:
            preflight.enable_gradient_checkpointing(self.student)
        self.teacher_precision = teacher_precision
        self.teacher_is_given = not isinstance(teacher, str)
        self.teacher = None if teacher is None else load_teacher(teacher, teacher_precision)
        one_of("task", task, ("auto", *get_args(Task)))
        self.task: Task = tasks.infer_task(self.student) if task == "auto" else task
        self.tokenizer = tokenizer
        one_of("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._schedule = {"interval": lr_scheduler_interval, "monitor": lr_scheduler_monitor}
        self._label_order: Tensor | None = None
        # Whether the classes of both mean the same, so that their predictions can be compared.
        self._same_answers = True
        self._checked: set[str] = set()
        self._has_warned = False  # of a batch without labels
        self._scale: float | None = None  # of the GradScaler, before the optimizer's step

        if objectives is None:
            objectives = (
                [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)]
                if teacher is not None
                else [HardLabel()]
            )
        self.objectives = nn.ModuleDict(named(objectives))
        headless = self._check_models()
        one_of("own_teacher_inputs", own_teacher_inputs, (False, True))
        self._own_teacher_inputs = own_teacher_inputs
        shared_words = self._bind(headless)
        self.forwards = Forwards(
            self.task, self._each_objective(), shared_words, headless, own_teacher_inputs=self._own_teacher_inputs
        )

        self._counted = Counted(self._each_objective())
        self._scores = nn.ModuleDict({stage: Scores(self.task, metrics) for stage in _STAGES})

    def _check_models(self) -> set[str]:
        """Refuse models that do not run or do not answer; returns the roles of those that give no logits."""
        headless = set()
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            step = f"{role}_step"
            # Who calls a model in a way of their own knows what it gives.
            if model is None or getattr(type(self), step) is not getattr(DistillationModule, step):
                continue
            preflight.check_forward(model, role)
            if not preflight.check_answers(model, role, self._each_objective()):
                headless.add(role)
        return headless

    def _bind(self, headless: set[str]) -> int | None:
        """Tell the objectives the two models; returns the number of words that padded vocabularies share."""
        shared_words = None
        preflight.check_objectives(self.task, self._each_objective())
        if self.teacher is None:
            needy = [name for name, objective in self._each_objective().items() if objective.needs_teacher]
            if needy:
                raise ValueError(
                    f"Expected argument `teacher` to be a model, because {needy} learn from it, but got None."
                )
            student_info = teacher_info = describe(self.student)
        else:
            objectives = self._each_objective().values()
            comparing = [o.any_vocabulary for o in objectives if o.needs_teacher and o.reads_logits]
            any_vocabulary = bool(comparing) and all(comparing)
            self._label_order = preflight.check_pair(
                self.student,
                self.teacher,
                self.task,
                any_vocabulary=any_vocabulary,
                same_answers=not headless,
                own_inputs=self._own_teacher_inputs,
            )
            self._own_teacher_inputs |= any_vocabulary and tokenizers.other_tokenizers(self.student, self.teacher)
            if self.task in LANGUAGE_MODELS and not any_vocabulary:
                shared_words = tokenizers.shared_words(self.student, self.teacher)
            self._same_answers = not any_vocabulary and not headless
            student_info, teacher_info = describe(self.student), describe(self.teacher)
        for objective in self._each_objective().values():
            objective.bind(student_info, teacher_info)
        return shared_words

    @property
    def _needs_teacher(self) -> bool:
        return any(objective.needs_teacher for objective in self._each_objective().values())

    def _each_objective(self) -> dict[str, Objective]:
        return dict(self.objectives.items())  # type: ignore[arg-type]

    # -- the parts of a step, each there to be overridden ------------------------------------------------------------

    def student_step(self, batch: Any) -> Signals:
        """The student's forward for a batch, with the signals the objectives ask for."""
        return self.forwards.run("student", self.student, batch)

    @torch.no_grad()
    def teacher_step(self, batch: Any) -> Signals:
        """The teacher's signals for a batch, under ``no_grad``, with its classes in the student's order."""
        return self.in_student_order(self.teacher_signals(batch))

    @torch.no_grad()
    def teacher_signals(self, batch: Any) -> Signals:
        """The teacher's forward for a batch, with its classes in its own order: the same whatever the student.

        What answers in the teacher's place, as :class:`~lightning_distill.callbacks.TeacherCache` does, stands here.
        """
        assert self.teacher is not None
        if any(module.training for module in self.teacher.modules()):  # outside a run
            with evaluating(self.teacher):
                return self.teacher_signals(batch)
        if self.teacher_precision is None:
            return self.forwards.run("teacher", self.teacher, batch)
        with own_precision(self.teacher_precision, self.device) as dtype:
            return self.forwards.run("teacher", self.teacher, cast_floats(batch, dtype))

    def in_student_order(self, signals: Signals) -> Signals:
        """The teacher's signals with their classes put, by name, in the student's order."""
        if self._label_order is None:
            return signals
        order = self._label_order.to(signals.logits.device)
        if not signals.top_k:
            return dataclasses.replace(signals, logits=signals.logits[..., order])
        places = order.argsort()  # of each of the teacher's classes among the student's
        top_k = {t: TopK(best.log_probs, places[best.classes]) for t, best in signals.top_k.items()}
        return dataclasses.replace(signals, top_k=top_k)

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the objectives' losses.

        Args:
            losses: One scalar per objective, by name.

        Returns:
            A scalar.
        """
        objectives = self._each_objective()
        return torch.stack([objectives[name].weight * loss for name, loss in losses.items()]).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's and the objectives' trainable parameters, and its schedule."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self._optimizer is None:
            lr = 5e-5 if hasattr(self.student, "config") else 1e-3
            optimizer: Optimizer = torch.optim.AdamW(parameters, lr=lr)
        else:
            optimizer = self._optimizer(parameters)
        schedule: Any = None if self._lr_scheduler is None else self._lr_scheduler(optimizer)
        if schedule is None:
            return optimizer
        if not isinstance(schedule, dict):
            own = getattr(schedule, "monitor", None)  # Lightning's own plateau has it
            schedule = {"scheduler": schedule, **self._schedule, **({"monitor": own} if own else {})}
        if isinstance(schedule["scheduler"], ReduceLROnPlateau) and schedule.get("monitor") is None:
            raise ValueError(
                "Expected argument `lr_scheduler_monitor` to be the name of a logged metric, such as 'val_loss', for a "
                "schedule that waits for a plateau, but got None."
            )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def configure_callbacks(self) -> list[L.Callback]:
        """A loss that is not finite stops the run before the update, unless the Trainer's own callback says else."""
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        own = any(isinstance(callback, FiniteLoss) for callback in given)
        return [*super().configure_callbacks(), *([] if own else [FiniteLoss()])]

    # -- one step ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Any) -> Tensor:
        """Logits of the student for a batch, as the student gives them."""
        batch = batch_of("student", batch)
        self.forwards.look("student", self.student, batch)
        return logits_of(call_model(self.student, batch))

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Each objective's loss on a batch, by name, unweighted: the mean over what counts, over all ranks."""
        student, teacher = self._signals(batch, self._needs_teacher)
        return self._reduce(student, teacher)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total loss of a batch; every objective is logged by name."""
        first = "train" not in self._checked
        self._check_batch(batch)
        student, teacher = self._signals(batch, self._needs_teacher)
        if first:
            preflight.check_signals(student, teacher, any_vocabulary=not self._same_answers)
        losses, _ = self._reduce(student, teacher)
        size = len(student.logits)
        self.log_dict({f"train_{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        if (shares := self._shares_of_step("objectives", self._counts)) is not None:
            losses = {name: loss * share for (name, loss), share in zip(losses.items(), shares, strict=True)}
        loss = self.total_loss(losses)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size)
        return loss

    def _counts(self, batch: Any) -> Tensor:
        """How much of a batch counts for each objective, shape ``[objectives]``."""
        objectives = self._each_objective().values()
        if not self._has_own_steps and all(objective.counts_ahead for objective in objectives):
            student, teacher = (before(self.task, batch_of(role, batch)) for role in ("student", "teacher"))
            counts = [objective.count(student, teacher) for objective in objectives]
            if not any(count is None for count in counts):
                return torch.stack(counts)  # type: ignore[arg-type]
        with evaluating(self.student), torch.no_grad():
            return self._reduce(*self._signals(batch, self._needs_teacher))[1]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses, the student's metric and its agreement with the teacher."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`, logged as ``test_...``."""
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits of the student."""
        return self(batch)

    def _evaluate(self, batch: Any, stage: str, dataloader_idx: int = 0) -> None:
        self._check_batch(batch)
        student, teacher = self._signals(batch, self.teacher is not None)
        losses, counts = self._reduce(student, teacher)
        # Weights of classes make fractions of them.
        sizes: list[Any] = [int(count) if count.is_integer() else count for count in counts.tolist()]
        for (name, value), size in zip(losses.items(), sizes, strict=True):
            self.log(f"{stage}_{name}", value, batch_size=size, sync_dist=True)
        self.log(f"{stage}_loss", self.total_loss(losses), batch_size=max(sizes), sync_dist=True)

        scores, path = self.scores(stage, dataloader_idx), f"_scores.{_key(stage, dataloader_idx)}"
        compares = teacher is not None and self._same_answers
        scored = student.labels is not None and "student" not in self.forwards.headless
        scores.update(student, teacher if compares else None, scored)
        if compares:
            self.log(f"{stage}_agreement", scores.agreement, prog_bar=True, metric_attribute=f"{path}.agreement")
        # One process of several may not have met a label yet; they compute together.
        if scored and (scores.has_scores or self.trainer.world_size > 1):
            for name, metric in scores.metrics.items():
                attribute = f"{path}.metrics.{name}"
                self.log(f"{stage}_{name}", metric, prog_bar=True, metric_attribute=attribute)  # type: ignore[arg-type]

    def scores(self, stage: str, dataloader_idx: int = 0) -> Scores:
        """What the student is scored by on one dataloader.

        Args:
            stage: ``"val"`` or ``"test"``.
            dataloader_idx: Which of several dataloaders.
        """
        key = _key(stage, dataloader_idx)
        if key not in self._scores:
            self._scores[key] = self.scores(stage).fresh()
        scores = self._scores[key]
        assert isinstance(scores, Scores)
        return scores

    def _check_batch(self, batch: Any) -> None:
        """Refuse a batch without a real token or with an impossible label.

        Every batch on the CPU, where looking is free; elsewhere the first one of each stage, as each look would make
        the device wait.
        """
        stage = self.trainer.state.stage
        where = stage.value if stage else ""
        labels = labels_of(batch)
        if labels is None or labels.device.type == "cpu" or where not in self._checked:
            self._warn_of_no_label(batch, where)
        if where in self._checked and not (labels is not None and labels.device.type == "cpu"):
            return
        field = "vocab_size" if self.task in LANGUAGE_MODELS else "num_labels"
        config, name = getattr(self.student, "config", None), f"a batch of the {where} data"
        # What the config of a body says of classes is a default that nobody chose.
        num_classes = None if "student" in self.forwards.headless else getattr(config, field, None)
        preflight.check_batch(self.task, batch, num_classes, name)
        if where not in self._checked:
            self.forwards.look_again()
        self._checked.add(where)

    def _warn_of_no_label(self, batch: Any, where: str) -> None:
        needy = [name for name, objective in self._each_objective().items() if objective.needs_labels]
        if self.task in LANGUAGE_MODELS:
            needy = list(self._each_objective())
        if needy and not self._has_warned and not tasks.has_label(self.task, batch):
            self._has_warned = True
            warnings.warn(
                f"A batch of the {where} data has no label, so it counts nothing for {needy}; neither will others.",
                stacklevel=2,
            )

    @property
    def _has_own_steps(self) -> bool:
        own = type(self).student_step, type(self).teacher_step
        return own != (DistillationModule.student_step, DistillationModule.teacher_step)

    def _signals(self, batch: Any, with_teacher: bool) -> tuple[Signals, Signals | None]:
        """What both forwards left behind; without logits where the vocabulary is large and nothing needs them whole."""
        models: dict[str, Any] = {}
        if not self._has_own_steps:
            models = {"student": self.student} | ({"teacher": self.teacher} if with_teacher else {})
            # Before the teacher runs, so that what the student cannot read is said first.
            self.forwards.look("student", self.student, batch_of("student", batch))
        with self.forwards.deferring(models):
            teacher = self.teacher_step(batch) if with_teacher else None
            student = self.student_step(batch)
        if self.forwards.was_wrong(student, teacher):
            return self._signals(batch, with_teacher)
        for signals in (student, teacher):
            if signals is not None:
                tasks.settle(self.task, signals)
        return student, teacher

    def _reduce(self, student: Signals, teacher: Signals | None) -> tuple[dict[str, Tensor], Tensor]:
        """Each objective's mean over what counts, and how much counts for each, shape ``[objectives]``."""
        found = {} if student.deferred is None else deferred_losses(self._each_objective(), student, teacher)
        for name, objective in self._each_objective().items():
            if name not in found:
                unlabelled = self._trainer is not None and student.labels is None and objective.needs_labels
                loss = Loss(student.logits.flatten()[:0].float()) if unlabelled else objective(student, teacher)
                found[name] = loss.sum(), loss.count()
        losses = {name: found[name] for name in self._each_objective()}
        counts = torch.stack([count for _, count in losses.values()]).float()
        counts = self._mean_over_ranks(counts)
        if self._trainer is not None and self.trainer.state.stage is not None:
            self._counted.add(self.trainer.state.stage.value, counts)
        counts = counts.clamp(min=torch.finfo(counts.dtype).tiny)
        means = {name: total / count for (name, (total, _)), count in zip(losses.items(), counts, strict=True)}
        return means, counts

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would train or save something else than is meant, and data of other classes.

        A CPU that emulates bfloat16 is said.
        """
        super().setup(stage)
        if self.task not in LANGUAGE_MODELS:
            preflight.check_data_classes(self.student, getattr(self.trainer, "datamodule", None))
        models = {"student": self.student, "teacher": self.teacher}
        precision.warn_of_slow_bf16(str(self.trainer.precision), models, self.trainer.strategy.root_device)
        if stage == "fit":
            parallel.check_trainer(self.trainer, self.student, self.teacher)
            parallel.look_for_unused(self.trainer.strategy, self._each_objective().values())

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy``: split student, teacher and objectives by plan and shard them by layer."""
        mesh = self.device_mesh
        if mesh is None or parallel.is_parallel(self):
            return
        if mesh["tensor_parallel"].size() > 1:
            parallel.check_signals(self._each_objective().values())
        parallel.parallelize(self.student, self.teacher, self.objectives, mesh)

    def on_fit_start(self) -> None:
        """Refuse an optimizer that would divide by 0."""
        for optimizer in self.trainer.optimizers:
            preflight.check_eps(optimizer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the objectives how much of the training is done, for their schedules."""
        self._set_progress()

    def on_validation_start(self) -> None:
        """Tell the objectives too: a run that resumes at its validation has not had a training batch yet."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._set_progress()

    def _set_progress(self) -> None:
        # Read from the step, not counted here, so that a resumed run stands where it stood.
        steps = self.trainer.estimated_stepping_batches
        for objective in self._each_objective().values():
            objective.set_progress(min(1.0, self.global_step / steps) if steps else 0.0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the gradient on the steps that are logged; GradientClipping logs the one it computes."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        clips = any(getattr(callback, "checks_gradients", False) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if not clips and every and (self.global_step + 1) % every == 0:
            gradients = [gradient for p in self.parameters() if (gradient := gradient_of(p)) is not None]
            norm = total_norm(group_tensors(gradients))
            # A fused optimizer unscales in its step, which is to come.
            fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            self.log("grad_norm", norm / scaler.get_scale() if fused else norm)
        self._scale = None if scaler is None else scaler.get_scale()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step the schedule, unless it follows the steps and the GradScaler has left this one out."""
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        config = next(config for config in self.trainer.lr_scheduler_configs if config.scheduler is scheduler)
        follows = config.interval == "step" and config.frequency == 1
        # It lowers its scale then, and only then.
        if follows and self._scale is not None and scaler.get_scale() < self._scale:
            return
        super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Refuse training data without a label; see :class:`lightning_distill.step.counting.Counted`."""
        self._counted.check("train", lambda counts: counts)

    def on_validation_epoch_end(self) -> None:
        """Refuse validation data without a label."""
        self._check_counted("validate")

    def on_test_epoch_end(self) -> None:
        """Refuse test data without a label."""
        self._check_counted("test")

    def _check_counted(self, stage: str) -> None:
        self._counted.check(stage, lambda counts: self.trainer.strategy.reduce(counts, reduce_op="sum"))

    def on_fit_end(self) -> None:
        """Refuse a fit in which there was nothing to learn from."""
        if self.trainer.num_training_batches == 0 and self.trainer.limit_train_batches != 0:
            raise ValueError("Expected the training data to have at least one batch, but got none. Give it rows.")

    def give_back(self) -> None:
        """Put both models into the modes they were given in, and take every hook off them."""
        super().give_back()
        self._window.close()
        self.release_hooks()

    def release_hooks(self) -> None:
        """Take every hook off the two models until the next step: to copy one, or to put another in its place."""
        self.forwards.release_hooks()

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write the student where others load it: see :func:`lightning_distill.models.pretrained.export`.

        Raises:
            ValueError: If this process has only a part of the student.
        """
        if parallel.is_parallel(self.student):
            raise ValueError(
                "Expected a whole student to export, but got one in parts. Save a checkpoint with "
                "`ModelParallelStrategy(save_distributed_checkpoint=False)`, load it in one process "
                "(`DistillationModule.load_from_checkpoint`) and export that."
            )
        self.release_hooks()
        return export(self.student, folder, self.tokenizer)


def _key(stage: str, dataloader_idx: int) -> str:
    return f"{stage}_{dataloader_idx}" if dataloader_idx else stage
