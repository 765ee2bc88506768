"""What a batch asks for: where its labels are, which logits answer them, how an answer is scored."""

from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_distill.functional.binary import two_logits
from lightning_distill.models.batch import IGNORE_INDEX, labels_of, token_mask
from lightning_distill.models.heads import LANGUAGE_MODELS, TOKEN_TASKS, Task, task_of_class
from lightning_distill.models.wrapped import inside
from lightning_distill.tasks.metrics import Pearson

if TYPE_CHECKING:
    from lightning_distill.signals.signals import Signals


def infer_task(model: nn.Module) -> Task:
    """Read the task off a transformers class and its config; any other module classifies.

    Args:
        model: A model, usually the student.

    Returns:
        The name of the task.

    Raises:
        ValueError: If it is a transformers model with a head that no task here answers.

    Example:
        >>> from torch import nn
        >>> from lightning_distill.tasks.task import infer_task
        >>> infer_task(nn.Linear(4, 2))
        'classification'
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return "classification"
    model = inside(model)
    name, task = type(model).__name__, task_of_class(type(model))
    problem = getattr(config, "problem_type", None)
    if task is None or problem == "multi_label_classification":
        what = f"`problem_type={problem!r}`" if task else f"a `{name}`"
        raise ValueError(
            f"Expected argument `student` to have a head for one of {list(get_args(Task))}, but got {what}. Load the "
            "model with such a head, or pass `task=...` and override `student_step` and `teacher_step`."
        )
    if task == "classification":
        # As in transformers: one logit is a value, unless the config says that it classifies.
        one = getattr(config, "num_labels", 2) == 1 and problem is None
        return "regression" if one or problem == "regression" else task
    return task


def align(task: Task, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Put logits beside the labels they answer.

    A causal model's logits at position t answer the token at t + 1, so logits lose their last position and labels
    their first. Without labels, a causal model answers its own input and every other token task counts its real tokens;
    so does a sentence none of whose tokens has a label, in token classification.

    Args:
        task: The name of the task.
        logits: Shape ``[B, C]``, in token tasks ``[B, T, C]``: classes come last. In classification and token
            classification, one logit stands for two classes; in regression C is the number of values, and may be left
            out where it is 1.
        batch: The batch: a mapping with ``input_ids``, ``attention_mask`` and ``labels``, or a pair.

    Returns:
        The logits (always with their last dimension, and of two classes where there was one logit), the labels (or
        None, see :func:`targets`) and a bool mask ``[B]`` or ``[B, T]`` of the items that count (or None where all do).

    Raises:
        ValueError: If logits or labels have another shape, or the labels are none of the task.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks.task import align
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> logits, labels, mask = align("causal_lm", torch.zeros(1, 3, 8), batch)
        >>> logits.shape, labels.tolist(), mask.tolist()
        (torch.Size([1, 2, 8]), [[6, -100]], [[True, False]])
        >>> align("classification", torch.tensor([[2.0]]), (None, torch.tensor([1.0])))
        (tensor([[0., 2.]]), tensor([1]), None)
    """
    logits, labels = answers(task, logits), labels_of(batch)
    if task == "causal_lm" and labels is None:
        labels = batch["input_ids"]
    if labels is not None:
        labels = targets(task, logits, labels)
    if task not in TOKEN_TASKS:
        return logits, labels, None
    real = token_mask(batch)
    if task == "causal_lm":
        assert labels is not None
        if real is not None:
            labels = labels.masked_fill(~real, IGNORE_INDEX)
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels is None or labels.is_floating_point():
        return logits, labels, real
    mask = labels != IGNORE_INDEX
    if task == "token_classification":
        # Row by row, so that a mean does not change with how rows are put into batches.
        unlabelled = ~mask.flatten(1).any(1).view(-1, *[1] * (mask.ndim - 1))
        mask = mask | (unlabelled if real is None else unlabelled & real)
    return logits, labels, mask


def answers(task: Task, logits: Tensor) -> Tensor:
    """What a model answers in the one form that all else reads, see :func:`align`."""
    if task in LANGUAGE_MODELS:
        return logits
    if task == "token_classification":
        return two_logits(logits)
    if logits.ndim == 1:
        logits = logits.unsqueeze(-1)
    if logits.ndim != 2:
        form = "rows, values" if task == "regression" else "rows, classes"
        raise ValueError(
            f"Expected the logits of {task} to have the shape [{form}], but got {list(logits.shape)}. For an answer "
            "per token, step or pixel, move the classes to the last dimension in the model's forward and pass "
            "`task='token_classification'`."
        )
    return logits if task == "regression" else two_logits(logits)


def settle(task: Task, signals: "Signals") -> None:
    """Give signals that a step of the user's own made the form that :func:`align` gives, and say what logits mean."""
    signals.regression = task == "regression"
    if task in ("classification", "token_classification"):
        signals.logits = two_logits(signals.logits)


def targets(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Labels in the one form that all else reads.

    Values are looked at where they lie on the CPU, where looking is free; elsewhere a fraction or NaN as a class
    becomes -1, which no loss takes.

    Args:
        task: The name of the task.
        logits: What :func:`answers` gives, shape ``[B, C]`` or ``[B, T, C]``.
        labels: Classes ``[B]``, ``[B, 1]`` or ``[B, T]``: integers of any width, bool, or whole floats; probabilities
            of the classes, of the shape of the logits; in regression numbers, one per logit.

    Returns:
        Classes as int64 ``[B]`` or ``[B, T]``, with -100 where there is no label; probabilities as float32, of the
        shape of the logits; in regression float32 ``[B]`` or, of several values, ``[B, C]``.

    Raises:
        ValueError: If they fit neither the logits nor the task.
    """
    items, labels = logits.shape[:-1], labels.to(logits.device)
    look = labels.device.type == "cpu"
    if look and labels.is_floating_point() and not bool(labels.isfinite().all()):
        place = int((~labels.isfinite()).flatten().nonzero()[0])
        # In regression -100 is a value like any other.
        other = "." if task == "regression" else f", or give it the class {IGNORE_INDEX}, which counts nothing."
        raise ValueError(
            f"Expected the labels of a batch to be finite, but got {labels.flatten()[place].item()} as label {place}. "
            f"Leave the row out{other}"
        )
    if not logits.shape[-1] and labels.numel() != items.numel():
        return labels.float()  # beside logits that were not computed there is nothing to compare
    if task == "regression":
        if (
            labels.dtype == torch.bool
            or labels.numel() != max(logits.numel(), items.numel())
            or labels.shape[:1] != logits.shape[:1]
        ):
            raise ValueError(
                f"Expected the labels of regression to be {list(logits.shape)} numbers, but got {labels.dtype} of "
                f"shape {list(labels.shape)}. For two classes with one logit, pass `task='classification'`."
            )
        shape = items if logits.shape[-1] <= 1 else logits.shape
        return (labels if labels.dtype == torch.float64 else labels.float()).reshape(shape)
    if labels.ndim == logits.ndim and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if labels.shape == logits.shape and task not in LANGUAGE_MODELS:
        labels = labels.float()
        if look and not bool((labels >= 0).all() & ((labels.sum(-1) - 1).abs() < 0.02).all()):
            wrong = ((labels < 0).any(-1) | ((labels.sum(-1) - 1).abs() >= 0.02)).flatten().nonzero()[0]
            row = labels.flatten(0, -2)[int(wrong)].tolist()
            raise ValueError(
                "Expected labels of the shape of the logits to be probabilities that sum to 1 in each row, but got "
                f"{row[:8]} in row {int(wrong)}. Several classes at once (multi-label) are not learned here; divide "
                "counts by their sum; for real values pass `task='regression'`."
            )
        return labels
    if labels.shape != items or labels.is_complex():
        raise ValueError(
            f"Expected the labels of {task} to have the shape {list(items)}, one class for each row of logits "
            f"{list(logits.shape)}, but got {labels.dtype} of shape {list(labels.shape)}. Classes are the last "
            "dimension of the logits."
        )
    if labels.is_floating_point():
        if logits.shape[-1] > 2 / torch.finfo(labels.dtype).eps:
            raise ValueError(
                f"Expected the labels of {task} to tell {logits.shape[-1]} classes apart, but got {labels.dtype}, "
                "which cannot. Give whole numbers, which no `precision` of the Trainer casts."
            )
        whole = labels == labels.round()
        if look and not bool(whole.all()):
            raise ValueError(
                f"Expected the labels of {task} to be classes, but got {labels[~whole][0].item():.4g}. For real values "
                f"pass `task='regression'`; for soft labels give a probability per class, {[*items, 'classes']}."
            )
        labels = labels.where(whole, -1)
    labels = labels.long()
    if look and task not in LANGUAGE_MODELS and logits.shape[-1]:
        check_range(labels, logits.shape[-1], "a batch")
    return labels


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


def default_metric(task: Task) -> tuple[str, Metric]:
    """Name and torchmetrics metric that a task is scored by when the user names none."""
    if task == "regression":
        return "pearson", Pearson()
    if task in LANGUAGE_MODELS:
        return "perplexity", Perplexity(ignore_index=IGNORE_INDEX)
    return "accuracy", MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX)


def agreement(task: Task, student: "Signals", teacher: "Signals") -> tuple[Tensor, ...]:
    """What the agreement is computed of: whether each item that counts has the teacher's class; in regression both."""
    if task == "regression":
        return values(student.logits), values(teacher.logits)
    best = next(iter(teacher.top_k.values()), None)
    answers = teacher.logits.argmax(-1) if best is None else best.classes[..., 0]
    same = (student.logits.argmax(-1) == answers).float()
    return (same if student.mask is None else same[student.mask],)


def values(logits: Tensor) -> Tensor:
    """The real values ``[B]`` that logits ``[B, 1]`` are in regression; of several ``[B, C]``."""
    return logits.squeeze(-1).float()


def flatten(task: Task, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and labels as torchmetrics wants them: one row per item that has a label.

    Perplexity keeps its ``[B, T, C]`` form, because it masks by itself. Of soft labels the most probable class counts.
    """
    if task == "regression":
        return values(logits), labels.float()
    if task in LANGUAGE_MODELS:
        return logits.float(), labels
    if labels.is_floating_point():
        labels = labels.argmax(-1)
    labelled = labels != IGNORE_INDEX
    labelled = labelled if mask is None else labelled & mask
    return logits[labelled], labels[labelled]


def has_label(task: Task, batch: Any) -> bool:
    """Whether anything in the batch has a label; a causal model's own input is one."""
    labels = labels_of(batch)
    if labels is None:
        return task == "causal_lm"
    return task == "regression" or bool(torch.any(labels != IGNORE_INDEX))
