"""The contract of an evaluator: given an encoder and its features of a train and a test split, yield named values."""

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
    """float32 (N, D), as the encoder gives them (not normalized)."""
    labels: IntArray
    """int64 (N,); -1 where the source has no labels."""
    indices: IntArray | None = None
    """int64 (N,): index in the source of each row; None: the row's own number."""
    skipped: tuple[str, ...] = ()
    """What the source calls the images that could not be decoded."""

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
class Cut:
    """A part of the features: the first so many, or as many principal components."""

    length: int
    principal: bool = False

    def __str__(self) -> str:
        """``64`` or ``pca64``, as it stands behind the @ of a metric's name."""
        return f"pca{self.length}" if self.principal else str(self.length)

    @property
    def words(self) -> str:
        return f"{self.length} principal components" if self.principal else f"first {self.length} features"


@dataclass(frozen=True)
class Point:
    """Where a value lies on a curve: values of one evaluator with equal `curve`, `axis` and unit are drawn as one."""

    curve: str
    """What the values of the curve have in common, such as ``kNN, top 5``."""
    axis: str
    """What they differ in, such as ``k``."""
    at: float


@dataclass(frozen=True)
class Measure:
    """What one value of an evaluator is, for tables and figures."""

    label: str
    """Such as ``kNN, k = 20``."""
    unit: Unit = "accuracy"
    """accuracy: fraction of the test images (its interval follows from their number); percent: another fraction of 1;
    number: anything else."""
    better: Direction | None = "higher"
    point: Point | None = None
    """None: it belongs to no curve."""
    guesses: int = 1
    """Guesses that an image has; what takes several (top 5) is listed after what takes one."""
    cut: Cut | None = None
    """The part of the features that was measured; None: all of them."""

    @property
    def text(self) -> str:
        """The label, with the part of the features."""
        return self.label if self.cut is None else f"{self.label}, {self.cut.words}"

    def of(self, value: float | Estimate) -> Measured:
        """This measure's value, with its interval where it comes with one."""
        if isinstance(value, Estimate):
            return Measured(value.value, self, value.low, value.high)
        return Measured(float(value), self)


@dataclass(frozen=True)
class Measured:
    """A value for tables and figures: what it is, and its 95 % interval (NaN: the evaluator gives none)."""

    value: float
    measure: Measure
    low: float = math.nan
    high: float = math.nan


Needs = Literal["features", "images", "backbone"]

Value = float | int | Measured | str | npt.NDArray[Any] | Tensor
"""`Measured`: a value for tables · float, int: a number for programs alone, such as a chosen learning rate · str: a
note for the reader, one sentence · array: for figures · uint8 tensor (3, H, W): an image for the report."""


class EvaluatorConfig(Section):
    """Base of an evaluator's settings, ``evaluate.NAME``. Unknown ones are refused."""


_NEEDS_ONCE: dict[str, Needs] = {"pictures": "images", "network": "backbone"}


class Evaluator(ABC):
    """One way to measure a representation. It is built from its section of ``evaluate`` and never prints or writes."""

    name: ClassVar[str]
    """Prefix of its values, such as ``knn``, and the name of its settings: ``evaluate.knn``."""
    title: ClassVar[str]
    """Heading of its table in the report."""
    needs: ClassVar[Needs] = "features"
    """features: pooled features alone · images: also the sources · backbone: the backbone, so that raw pixels cannot
    be judged."""
    captions: ClassVar[Mapping[str, str]] = {}
    """Key of an image that it draws → what that shows."""
    Config: ClassVar[type[EvaluatorConfig]] = EvaluatorConfig
    """Its settings."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        needs: str = vars(cls).get("needs", "")
        if needs in _NEEDS_ONCE:  # a plugin from before the values were renamed
            cls.needs = _NEEDS_ONCE[needs]

    def __init__(self, config: Any) -> None:
        """`config`: an instance of `Config`. Raises ConfigError for settings that are not possible."""
        self.config = config

    def check_sources(self, train: ImageSource, test: ImageSource) -> None:  # noqa: B027  # most ask nothing
        """Raises DataError for data that it cannot judge, as far as that shows before anything is computed.

        A run asks at its start, so that nothing is trained for an evaluation that cannot be had.
        """

    @abstractmethod
    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        """Yields (key, value), each key once, but for notes; the caller makes ``name/key`` of it.

        Raises DataError, in one line, for what it cannot judge (NaN, a single class, no masks, too few images).
        """

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        """What the value under `key` is, asked of words of a user and of files from before values said so themselves.

        None for one that no table shows. An evaluator without an answer may leave this as it is.
        """
        return None


def check_features(data: FeatureSet) -> None:
    """Raises DataError, in one line, for features or labels that no evaluator can judge.

    That is: no images, NaN or infinite features, labels outside the classes, a training split of a single class.
    """
    for split, part in (("training", data.train), ("test", data.test)):
        if len(part) == 0:
            raise DataError(f"evaluate.data: the {split} split has no readable image; nothing can be measured")
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
            f"evaluate.data: all training images are of class {only!r}; give data with at least two classes"
        )
