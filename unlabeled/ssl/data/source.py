"""The contract of a data source, and the mapping from its name to its class.

A source answers four questions about an index: the picture, its label, what to call it, and (where it has one) its
segmentation mask. Sources are opened in the main process, pickled to loader workers, and must therefore hold paths
and tables rather than open files.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch

from unlabeled.ssl.core.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from unlabeled.ssl.config.schema import DataConfig

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


@runtime_checkable
class MaskSource(ImageSource, Protocol):
    """A source that also knows which pixels show what."""

    def mask(self, index: int) -> torch.Tensor:
        """Segmentation of picture `index`, uint8 (H, W): 0 is background, class c is c + 1.

        255 says that nobody knows, or that it does not matter: such pixels are left out of every measure.
        """
        ...


class Subset:
    """The pictures `indices` of another source, in that order."""

    def __init__(self, source: ImageSource, indices: torch.Tensor) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> torch.Tensor:
        return self.source.read(int(self.indices[index]))

    def labels(self) -> torch.Tensor | None:
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | Path | None:
        return encoded(self.source, int(self.indices[index]))

    def boxes(self, index: int) -> torch.Tensor | None:
        return annotated_boxes(self.source, int(self.indices[index]))


class MaskSubset(Subset):
    """A subset of a source with masks."""

    source: MaskSource

    def mask(self, index: int) -> torch.Tensor:
        return self.source.mask(int(self.indices[index]))


def limited(source: ImageSource, limit: int | None) -> ImageSource:
    """The first `limit` pictures of a fixed shuffle of `source`, or all when there are no more than that."""
    if limit is None or limit >= len(source):
        return source
    shuffled = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    kind = MaskSubset if isinstance(source, MaskSource) else Subset
    # a clone, since a slice would carry the whole shuffle to every worker
    return kind(source, shuffled[:limit].clone())


def encoded(source: ImageSource, index: int) -> bytes | Path | None:
    """The file or the bytes behind picture `index`; None where pictures are made or kept as arrays.

    A source offers this by a method of the same name. Raises DecodeError when there is nothing where it should be.
    """
    method = getattr(source, "encoded", None)
    content: bytes | Path | None = method(index) if method is not None else None
    return content


def annotated_boxes(source: ImageSource, index: int) -> torch.Tensor | None:
    """Boxes around the objects of picture `index`, float32 (N, 4): left, top, right, bottom in pixels from the corner.

    None where nobody drew any. A source offers this by a method ``boxes``.
    """
    method = getattr(source, "boxes", None)
    found: torch.Tensor | None = method(index) if method is not None else None
    return found


SOURCES: dict[str, str] = {
    "folder": "unlabeled.ssl.data.sources.folder:FolderSource",
    "parquet": "unlabeled.ssl.data.sources.table:ParquetSource",
    "hf": "unlabeled.ssl.data.sources.table:HuggingFaceSource",
    "tar": "unlabeled.ssl.data.sources.tar:TarSource",
    "torchvision": "unlabeled.ssl.data.sources.vision:TorchvisionSource",
    "digits": "unlabeled.ssl.data.sources.embedded:DigitsSource",
    "shapes": "unlabeled.ssl.data.sources.embedded:ShapesSource",
    "voc": "unlabeled.ssl.data.sources.voc:VocSource",
}


def open_source(config: DataConfig, split: Split = "train") -> ImageSource:
    """Opens split `split` of the data that `config` names.

    Every source class is built as ``Source(config, split)``; `config.limit` applies to each split. Raises ConfigError
    for an unknown name and DataError for a missing path, an empty folder, or a split that the data does not have.
    """
    if config.name not in SOURCES:
        raise ConfigError(f"data: {config.name!r} is not a data source; {nearest(config.name, SOURCES)}")
    module, _, attribute = SOURCES[config.name].partition(":")
    source: ImageSource = getattr(importlib.import_module(module), attribute)(config, split)
    return limited(source, config.limit)
