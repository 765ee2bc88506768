"""Which head a transformers model has: the task that its class is made for."""

from typing import Literal

from torch import nn

from lightning_distill.models.wrapped import inside

TaskName = Literal[
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "segmentation",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
    "sentence_embedding",
]
#: The classes with a head for a task, as transformers lists them in ``MODEL_FOR_<...>_MAPPING`` by a model's config. A
#: model without such a head can get a new one; for any other task it comes with what answers it.
HEAD_CLASSES: dict[str, tuple[str, ...]] = {
    "classification": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    "multi_label": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    "regression": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    "token_classification": ("TOKEN_CLASSIFICATION",),
    "segmentation": ("SEMANTIC_SEGMENTATION",),
    "question_answering": ("QUESTION_ANSWERING",),
}
#: Token tasks whose classes are the words of a vocabulary.
LANGUAGE_MODELS = ("masked_lm", "causal_lm", "seq2seq_lm")

_SUFFIXES: tuple[tuple[str, TaskName], ...] = (
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForTokenClassification", "token_classification"),
    ("ForSemanticSegmentation", "segmentation"),
    ("ForMaskedLM", "masked_lm"),
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
    ("ForConditionalGeneration", "seq2seq_lm"),
    ("ForTextToText", "seq2seq_lm"),
    ("MarianMTModel", "seq2seq_lm"),
    ("EncoderDecoderModel", "seq2seq_lm"),
    ("EmbeddingModel", "sentence_embedding"),
)


def task_of_class(kind: type) -> TaskName | None:
    """The task that a transformers class is made for, or what it is derived from; None where it has no head."""
    # A class of the user's own is what it is derived from, whatever its name.
    names = [base.__name__ for base in kind.__mro__]
    task = next((task for name in names for suffix, task in _SUFFIXES if name.endswith(suffix)), None)
    # Decoders that read pictures have the same suffix as encoders beside a decoder.
    has_encoder = getattr(getattr(kind, "config_class", None), "is_encoder_decoder", False)
    return None if task == "seq2seq_lm" and not has_encoder else task


def is_language_model(model: nn.Module) -> bool:
    """Whether a transformers model answers with words, so that the names of classes in its config mean nothing."""
    return task_of_class(type(inside(model))) in LANGUAGE_MODELS
