"""Any labeled data set of torchvision that is already on disk; nothing is ever downloaded."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from pydantic import Field

from unlabeled.ssl.core.errors import ConfigError, DataError, nearest
from unlabeled.ssl.data.decode import rgb_tensor
from unlabeled.ssl.data.source import DecodeError, SourceConfig, Split
from unlabeled.ssl.data.sources.layout import existing_folder, holdout

_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}
_LABELS = ("targets", "labels", "_labels", "y", "_samples", "samples")
_EXTRA: dict[str, dict[str, Any]] = {"EMNIST": {"split": "balanced"}}
"""Arguments that a constructor cannot do without."""


class TorchvisionConfig(SourceConfig):
    """A labeled data set of torchvision that is already on disk, such as CIFAR10; nothing is downloaded."""

    path: Path | None = None
    """torchvision's root folder."""
    dataset: str = "CIFAR10"
    """Name of a class of torchvision.datasets."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of each class that is held out for testing if the data set has no splits. [fraction]"""


class TorchvisionSource:
    """Any labeled data set of torchvision that is on disk, such as ``data.dataset=CIFAR10``; nothing is downloaded.

    Where the class knows no splits, a part of each class is held out.
    """

    Config: ClassVar[type[SourceConfig]] = TorchvisionConfig

    def __init__(self, config: TorchvisionConfig, split: Split = "train") -> None:
        constructor = _constructor(config.dataset)
        self.name = config.dataset
        root = existing_folder(config.path, "data.path")
        self._dataset, has_split = _opened(constructor, self.name, str(root), split)
        labels = _labels(self._dataset)
        self.classes: list[str] | None = None
        self._rows: torch.Tensor | None = None
        if labels is not None:
            self.classes = _class_names(self._dataset, labels)
        if not has_split and labels is not None:
            self._rows = holdout(labels, config.test_fraction, split)
            labels = labels[self._rows]
        elif not has_split and split == "test":
            raise DataError(f"data.dataset: {self.name} has neither a test split nor labels to hold a part out by")
        self._labels = labels

    def __len__(self) -> int:
        return len(self._dataset) if self._rows is None else len(self._rows)

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        row = self._row(index)
        try:
            return rgb_tensor(self._dataset[row][0])
        except Exception as error:  # what a damaged file raises is up to each of torchvision's classes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DecodeError(f"{self.describe(index)}: cannot be decoded ({reason})") from error

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,); None when torchvision's class keeps no list of them."""
        return self._labels

    def describe(self, index: int) -> str:
        """Place and data set, such as ``image 7 of CIFAR10``."""
        return f"image {self._row(index)} of {self.name}"

    def _row(self, index: int) -> int:
        if index >= len(self):  # of torchvision's classes, some would raise something else
            raise IndexError(f"{self.name} has {len(self)} images, and no {index}")
        return index if self._rows is None else int(self._rows[index])


def _constructor(name: str) -> Any:
    known = [item for item in torchvision.datasets.__all__ if item[0].isupper()]
    if name not in known:
        raise ConfigError(f"data.dataset: {name!r} is not a class of torchvision.datasets; {nearest(name, known)}")
    return getattr(torchvision.datasets, name)


def _opened(constructor: Any, name: str, root: str, split: Split) -> tuple[Any, bool]:
    """The data set, and whether its class has splits of its own."""
    parameters = inspect.signature(constructor).parameters
    if "root" not in parameters:
        raise ConfigError(f"data.dataset: {name} cannot be opened by its root alone; choose another class")
    arguments: dict[str, Any] = {"root": root, **_EXTRA.get(name, {})}
    if "download" in parameters:
        arguments["download"] = False
    if "train" in parameters:
        return _built(constructor, name, {**arguments, "train": split == "train"}), True
    if "split" not in parameters:
        return _built(constructor, name, arguments), False
    for value in _SPLITS[split]:
        with contextlib.suppress(ValueError):  # this class has no split of that name
            return _built(constructor, name, {**arguments, "split": value}), True
    raise DataError(f"data.dataset: {name} has no {split} split; choose another class or data=folder")


def _built(constructor: Any, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return constructor(**arguments)
    except (RuntimeError, OSError) as error:
        root = arguments["root"]
        raise DataError(f"data.path: {name} is not complete in {root}; download it there with torchvision") from error
    except TypeError as error:
        raise ConfigError(f"data.dataset: {name} cannot be opened by its root alone; choose another class") from error
    except ImportError as error:
        raise ConfigError(f"data.dataset: {name} needs a missing package ({error}); install it") from error


def _labels(dataset: Any) -> torch.Tensor | None:
    """Labels without decoding: the lists that torchvision's classes keep, under one of a few names."""
    for attribute in _LABELS:
        values = getattr(dataset, attribute, None)
        if values is None or len(values) != len(dataset):
            continue
        if isinstance(values[0], (tuple, list)):
            values = [value[1] for value in values]
        labels = torch.as_tensor(values)
        if labels.ndim == 1 and not labels.is_floating_point():
            return labels.long()
    return None


def _class_names(dataset: Any, labels: torch.Tensor) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    count = int(labels.max()) + 1
    return [str(name) for name in names] if len(names) >= count else [str(label) for label in range(count)]
