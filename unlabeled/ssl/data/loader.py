"""From a source to batches: which images each step sees, their views, and what happens to broken ones.

A batch depends on the seed, the step and the data alone: not on loader workers, and the set of its images neither on
the number of processes nor on accumulation. A run can therefore go on at any step as if it had never stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import random
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from unlabeled.ssl.core.errors import ConfigError, DataError, UnlabeledError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.bad import BadImage
from unlabeled.ssl.data.source import DecodeError, ImageSource
from unlabeled.ssl.data.views import Views

Key = tuple[int, int]
"""(epoch, index of the image): together with the run's seed this fixes what the views draw."""


def require_batch(batch_size: int, images: int, world: int, accumulation: int) -> None:
    """Raises ConfigError when a batch is larger than the data, or cannot be split over processes and micro-steps."""
    if batch_size > images:
        raise ConfigError(
            f"batch_size: {batch_size} is larger than the data ({images} images); give batch_size={images} or less"
        )
    if batch_size % (world * accumulation):
        raise ConfigError(
            f"batch_size: {batch_size} cannot be split over {world} processes x {accumulation} micro-steps; "
            f"give a multiple of {world * accumulation}"
        )


class RunSampler(Sampler[list[Key]]):
    """The keys of every micro-step that one process sees, from `start_step` to the end of the run.

    Each epoch is a permutation of the data, cut to full batches; optimizer step s takes `batch_size` places of the
    row of all epochs. They are laid out as [micro-step][rank][local], so that the images of a step are the same
    whatever `world` and `accumulation` are. Raises ConfigError when a batch is larger than the data or does not divide.
    """

    def __init__(
        self,
        *,
        length: int,
        batch_size: int,
        total_steps: int,
        seed: int,
        start_step: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        require_batch(batch_size, length, world, accumulation)
        self.length = length
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulation = accumulation
        self.rank = rank
        self.world = world

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        """Micro-steps that are left."""
        return max(self.total_steps - self.start_step, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // (self.world * self.accumulation)
        shuffled, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                shuffled, order = epoch, self._order(epoch)
            for micro in range(self.accumulation):
                first = position * self.batch_size + (micro * self.world + self.rank) * local
                yield [(epoch, index) for index in order[first : first + local].tolist()]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(derive("epoch", self.seed, epoch)).permutation(self.length)


class Sample(NamedTuple):
    """One image's views, and the broken images met on the way to it."""

    views: dict[str, Tensor]
    bad: list[BadImage]


class ViewDataset(Dataset[Sample]):
    """Images of a source through a task's views, under randomness that belongs to (seed, epoch, index).

    An image that cannot be decoded is replaced by another one, fixed by (seed, index, attempt), and reported. Raises
    DataError when `max_attempts` images in a row are broken.
    """

    def __init__(
        self, source: ImageSource, views: Views, seed: int, max_attempts: int = 16, labels: Tensor | None = None
    ) -> None:
        """`labels`, int64 (N,), go with the views; None: the task has none."""
        self.source = source
        self.views = views
        self.seed = seed
        self.labels = labels
        self.max_attempts = max_attempts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """Views of image `key`, and int64 () ``"index"``: the image really used, and its ``"label"`` if known."""
        epoch, index = key
        image, used, bad = self._read(index)
        with seeded(derive("image", self.seed, epoch, index)):
            views = self.views(image)
        known = {} if self.labels is None else {"label": self.labels[used]}
        return Sample({**views, "index": torch.tensor(used), **known}, bad)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | UnlabeledError:
        """One batch. In a worker an error that a user can cause is returned, for `RunLoader` to raise: see there."""
        try:
            return [self[key] for key in keys]
        except UnlabeledError as error:
            if get_worker_info() is None:
                raise
            return error

    def _read(self, index: int) -> tuple[Tensor, int, list[BadImage]]:
        bad: list[BadImage] = []
        used = index
        for attempt in range(1, self.max_attempts + 1):
            try:
                return self.source.read(used), used, bad
            except DecodeError as error:
                name = self.source.describe(used)
                bad.append(BadImage(used, name, str(error).removeprefix(f"{name}: ")))
            used = derive("replacement", self.seed, index, attempt) % len(self.source)
        raise DataError(
            f"data: {self.max_attempts} images in a row cannot be decoded, the last is {bad[-1].name} "
            f"({bad[-1].reason}); scan the data with `unlabeled doctor`"
        )


@dataclass
class LoadedBatch:
    """What a loader yields: the views of all images stacked, and the broken images that were replaced."""

    tensors: dict[str, Tensor]
    """Each (B, ...); ``"index"`` is int64 (B,)."""
    bad: list[BadImage]

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory; called by torch's loader."""
        return LoadedBatch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.bad)


class RunLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's UnlabeledError as it was: one line instead of a traceback in a traceback.

    Its workers end with its iterator: when that is exhausted, closed, dropped, or raises.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        workers = _Workers(iterator)
        try:
            for batch in iterator:
                if isinstance(batch, UnlabeledError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if re.match(r"DataLoader worker \(pid", str(error)) is None:
                raise
            raise DataError(
                "engine.workers: a loader process died, most often for want of memory; set engine.workers lower"
            ) from error
        finally:
            workers.end()


class _Workers:
    """The loader processes of one of torch's iterators; they end once, at the latest when Python exits.

    The registration also keeps the iterator out of reference cycles with a traceback: collected in one, it loses its
    queues before it has told the workers to leave, and waits for them in vain.
    """

    def __init__(self, iterator: object) -> None:
        self._iterator = iterator if isinstance(iterator, _MultiProcessingDataLoaderIter) else None
        if self._iterator is not None:
            atexit.register(self.end)

    def end(self) -> None:
        """Tells them to leave, waits for them some seconds, and kills those that are stuck."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        atexit.unregister(self.end)
        iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():  # torch's own last resort is the SIGTERM that they ignore
                process.kill()


def make_loader(dataset: ViewDataset, sampler: RunSampler, workers: int, pin_memory: bool = False) -> RunLoader:
    """Yields a `LoadedBatch` per micro-step; one iterator, and with it one set of workers, lasts the whole run."""
    return RunLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=start_worker,
        # of its own, since a loader draws a number from the global generator when it starts
        generator=torch.Generator(),
    )


def collate(samples: list[Sample] | UnlabeledError) -> LoadedBatch | UnlabeledError:
    """Stacks samples; an error passes through."""
    if isinstance(samples, UnlabeledError):
        return samples
    tensors: dict[str, Tensor] = default_collate([sample.views for sample in samples])
    return LoadedBatch(tensors, [bad for sample in samples for bad in sample.bad])


def start_worker(worker: int) -> None:
    """Set-up of a loader process: the main process alone answers signals, and one thread is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generators of torch, numpy and Python; in the main process they are then put back."""
    # not torch.manual_seed: that reaches for the GPU's generators too, and is ten times slower
    generator = torch.default_generator
    # in a worker nothing else draws from them, and numpy takes longer over its state than a small image to decode
    restored = get_worker_info() is None
    if restored:
        before = generator.get_state(), np.random.get_state(), random.getstate()
    generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        if restored:
            generator.set_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])
