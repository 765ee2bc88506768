"""What every task is: which logits answer which labels, what counts, how an answer is scored."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_distill.models.batch import IGNORE_INDEX, has_real_item, labels_of, token_mask
from lightning_distill.models.heads import TaskName
from lightning_distill.signals.signals import Signals


class Task:
    """One task, whose classes are told apart by the largest logit. Other tasks override what differs.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import TASKS
        >>> TASKS["classification"].align(torch.tensor([[2.0]]), (None, torch.tensor([1.0])))
        (tensor([[0., 2.]]), tensor([1]), None)
    """

    #: What users call it.
    name: ClassVar[TaskName]
    #: Whether logits have one row per token.
    of_tokens: ClassVar[bool] = False
    #: Whether the classes are the words of a vocabulary.
    of_words: ClassVar[bool] = False
    #: Whether logits are classes; real values if not.
    has_classes: ClassVar[bool] = True
    #: Whether classes have names of the data's own, as a transformers config lists them in ``id2label``.
    names_classes: ClassVar[bool] = False
    #: What a transformers config calls it, where the class of the head does not say it.
    problem_type: ClassVar[str | None] = None
    #: Whether an answer is one vector, whose direction counts, of any width.
    of_vectors: ClassVar[bool] = False
    #: Whether the classes exclude each other, so that objectives may compare one with the others.
    exclusive: ClassVar[bool] = True
    #: The dimension of aligned logits along which the classes lie that a model has names for.
    named_dim: ClassVar[int] = -1
    #: Whether a batch that has no labels answers itself.
    labels_itself: ClassVar[bool] = False
    #: The fields of a transformers config that may hold the number of classes, the first that is there.
    num_classes_fields: ClassVar[tuple[str, ...]] = ("num_labels",)

    def align(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Put logits beside the labels they answer.

        Args:
            logits: Shape ``[B, C]``, in token tasks ``[B, T, C]``: classes come last. In classification and token
                classification, one logit stands for two classes; in regression C is the number of values, and may be
                left out where it is 1.
            batch: The batch: a mapping with ``input_ids``, ``attention_mask`` and ``labels``, or a pair.

        Returns:
            The logits (always with their last dimension, and of two classes where there was one logit), the labels (or
            None, see :meth:`targets`) and a bool mask ``[B]`` or ``[B, T]`` of the items that count (None: all do).

        Raises:
            ValueError: If logits or labels have another shape, or the labels are none of the task.
        """
        logits, labels = self.answers(logits), labels_of(batch)
        return logits, None if labels is None else self.targets(logits, labels), None

    def answers(self, logits: Tensor) -> Tensor:
        """What a model answers in the one form that all else reads, see :meth:`align`; as it is, if it has it."""
        return logits

    def targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels in the one form that all else reads.

        Values are looked at where they lie on the CPU, where looking is free; elsewhere a fraction or NaN as a class
        becomes -1, which no loss takes.

        Args:
            logits: What :meth:`answers` gives, shape ``[B, C]`` or ``[B, T, C]``.
            labels: Classes ``[B]``, ``[B, 1]`` or ``[B, T]``: integers of any width, bool, or whole floats;
                probabilities of the classes, of the shape of the logits; in regression numbers, one per logit.

        Returns:
            Classes as int64 ``[B]`` or ``[B, T]``, with -100 where there is no label; probabilities as float32, of the
            shape of the logits, all -100 where there are none; in regression float32 ``[B]`` or, of several values,
            ``[B, C]``.

        Raises:
            ValueError: If they fit neither the logits nor the task.
        """
        labels = labels.to(logits.device)
        if labels.is_floating_point() and labels.is_cpu and not bool(labels.isfinite().all()):
            place = int((~labels.isfinite()).flatten().nonzero()[0])
            # In regression -100 is a value like any other.
            other = f", or give it the class {IGNORE_INDEX}, which counts nothing." if self.has_classes else "."
            raise ValueError(
                f"Expected the labels of a batch to be finite, but got {labels.flatten()[place].item()} as label "
                f"{place}. Leave the row out{other}"
            )
        if not logits.shape[-1] and labels.numel() != logits.shape[:-1].numel():
            return labels.float()  # beside logits that were not computed there is nothing to compare
        return self._targets(logits, labels)

    def _targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == logits.ndim and labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
        if labels.shape == logits.shape and not self.of_words:
            return _probabilities(labels.float())
        if labels.shape != logits.shape[:-1] or labels.is_complex():
            raise ValueError(
                f"Expected the labels of {self.name} to have the shape {list(logits.shape[:-1])}, one class for each "
                f"row of logits {list(logits.shape)}, but got {labels.dtype} of shape {list(labels.shape)}. Classes "
                "are the last dimension of the logits; with `task='segmentation'` they are dimension 1."
            )
        if labels.is_floating_point():
            if not logits.shape[-1] and not bool((labels == labels.round()).all()):
                return labels.float()  # counted before a model has answered: of one logit they are probabilities
            labels = self._whole_numbers(labels, logits.shape[-1])
        labels = labels.long()
        if labels.is_cpu and not self.of_words and logits.shape[-1]:
            check_range(labels, logits.shape[-1], "a batch")
        return labels

    def _whole_numbers(self, labels: Tensor, num_classes: int) -> Tensor:
        """Labels that are floats and name classes."""
        if num_classes > 2 / torch.finfo(labels.dtype).eps:
            raise ValueError(
                f"Expected the labels of {self.name} to tell {num_classes} classes apart, but got {labels.dtype}, "
                "which cannot. Give whole numbers, which no `precision` of the Trainer casts."
            )
        whole = labels == labels.round()
        if labels.is_cpu and not bool(whole.all()):
            raise ValueError(
                f"Expected the labels of {self.name} to be classes, but got {labels[~whole][0].item():.4g}. For real "
                "values pass `task='regression'`; for soft labels give a probability per class, "
                f"{[*labels.shape, 'classes']}."
            )
        return labels.where(whole, -1)

    def settle(self, *made: Signals | None) -> None:
        """Give signals that a step of the user's own made the form that :meth:`align` gives, and say what they mean."""
        for signals in made:
            if signals is not None:
                signals.regression, signals.vectors = not self.has_classes, self.of_vectors
                signals.logits = self._settled(signals.logits)

    def _settled(self, logits: Tensor) -> Tensor:
        return logits

    def tell(self, model: nn.Module) -> None:
        """Say in a transformers config what the model answers, so that it does where it is loaded again."""
        config: Any = getattr(model, "config", None)
        # transformers refuses to load one logit as that of classes.
        one = self.exclusive and getattr(config, "num_labels", 2) == 1
        if self.problem_type is not None and hasattr(config, "problem_type") and not one:
            config.problem_type = self.problem_type

    def has_label(self, batch: Any) -> bool:
        """Whether anything in the batch has a label; a causal model's own input is one."""
        labels = labels_of(batch)
        return self.labels_itself if labels is None else self._any_label(labels)

    def _any_label(self, labels: Tensor) -> bool:
        return bool(torch.any(labels != IGNORE_INDEX))

    def check_batch(self, batch: Any, num_classes: int | None, where: str) -> None:
        """Refuse a batch of padding alone, or with a label that names no class.

        Args:
            batch: The batch.
            num_classes: Number of classes, or None where it is not known.
            where: Words that name the batch in the error.

        Raises:
            ValueError: If no token is real, or a label is below 0 (and not -100) or too large.
        """
        if not has_real_item(batch):
            raise ValueError(
                f"Expected {where} to have a real token, but got one in which everything is padding. Remove empty rows "
                "from the data."
            )
        if (labels := labels_of(batch)) is not None:
            self.check_labels(labels, num_classes, where)

    def check_labels(self, labels: Tensor, num_classes: int | None, where: str) -> None:
        """Refuse labels that name no class; arguments as in :meth:`check_batch`."""
        if self.has_classes and num_classes is not None and not labels.is_floating_point():
            # One logit is that of two classes.
            check_range(labels.long(), max(num_classes, 2), where)

    # -- what others do with answers ---------------------------------------------------------------------------------

    def has_count(self, batch: Any) -> bool:
        """Whether a batch says how many answers it asks for; where it does not, a model runs to count them."""
        return True

    def packed(self, logits: Tensor) -> Tensor:
        """Aligned logits as they are kept on disk: ``[B, C]`` or ``[B, T, C]``, of one width in all batches."""
        return logits

    def unpacked(self, logits: Tensor) -> Tensor:
        """Aligned logits, of what :meth:`packed` gave."""
        return logits

    # -- scores ------------------------------------------------------------------------------------------------------

    def metric(self) -> tuple[str, Metric]:
        """Name and torchmetrics metric of an answer when the user names none."""
        return "accuracy", MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX)

    def agreement_metric(self) -> Metric:
        """The metric of :meth:`agreement`."""
        return MeanMetric()

    def agreement(self, student: Signals, teacher: Signals) -> tuple[Tensor, ...]:
        """What the agreement is computed of: whether each item that counts has the teacher's class."""
        best = next(iter(teacher.top_k.values()), None)
        theirs = teacher.logits.argmax(-1) if best is None else best.classes[..., 0]
        same = (student.logits.argmax(-1) == theirs).float()
        return (same if student.mask is None else same[student.mask],)

    def classes(self, labels: Tensor) -> Tensor:
        """Labels that :meth:`targets` gave as classes: soft ones by their likeliest, -100 where there is no label."""
        if not labels.is_floating_point():
            return labels
        return labels.argmax(-1).where((labels != IGNORE_INDEX).all(-1), IGNORE_INDEX)

    def scored(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and labels as torchmetrics takes them: a row per item with a label; soft labels by their likeliest."""
        labels = self.classes(labels)
        labelled = labels != IGNORE_INDEX
        labelled = labelled if mask is None else labelled & mask
        return logits[labelled], labels[labelled]


def check_range(labels: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels that name no class.

    Args:
        labels: Integers of any shape.
        num_classes: Number of classes.
        where: Words that name the batch in the error.

    Raises:
        ValueError: If a label is below 0 and not -100, or too large.
    """
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Expected the labels of {where} to be in [0, {num_classes - 1}], but got {wrong[0].item()}. Give the "
            "models as many classes as the data have, or correct the labels."
        )


def _probabilities(labels: Tensor) -> Tensor:
    """Labels that are probabilities of the classes, or -100 for every class of a row without a label."""
    if labels.is_cpu:
        fit = (labels >= 0).all(-1) & ((labels.sum(-1) - 1).abs() < 0.02) | (labels == IGNORE_INDEX).all(-1)
        if not bool(fit.all()):
            wrong = int((~fit).flatten().nonzero()[0])
            raise ValueError(
                "Expected labels of the shape of the logits to be probabilities that sum to 1 in each row, but got "
                f"{labels.flatten(0, -2)[wrong].tolist()[:8]} in row {wrong}. Divide counts by their sum; for several "
                "labels at once (multi-label) pass `task='multi_label'`, for real values `task='regression'`."
            )
    return labels


def row_logits(task: Task, logits: Tensor, form: str) -> Tensor:
    """Logits ``[B, C]`` of a task with one answer a row."""
    if logits.ndim == 1:
        logits = logits.unsqueeze(-1)
    if logits.ndim != 2:
        raise ValueError(
            f"Expected the logits of {task.name} to have the shape [{form}], but got {list(logits.shape)}. For an "
            "answer per token, step or pixel, pass `task='token_classification'` where the classes are the last "
            "dimension, and `task='segmentation'` where they are dimension 1."
        )
    return logits


def labelled_tokens(task: Task, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits ``[B, T, C]``, the labels of the tokens, and the mask of the real ones; None where nothing says."""
    logits, labels = task.answers(logits), labels_of(batch)
    if labels is None and task.labels_itself:
        labels = batch["input_ids"]
    return logits, None if labels is None else task.targets(logits, labels), token_mask(batch)
