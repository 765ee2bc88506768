"""Pictures with a class each: a folder a class, files of encoded pictures, hub data sets."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distill.arguments import finite, integer, typed
from lightning_distill.data.classes import check_class_weights
from lightning_distill.data.pictures import EpochSampler, Pictures, read_image_folder
from lightning_distill.data.readers import kind_of
from lightning_distill.data.rows import RowData
from lightning_distill.data.sampler import BucketBatchSampler
from lightning_distill.data.table import Table

#: Mean and deviation of ImageNet's pictures, channel by channel, which most networks for pictures are trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By Pillow, whether torchvision is installed or not: pictures are the same everywhere.
_PROCESSOR = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
# Where the schema of a parquet file says the names of the classes, joined by commas.
_NAMES = b"label_names"


@typed
class ImageData(RowData):
    """Pictures for a Trainer, one class each. A batch is ``pixel_values`` ``[B, C, H, W]`` and ``labels`` ``[B]``.

    A file is a folder with a folder for each class, or a table (parquet, jsonl, csv ...) whose image column holds
    encoded pictures (bytes, or ``{"bytes", "path"}`` as ``datasets`` writes them) or paths, relative to the file.
    Every picture is decoded once in ``setup``; one that cannot be is an error with file and row.

    Size and normalisation are those of the teacher's image processor (:meth:`read_as`), where it has one; what is given
    here goes before it. The processor is saved beside the student.

    Training reads random views, as ``padding`` and ``flip`` say, which depend on ``seed``, epoch and row alone. A
    :class:`~lightning_distill.callbacks.TeacherCache` knows pictures by their pixels, so a view is an answer of its
    own: right, but only a second run with the same seed finds what it needs in the cache.

    Args:
        image_column: the column of pictures.
        label_column: the column of labels. Names of its numbers are read off a parquet file: the features that
            ``datasets`` writes, or ``label_names`` in the metadata of its schema, joined by commas.
        image_size: height and width that pictures are resized to, in pixels; None: as the teacher has it, else as they
            are, all of one size.
        channels: 3, or 1 for grey.
        mean: of each channel, of pixels in [0, 1]; None: the teacher's, else ImageNet's.
        std: likewise, the deviation.
        padding: pixels of a border around a training picture that it is cut out of at random; 0: it is not cut.
        flip: whether half of the training pictures are mirrored, left to right.
        class_weights: a weight per class for the hard label, or ``"balanced"``.
        balanced: whether training draws all classes equally often.
        **rows: as for :class:`~lightning_distill.data.RowData`.

    Attributes:
        processor: the image processor; it may be set before ``setup``.

    Raises:
        ValueError: an argument is out of range, or a file is wrong; errors about files name file and row.

    Example:
        >>> import numpy as np
        >>> from lightning_distill.data import ImageData
        >>> grey = [np.full((8, 8), shade, dtype=np.uint8) for shade in (0, 250) * 5]
        >>> data = ImageData.from_rows(list(zip(grey, ["dark", "light"] * 5)), batch_size=4, padding=1, flip=True)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["pixel_values"].shape, data.label_names
        (torch.Size([4, 3, 8, 8]), ['dark', 'light'])
    """

    task = "classification"

    def __init__(
        self,
        image_column: str = "image",
        label_column: str = "label",
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        padding: int = 0,
        flip: bool = False,
        class_weights: Literal["balanced"] | list[float] | None = None,
        balanced: bool = False,
        **rows: Any,
    ) -> None:
        super().__init__(**rows)
        integer("padding", padding, 0)
        if image_size is not None:
            integer("image_size", image_size, 1)
        if image_column == label_column:
            raise ValueError(
                f"Expected argument `label_column` to be another one than `image_column`, but got {label_column!r}"
            )
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"Expected argument `{name}` to have {channels} values, one a channel, but got {values}"
                )
            for value in values or ():
                finite(name, value)
        if std is not None and min(std) <= 0:
            raise ValueError(f"Expected argument `std` to be above 0, but got {std}")
        check_class_weights(class_weights, balanced, self.task)
        self.columns, self.label_column, self.binary_columns = (
            [image_column, label_column],
            label_column,
            [image_column],
        )
        self.image_column, self.image_size, self.channels = image_column, image_size, channels
        self.mean, self.std, self.padding, self.flip = mean, std, padding, flip
        self._class_weights, self.balanced = class_weights, balanced
        self.processor = self._new_processor(image_size, list(MEAN), list(STD))

    @classmethod
    def embedded(cls, *, seed: int = 0, **kwargs: Any) -> "ImageData":
        """Make it of scikit-learn's digits: 1,797 grey pictures of 8 x 8 pixels; a tenth validates, a fifth tests.

        Args:
            seed: seed of the split and of the order of the batches.
            **kwargs: as for the class.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                'The digits are in scikit-learn; run: pip install "lightning-distill[vision]"'
            ) from None
        import numpy as np

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        rows = list(zip(pixels, digits.target.tolist(), strict=True))
        order = np.random.default_rng(seed).permutation(len(rows))
        rows, tenth = [rows[place] for place in order], len(rows) // 10
        return cls.from_rows(rows[3 * tenth :], rows[:tenth], rows[tenth : 3 * tenth], seed=seed, **kwargs)

    def read(self, path: Path) -> Table:
        """Read a folder with a folder for each class, or a table of pictures."""
        if path.is_dir():
            return read_image_folder(path, self.image_column, str(self.label_column))
        table = super().read(path)
        pictures = [_found(value, path.parent) for value in table.columns[self.image_column]]
        table = replace(table, columns={**table.columns, self.image_column: pictures})
        if kind_of(path) != ".parquet" or self.label_column in table.class_names:
            return table
        import pyarrow.parquet

        names = (pyarrow.parquet.read_schema(path).metadata or {}).get(_NAMES)
        if names is None:
            return table
        return replace(table, class_names={**table.class_names, str(self.label_column): names.decode().split(",")})

    def read_as(self, path: str, name: str, model: Any) -> None:
        """Read pictures as a model does: by the image processor of its folder; where it has none, a warning says so."""
        config = getattr(model, "config", None)
        self.channels = getattr(config, "num_channels", None) or self.channels
        size = {"height": self.image_size, "width": self.image_size}
        given = {"image_mean": self.mean, "image_std": self.std, "size": self.image_size and size}
        try:
            self.processor = transformers.AutoImageProcessor.from_pretrained(
                path, trust_remote_code=False, **{key: value for key, value in given.items() if value}
            )
            return
        except (OSError, ValueError):
            pass
        image_size = self.image_size or getattr(config, "image_size", None)
        self.processor = self._new_processor(image_size, list(MEAN), list(STD))
        if self.mean is None or self.std is None:
            rank_zero_warn(
                f"{name} {path} has no image processor, so pictures are normalised by ImageNet's mean and deviation; "
                "if the model was trained with others, give `mean` and `std`",
                stacklevel=2,
            )

    def _new_processor(self, image_size: int | None, mean: list[float], std: list[float]) -> Any:
        if self.channels == 1:
            mean, std = [sum(mean) / 3], [sum(std) / 3]
        resize = {"do_resize": image_size is not None, "size": {"height": image_size or 1, "width": image_size or 1}}
        return _PROCESSOR(**resize, image_mean=self.mean or mean, image_std=self.std or std)

    def dataset_of(self, table: Table) -> Pictures:
        """The pictures of a table and their classes."""
        options: dict[str, Any] = {"padding": self.padding, "flip": self.flip, "seed": self.seed}
        labels = self.label_ids(table)
        return Pictures(table, self.image_column, labels, self.processor, channels=self.channels, **options)

    @property
    def collate(self) -> None:  # type: ignore[override]
        """None: torch stacks pictures."""
        return None

    @property
    def train_sampler(self) -> type[BucketBatchSampler]:  # type: ignore[override]
        """Says the epoch beside each row where views are drawn anew in each."""
        return EpochSampler if self.padding or self.flip else BucketBatchSampler


def _found(value: Any, folder: Path) -> Any:
    """A picture, its path made one that can be opened."""
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = value["path"]
    return str(folder / value) if isinstance(value, str) else value
