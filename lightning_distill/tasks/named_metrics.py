"""torchmetrics by the names that people know them by, made for a task."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torchmetrics import Metric
from torchmetrics import classification as c
from torchmetrics import regression as r

from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.tasks.metrics import Pearson, Spearman

#: A class of torchmetrics, and what it takes beside the number of classes.
Rows = Mapping[str, tuple[Callable[..., Metric], dict[str, Any]]]
_CLASSES: dict[str, tuple[Callable[..., Metric], dict[str, Any]]] = {
    "accuracy": (c.MulticlassAccuracy, {"average": "micro"}),
    "balanced_accuracy": (c.MulticlassAccuracy, {"average": "macro"}),
    "macro_f1": (c.MulticlassF1Score, {"average": "macro"}),
    "micro_f1": (c.MulticlassF1Score, {"average": "micro"}),
    "macro_precision": (c.MulticlassPrecision, {"average": "macro"}),
    "macro_recall": (c.MulticlassRecall, {"average": "macro"}),
    "matthews": (c.MulticlassMatthewsCorrCoef, {}),
    "auroc": (c.MulticlassAUROC, {}),
    "calibration_error": (c.MulticlassCalibrationError, {}),
}
_LABELS: Rows = {
    "macro_f1": (c.MultilabelF1Score, {"average": "macro"}),
    "micro_f1": (c.MultilabelF1Score, {"average": "micro"}),
    "macro_precision": (c.MultilabelPrecision, {"average": "macro"}),
    "macro_recall": (c.MultilabelRecall, {"average": "macro"}),
    "exact_match": (c.MultilabelExactMatch, {}),
    "auroc": (c.MultilabelAUROC, {}),
    "average_precision": (c.MultilabelAveragePrecision, {}),
}
_VALUES: Rows = {
    "pearson": (Pearson, {}),
    "spearman": (Spearman, {}),
    "mse": (r.MeanSquaredError, {}),
    "mae": (r.MeanAbsoluteError, {}),
    "r2": (r.R2Score, {}),
}
#: The metrics of a task by name; a new one is a row.
METRICS: dict[str, Rows] = {
    "classification": _CLASSES,
    "multi_label": _LABELS,
    "token_classification": _CLASSES,
    "segmentation": _CLASSES | {"mean_iou": (c.MulticlassJaccardIndex, {})},
    "regression": _VALUES,
}


def named_metrics(names: str, task: str, num_classes: int | None = None) -> dict[str, Metric]:
    """Make the metrics of some names.

    Args:
        names: One name, or several as ``"a,b"``.
        task: The name of the task.
        num_classes: Number of classes or labels, at least 2; not read where there are none.

    Returns:
        The metrics by name, in the order of the names. Those of classes take logits ``[N, C]`` and classes ``[N]``,
        those of several labels probabilities and labels ``[N, L]``, and both leave -100 out; those of values take two
        tensors ``[N]``.

    Raises:
        ValueError: If the task has no metrics by name, or none of this name, or a name is there twice.

    Example:
        >>> from lightning_distill.tasks.named_metrics import named_metrics
        >>> list(named_metrics("macro_f1, accuracy", "classification", 3))
        ['macro_f1', 'accuracy']
    """
    rows = METRICS.get(task)
    if rows is None:
        raise ValueError(f"Expected argument `metric` to be left out for {task}, whose own is taken, but got {names!r}")
    asked = [name.strip() for name in names.split(",")]
    if len(set(asked)) < len(asked):
        raise ValueError(f"Expected argument `metric` to have different names, but got {names!r}")
    for name in asked:
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Expected argument `metric` to be of {', '.join(rows)}, but got {name!r}.{meant}")
    shared: dict[str, Any] = {}
    if rows is not _VALUES:
        shared = {"num_labels" if rows is _LABELS else "num_classes": num_classes, "ignore_index": IGNORE_INDEX}
    with warnings.catch_warnings():
        # A correlation of ranks needs them all, and whoever names one has asked for it.
        warnings.filterwarnings("ignore", "Metric .* will save all targets and predictions")
        return {name: rows[name][0](**rows[name][1], **shared) for name in asked}


def lower_is_better(name: str) -> bool:
    """Whether less is better, of a loss or of a metric by its name.

    Example:
        >>> from lightning_distill.tasks.named_metrics import lower_is_better
        >>> lower_is_better("mse"), lower_is_better("pearson"), lower_is_better("loss")
        (True, False, True)
    """
    made: Any = next((rows[name][0] for rows in METRICS.values() if name in rows), None)
    if made is None:
        return name.endswith(("loss", "perplexity"))
    return made.higher_is_better is False  # None where both ends are good, as of Pearson's correlation
