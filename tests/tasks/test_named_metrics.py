"""Metrics by name: their values are scikit-learn's and scipy's, their names and directions are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from lightning_distill.tasks.named_metrics import METRICS, lower_is_better, named_metrics

LOGITS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(60) % 3
CLASSES[:4] = -100
ORACLES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "macro_f1": lambda y, p: sk.f1_score(y, p, average="macro"),
    "micro_f1": lambda y, p: sk.f1_score(y, p, average="micro"),
    "macro_precision": lambda y, p: sk.precision_score(y, p, average="macro"),
    "macro_recall": lambda y, p: sk.recall_score(y, p, average="macro"),
    "matthews": sk.matthews_corrcoef,
    "pearson": lambda y, p: stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
    "mse": sk.mean_squared_error,
    "mae": sk.mean_absolute_error,
    "r2": sk.r2_score,
}


@pytest.mark.parametrize("name", [name for name in METRICS["classification"] if name in ORACLES])
def test_of_classes(name: str) -> None:
    (metric,) = named_metrics(name, "classification", 3).values()
    metric.update(LOGITS, CLASSES)
    assert metric.compute().item() == pytest.approx(ORACLES[name](CLASSES[4:], LOGITS[4:].argmax(-1)), abs=1e-5)


def test_area_under_the_curve() -> None:
    (metric,) = named_metrics("auroc", "classification", 3).values()
    metric.update(LOGITS, CLASSES)
    expected = sk.roc_auc_score(CLASSES[4:], LOGITS[4:].softmax(-1), multi_class="ovr")
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)


LABELS: dict[str, Callable[[Any, Any], float]] = {
    **{name: ORACLES[name] for name in ("macro_f1", "micro_f1", "macro_precision", "macro_recall")},
    "exact_match": sk.accuracy_score,  # of rows of labels: those that are right as a whole
}


@pytest.mark.parametrize("name", METRICS["multi_label"])
def test_of_several_labels(name: str) -> None:
    (metric,) = named_metrics(name, "multi_label", 3).values()
    probabilities, labels = LOGITS.sigmoid(), (LOGITS.roll(1, 0) + LOGITS > 0).long()
    metric.update(probabilities, labels)
    if name in LABELS:
        expected = LABELS[name](labels, probabilities > 0.5)
    else:
        areas = {"auroc": sk.roc_auc_score, "average_precision": sk.average_precision_score}
        expected = areas[name](labels, probabilities, average="macro")
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", METRICS["regression"])
def test_of_values(name: str) -> None:
    (metric,) = named_metrics(name, "regression").values()
    metric.update(LOGITS[:, 0], LOGITS[:, 1])
    assert metric.compute().item() == pytest.approx(ORACLES[name](LOGITS[:, 1], LOGITS[:, 0]), abs=1e-5)


def test_directions() -> None:
    names = {name for rows in METRICS.values() for name in rows} | {"loss", "perplexity", "hard_label_loss"}
    less = {"mse", "mae", "calibration_error", "loss", "perplexity", "hard_label_loss"}
    assert {name for name in names if lower_is_better(name)} == less


def test_names_that_cannot_be_right() -> None:
    with pytest.raises(ValueError, match=r"`metric` to be of accuracy, .*'macro_f2'. Did you mean 'm\w+_f1'\?"):
        named_metrics("macro_f2", "classification", 3)
    with pytest.raises(ValueError, match=r"`metric` to have different names"):
        named_metrics("mse,mse", "regression")
    with pytest.raises(ValueError, match=r"`metric` to be left out for causal_lm"):
        named_metrics("accuracy", "causal_lm")
