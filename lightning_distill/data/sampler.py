"""Batches of similar length in a random order that can be taken up again where it stopped.

torchdata's ``StatefulDataLoader`` keeps a position for each worker process, so a run must go on with as many of them.
Here it is one number, whoever fetches the batches.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_distill.arguments import integer, typed
from lightning_distill.data.classes import equal_draws

_POOL = 50  # global batches sorted together: enough for little padding, few enough for a random order


@typed
class BucketBatchSampler(DistributedSampler):
    """Batches of similar length, in an order that is a function of the seed and the epoch alone.

    The samples are shuffled, cut into pools of 50 batches, sorted by length within a pool, cut into batches, and the
    batches are shuffled. Processes share each batch: with R processes the order is that of one process with R times the
    batch size, and process r takes every R-th sample of each global batch. So two processes train on what one would.

    It is a ``DistributedSampler``, which tells Lightning that the samples are divided among the processes already; give
    it to :class:`ResumableDataLoader` as its ``batch_sampler``.

    Args:
        lengths: the length of each sample, in any unit; equal lengths give plain shuffled batches.
        batch_size: samples in a batch of one process.
        seed: seed of the order.
        shuffle: ``True``, for training, repeats at most R - 1 samples of an epoch so that the processes have equally
            many. ``False``, for evaluation, gives each sample exactly once, in batches of nearly equal size, the
            longest samples first, so that a batch that does not fit into memory is met at once.
        drop_last: when shuffling, leave out the samples that do not fill a global batch.
        num_replicas: number of processes R; default: that of ``torch.distributed``, or 1.
        rank: number of this process; default: that of ``torch.distributed``, or 0.
        classes: the class of each sample; when shuffling, an epoch then has as many samples as before, drawn from all
            classes equally often: those of small classes are repeated, some of large ones are left out, other ones in
            each epoch.

    Raises:
        ValueError: ``lengths`` is empty, or ``batch_size`` is not positive, or the rank is not below the number of
            processes, or ``classes`` are not as many as ``lengths``.

    Example:
        >>> sampler = BucketBatchSampler([3, 9, 4, 8, 5, 7], batch_size=2, shuffle=False)
        >>> list(sampler)
        [[1, 3], [5, 4], [2, 0]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("Expected argument `lengths` to have one length per sample, but got none")
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be positive, but got {batch_size}")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        integer("seed", seed, 0)
        integer("num_replicas", num_replicas, 1)
        integer("rank", rank, 0, num_replicas - 1)
        super().__init__(lengths, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        if classes is not None and len(classes) != len(lengths):
            raise ValueError(
                f"Expected argument `classes` to have one class per sample, {len(lengths)}, but got {len(classes)}"
            )
        self.lengths = np.asarray(lengths)
        self.classes = None if classes is None else np.asarray(classes)
        self.batch_size = batch_size
        self.position = 0
        self._start = 0

    @property
    def global_batch_size(self) -> int:
        """Samples in a batch of all processes together."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        if not self.shuffle:
            return len(self._evaluation_batches())
        full, rest = divmod(len(self.lengths), self.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        batches = self._training_batches() if self.shuffle else self._evaluation_batches()
        for number, batch in enumerate(batches[start:], start=start):
            self.position = number + 1
            yield batch.tolist()

    def _training_batches(self) -> list[np.ndarray]:
        size = self.global_batch_size
        random = np.random.default_rng((self.seed, self.epoch))
        drawn = random.permutation(len(self.lengths)) if self.classes is None else equal_draws(self.classes, random)
        order: np.ndarray = drawn
        for begin in range(0, len(order), _POOL * size):
            pool = order[begin : begin + _POOL * size]
            pool[:] = pool[np.argsort(self.lengths[pool], kind="stable")]
        batches = np.split(order, range(size, len(order), size))
        full = len(order) // size
        shuffled = [batches[index] for index in random.permutation(full)]
        if len(self) > full:
            missing = -len(batches[-1]) % self.num_replicas
            shuffled.append(np.concatenate([batches[-1], np.resize(order, missing)]))
        return [batch[self.rank :: self.num_replicas] for batch in shuffled]

    def _evaluation_batches(self) -> list[np.ndarray]:
        order = np.argsort(-self.lengths, kind="stable")
        batches = np.array_split(order, -(-len(order) // self.global_batch_size))
        return [batch[self.rank :: self.num_replicas] for batch in batches if len(batch) > self.rank]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from its first batch unless it is the epoch already chosen."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Say which batches of which epoch have been given out."""
        return {"epoch": self.epoch, "position": self.position, "global_batch_size": self.global_batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on after the batches that ``state`` says were given out.

        The number of processes may have changed if the global batch size has not. If it has, the rest of the epoch
        starts after about as many samples, in another order, and a warning says so.
        """
        position = state["position"]
        if position and state["global_batch_size"] != self.global_batch_size:
            warnings.warn(
                f"the checkpoint has {state['global_batch_size']} samples in a step of all processes, this run has "
                f"{self.global_batch_size}: in the epoch it resumes some samples are repeated or left out",
                stacklevel=2,
            )
            position = position * state["global_batch_size"] // self.global_batch_size
        self.epoch, self.position, self._start = state["epoch"], position, position


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` whose position is kept in Lightning's checkpoints, so that a run resumes at its next batch.

    Lightning saves ``state_dict()`` of every train dataloader that has one and loads it before training goes on. The
    position counts the batches received, not those that worker processes have fetched ahead.

    Args:
        dataset: a map-style dataset.
        batch_sampler: the batches.
        **kwargs: as for ``torch.utils.data.DataLoader``.

    Example:
        >>> loader = ResumableDataLoader(range(6), BucketBatchSampler([1] * 6, 2, shuffle=False))
        >>> iterator = iter(loader)
        >>> next(iterator)
        tensor([0, 1])
        >>> resumed = ResumableDataLoader(range(6), BucketBatchSampler([1] * 6, 2, shuffle=False))
        >>> resumed.load_state_dict(loader.state_dict())
        >>> next(iter(resumed)), len(resumed)
        (tensor([2, 3]), 3)
    """

    batch_sampler: BucketBatchSampler

    def __init__(self, dataset: Dataset, batch_sampler: BucketBatchSampler, **kwargs: Any) -> None:
        # An iterator draws a seed for its workers. From the global generator that would change every dropout mask after
        # it, in a resumed run at another step than in one without a break.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        # Lightning looks at `sampler` to see whether the samples are divided among the processes already, and to call
        # set_epoch; PyTorch puts an unused SequentialSampler there and refuses the plain assignment.
        self.__dict__["sampler"] = batch_sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is fetched before the first batch is asked for: Lightning makes the iterator
        # before it calls set_epoch, and workers would start on the wrong epoch.
        sampler = self.batch_sampler
        position = sampler._start
        for batch in super().__iter__():
            position += 1
            sampler.position = position
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Say which batches of which epoch have been received."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start at the first batch that had not been received."""
        self.batch_sampler.load_state_dict(state)
