"""DistillationModule: a teacher and a student as one LightningModule."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_distill.arguments import one_of
from lightning_distill.models.batch import batch_of
from lightning_distill.models.calling import call_model, evaluating, logits_of
from lightning_distill.models.pretrained import export, load_pretrained
from lightning_distill.models.wrapped import compile_parts_in_place
from lightning_distill.objectives.logits import HardLabel, SoftTarget
from lightning_distill.objectives.objective import Objective, named
from lightning_distill.optim.configured import MakeOptimizer, MakeSchedule, configured
from lightning_distill.signals.signals import Signals
from lightning_distill.step.accumulation import AccumulatingModule
from lightning_distill.step.checked_run import CheckedRun
from lightning_distill.step.checks import StepCheck, enable_gradient_checkpointing
from lightning_distill.step.counting import Counted, counted_ahead
from lightning_distill.step.evaluation import EvaluatedModule
from lightning_distill.step.forwards import Forwards, TeacherSource, teacher_forward
from lightning_distill.step.losses import sums_and_counts, totals_of, weighted_sum
from lightning_distill.step.pairing import pair
from lightning_distill.tasks import TaskName, task_named
from lightning_distill.tasks.scores import Metrics
from lightning_distill.teachers.class_order import ClassOrder
from lightning_distill.teachers.precision import TeacherPrecision, load_teacher
from lightning_distill.training import parallel
from lightning_distill.training.adapters import AdapterCheckpoints
from lightning_distill.training.scaled_steps import ScaledSteps


class DistillationModule(AdapterCheckpoints, CheckedRun, AccumulatingModule, ScaledSteps, EvaluatedModule):
    r"""Trains a student to imitate a frozen teacher.

    One step: the teacher's forward under ``no_grad``, the student's forward, each objective on what the two forwards
    left behind, the weighted sum :math:`\sum_i w_i L_i`. Each :math:`L_i` is a mean over the items that count (rows,
    or real tokens), over all ranks and over the batches that ``accumulate_grad_batches`` puts into one step: the
    gradient does not depend on how a batch is split.

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
            classifies: one logit is that of two classes; with ``"multi_label"`` each logit is that of a label, there or
            not, with ``"regression"`` a real value. The config of a student is told, as ``problem_type``.
        optimizer: Called with the trainable parameters. Default: AdamW with learning rate 5e-5 for a transformers
            student and 1e-3 for any other.
        lr_scheduler: Called with the optimizer; returns any scheduler of torch, Lightning's dictionary of scheduler,
            interval and monitor, or None for no schedule.
        lr_scheduler_interval: How often a scheduler moves: once an ``"epoch"`` or every optimizer ``"step"``.
        lr_scheduler_monitor: The logged metric that a plateau waits for.
        metrics: torchmetrics called with logits and labels of the items that have one (``Binary...`` with the
            probability of class 1): one, logged by its class in short (``val_f1`` of ``MulticlassF1Score``), or a
            dictionary or collection, by the names in it. Default: accuracy, perplexity for language models, macro F1
            for several labels, Pearson correlation for regression.
        tokenizer: Saved beside the student by :meth:`export`: a tokenizer or an image processor.
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
        task: TaskName | Literal["auto"] = "auto",
        optimizer: MakeOptimizer | None = None,
        lr_scheduler: MakeSchedule | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str | None = None,
        metrics: Metrics | None = None,
        tokenizer: Any = None,
        teacher_precision: TeacherPrecision | None = None,
        gradient_checkpointing: bool = False,
        own_teacher_inputs: bool = False,
    ) -> None:
        super().__init__()
        # Only paths and names are written to checkpoints: a module or a callable in the hyper-parameters would keep
        # the checkpoint from loading under `weights_only`.
        ignored = ["objectives", "optimizer", "lr_scheduler", "metrics", "tokenizer"]
        others = {"teacher": isinstance(teacher, str), "student": isinstance(student, str)}
        others["own_teacher_inputs"] = own_teacher_inputs
        self.save_hyperparameters(ignore=[*ignored, *(name for name, kept in others.items() if not kept)])
        one_of("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        one_of("own_teacher_inputs", own_teacher_inputs, (False, True))

        self.student = compile_parts_in_place(load_pretrained(student, "student")).train()
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.student)
        self.teacher_precision = teacher_precision
        self.teacher_is_given = not isinstance(teacher, str)
        self.teacher = None if teacher is None else load_teacher(teacher, teacher_precision)
        self._task = task_named(task, self.student)
        self.task: TaskName = self._task.name
        self.tokenizer = tokenizer
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._schedule: dict[str, Any] = {"interval": lr_scheduler_interval, "monitor": lr_scheduler_monitor}

        if objectives is None:
            soft = [] if teacher is None else [SoftTarget(temperature=2.0, weight=0.7)]
            objectives = [*soft, HardLabel(weight=0.3 if soft else 1.0)]
        named_objectives = named(objectives)
        self.objectives = nn.ModuleDict(named_objectives)
        own: dict[str, Any] = {"own_steps": self._own_steps, "own_teacher_inputs": own_teacher_inputs}
        self.pairing = pair(self.student, self.teacher, self._task, named_objectives, **own)
        learned: Any = self.objectives  # not a copy: a callback may add some
        self.forwards = Forwards(self._task, learned, self.pairing)
        self._teacher_source: TeacherSource | None = None
        self._check = StepCheck(self._task, named_objectives, same_answers=self.pairing.same_answers)
        self._counted = Counted()
        self._score_by(self._task, metrics)

    @property
    def _own_steps(self) -> set[str]:
        """The roles whose model is called by a step of a subclass."""
        steps = {"student": "student_step", "teacher": "teacher_step"}
        base, own = DistillationModule, type(self)
        return {role for role, step in steps.items() if getattr(own, step) is not getattr(base, step)}

    @property
    def teacher_source(self) -> TeacherSource:
        """Gives the teacher's signals for a batch: the seam where what answers in its place, as a cache, is put."""
        if self._teacher_source is not None:
            return self._teacher_source
        return self.teacher_signals if self.teacher_source_has_own_order else self.teacher_step

    @teacher_source.setter
    def teacher_source(self, source: TeacherSource | None) -> None:
        if source is not None and not self.teacher_source_has_own_order:
            name = type(self).__name__
            raise ValueError(f"Expected no `teacher_step` beside `teacher_source`, but {name} has one. Ask it there.")
        self._teacher_source = source

    @property
    def teacher_source_has_own_order(self) -> bool:
        """Whether :attr:`teacher_source` has the teacher's order of classes; a user's own step has the student's."""
        return "teacher" not in self._own_steps

    @property
    def _needs_teacher(self) -> bool:
        return any(objective.needs_teacher for objective in self._each_objective().values())

    # -- the parts of a step, each there to be overridden ------------------------------------------------------------

    def student_step(self, batch: Any) -> Signals:
        """The student's forward for a batch, with the signals the objectives ask for."""
        return self.forwards.run("student", self.student, batch)

    @torch.no_grad()
    def teacher_step(self, batch: Any) -> Signals:
        """The teacher's signals for a batch, under ``no_grad``, with its classes in the student's order."""
        source = self.teacher_source if self.teacher_source_has_own_order else self.teacher_signals
        return self.in_student_order(source(batch))

    def teacher_signals(self, batch: Any) -> Signals:
        """The teacher's forward for a batch, with its classes in its own order: the same whatever the student."""
        return teacher_forward(self, batch)

    def in_student_order(self, signals: Signals) -> Signals:
        """The teacher's signals with their classes put, by name, in the student's order."""
        return ClassOrder(self.pairing.class_index, self._task.named_dim)(signals)

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the objectives' losses, scalars by name."""
        return weighted_sum(self._each_objective(), losses)

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total loss of a batch; every objective is logged by name, and so is what callbacks add."""
        student, teacher = self.signals(batch, with_teacher=self._needs_teacher)
        self._check.first_signals(student, teacher)
        losses, _ = self.mean_losses(student, teacher)
        rows = len(student.logits)
        self.log_dict({f"train_{name}": loss.detach() for name, loss in losses.items()}, batch_size=rows)
        weighed = self.weighed_in_step("objectives", losses, self._counts)
        totals = totals_of(self._each_objective(), weighed, own=self.total_loss)
        for name, total in totals.items():
            self.log(f"train_{name}", total.detach(), prog_bar=name == "loss", batch_size=rows)
        return torch.stack([*totals.values()]).sum()

    def signals(self, batch: Any, *, with_teacher: bool) -> tuple[Signals, Signals | None]:
        """What both forwards leave behind; no logits where the vocabulary is large and nothing needs them whole."""
        with nullcontext() if self._own_steps else self.forwards.step(self.student, batch):
            source = self.teacher_step if self.teacher_source_has_own_order else self.teacher_source
            teacher = source(batch) if with_teacher else None
            own, step = "student" in self._own_steps, self.student_step
            student = self.forwards.own_step(step, self.student, batch) if own else step(batch)
        self._task.settle(student, teacher)
        return student, teacher

    def mean_losses(self, student: Signals, teacher: Signals | None) -> tuple[dict[str, Tensor], Tensor]:
        """Each objective's mean over what counts, on all ranks, and how much counts, shape ``[objectives]``."""
        runs = self._trainer is not None
        losses = sums_and_counts(self._each_objective(), student, teacher, labels_may_lack=runs)
        counts = self._mean_over_ranks(torch.stack([count for _, count in losses.values()]).float())
        if runs and self.trainer.state.stage is not None:
            self._counted.add(self.trainer.state.stage.value, counts)
        counts = counts.clamp(min=torch.finfo(counts.dtype).tiny)
        return {name: total / count for (name, (total, _)), count in zip(losses.items(), counts, strict=True)}, counts

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Each objective's loss on a batch, by name, unweighted: the mean over what counts, over all ranks."""
        return self.mean_losses(*self.signals(batch, with_teacher=self._needs_teacher))[0]

    def forward(self, batch: Any) -> Tensor:
        """Logits of the student for a batch, as the student gives them."""
        self.forwards.look("student", self.student, batch)
        return logits_of(call_model(self.student, batch_of("student", batch)))

    def _counts(self, batch: Any) -> Tensor:
        """How much of a batch counts for each objective, shape ``[objectives]``, before it is trained on."""
        ahead = None if self._own_steps else counted_ahead(self._task, self._each_objective(), batch)
        if ahead is not None:
            return ahead
        with evaluating(self.student), torch.no_grad():
            return self.mean_losses(*self.signals(batch, with_teacher=self._needs_teacher))[1]

    # -- hooks -------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's and the objectives' trainable parameters, and its schedule."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        lr = 5e-5 if hasattr(self.student, "config") else 1e-3
        return configured(parameters, self._optimizer, self._lr_scheduler, lr=lr, **self._schedule)

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
