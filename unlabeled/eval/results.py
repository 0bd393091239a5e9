"""Results of an evaluation: the metrics of an encoder and of its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy.typing as npt
from torch import Tensor

from unlabeled.eval.base import IntArray, Measure
from unlabeled.eval.embedding import Embedding
from unlabeled.eval.gallery import GalleryRow
from unlabeled.ssl.core.renamed import OldNames

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Metric:
    """Origin and description of a metric."""

    evaluator: str
    """Name of the evaluator, such as ``knn``."""
    key: str
    """Key that the evaluator yields, such as ``k20``."""
    measure: Measure


@dataclass(frozen=True)
class EvaluatorInfo:
    """What a report needs to know about an evaluator."""

    title: str
    """Heading of its section."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Key of an image → caption."""


@dataclass(frozen=True)
class EncoderResults(OldNames, pictures="images"):
    """What the evaluators yielded for one encoder."""

    metrics: dict[str, float]
    """``evaluator/key`` → value, such as ``knn/k20`` (fractions, not percent)."""
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """``evaluator/key`` → array, such as ``linear/confusion`` (C, C)."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the metrics should know."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock time of ``features`` and of each evaluator. [seconds]"""
    dimension: int = 0
    """Number of pooled features."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """``evaluator/key`` → 95 % interval (low, high), for metrics with an interval of their own."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """``evaluator/key`` → uint8 (3, H, W), for the report."""
    measures: dict[str, Metric] = field(default_factory=dict)
    """``evaluator/key`` → description, for the metrics that tables show."""


@dataclass(frozen=True, repr=False)
class Results(OldNames, train_pictures="train_images", test_pictures="test_images", judges="evaluators"):
    """Everything that was measured for the report, for a backbone and its baselines."""

    encoders: dict[str, EncoderResults]
    """``backbone`` and, with baselines, ``pixels`` and ``random``."""
    headline: tuple[str, ...]
    """The metrics to quote, fixed in advance: ``knn/k20`` and ``linear/top1``."""
    classes: tuple[str, ...]
    """Class names of the training split."""
    test_labels: IntArray
    """int64 (N,), of the test images that were evaluated."""
    train_images: int
    test_images: int
    majority: float
    """Test accuracy of always guessing the most common training class."""
    skipped: dict[str, tuple[str, ...]]
    """Split → names of images that could not be decoded."""
    seeds: dict[str, int]
    """What was drawn at random → its seed."""
    hardware: dict[str, str]
    gallery: tuple[GalleryRow, ...] = ()
    """Some test images with their nearest training images."""
    embedding: Embedding | None = None
    """Some test images as points in a plane."""
    maps: dict[str, Tensor] = field(default_factory=dict)
    """Caption → dense features and attention of a few test images, uint8 (3, H, W)."""
    seconds: float = 0.0
    """Wall-clock time of the evaluation. [seconds]"""
    evaluators: dict[str, EvaluatorInfo] = field(default_factory=dict)
    """The evaluators by name, in the order of the report."""
    recalibrated: int = 0
    """Training images on which the batch-norm statistics of all encoders were re-estimated; 0: they were not."""

    def __repr__(self) -> str:
        return f"<Results of {', '.join(self.encoders)} on {self.test_images} test images>"

    def _repr_markdown_(self) -> str:
        """The table that notebooks show."""
        from unlabeled.eval.tables import results_table  # here, since that module imports this one

        return results_table(self)


def of_evaluator(name: str, items: Mapping[str, ItemT]) -> dict[str, ItemT]:
    """The entries of `items` (``evaluator/key`` → item) that evaluator `name` yielded, by its own keys."""
    own = f"{name}/"
    return {key.removeprefix(own): item for key, item in items.items() if key.startswith(own)}
