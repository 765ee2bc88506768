"""What all data modules have in common: splits of samples, and dataloaders whose order can be resumed."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_distill.arguments import integer
from lightning_distill.data.sampler import BucketBatchSampler, ResumableDataLoader
from lightning_distill.models.pretrained import load_tokenizer

Split = Literal["train", "val", "test"]


def check_sources(hub_dataset: str | None, **files: Any) -> None:
    """Refuse sources that do not go together: a hub data set beside files, or files without one to train on.

    Args:
        hub_dataset: the argument of that name.
        **files: the others by name, that to train on first.

    Raises:
        ValueError: if so.
    """
    train, *others = files
    if files[train] and hub_dataset is not None:
        raise ValueError(f"Expected one of the arguments `{train}` and `hub_dataset`, but got both")
    for name in others:
        if files[name] and not files[train]:
            beside = "none" if hub_dataset is None else "a `hub_dataset`, which has its own splits"
            raise ValueError(f"Expected argument `{train}` beside `{name}`, to train on, but got {beside}")


def hold_out(count: int, share: float, generator: random.Random) -> tuple[list[int], list[int]]:
    """Draw a share of so many things, at least one and not all: the places of what stays, and of what is drawn."""
    size = min(max(round(share * count), 1), count - 1)
    drawn = set(generator.sample(range(count), size))
    return [place for place in range(count) if place not in drawn], sorted(drawn)


class ResumableData(L.LightningDataModule):
    """Splits of samples, and their dataloaders. Subclasses fill ``_datasets`` in ``setup``.

    A dataset is map-style and has ``lengths``, one per sample; training batches hold samples of similar length.

    Args:
        tokenizer: a tokenizer, or the name or folder of one; it may be set later, before ``setup``. None where nothing
            is text.
        batch_size: samples in a batch of one process.
        seed: seed of the order of the batches.
        num_workers: worker processes of each dataloader.
    """

    #: Makes a batch of samples; None for torch's own way.
    collate: Callable[[list[Any]], Any] | None = None
    #: Whether training draws all classes equally often; datasets then have ``labels``.
    balanced = False
    #: Makes the batches of training; one of its own may say more of each sample than its number.
    train_sampler: type[BucketBatchSampler] = BucketBatchSampler

    def __init__(
        self, tokenizer: str | Path | PreTrainedTokenizerBase | None, batch_size: int, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        integer("seed", seed, 0)
        integer("num_workers", num_workers, 0)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: dict[str, Any] = {}

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(
                "Expected argument `tokenizer` to be a tokenizer or the name or folder of one, but got None"
            )
        if isinstance(self.tokenizer, str | Path):
            self.tokenizer = load_tokenizer(self.tokenizer, "tokenizer")
        tokenizer: Any = self.tokenizer
        return tokenizer

    def _loader(self, split: Split, shuffle: bool) -> DataLoader:
        dataset = self._datasets[split]
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return self._loader_in_file_order(split)  # Lightning wants to replace the sampler then, and could not
        # Under tensor parallelism several processes read the same batches, which only the strategy knows.
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        classes = dataset.labels if shuffle and self.balanced else None
        kind = self.train_sampler if shuffle else BucketBatchSampler
        sampler = kind(dataset.lengths, self.batch_size, seed=self.seed, shuffle=shuffle, classes=classes, **share)
        return ResumableDataLoader(dataset, sampler, **self._loader_options())

    def _loader_in_file_order(self, split: Split) -> DataLoader:
        return DataLoader(self._datasets[split], batch_size=self.batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self.collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> DataLoader:
        """Batches of similar length in a random order."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Each validation sample once, the longest first."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Each test sample once, the longest first."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader:
        """The test samples in their own order."""
        return self._loader_in_file_order("test")
