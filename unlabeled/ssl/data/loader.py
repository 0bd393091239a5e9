"""From a source to batches: which images each step uses, their views, and how broken images are replaced.

A batch depends only on the seed, the step and the data, and not on the number of loader workers. The set of its images
does not depend on the number of processes or on accumulation either. A run can therefore be resumed at any step as if
it had never stopped.
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
from unlabeled.ssl.core.signals import STOP_SIGNALS
from unlabeled.ssl.data.bad import BadImage
from unlabeled.ssl.data.source import DecodeError, ImageSource
from unlabeled.ssl.data.views import Views

Key = tuple[int, int]
"""(epoch, index of the image): together with the run's seed, this determines the random numbers of the views."""


def require_batch(batch_size: int, images: int, world: int, accumulation: int) -> None:
    """Raises ConfigError if a batch is larger than the data or cannot be split over processes and micro-steps."""
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
    """Yields the keys of each micro-step of one process, from `start_step` to the end of the run.

    Each epoch is a permutation of the data, cut to full batches, and each optimizer step takes the next `batch_size`
    images. Raises ConfigError if a batch is larger than the data or cannot be split (see `require_batch`).
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
        """Number of remaining micro-steps."""
        return max(self.total_steps - self.start_step, 0) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        local = self.batch_size // (self.world * self.accumulation)
        shuffled, order = -1, np.empty(0, dtype=np.int64)  # the epoch of `order`; none yet
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                shuffled, order = epoch, self._order(epoch)
            for micro in range(self.accumulation):
                # laid out as [micro-step][rank][local]: a step has the same images for any `world` and `accumulation`
                first = position * self.batch_size + (micro * self.world + self.rank) * local
                yield [(epoch, index) for index in order[first : first + local].tolist()]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(derive("epoch", self.seed, epoch)).permutation(self.length)


class Sample(NamedTuple):
    """The views of one image, and the broken images that it replaces."""

    views: dict[str, Tensor]
    bad: list[BadImage]


class ViewDataset(Dataset[Sample]):
    """Applies a task's views to the images of a source, with random numbers seeded from (seed, epoch, index).

    An image that cannot be decoded is reported and replaced by another one that depends on (seed, index, attempt).
    Raises DataError if `max_attempts` images in a row are broken.
    """

    def __init__(
        self, source: ImageSource, views: Views, seed: int, max_attempts: int = 16, labels: Tensor | None = None
    ) -> None:
        """`labels`, int64 (N,), are added to the views; None: the task uses no labels."""
        self.source = source
        self.views = views
        self.seed = seed
        self.labels = labels
        self.max_attempts = max_attempts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """The views of image `key`, with the int64 scalars ``"index"`` (of the image actually used) and ``"label"``."""
        epoch, index = key
        image, used, bad = self._read(index)
        # by the requested index, not the used one; "picture" is part of the seed, so renaming it would change every run
        with seeded(derive("picture", self.seed, epoch, index)):
            views = self.views(image)
        known = {} if self.labels is None else {"label": self.labels[used]}
        return Sample({**views, "index": torch.tensor(used), **known}, bad)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | UnlabeledError:
        """The samples of one batch; in a worker, an UnlabeledError is returned instead of raised."""
        try:
            return [self[key] for key in keys]
        except UnlabeledError as error:
            # torch would raise a worker's error with its traceback as the message; `RunLoader` raises it unchanged
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
    """One micro-batch: the stacked views of all images, and the broken images that were replaced."""

    tensors: dict[str, Tensor]
    """Each (B, ...); ``"index"`` is int64 (B,)."""
    bad: list[BadImage]

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory; torch's loader calls this."""
        return LoadedBatch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.bad)


class RunLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's UnlabeledError unchanged, as one line instead of a traceback in a traceback.

    Its workers end when its iterator is exhausted, closed, deleted, or raises.
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
            # torch has no exception class for a worker that was killed
            if re.match(r"DataLoader worker \(pid", str(error)) is None:
                raise
            raise DataError(
                "engine.workers: a loader process died, usually out of memory; set engine.workers lower"
            ) from error
        finally:
            workers.end()


class _Workers:
    """The loader processes of one of torch's iterators, which end at the latest when Python exits."""

    def __init__(self, iterator: object) -> None:
        self._iterator = iterator if isinstance(iterator, _MultiProcessingDataLoaderIter) else None
        if self._iterator is not None:
            # this reference also keeps the garbage collector from the iterator: collected in a cycle with a traceback,
            # it loses its queues before it can stop the workers, and waits for them in vain
            atexit.register(self.end)

    def end(self) -> None:
        """Stops the workers, waits a few seconds for them, and kills those that are stuck. Later calls do nothing."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        atexit.unregister(self.end)
        iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():  # torch's own last resort is SIGTERM, which the workers ignore
                process.kill()


def make_loader(dataset: ViewDataset, sampler: RunSampler, workers: int, pin_memory: bool = False) -> RunLoader:
    """Creates the loader of a run, which yields one `LoadedBatch` per micro-step.

    Use a single iterator: it keeps one set of workers for the entire run.
    """
    return RunLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=start_worker,
        # its own generator, since a loader draws from the global one when it starts
        generator=torch.Generator(),
    )


def collate(samples: list[Sample] | UnlabeledError) -> LoadedBatch | UnlabeledError:
    """Stacks samples into a batch; returns an error unchanged."""
    if isinstance(samples, UnlabeledError):
        return samples
    tensors: dict[str, Tensor] = default_collate([sample.views for sample in samples])
    return LoadedBatch(tensors, [bad for sample in samples for bad in sample.bad])


def start_worker(worker: int) -> None:
    """Sets up a loader process."""
    # a launcher signals all processes, and the main one still needs its workers until the next checkpoint
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)  # the workers already use all cores


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generators of torch, numpy and Python; in the main process, restores their state afterwards."""
    # not torch.manual_seed, which also seeds the GPU's generators and is ten times slower
    generator = torch.default_generator
    # in a worker nothing else uses them, and saving numpy's state takes longer than decoding a small image
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
