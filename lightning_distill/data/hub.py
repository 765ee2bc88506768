"""Labelled text from the hub, or from a local folder, through the ``datasets`` library."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.data.readers import class_names_of, from_arrow
from lightning_distill.data.table import Table, chosen_columns, listed, one_line

# What the splits are called that the field's data sets have; of MNLI's two, the one of the same genres.
_SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "eval", "evaluation", "development", "validation_matched",
            "dev_matched"),
    "test": ("test", "testing", "test_matched"),
}  # fmt: skip


def read_hub_dataset(
    name: str,
    columns: Sequence[str],
    *others: Sequence[str],
    label_column: str | None = None,
    binary: Collection[str] = (),
) -> dict[str, Table]:
    """Read the splits (train, val, test) of a hub data set; a warning names the splits and rows that are not used.

    Args:
        name: ``"name"``, ``"name/configuration"``, ``"owner/name"``, ``"owner/name/configuration"`` or a local folder.
        columns: the columns to keep.
        *others: other lists of columns; the first list that is there in full is kept.
        label_column: the one of them that holds labels, if any. A test split without labels, all -1 as in GLUE, is
            left out, and so are rows of the label -1 where the data set names its classes.
        binary: those that may hold bytes.

    Returns:
        The tables by split, with the names of classes that the data set has.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        ValueError: there is no such data set, no training split, or no such column, or it cannot be read.
    """
    splits = _load(name)
    used = {split: next((name for name in names if name in splits), None) for split, names in _SPLITS.items()}
    tables: dict[str, Table] = {}
    passed_over = [split for split in splits if split not in used.values()]
    for split, found in used.items():
        if found is None:
            continue
        data, place = splits[found], f"{name} ({found})"
        if label_column is not None and split != "train" and label_column not in data.column_names:
            passed_over.append(f"{found} (it has no column {label_column!r})")
            continue
        kept = chosen_columns(place, [columns, *others], data.column_names)
        table = from_arrow(place, data.with_format("arrow")[:], kept, data.column_names, binary)
        table = replace(table, class_names=class_names_of(data.features))
        if not len(table):
            passed_over.append(f"{found} (it has no rows)")
            continue
        if label_column is not None:
            labelled = [row for row, label in enumerate(table.columns[label_column]) if label not in (-1, None)]
            if not labelled:
                passed_over.append(f"{found} (its rows have no labels)")
                continue
            if label_column in table.class_names and len(labelled) < len(table):
                passed_over.append(f"{len(table) - len(labelled)} rows of {found} (their label is -1, none)")
                table = table.take(labelled)
        tables[split] = table
    if "train" not in tables:
        raise ValueError(
            one_line(f"{name}: there is no training split with labels; the splits are {listed(list(splits))}")
        )
    if passed_over:
        rank_zero_warn(one_line(f"{name}: not used: {', '.join(passed_over)}"), stacklevel=2)
    return tables


def _load(name: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{name}: reading a hub data set needs datasets; run: pip install "lightning-distill[hub]"'
        ) from None
    from pyarrow import ArrowException

    owner_and_name, _, configuration = name.rpartition("/")
    # "glue/sst2" may be an owner with a data set or a data set with a configuration: the hub knows.
    readings: list[tuple[str, str | None]] = [(name, None)]
    if owner_and_name and not Path(name).is_dir():
        readings.append((owner_and_name, configuration))
    problem = ""
    for reading in readings:
        try:
            splits: Mapping[str, Any] = datasets.load_dataset(*reading)
            return splits
        except (datasets.exceptions.DatasetsError, ArrowException, OSError, ValueError) as error:
            broken = isinstance(error, datasets.exceptions.DatasetBuildError | ArrowException)
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
            problem = f"the data set cannot be read ({reason})" if broken else f"no such data set ({reason})"
            if broken:
                break
    raise ValueError(one_line(f"{name}: {problem}"))
