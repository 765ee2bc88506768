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
from torchmetrics.regression import PearsonCorrCoef
from torchmetrics.text import Perplexity

from lightning_distill.wrapped import inside

if TYPE_CHECKING:
    from lightning_distill.signals import Signals

Task = Literal["classification", "regression", "token_classification", "masked_lm", "causal_lm"]

#: Tasks whose logits have one row per token.
TOKEN_TASKS = ("token_classification", "masked_lm", "causal_lm")
#: Token tasks whose classes are the words of a vocabulary.
LANGUAGE_MODELS = ("masked_lm", "causal_lm")
IGNORE_INDEX = -100

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
    if task == "classification" and (problem == "regression" or getattr(config, "num_labels", 2) == 1):
        return "regression"
    return task


def _task_of_class(kind: type) -> Task | None:
    # A class of the user's own is what it is derived from, whatever its name.
    names = [base.__name__ for base in kind.__mro__]
    return next((task for name in names for suffix, task in _SUFFIXES if name.endswith(suffix)), None)


def is_language_model(model: nn.Module) -> bool:
    """Whether a transformers model answers with words, so that the names of classes in its config mean nothing."""
    return _task_of_class(type(inside(model))) in LANGUAGE_MODELS


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: key ``labels`` of a mapping, or the second item of a pair; None where there are none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def align(task: Task, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Put logits beside the labels they answer.

    A causal model's logits at position t answer the token at t + 1, so logits lose their last position and labels
    their first. Without labels, a causal model answers its own input and every other token task counts its real tokens.

    Args:
        task: The name of the task.
        logits: Shape ``[B, C]`` or, in token tasks, ``[B, T, C]``.
        batch: The batch: a mapping with ``input_ids``, ``attention_mask`` and ``labels``, or a pair.

    Returns:
        The logits, the labels (or None) and a bool mask of the positions that count (or None where all do); labels and
        mask have the shape of the logits without the last dimension.

    Example:
        >>> import torch
        >>> from lightning_distill.tasks import align
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> logits, labels, mask = align("causal_lm", torch.zeros(1, 3, 8), batch)
        >>> logits.shape, labels.tolist(), mask.tolist()
        (torch.Size([1, 2, 8]), [[6, -100]], [[True, False]])
    """
    labels = labels_of(batch)
    if task not in TOKEN_TASKS:
        return logits, labels, None
    real = token_mask(batch)
    if task == "causal_lm":
        if labels is None:
            labels = batch["input_ids"]
        if real is not None:
            labels = labels.masked_fill(~real, IGNORE_INDEX)
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits, labels, real if labels is None else labels != IGNORE_INDEX


def token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens of a batch, or None where it says nothing of padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.bool()


def decoder_token_mask(batch: Any) -> Tensor | None:
    """Bool mask ``[B, T]`` of the real tokens that the decoder of an encoder-decoder reads; None where nothing says."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if mask is not None:
        return mask.bool()
    # The decoder reads the labels, moved by one token, so it reads as many real ones as there are labels.
    return None if labels is None or labels.ndim < 2 else labels != IGNORE_INDEX


def default_metric(task: Task) -> tuple[str, Metric]:
    """Name and torchmetrics metric that a task is scored by when the user names none."""
    if task == "regression":
        return "pearson", PearsonCorrCoef()
    if task in LANGUAGE_MODELS:
        return "perplexity", Perplexity(ignore_index=IGNORE_INDEX)
    return "accuracy", MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX)


def agreement(task: Task, student: "Signals", teacher: "Signals") -> tuple[Tensor, ...]:
    """What the agreement is computed of: whether each item that counts has the teacher's class; in regression both."""
    if task == "regression":
        return student.logits.squeeze(-1).float(), teacher.logits.squeeze(-1).float()
    best = next(iter(teacher.top_k.values()), None)
    answers = teacher.logits.argmax(-1) if best is None else best.classes[..., 0]
    same = (student.logits.argmax(-1) == answers).float()
    return (same if student.mask is None else same[student.mask],)


def flatten(task: Task, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and labels as torchmetrics wants them: one row per item that counts.

    Perplexity keeps its ``[B, T, C]`` form, because it masks by itself.
    """
    if task == "regression":
        return logits.squeeze(-1).float(), labels.float().view(logits.squeeze(-1).shape)
    if task in LANGUAGE_MODELS:
        return logits.float(), labels
    if mask is not None:
        return logits[mask], labels[mask]
    return logits, labels


def out_of_range(labels: Tensor, num_classes: int) -> Tensor:
    """The labels that name no class and are not ``IGNORE_INDEX``, as a flat tensor."""
    return labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= num_classes)]


def has_real_item(task: Task, batch: Any) -> bool:
    """Whether anything in the batch counts: a row, a real token, a label that is not ignored."""
    real = token_mask(batch)
    if real is not None and not bool(real.any()):
        return False
    labels = labels_of(batch)
    return labels is None or task not in TOKEN_TASKS or bool(torch.any(labels != IGNORE_INDEX))


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
    # Teacher and student may differ in what they take: DistilBERT has no token_type_ids. A transformers forward also
    # has **kwargs, but what it does not name it hands to the attention function.
    named_only = hasattr(model, "config") or not any(p.kind is p.VAR_KEYWORD for p in names.values())
    inputs = {key: value for key, value in batch.items() if key != "labels" and (key in names or not named_only)}
    if "use_cache" in names:
        inputs["use_cache"] = False
    return model(**inputs)


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
