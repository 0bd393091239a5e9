"""What an evaluator receives: an encoder, its pooled features, and the images behind them."""

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
    """Folder of cached features; None: nothing is kept."""


@dataclass(frozen=True)
class EncodedDataset(OldNames, pictures="require_sources", network="require_backbone", beside="size_like"):
    """One encoder on labeled data.

    Labels are those of `features`: the test source may number its classes differently. ``features.train.indices`` says
    which image of ``sources[0]`` a row belongs to.
    """

    features: FeatureSet
    backbone: Backbone | None = None
    """None: raw pixels, or features from elsewhere."""
    sources: tuple[ImageSource, ImageSource] | None = None
    """(training, test) images; None: features alone."""
    loading: Loading = field(default_factory=Loading)
    seed: int = 0
    """Of everything that an evaluator draws."""
    size_like: Backbone | None = None
    """Raw pixels only: the judged network, whose size and grid of places a baseline of pixels takes over."""

    @property
    def device(self) -> torch.device:
        return self.loading.device

    def require_sources(self) -> tuple[ImageSource, ImageSource]:
        """(training, test) sources. Raises DataError when there are features alone."""
        if self.sources is None:
            raise DataError("evaluate: this evaluator looks at images, and there are features alone; give data=...")
        return self.sources

    def require_backbone(self) -> Backbone:
        """The backbone. Raises DataError for raw pixels and for bare features."""
        if self.backbone is None:
            raise DataError("evaluate: this evaluator needs the network, and there are features alone")
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
        """What `outputs` (backbone, normalized images (B, 3, h, w)) → (B, F) gives for `source`, float32 (N, F).

        None: pooled features. `named` says in the cache what `outputs` and its settings are. `transform` replaces the
        evaluation transform: uint8 (3, H, W) → uint8 (3, h, w), the same for the same image, with a telling `repr`.
        Done by this process alone, also under torch.distributed.
        """
        load = self.loading
        return extract_features(
            self.require_backbone(), source, outputs=outputs, named=named, transform=transform,
            batch_size=load.batch_size,
            workers=load.workers, device=load.device, precision=load.precision, together=False,
            cache=load.cache if cached else None,
        )  # fmt: skip

    def first(self, length: int) -> EncodedDataset:
        """The same with the first `length` of its features only, as Matryoshka representations are read."""
        return replace(self, features=mapped(self.features, lambda rows: rows[:, :length]), backbone=None)


def principal(dataset: EncodedDataset, length: int) -> EncodedDataset:
    """The same as its first `length` principal components, found on the training split; fewer where D is smaller.

    The first m of them are the first m components, so that `first` of the result needs no new basis.
    """
    train = dataset.features.train.features.astype(np.float64)
    mean, width = train.mean(axis=0), train.shape[1]
    covariance = np.atleast_2d(np.cov(train, rowvar=False))
    _, vectors = eigh(covariance, subset_by_index=[max(0, width - length), width - 1])
    basis = vectors[:, ::-1]
    return replace(
        dataset,
        features=mapped(dataset.features, lambda rows: ((rows - mean) @ basis).astype(np.float32)),
        backbone=None,
    )


def mapped(data: FeatureSet, function: Callable[[FloatArray], FloatArray]) -> FeatureSet:
    """`data` with `function` (N, D) → (N, E) applied to the features of both splits."""

    def of(split: FeatureSplit) -> FeatureSplit:
        return replace(split, features=np.ascontiguousarray(function(split.features)))

    return replace(data, train=of(data.train), test=of(data.test))


def random_twin(backbone: Backbone, seed: int) -> Backbone:
    """The same architecture with fresh random weights drawn under `seed`; the global random state is left alone.

    Raises ConfigError for a network without a timm name whose layers cannot draw all of its parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbone.twin()
