"""The contract of an evaluator: given features of a labelled train and test split, yield named values.

The caller prefixes the names, logs and reports them; an evaluator never prints, logs or writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureSplit:
    """Features and labels of one split."""

    features: FloatArray
    """float32 (N, D), as the encoder gives them (not normalised)."""
    labels: IntArray
    """int64 (N,)."""

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
