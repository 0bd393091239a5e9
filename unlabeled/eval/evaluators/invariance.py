"""Invariance of features to augmentation: LiDAR and alignment over several views of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from unlabeled.eval.base import Estimate, Evaluator, EvaluatorConfig, Measure, Value
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.spectrum import sample_rows
from unlabeled.eval.metrics import lidar, pair_distances
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.loader import seeded
from unlabeled.ssl.data.source import ImageSource

_Z95 = 1.96


_MEASURES = {
    "lidar": Measure("LiDAR", "number"),
    "alignment": Measure("alignment of two views (0: identical)", "number", "lower"),
}


class InvarianceConfig(EvaluatorConfig):
    """LiDAR and alignment over random crops, flips and color changes of training images."""

    images: int = Field(500, ge=2)
    """Training images to use, drawn with the seed; the LiDAR paper uses 1000. [images]"""
    views: int = Field(10, ge=2)
    """Random views of each image; the LiDAR paper uses 50. [views]"""
    scale: float = Field(0.2, gt=0, le=1)
    """Smallest fraction of the image area that a crop covers. [fraction]"""


class InvarianceEvaluator(Evaluator):
    """LiDAR and alignment over random crops, flips and color jitter, the views of most joint-embedding methods.

    The views are the same for all encoders. For a task with other views (patches, rotations), this is not the LiDAR of
    its own objective, but values remain comparable.

    Yields ``lidar`` (at most ``images`` - 1) and ``alignment``, with a 95 % interval of the mean over images; the
    numbers of ``images`` and ``views`` used; and ``distances`` float64 (N,), the alignment of each image.
    """

    name: ClassVar = "invariance"
    title: ClassVar = "Invariance to augmentation"
    needs: ClassVar = "backbone"
    Config: ClassVar = InvarianceConfig

    def __init__(self, config: InvarianceConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        train, views = dataset.features.train, self.config.views
        readable = np.arange(len(train)) if train.indices is None else train.indices
        picked = readable[sample_rows(len(readable), self.config.images, "invariance", dataset.seed)]
        if len(picked) < 2:
            raise DataError(f"evaluate.invariance: {len(picked)} images are too few; give at least two")
        augment = augmentation(dataset.require_backbone().input_size, self.config.scale)
        source = ViewSource(dataset.require_sources()[0], picked.tolist(), views, augment, dataset.seed)
        features = dataset.encode(source).features.reshape(len(picked), views, -1)  # (N, Q, D)
        distances = pair_distances(features)
        mean, half = float(distances.mean()), _Z95 * float(distances.std(ddof=1)) / len(picked) ** 0.5
        yield "lidar", _MEASURES["lidar"].of(lidar(features))
        yield "alignment", _MEASURES["alignment"].of(Estimate(mean, mean - half, mean + half))
        yield "images", len(picked)
        yield "views", views
        yield "distances", distances


class ViewSource:
    """A source with `views` augmented versions of each of the images `indices` of another source, image by image.

    The augmentation of a view depends on the seed, the image's index and the view's number only.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self, source: ImageSource, indices: Sequence[int], views: int, augment: Callable[[Tensor], Tensor], seed: int
    ) -> None:
        self.source, self.indices, self.views, self.augment, self.seed = source, indices, views, augment, seed

    def __len__(self) -> int:
        return len(self.indices) * self.views

    def read(self, index: int) -> Tensor:
        position, view = divmod(index, self.views)
        image = self.source.read(self.indices[position])
        with seeded(derive("view", self.seed, self.indices[position], view)):
            return self.augment(image)

    def labels(self) -> Tensor | None:
        return None

    def describe(self, index: int) -> str:
        # the feature cache identifies images by this text, so it names all that shapes the pixels
        position, view = divmod(index, self.views)
        return f"{self.source.describe(self.indices[position])}, view {view} of seed {self.seed}, {self.augment!r}"


def augmentation(size: tuple[int, int], scale: float) -> Callable[[Tensor], Tensor]:
    """A random augmentation, uint8 (3, H, W) → uint8 (3, h, w) of `size`: crops, flips, and color jitter (p = 0.8).

    Crops cover a fraction `scale` to 1 of the area. The jitter is SimCLR's (Chen et al. 2020, 2002.05709) at half
    strength, as that paper uses for CIFAR-10.
    """
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    steps: list[Any] = [v2.RandomResizedCrop(list(size), scale=(scale, 1.0), antialias=True)]
    composed: Callable[[Tensor], Tensor] = v2.Compose(
        [*steps, v2.RandomHorizontalFlip(), v2.RandomApply([jitter], 0.8)]
    )
    return composed
