"""What was measured of an encoder and of its baselines."""

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
    """Whose a metric is, and what it is."""

    evaluator: str
    key: str
    """What the evaluator calls it, such as ``k20``."""
    measure: Measure


@dataclass(frozen=True)
class EvaluatorInfo:
    """What a report says of an evaluator itself."""

    title: str
    captions: Mapping[str, str] = field(default_factory=dict)
    """Key of an image → what it shows."""


@dataclass(frozen=True)
class EncoderResults(OldNames, pictures="images"):
    """What was measured on one encoder's features."""

    metrics: dict[str, float]
    """``evaluator/name`` → value, such as ``knn/k20`` (fractions, not percent)."""
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """``evaluator/name`` → array, such as ``linear/confusion`` (C, C)."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know, in plain words."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall clock of ``features`` and of each evaluator."""
    dimension: int = 0
    """Number of features."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of the metrics that bring their own."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """``evaluator/name`` → uint8 (3, H, W), for the report."""
    measures: dict[str, Metric] = field(default_factory=dict)
    """What those of the metrics are that tables show."""


@dataclass(frozen=True, repr=False)
class Results(OldNames, train_pictures="train_images", test_pictures="test_images", judges="evaluators"):
    """Everything that a report says about an encoder's quality."""

    encoders: dict[str, EncoderResults]
    """``backbone``, and with baselines ``pixels`` and ``random``."""
    headline: tuple[str, ...]
    """The metrics to quote, fixed beforehand: ``knn/k20`` and ``linear/top1``."""
    classes: tuple[str, ...]
    test_labels: IntArray
    """int64 (N,) of the images that were judged."""
    train_images: int
    test_images: int
    majority: float
    """Test accuracy of always guessing the commonest training class."""
    skipped: dict[str, tuple[str, ...]]
    """Split → names of images that could not be decoded."""
    seeds: dict[str, int]
    hardware: dict[str, str]
    gallery: tuple[GalleryRow, ...] = ()
    embedding: Embedding | None = None
    """Some test images as points of a plane."""
    maps: dict[str, Tensor] = field(default_factory=dict)
    """What the backbone looks at in a few test images: name → uint8 (3, H, W)."""
    seconds: float = 0.0
    """Wall clock of the whole evaluation."""
    evaluators: dict[str, EvaluatorInfo] = field(default_factory=dict)
    """The evaluators by name, in the order of the report."""
    recalibrated: int = 0
    """Training images on which the batch-norm statistics of all networks were estimated anew; 0: they were not."""

    def __repr__(self) -> str:
        return f"<Evidence of {', '.join(self.encoders)} on {self.test_images} test images>"

    def _repr_markdown_(self) -> str:
        from unlabeled.eval.tables import results_table  # here, since the table is made of what this class holds

        return results_table(self)


def of_evaluator(name: str, items: Mapping[str, ItemT]) -> dict[str, ItemT]:
    """Those of `items` (``evaluator/key`` → item) that evaluator `name` gave, by its own keys."""
    own = f"{name}/"
    return {key.removeprefix(own): item for key, item in items.items() if key.startswith(own)}
