"""Labelled text from the hub, or from a local folder, through the ``datasets`` library."""

from collections.abc import Sequence
from pathlib import Path

from lightning_distill.data.files import Table, check_columns

_SPLITS = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)}


def read_hub_dataset(name: str, columns: Sequence[str]) -> tuple[dict[str, Table], list[str] | None]:
    """Read the splits of a hub data set.

    Args:
        name: ``"name"``, ``"name/configuration"``, ``"owner/name"``, ``"owner/name/configuration"`` or a local folder.
        columns: the columns to keep, the label column last.

    Returns:
        The tables by split (train, val, test; a test split without labels, all -1 as in GLUE, is left out), and the
        class names if the data set has them.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        ValueError: there is no such data set, no training split, or no such column.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'{name}: reading a hub data set needs datasets; run: pip install "lightning-distill[hub]"'
        ) from None
    owner_and_name, _, configuration = name.rpartition("/")
    # "glue/sst2" may be an owner with a data set or a data set with a configuration: the hub knows.
    readings: list[tuple[str, str | None]] = [(name, None)]
    if owner_and_name and not Path(name).is_dir():
        readings.append((owner_and_name, configuration))
    for reading in readings:
        try:
            splits = datasets.load_dataset(*reading)
            break
        except (FileNotFoundError, ValueError) as error:
            problem = str(error).splitlines()[0]
    else:
        raise ValueError(f"{name}: no such data set ({problem})")
    tables: dict[str, Table] = {}
    names = None
    for split, aliases in _SPLITS.items():
        found = next((alias for alias in aliases if alias in splits), None)
        if found is None:
            continue
        data = splits[found]
        place = f"{name} ({found})"
        check_columns(place, columns, data.column_names)
        table = Table(place, {column: list(data[column]) for column in columns}, list(range(1, len(data) + 1)))
        if not set(table.columns[columns[-1]]) <= {-1}:
            tables[split] = table
            names = names or getattr(data.features[columns[-1]], "names", None)
    if "train" not in tables:
        raise ValueError(f"{name}: there is no training split with labels; the splits are {', '.join(splits)}")
    return tables, names
