"""The contract of an evaluator: it receives an encoder with its train and test features, and yields named values.

To write an evaluator, subclass `Evaluator` and `EvaluatorConfig`; `unlabeled.testing.check_evaluator` checks both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from unlabeled.ssl.config.base import Section
from unlabeled.ssl.core.errors import DataError

if TYPE_CHECKING:
    from unlabeled.eval.encoded_dataset import EncodedDataset
    from unlabeled.ssl.data.source import ImageSource

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Unit = Literal["accuracy", "percent", "number"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class FeatureSplit:
    """Features and labels of one split."""

    features: FloatArray
    """float32 (N, D), as the encoder returns them (not normalized)."""
    labels: IntArray
    """int64 (N,); -1 where the source has no labels."""
    indices: IntArray | None = None
    """int64 (N,): source index of each row; None: row i is image i. They differ when images could not be decoded."""
    skipped: tuple[str, ...] = ()
    """Names of the images that could not be decoded."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FeatureSet:
    """One encoder's features of a training and a test split, with the classes of their labels."""

    train: FeatureSplit
    test: FeatureSplit
    classes: tuple[str, ...]
    """Class names; label c means ``classes[c]``."""


@dataclass(frozen=True)
class Estimate:
    """A value, or the difference between two values, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cut:
    """A subset of the features: the first `length` of them, or their first `length` principal components."""

    length: int
    principal: bool = False

    def __str__(self) -> str:
        """``64`` or ``pca64``: the suffix after @ in a metric's name."""
        return f"pca{self.length}" if self.principal else str(self.length)

    @property
    def description(self) -> str:
        """How a label names the subset, such as ``first 64 features``."""
        return f"{self.length} principal components" if self.principal else f"first {self.length} features"


@dataclass(frozen=True)
class Point:
    """Position of a value on a curve. The report joins an evaluator's values of equal `curve`, `axis` and unit."""

    curve: str
    """Name of the curve in the legend, such as ``kNN, top 5``."""
    axis: str
    """Name of the horizontal axis, such as ``k``."""
    at: float
    """Coordinate on that axis."""


@dataclass(frozen=True)
class Measure:
    """Describes one value of an evaluator for tables and plots. Nothing is inferred from the value's key."""

    label: str
    """Name in tables and plots, such as ``kNN, k = 20``; unique within the evaluator."""
    unit: Unit = "accuracy"
    """accuracy: a fraction of the test images, which gets Wilson's interval unless it has its own; percent: any other
    fraction of 1; number: anything else."""
    better: Direction | None = "higher"
    """Which direction is better; None: neither, so values are not compared."""
    point: Point | None = None
    """Position on a curve; None: the value belongs to no curve."""
    guesses: int = 1
    """Guesses allowed for each image, such as 5 for a top-5 accuracy; tables list single guesses first."""
    cut: Cut | None = None
    """The subset of the features that was evaluated; None: all of them."""

    @property
    def text(self) -> str:
        """The label, followed by the subset of the features if there is one."""
        return self.label if self.cut is None else f"{self.label}, {self.cut.description}"

    def of(self, value: float | Estimate) -> Measured:
        """`value` with this description, ready to be yielded; an `Estimate` keeps its interval."""
        if isinstance(value, Estimate):
            return Measured(value.value, self, value.low, value.high)
        return Measured(float(value), self)


@dataclass(frozen=True)
class Measured:
    """A value for tables and plots, its description, and its 95 % interval (NaN: the evaluator gives none)."""

    value: float
    measure: Measure
    low: float = math.nan
    high: float = math.nan


Needs = Literal["features", "images", "backbone"]

Value = float | int | Measured | str | npt.NDArray[Any] | Tensor
"""What an evaluator may yield, by type.

- `Measured`, from ``Measure(...).of(value)``: a row of a table.
- float, int: a number for programs only, such as the selected learning rate.
- str: one sentence for the reader of the report.
- array: data for a plot or for programs.
- uint8 tensor (3, H, W): an image for the report."""


class EvaluatorConfig(Section):
    """Base class of an evaluator's settings, ``evaluate.NAME``.

    Give every field a default, bounds and a docstring with its unit; unknown settings are refused.
    """


# Plugins written before these values were renamed still declare the old ones.
_RENAMED_NEEDS: dict[str, Needs] = {"pictures": "images", "network": "backbone"}


class Evaluator(ABC):
    """One way to measure the quality of a representation.

    Subclasses set `name`, `title` and `Config`, and implement `run`. The evaluation runner builds an evaluator once,
    from its section of ``evaluate``, and runs it on the backbone and on each baseline. So it must not keep state
    between runs, print, write files, or change the features, the backbone or the global random state. The first
    sentence of the class docstring appears in the tables of evaluators.
    """

    name: ClassVar[str]
    """Prefix of its metrics, such as ``knn`` in ``knn/k20``, and name of its settings, ``evaluate.knn``."""
    title: ClassVar[str]
    """Heading of its section in the report."""
    needs: ClassVar[Needs] = "features"
    """features: pooled features only. images: the image sources as well. backbone: the backbone as well, so the
    evaluator does not run on the raw-pixels baseline. Only evaluators of ``features`` run on prefixes of them."""
    captions: ClassVar[Mapping[str, str]] = {}
    """Key of each image it yields → caption in the report."""
    Config: ClassVar[type[EvaluatorConfig]] = EvaluatorConfig
    """Class of its settings."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        needs: str = vars(cls).get("needs", "")
        if needs in _RENAMED_NEEDS:
            cls.needs = _RENAMED_NEEDS[needs]

    def __init__(self, config: Any) -> None:
        """`config` is an instance of `Config`. Raises ConfigError for values that its types cannot exclude."""
        self.config = config

    def check_sources(self, train: ImageSource, test: ImageSource) -> None:  # noqa: B027  # most accept any data
        """Raises DataError for data that cannot be evaluated, such as data without masks.

        `pretrain` and `evaluate` call it before they compute anything, so that a run does not fail after training.
        Override it for what the sources alone reveal; `run` raises the rest.
        """

    @abstractmethod
    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        """Yields (key, value) pairs; see `Value` for the types. A metric is reported as ``name/key``.

        Keys are unique, except for notes, and the same for every encoder. All randomness comes from `dataset.seed`.
        Raises DataError, in one line, for data that cannot be evaluated: NaN, a single class, no masks, too few images.
        """

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        """Describes the value that `run` yields under `key`; None for keys that no table shows.

        It is used where no value is available: for metrics that users name in settings (so that typing errors are
        refused), and for old reports. It must agree with what `run` yields. An evaluator need not override it.
        """
        return None


def check_features(data: FeatureSet) -> None:
    """Raises DataError, in one line, for features or labels that no evaluator can use.

    That is: no images, NaN or infinite features, labels outside the classes, or a training split of one class.
    """
    for name, split in (("training", data.train), ("test", data.test)):
        if len(split) == 0:
            raise DataError(f"evaluate.data: the {name} split has no readable image; nothing can be evaluated")
        if len(split.features) != len(split.labels):
            raise DataError(f"evaluate.data: {len(split.features)} {name} features but {len(split.labels)} labels")
        broken = int((~np.isfinite(split.features).all(axis=1)).sum())
        if broken:
            raise DataError(
                f"evaluate: {broken} of {len(split)} {name} features are NaN or infinite; the backbone's weights have "
                "diverged, go back to an earlier checkpoint or lower optim.lr"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(data.classes):  # -1 marks an image without a label
            wrong = low if low < 0 else high
            raise DataError(f"evaluate.data: {name} label {wrong} is outside the {len(data.classes)} classes")
    if len(np.unique(data.train.labels)) < 2:
        only = data.classes[int(data.train.labels[0])]
        raise DataError(
            f"evaluate.data: all training images are of class {only!r}; give data with at least two classes"
        )
