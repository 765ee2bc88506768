"""What a batch asks for: where its labels are, which logits answer them, how an answer is scored."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_distill.functional.binary import two_logits
from lightning_distill.metrics import Pearson
from lightning_distill.wrapped import inside

if TYPE_CHECKING:
    from lightning_distill.signals import Signals

Task = Literal["classification", "regression", "token_classification", "masked_lm", "causal_lm"]

#: Tasks whose logits have one row per token.
TOKEN_TASKS = ("token_classification", "masked_lm", "causal_lm")
#: Token tasks whose classes are the words of a vocabulary.
LANGUAGE_MODELS = ("masked_lm", "causal_lm")
IGNORE_INDEX = -100
#: Keys of a mapping under which labels are looked for, the first that is there.
LABEL_KEYS = ("labels", "label", "label_ids")

_SUFFIXES: tuple[tuple[str, Task], ...] = (
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForTokenClassification", "token_classification"),
    ("ForMaskedLM", "masked_lm"),
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
)


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
        >>> from lightning_distill.tasks import infer_task
        >>> infer_task(nn.Linear(4, 2))
        'classification'
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return "classification"
    model = inside(model)
    name, task = type(model).__name__, _task_of_class(type(model))
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


def _task_of_class(kind: type) -> Task | None:
    # A class of the user's own is what it is derived from, whatever its name.
    names = [base.__name__ for base in kind.__mro__]
    return next((task for name in names for suffix, task in _SUFFIXES if name.endswith(suffix)), None)


def is_language_model(model: nn.Module) -> bool:
    """Whether a transformers model answers with words, so that the names of classes in its config mean nothing."""
    return _task_of_class(type(inside(model))) in LANGUAGE_MODELS


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: of a mapping under ``labels``, ``label`` or ``label_ids``, of a pair the second item.

    Args:
        batch: The batch.

    Returns:
        The labels as a tensor; None where there are none.

    Raises:
        TypeError: If they are no numbers.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if batch.get(key) is not None), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if found is None or isinstance(found, Tensor):
        return found
    try:
        if isinstance(found, (str, bytes)):
            raise TypeError(found)
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(found) if len(repr(found)) < 80 else f"{repr(found)[:80]}..."
        raise TypeError(
            f"Expected the labels of a batch to be numbers, but got a {type(found).__name__}: {shown}. Number the "
            "classes from 0 and give a tensor."
        ) from error


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
        >>> from lightning_distill.tasks import align
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


def token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens of a batch, or None where it says nothing of padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.bool()


def offsets(batch: Any) -> Tensor | None:
    """Where in the text each token of a batch begins and ends ``[B, T, 2]``, or None where it does not say."""
    found = batch.get("offset_mapping") if isinstance(batch, Mapping) else None
    return None if found is None else torch.as_tensor(found)


def decoder_token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens that the decoder of an encoder-decoder reads; None where nothing says."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("decoder_attention_mask"), labels_of(batch)
    if mask is not None:
        return mask.bool()
    # The decoder reads the labels, moved by one token, so it reads as many real ones as there are labels.
    return None if labels is None or labels.ndim < 2 else labels != IGNORE_INDEX


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


def has_real_item(batch: Any) -> bool:
    """Whether anything in the batch is no padding."""
    real = token_mask(batch)
    return real is None or bool(real.any())


def batch_of(role: str, batch: Any) -> Any:
    """The batch a model reads: with another tokenizer the teacher has its own, under keys that begin so.

    Args:
        role: ``"student"`` or ``"teacher"``.
        batch: The batch.

    Returns:
        The batch as it is, or for the teacher what its keys ``teacher_...`` hold, under the names without that.

    Example:
        >>> from lightning_distill.tasks import batch_of
        >>> batch_of("teacher", {"input_ids": 1, "labels": 2, "teacher_input_ids": 3})
        {'input_ids': 3}
    """
    prefix = "teacher_"
    if not isinstance(batch, Mapping) or not any(key.startswith(prefix) for key in batch):
        return batch
    own = {key for key in batch if key.startswith(prefix)}
    if role == "teacher":
        return {key.removeprefix(prefix): batch[key] for key in batch if key in own}
    return {key: value for key, value in batch.items() if key not in own}


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on what it takes of a batch, never on the labels: it would compute a loss in vain."""
    if not isinstance(batch, Mapping):
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    names = accepted(model)
    given = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    inputs = {key: given[key] for key in taken_names(model, given)}
    missing = [
        name
        for name, parameter in names.items()
        if name not in (*inputs, "self") and parameter.kind not in _VARIABLE and parameter.default is parameter.empty
    ]
    if missing:
        if not inputs and len(missing) == len(given) == 1:
            # What they are called need not be what a plain module calls its one input.
            return model(*given.values())
        raise ValueError(
            f"Expected a batch with the inputs {missing} of `{type(model).__name__}.forward`, but got the keys "
            f"{list(batch)}. Give the batch these keys, or a pair (inputs, labels)."
        )
    if "use_cache" in names:
        inputs["use_cache"] = False
    return model(**inputs)


def taken_names(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that a model takes."""
    names = accepted(model)
    # Teacher and student may differ in what they take: DistilBERT has no token_type_ids. A transformers forward also
    # has **kwargs, but what it does not name it hands to the attention function.
    named_only = hasattr(model, "config") or not any(p.kind is p.VAR_KEYWORD for p in names.values())
    return [key for key in inputs if key in names or not named_only]


def accepted(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's forward; of a peft or a compiled model those of the model inside it."""
    model = inside(model)
    own = _parameters(getattr(model.forward, "__func__", model.forward))
    if hasattr(model, "config") and all(p.kind in _VARIABLE for name, p in own.items() if name != "self"):
        # A class of the user's own that hands everything on takes what the class it is derived from takes.
        derived = (_parameters(kind.forward) for kind in type(model).__mro__[1:] if hasattr(kind, "forward"))
        named = (names for names in derived if any(p.kind not in _VARIABLE for p in list(names.values())[1:]))
        return next(named, own)
    return own


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # Reading a signature takes as long as a small layer.
    return inspect.signature(forward).parameters


def gives_logits(model: nn.Module) -> bool:
    """Whether a model answers by logits, as far as its class says so: False for a transformers model without a head.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_distill.tasks import gives_logits
        >>> gives_logits(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
        False
    """
    model = inside(model)
    if not hasattr(getattr(model, "config", None), "model_type"):
        return True
    if _task_of_class(type(model)) is not None:
        return True
    # A forward of transformers says what it returns: a class of named tensors.
    try:
        returned = get_type_hints(type(model).forward).get("return")
    except (NameError, TypeError):  # a forward of the user's own, annotated by names that are not there
        return True
    outputs = [kind for kind in (get_args(returned) or (returned,)) if is_dataclass(kind)]
    return not outputs or any(field.name == "logits" for kind in outputs for field in fields(kind))


def no_logits(task: Task, output: Any) -> Tensor:
    """Logits of width 0, of a model that gives none: of each row or, in token tasks, of each token."""
    first = next(value for value in output.values() if isinstance(value, Tensor))
    return (first if task in TOKEN_TASKS else first.flatten(1))[..., :0]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model's forward returned."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    if not isinstance(logits, Tensor):
        raise TypeError(
            "Expected the model's forward to return logits: a tensor, a mapping with `logits`, or a tuple that starts "
            f"with them, but got {type(output).__name__}. Override `student_step` and `teacher_step`."
        )
    return logits
