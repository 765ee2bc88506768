"""Every task, one row each for every form of its answers, as the shared tests of this folder go through them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models import batch, bert, embedder, llama, pictures, segformer, seq2seq, texts


@dataclass(frozen=True)
class Row:
    """A form of answers to a task, made small."""

    name: str
    task: str
    #: Makes a model: of so many layers, with settings of its config.
    make: Callable[..., Any]
    #: The metric that is logged where the user names none.
    metric: str
    #: The loss of a model on a batch by other means than ours.
    oracle: Callable[[Any, dict[str, Tensor]], Tensor] = lambda model, data: model(**data).loss
    classes: int = 3
    #: What DistillationModule is told beside the models.
    told: dict[str, Any] = field(default_factory=dict)

    def batch(self, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        if self.task == "sentence_embedding":
            return texts(several=self.classes, seed=seed, **sizes)
        if self.task == "segmentation":
            return pictures(classes=self.classes, seed=seed, **sizes)
        made = batch(self.task, classes=self.classes, seed=seed, **sizes)
        if self.name == "several values":
            labels = torch.randn(len(made["labels"]), 3, generator=torch.Generator().manual_seed(seed))
            return {**made, "labels": labels}
        return made

    def __str__(self) -> str:
        return self.name


def _of_two_classes(model: Any, data: dict[str, Tensor]) -> Tensor:
    logits = model(data["input_ids"], data["attention_mask"]).logits[:, 0]
    return F.binary_cross_entropy_with_logits(logits, data["labels"].float())


def _of_cosines(model: Any, data: dict[str, Tensor]) -> Tensor:
    first, *others = (
        model(data["input_ids"][:, i], data["attention_mask"][:, i]).logits for i in range(data["input_ids"].shape[1])
    )
    cosines = torch.stack([F.cosine_similarity(first, other) for other in others], 1)
    return F.mse_loss(cosines, data["labels"].view_as(cosines))


ROWS = [
    Row("classification", "classification", lambda **c: bert(num_labels=3, **c), "accuracy"),
    Row(
        "one logit",
        "classification",
        lambda **c: bert(num_labels=1, **c),
        "accuracy",
        _of_two_classes,
        classes=2,
        told={"task": "classification"},
    ),
    Row(
        "several labels",
        "multi_label",
        lambda **c: bert(num_labels=3, problem_type="multi_label_classification", **c),
        "macro_f1",
    ),
    Row("regression", "regression", lambda **c: bert(num_labels=1, **c), "pearson"),
    Row("several values", "regression", lambda **c: bert(num_labels=3, problem_type="regression", **c), "pearson"),
    Row(
        "token classification",
        "token_classification",
        lambda **c: bert("TokenClassification", num_labels=3, **c),
        "accuracy",
    ),
    Row("pixels", "segmentation", lambda **c: segformer(num_labels=3, **c), "accuracy"),
    Row("masked language model", "masked_lm", lambda **c: bert("MaskedLM", **c), "perplexity"),
    Row("pairs of texts", "sentence_embedding", embedder, "spearman", _of_cosines, classes=2),
    Row("queries and candidates", "sentence_embedding", embedder, "spearman", _of_cosines, classes=4),
    Row("causal language model", "causal_lm", lambda **c: llama(**c), "perplexity"),
    Row("sequence to sequence, T5", "seq2seq_lm", lambda **c: seq2seq("T5", **c), "perplexity"),
    Row("sequence to sequence, BART", "seq2seq_lm", lambda **c: seq2seq("Bart", **c), "perplexity"),
]
