"""Any labeled torchvision dataset that is already on disk; nothing is downloaded."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from pydantic import Field

from unlabeled.ssl.core.errors import ConfigError, DataError, NoLabelsError, nearest
from unlabeled.ssl.data.decode import rgb_tensor
from unlabeled.ssl.data.source import DecodeError, SourceConfig, Split
from unlabeled.ssl.data.sources.layout import existing_folder, holdout

_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}
_LABELS = ("targets", "labels", "_labels", "y", "_samples", "samples")
"""Attributes in which torchvision's classes keep labels, the preferred first."""
_EXTRA: dict[str, dict[str, Any]] = {"EMNIST": {"split": "balanced"}}
"""Arguments that a constructor requires in addition to its root."""


class TorchvisionConfig(SourceConfig):
    """A labeled torchvision dataset that is already on disk, such as CIFAR10; nothing is downloaded."""

    path: Path | None = None
    """torchvision's root folder."""
    dataset: str = "CIFAR10"
    """Name of a class of torchvision.datasets."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of each class that is held out for testing if the dataset has no splits. [fraction]"""


class TorchvisionSource:
    """Any labeled torchvision dataset that is on disk, such as ``data.dataset=CIFAR10``; nothing is downloaded.

    If torchvision's class has no splits, a fraction of each class is held out.
    """

    Config: ClassVar[type[SourceConfig]] = TorchvisionConfig

    def __init__(self, config: TorchvisionConfig, split: Split = "train") -> None:
        constructor = _constructor(config.dataset)
        self.name = config.dataset
        root = existing_folder(config.path, "data.path")
        self._dataset, has_split = _opened(constructor, self.name, str(root), split)
        labels = _labels(self._dataset)
        self.classes: list[str] | None = None
        self._kept: torch.Tensor | None = None  # indices of this split; None: all images
        if labels is not None:
            self.classes = _class_names(self._dataset, labels)
        if not has_split and labels is not None:
            self._kept = holdout(labels, config.test_fraction, split)
            labels = labels[self._kept]
        elif not has_split and split == "test":
            raise NoLabelsError(
                f"data.dataset: {self.name} has neither a test split nor labels to hold out a fraction by; "
                "choose another class or data=folder"
            )
        self._labels = labels

    def __len__(self) -> int:
        return len(self._dataset) if self._kept is None else len(self._kept)

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        position = self._position(index)
        try:
            return rgb_tensor(self._dataset[position][0])
        except Exception as error:  # each of torchvision's classes raises something else for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DecodeError(f"{self.describe(index)}: cannot be decoded ({reason})") from error

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,); None if torchvision's class does not have a list of them."""
        return self._labels

    def describe(self, index: int) -> str:
        """Index and dataset, such as ``image 7 of CIFAR10``."""
        return f"image {self._position(index)} of {self.name}"

    def _position(self, index: int) -> int:
        """Index of image `index` of this split in torchvision's dataset."""
        if index >= len(self):  # some of torchvision's classes raise something else, and iteration would not end
            raise IndexError(f"index {index} is out of range for {len(self)} images of {self.name}")
        return index if self._kept is None else int(self._kept[index])


def _constructor(name: str) -> Any:
    known = [item for item in torchvision.datasets.__all__ if item[0].isupper()]
    if name not in known:
        raise ConfigError(f"data.dataset: {name!r} is not a class of torchvision.datasets; {nearest(name, known)}")
    return getattr(torchvision.datasets, name)


def _opened(constructor: Any, name: str, root: str, split: Split) -> tuple[Any, bool]:
    """The dataset, and whether its class has splits."""
    # torchvision's constructors have train=True, split="train", or neither
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
        with contextlib.suppress(ValueError):  # the class has no split of that name: try the next
            return _built(constructor, name, {**arguments, "split": value}), True
    raise DataError(f"data.dataset: {name} has no {split} split; choose another class or data=folder")


def _built(constructor: Any, name: str, arguments: dict[str, Any]) -> Any:
    """The dataset, with torchvision's errors as ours."""
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
    """Labels without decoding images, from the lists that most of torchvision's classes have; None without one."""
    for attribute in _LABELS:
        values = getattr(dataset, attribute, None)
        if values is None or len(values) != len(dataset):
            continue
        if isinstance(values[0], (tuple, list)):  # samples: (file, label)
            values = [value[1] for value in values]
        labels = torch.as_tensor(values)
        # anything else is a target of another kind, such as attributes or coordinates
        if labels.ndim == 1 and not labels.is_floating_point():
            return labels.long()
    return None


def _class_names(dataset: Any, labels: torch.Tensor) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    count = int(labels.max()) + 1
    return [str(name) for name in names] if len(names) >= count else [str(label) for label in range(count)]
