"""The contract of an evaluator: given features of a labelled train and test split, yield named values.

The caller prefixes the names, logs and reports them; an evaluator never prints, logs or writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from unlabeled.ssl.errors import DataError

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


class Evaluator(Protocol):
    """One way to measure a representation."""

    name: str
    """Prefix of its values in tables and logs, such as ``knn``."""

    def run(self, data: FeatureSet) -> Iterator[tuple[str, Any]]:
        """Yields (name, value): scalars, and arrays such as ``predictions`` (N,) for the report's figures.

        Raises DataError, in one line, for features that it cannot judge (NaN, a single class, too few pictures).
        """
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
