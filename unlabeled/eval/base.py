"""The contract of an evaluator: given an encoder and its features of a train and a test split, yield named values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from unlabeled.ssl.core.errors import DataError

if TYPE_CHECKING:
    from unlabeled.eval.subject import Subject

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureSplit:
    """Features and labels of one split."""

    features: FloatArray
    """float32 (N, D), as the encoder gives them (not normalised)."""
    labels: IntArray
    """int64 (N,); -1 where the source has no labels."""
    indices: IntArray | None = None
    """int64 (N,): index in the source of each row; None: the row's own number."""
    skipped: tuple[str, ...] = ()
    """What the source calls the pictures that could not be decoded."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FeatureSet:
    """What an evaluator receives: a training and a test split of one encoder's features."""

    train: FeatureSplit
    test: FeatureSplit
    classes: tuple[str, ...]
    """Class names, index = label."""


@dataclass(frozen=True)
class Estimate:
    """A value, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """What one value of an evaluator is, for tables and figures."""

    label: str
    """Such as ``kNN, k = 20``."""
    unit: Literal["accuracy", "percent", "number"] = "accuracy"
    """accuracy: fraction of the test pictures (its interval follows from their number); percent: another fraction of 1;
    number: anything else."""
    better: Literal["higher", "lower"] | None = "higher"


Value = float | int | Estimate | str | npt.NDArray[Any] | Tensor
"""float, int: a metric · Estimate: a metric that brings its own interval · str: a note for the reader, one sentence ·
array: for figures · uint8 tensor (3, H, W): a picture for the report."""


class Evaluator(Protocol):
    """One way to measure a representation. It is built from its section of ``evaluate`` and never prints or writes.

    An evaluator that draws pictures has ``captions``: key of the picture → what it shows.
    """

    name: ClassVar[str]
    """Prefix of its values, such as ``knn``, and the name of its settings: ``evaluate.knn``."""
    title: ClassVar[str]
    """Heading of its table in the report."""
    needs: ClassVar[Literal["features", "pictures", "network"]]
    """features: pooled features alone · pictures: also the sources · network: the backbone, so that raw pixels cannot
    be judged."""

    def run(self, subject: Subject) -> Iterator[tuple[str, Value]]:
        """Yields (key, value); the caller makes ``name/key`` of it.

        Raises DataError, in one line, for what it cannot judge (NaN, a single class, no masks, too few pictures).
        """
        ...

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        """What the value under `key` is; None for one that no table shows, such as a chosen learning rate."""
        ...


def check_features(data: FeatureSet) -> None:
    """Raises DataError, in one line, for features or labels that no evaluator can judge.

    That is: no pictures, NaN or infinite features, labels outside the classes, a training split of a single class.
    """
    for split, part in (("training", data.train), ("test", data.test)):
        if len(part) == 0:
            raise DataError(f"evaluate.data: the {split} split has no readable picture; nothing can be measured")
        if len(part.features) != len(part.labels):
            raise DataError(f"evaluate.data: {len(part.features)} {split} features but {len(part.labels)} labels")
        broken = int((~np.isfinite(part.features).all(axis=1)).sum())
        if broken:
            raise DataError(
                f"evaluate: {broken} of {len(part)} {split} features are NaN or infinite; the backbone's weights have "
                "diverged, go back to an earlier checkpoint or lower optim.lr"
            )
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= len(data.classes):
            wrong = low if low < 0 else high
            raise DataError(f"evaluate.data: {split} label {wrong} is outside the {len(data.classes)} classes")
    if len(np.unique(data.train.labels)) < 2:
        only = data.classes[int(data.train.labels[0])]
        raise DataError(
            f"evaluate.data: all training pictures are of class {only!r}; give data with at least two classes"
        )
