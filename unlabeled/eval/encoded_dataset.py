"""The input of an evaluator: an encoder, its pooled features, and the images they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import eigh

from unlabeled.eval.base import FeatureSet, FeatureSplit, FloatArray
from unlabeled.eval.features.extract import ImageTransform, Outputs, Precision, extract_features
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.data.source import ImageSource


@dataclass(frozen=True)
class Loading:
    """How images are read and encoded."""

    batch_size: int = 256
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    cache: Path | None = None
    """Folder for cached features; None: no cache."""


@dataclass(frozen=True)
class EncodedDataset(OldNames, pictures="require_sources", network="require_backbone", beside="size_like"):
    """One encoder applied to labeled data.

    Use the labels of `features`, not those of the sources: the test source may number its classes differently. Row i
    of ``features.train`` belongs to image ``features.train.indices[i]`` of ``sources[0]``; likewise for test.
    """

    features: FeatureSet
    backbone: Backbone | None = None
    """None: raw pixels, or features from another program."""
    sources: tuple[ImageSource, ImageSource] | None = None
    """(training, test) images; None: only features are available."""
    loading: Loading = field(default_factory=Loading)
    seed: int = 0
    """Seed of all randomness in an evaluator."""
    size_like: Backbone | None = None
    """Raw pixels only: the backbone under evaluation, which sets the image size and grid of the pixel baseline."""

    @property
    def device(self) -> torch.device:
        return self.loading.device

    def require_sources(self) -> tuple[ImageSource, ImageSource]:
        """The (training, test) sources. Raises DataError if only features are available."""
        if self.sources is None:
            raise DataError("evaluate: this evaluator needs images, but only features are available; give data=...")
        return self.sources

    def require_backbone(self) -> Backbone:
        """The backbone. Raises DataError for raw pixels, and if only features are available."""
        if self.backbone is None:
            raise DataError("evaluate: this evaluator needs the backbone, but only features are available")
        return self.backbone

    def encode(
        self,
        source: ImageSource,
        outputs: Outputs | None = None,
        *,
        named: str = "pooled",
        transform: ImageTransform | None = None,
        cached: bool = True,
    ) -> FeatureSplit:
        """Encodes the images of `source` with the backbone: float32 (N, F), with labels and indices.

        `outputs`: function (backbone, normalized images (B, 3, h, w)) → (B, F); None: pooled features.
        `named`: text that identifies `outputs` and its settings in the cache.
        `transform`: replaces the evaluation transform, uint8 (3, H, W) → uint8 (3, h, w). It must be deterministic, and
        its `repr` must show its settings, since the cache identifies it by that.
        `cached`: False: neither read nor write the cache.

        Only this process computes, also under torch.distributed. Raises DataError for raw pixels, and if no image can
        be decoded.
        """
        load = self.loading
        return extract_features(
            self.require_backbone(), source, outputs=outputs, named=named, transform=transform,
            batch_size=load.batch_size,
            workers=load.workers, device=load.device, precision=load.precision,
            together=False,  # evaluators run on the main process only: a collective would wait forever
            cache=load.cache if cached else None,
        )  # fmt: skip

    def first(self, length: int) -> EncodedDataset:
        """The same dataset with only its first `length` features, as for Matryoshka representations."""
        # without the backbone: its pooled features would no longer match these
        return replace(self, features=mapped(self.features, lambda rows: rows[:, :length]), backbone=None)


def principal(dataset: EncodedDataset, length: int) -> EncodedDataset:
    """The same dataset with its features projected on `length` principal components of the training split.

    If there are fewer features, all components are used. Components are sorted by variance, so `first(m)` of the result
    gives the first m components without another decomposition.
    """
    train = dataset.features.train.features.astype(np.float64)
    mean, width = train.mean(axis=0), train.shape[1]
    covariance = np.atleast_2d(np.cov(train, rowvar=False))
    _, vectors = eigh(covariance, subset_by_index=[max(0, width - length), width - 1])
    basis = vectors[:, ::-1]  # eigh sorts ascending
    return replace(
        dataset,
        features=mapped(dataset.features, lambda rows: ((rows - mean) @ basis).astype(np.float32)),
        backbone=None,
    )


def mapped(data: FeatureSet, function: Callable[[FloatArray], FloatArray]) -> FeatureSet:
    """`data` with `function` (N, D) → (N, E) applied to the features of both splits."""

    def apply(split: FeatureSplit) -> FeatureSplit:
        return replace(split, features=np.ascontiguousarray(function(split.features)))

    return replace(data, train=apply(data.train), test=apply(data.test))


def random_twin(backbone: Backbone, seed: int) -> Backbone:
    """The same architecture with new random weights, drawn with `seed`; the global random state does not change.

    Raises ConfigError for a custom model if its layers cannot reinitialize all parameters.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(seed)
        return backbone.twin()
