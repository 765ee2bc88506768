"""Pictures: folders of them, how one is decoded, random views of one, and the dataset that reads them."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_distill.arguments import integer, typed
from lightning_distill.data.progress import progress
from lightning_distill.data.sampler import BucketBatchSampler
from lightning_distill.data.table import Table, listed, shown

#: Endings of the pictures that are looked for in a folder.
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image_folder(path: Path, image_column: str, label_column: str) -> Table:
    """Read the names of the pictures in a folder that has a folder for each class, which is named as the class.

    Raises:
        ValueError: there are no such folders, one has no pictures, or they are splits.

    Example:
        >>> import tempfile
        >>> home = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (home / name).mkdir()
        ...     Image.new("RGB", (2, 2)).save(home / name / "1.png")
        >>> read_image_folder(home, "image", "label").columns["label"]
        ['cat', 'dog']
    """
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    names = [folder.name for folder in classes]
    if not classes:
        raise ValueError(f"{path}: there are no folders in it; expected one for each class, with its pictures")
    if {name.lower() for name in names} <= _SPLITS:
        raise ValueError(f"{path}: its folders are splits, {listed(names)}; name each, or the whole as `hub_dataset`")
    images: list[str] = []
    labels: list[str] = []
    for folder in classes:
        found = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
        if not found:
            raise ValueError(f"{folder}: there are no pictures in it; known endings are {' '.join(sorted(ENDINGS))}")
        images += found
        labels += [folder.name] * len(found)
    return Table(str(path), {image_column: images, label_column: labels}, list(range(1, len(images) + 1)))


def picture(value: Any, mode: str = "RGB") -> Image.Image:
    """Decode a picture.

    Args:
        value: Bytes of a file; its path; a mapping with ``bytes`` or ``path``, as ``datasets`` writes it; a picture of
            Pillow; or an array of uint8, ``[H, W]`` or ``[H, W, 3]``.
        mode: Pillow's name of the channels that are wanted: ``"RGB"``, or ``"L"`` for grey.

    Raises:
        ValueError: It cannot be decoded, or has more than 8 bits a channel.

    Example:
        >>> picture(np.zeros((4, 6), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    named = f"{value}: " if isinstance(value, str | Path) else ""
    try:
        if isinstance(value, np.ndarray):
            if value.dtype != np.uint8:
                raise ValueError(f"an array of {value.dtype}; expected uint8")
            image: Image.Image = Image.fromarray(value)
        elif isinstance(value, Image.Image):
            image = value
        elif isinstance(value, bytes | str | Path):
            image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        else:
            raise ValueError(f"{shown(value)} is no picture")
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are of mode {image.mode!r}; expected 8 bits a channel")
        with image if image is not value else image.copy() as opened:
            return opened.convert(mode)
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            problem = "not a picture of a known kind"
        else:
            problem = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        raise ValueError(f"{named}{problem}") from None


@typed
def random_view(
    pixels: Tensor, *, padding: int = 0, flip: bool = False, seed: int = 0, epoch: int = 0, row: int = 0
) -> Tensor:
    """Cut a picture at random out of itself with a border around it, and mirror it with probability 1/2.

    Crops of a border of 4 pixels and mirroring are what CIFAR networks are trained with. The border is 0, which is the
    mean colour of normalised pixels. The view depends on seed, epoch and row alone: a resumed run, and any number of
    workers and processes, see the same.

    Args:
        pixels: A picture ``[C, H, W]``.
        padding: Pixels of the border; 0: it is not cut.
        flip: Whether it may be mirrored, left to right.
        seed: Seed of the run.
        epoch: Number of the epoch.
        row: Number of the picture.

    Returns:
        A picture of the same shape.

    Raises:
        ValueError: If ``pixels`` are not ``[C, H, W]``, or ``padding`` is negative.

    Example:
        >>> import torch
        >>> picture = torch.arange(1.0, 10.0).view(1, 3, 3)
        >>> random_view(picture, padding=1, flip=True, seed=0)
        tensor([[[6., 5., 4.],
                 [9., 8., 7.],
                 [0., 0., 0.]]])

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
    """
    integer("padding", padding, 0)
    if pixels.ndim != 3:
        raise ValueError(f"Expected argument `pixels` to have the shape [C, H, W], but got {list(pixels.shape)}.")
    random = np.random.default_rng((seed, epoch, row))
    top, left = random.integers(2 * padding + 1, size=2).tolist()
    mirrored = flip and bool(random.random() < 0.5)
    height, width = pixels.shape[1:]
    view = F.pad(pixels, [padding] * 4)[:, top : top + height, left : left + width]
    return view.flip(2) if mirrored else view


class EpochSampler(BucketBatchSampler):
    """A :class:`BucketBatchSampler` whose batches say the epoch beside each row, for what is drawn anew in each.

    A dataset cannot be told the epoch: worker processes keep a copy of it from one epoch to the next.

    Example:
        >>> sampler = EpochSampler([1, 1], batch_size=2, shuffle=False)
        >>> sampler.set_epoch(3)
        >>> list(sampler)
        [[(0, 3), (1, 3)]]
    """

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            yield [(row, self.epoch) for row in batch]


class Pictures(Dataset):
    """The pictures of a table, decoded when they are asked for, so that memory holds them as they are encoded.

    Args:
        table: The table; each of its pictures is decoded once to see that it can be.
        column: Its column of pictures.
        labels: The class of each row.
        processor: Makes ``pixel_values`` of a picture: an image processor of transformers.
        channels: 3, or 1 for grey.
        padding: See :func:`random_view`.
        flip: See there.
        seed: See there.

    Raises:
        ValueError: A picture does not decode, or is of another size than the first where nothing resizes them.

    Example:
        >>> from transformers import ViTImageProcessor
        >>> table = Table("rows", {"image": [np.zeros((8, 8), dtype=np.uint8)]}, [1])
        >>> pictures = Pictures(table, "image", [1], ViTImageProcessor(size=4))
        >>> pictures[0]["pixel_values"].shape, pictures[0]["labels"]
        (torch.Size([3, 4, 4]), tensor(1))
    """

    def __init__(
        self,
        table: Table,
        column: str,
        labels: Sequence[int],
        processor: Any,
        *,
        channels: int = 3,
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.table, self.values, self.labels, self.processor = table, table.columns[column], list(labels), processor
        self.mode = "RGB" if channels == 3 else "L"
        self.padding, self.flip, self.seed = padding, flip, seed
        self.lengths = [1] * len(self.values)
        self._check()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        row, epoch = key if isinstance(key, tuple) else (key, None)
        pixels: Tensor = self.processor(self._picture(row), return_tensors="pt")["pixel_values"][0]
        if epoch is not None:
            pixels = random_view(pixels, padding=self.padding, flip=self.flip, seed=self.seed, epoch=epoch, row=row)
        return {"pixel_values": pixels, "labels": torch.tensor(self.labels[row])}

    def _picture(self, row: int) -> Image.Image:
        try:
            return picture(self.values[row], self.mode)
        except ValueError as error:
            raise self.table.error(row, f"the picture cannot be read: {error}") from None

    def _check(self) -> None:
        """Decode every picture, as many at a time as there are cores."""
        size = getattr(self.processor, "size", None) or {}
        crops = getattr(self.processor, "do_center_crop", None)
        any_size = bool(crops or (getattr(self.processor, "do_resize", None) and "height" in size))
        with ThreadPoolExecutor() as pool:
            sizes = pool.map(lambda row: self._picture(row).size, range(len(self)))
            first: tuple[int, int] | None = None
            for row, found in enumerate(progress(sizes, f"Decoding {self.table.name}", unit=" pictures")):
                first = first or found
                if found != first and not any_size:
                    problem = f"a picture of {found[0]} x {found[1]} pixels, and the first has {first[0]} x {first[1]}"
                    raise self.table.error(row, f"{problem}; give `image_size`, to which all are resized")
