"""The contract of a data source, and the mapping from its name to its class.

A source answers four questions about an index: the picture, its label, what to call it, and (where it has one) its
segmentation mask. Sources are opened in the main process, pickled to loader workers, and must therefore hold paths
and tables rather than open files.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from unlabeled.ssl.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from unlabeled.ssl.schema import DataConfig

Split = Literal["train", "test"]


class DecodeError(DataError):
    """One picture cannot be decoded; the loader skips it, counts it and lists it."""


@runtime_checkable
class ImageSource(Protocol):
    """Map-style collection of pictures."""

    classes: Sequence[str] | None
    """Class names, index = label; None when the source has no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> torch.Tensor:
        """Picture `index` as RGB, uint8 (3, H, W). Raises DecodeError when it cannot be decoded."""
        ...

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,), without decoding a picture; None when there are none."""
        ...

    def describe(self, index: int) -> str:
        """What a person calls picture `index`: its path, or its row and file."""
        ...


SOURCES: dict[str, str] = {
    "folder": "unlabeled.ssl.data.folder:FolderSource",
    "parquet": "unlabeled.ssl.data.table:ParquetSource",
    "hf": "unlabeled.ssl.data.table:HuggingFaceSource",
    "torchvision": "unlabeled.ssl.data.vision:TorchvisionSource",
    "digits": "unlabeled.ssl.data.embedded:DigitsSource",
    "shapes": "unlabeled.ssl.data.embedded:ShapesSource",
}


def open_source(config: DataConfig, split: Split = "train") -> ImageSource:
    """Opens split `split` of the data that `config` names.

    Every source class is built as ``Source(config, split)``. Raises ConfigError for an unknown name and DataError for
    a missing path, an empty folder, or a split that the data does not have.
    """
    if config.name not in SOURCES:
        raise ConfigError(f"data: {config.name!r} is not a data source; {nearest(config.name, SOURCES)}")
    module, _, attribute = SOURCES[config.name].partition(":")
    source: ImageSource = getattr(importlib.import_module(module), attribute)(config, split)
    return source
