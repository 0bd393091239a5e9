"""Settings of the evaluators, one section each: ``evaluate.knn``, ``evaluate.linear``, ...

The order is that of `unlabeled.eval.registry.EVALUATORS`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unlabeled.ssl.section import Section


class KnnConfig(Section):
    """Weighted kNN through faiss, the protocol of DINO."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, gt=0)


class LinearConfig(Section):
    """Linear probe on cached features: a grid trained in one pass, chosen on a split of the training set."""

    lr: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD with momentum, for standardised features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses the head."""


class SpectrumConfig(Section):
    """Measures of the training features that need no labels: RankMe, α-ReQ, intrinsic dimension, uniformity."""

    pictures: int = Field(25_600, ge=2)
    """Training pictures, drawn by the seed; the number of the RankMe paper."""
    pairwise: int = Field(10_000, ge=2)
    """Of these, as many for what compares pairs: intrinsic dimension, cluster learnability, uniformity."""


class InvarianceConfig(Section):
    """LiDAR and alignment over crops, flips and colour jitter of training pictures."""

    pictures: int = Field(500, ge=2)
    """Training pictures, drawn by the seed; the paper of LiDAR takes 1000."""
    views: int = Field(10, ge=2)
    """Of each picture; the paper takes 50."""
    scale: float = Field(0.2, gt=0, le=1)
    """Smallest part of a picture's area that a crop shows."""


class LayersConfig(Section):
    """Similarity (debiased linear CKA) between the layers of the network, and with those of random weights."""

    pictures: int = Field(1024, ge=4)
    """Training pictures, drawn by the seed."""


CorruptionName = Literal["gaussian_noise", "gaussian_blur", "jpeg", "brightness", "contrast", "pixelate"]


class CorruptionConfig(Section):
    """Accuracy on corrupted test pictures of a classifier fitted to clean features, after ImageNet-C."""

    corruptions: tuple[CorruptionName, ...] = Field(
        ("gaussian_noise", "gaussian_blur", "jpeg", "brightness"), min_length=1
    )
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((1, 3, 5), min_length=1)
    """From 1 (weak) to 5."""
    pictures: int = Field(1000, ge=1)
    """Test pictures, drawn by the seed."""
    classifier: Literal["knn", "linear"] = "knn"
    """kNN with k = 20, or a linear probe with the default settings of ``evaluate.linear``."""
