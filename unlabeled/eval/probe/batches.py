"""Batches for linear heads, from cached features or from augmented images that are encoded on the fly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.features.extract import Outputs, encode_batch, evaluating, load_images
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.loader import seeded
from unlabeled.ssl.data.source import ImageSource

Batches = Iterator[tuple[Tensor, Tensor]]
"""Standardized features float32 (B, F) and labels int64 (B,); the next batch may reuse the memory of the features."""


@dataclass(frozen=True)
class Course:
    """The order of training rows: in each epoch a new shuffle, in full batches; the incomplete last one is dropped."""

    rows: Tensor
    """int64 (N,), rows of the training split."""
    batch: int
    """Images per batch."""
    epochs: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return len(self.rows) // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch

    def orders(self) -> Iterator[Tensor]:
        """Yields the rows of each epoch, int64 (`per_epoch` * `batch`,)."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield self.rows[torch.randperm(len(self.rows), generator=generator)[: self.per_epoch * self.batch]]


def cached_batches(features: Tensor, labels: Tensor, course: Course) -> Batches:
    """Yields batches of standardized features (N, F) and labels (N,)."""
    buffer = features.new_empty(course.batch, features.shape[1])  # allocating it each time costs more than the copy
    for order in course.orders():
        order = order.to(features.device)
        truth = labels[order]
        for position, rows in enumerate(torch.split(order, course.batch)):
            torch.index_select(features, 0, rows, out=buffer)
            yield buffer, truth[position * course.batch : (position + 1) * course.batch]


class AugmentedImages:
    """A source whose image ``epoch * N + i`` is a random crop of image i, flipped with probability 0.5.

    The crop is torchvision's RandomResizedCrop (8 to 100 % of the area, bicubic), as in the linear evaluation of DINOv2
    and in supervised recipes. The augmentation depends on (seed, epoch, i) only.
    """

    def __init__(self, source: ImageSource, size: tuple[int, int], seed: int) -> None:
        self.source = source
        self.seed = seed
        self.classes = source.classes
        crop = v2.RandomResizedCrop(list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        self._transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        """uint8 (3, h, w)."""
        epoch, inner = divmod(index, len(self.source))
        pixels = self.source.read(inner)
        with seeded(derive("linear probe", self.seed, epoch, inner)):
            image: Tensor = self._transform(pixels)
        return image

    def labels(self) -> Tensor | None:
        return self.source.labels()

    def describe(self, index: int) -> str:
        return self.source.describe(index % len(self.source))


def augmented_batches(
    dataset: EncodedDataset, outputs: Outputs | None, mean: Tensor, deviation: Tensor, labels: Tensor, course: Course
) -> Batches:
    """Yields batches of features of augmented training images, standardized with `mean` and `deviation` (F,).

    `labels` (N,) are those of all rows of the training split. The backbone stays frozen and in evaluation mode.
    """
    backbone, load = dataset.require_backbone(), dataset.loading
    source = AugmentedImages(dataset.require_sources()[0], backbone.input_size, dataset.seed)
    indices = dataset.features.train.indices
    readable = torch.arange(len(labels)) if indices is None else torch.from_numpy(indices)
    # one list of images for all epochs, so that workers start once
    keys = torch.cat([readable[order] + epoch * len(source) for epoch, order in enumerate(course.orders())])
    row_of = torch.zeros(len(source), dtype=torch.int64)
    row_of[readable] = torch.arange(len(readable))
    backbone.to(load.device)
    batches = load_images(source, _unchanged, keys.tolist(), batch_size=course.batch, workers=load.workers)
    for batch_keys, images, _ in batches:
        if images is None:
            continue
        with evaluating(backbone), torch.inference_mode():
            features = encode_batch(backbone, images, outputs, load.device, load.precision)
            features.sub_(mean).div_(deviation)
        yield features, labels[row_of[batch_keys % len(source)].to(labels.device)]


def _unchanged(image: Tensor) -> Tensor:
    """The transform of images that the source has already resized; a lambda could not be sent to a worker."""
    return image
