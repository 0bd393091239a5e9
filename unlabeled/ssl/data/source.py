"""The interface of a data source and its settings.

For each index a source provides the image, its label, a description and, if it has one, its segmentation mask. Sources
are opened in the main process and pickled to loader workers, so they must hold paths and tables rather than open files.
The class of a source has its settings as ``Config``, a subclass of `SourceConfig`, and is created as
``Source(config, split)``; `unlabeled.ssl.data.registry` finds it by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field

from unlabeled.ssl.config.base import Section
from unlabeled.ssl.core.errors import DataError

Split = Literal["train", "test"]


class DecodeError(DataError):
    """One image cannot be decoded. The loader replaces, counts and lists it instead of stopping."""


class SourceConfig(Section):
    """Settings that every source has. A source adds its own, each with a docstring under it.

    Two names have a meaning: reports describe data by its ``dataset`` and ``path``, and evaluation and fine-tuning turn
    on ``labels`` in sources that read labels only on request (``labels: bool = False``).
    """

    debug: ClassVar[Mapping[str, Any]] = {}
    """Settings for tiny mode (``debug=true``), such as fewer images in a source that generates them."""

    limit: int | None = Field(None, ge=1)
    """Use at most this many images per split, chosen by a fixed shuffle; null: all. [images]"""


@runtime_checkable
class ImageSource(Protocol):
    """Map-style collection of images."""

    classes: Sequence[str] | None
    """Class names, index = label; None when the source has no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as RGB, uint8 (3, H, W). Raises DecodeError if it cannot be decoded."""
        ...

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,), without decoding images; -1 for an image without one; None if there are no labels."""
        ...

    def describe(self, index: int) -> str:
        """Name of image `index` for messages: its path, or its row and file."""
        ...


class SourceClass(Protocol):
    """The class of a source, as the registry returns it."""

    Config: ClassVar[type[SourceConfig]]
    """Its settings, with defaults for all that are optional."""
    __name__: str

    def __call__(self, config: Any, split: Split = "train") -> ImageSource:
        """Opens one split of the data that `config`, an instance of `Config`, describes.

        Raises ConfigError for impossible settings, and DataError if the data or the split is missing.
        """
        ...


@runtime_checkable
class MaskSource(ImageSource, Protocol):
    """A source with segmentation masks."""

    def mask(self, index: int) -> torch.Tensor:
        """Segmentation of image `index`, uint8 (H, W): 0 is background, class c is c + 1.

        255 marks pixels whose class is unknown or irrelevant; all metrics ignore them.
        """
        ...


class Subset:
    """The images `indices` of another source, in that order."""

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
    """The first `limit` images of a fixed shuffle of `source`, or `source` itself if it has no more than that."""
    if limit is None or limit >= len(source):
        return source
    # shuffled, since the first images of a sorted folder are all of one class
    shuffled = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    subset_class = MaskSubset if isinstance(source, MaskSource) else Subset
    # a clone, since pickling a slice would send the whole shuffle to every worker
    return subset_class(source, shuffled[:limit].clone())


def encoded(source: ImageSource, index: int) -> bytes | Path | None:
    """The file or the encoded bytes of image `index`; None if the source generates images or keeps them as arrays.

    Calls the source's method ``encoded``, if it has one. Raises DecodeError if the file or bytes are missing.
    """
    # not part of `ImageSource`, so that a plugin works without it
    method = getattr(source, "encoded", None)
    content: bytes | Path | None = method(index) if method is not None else None
    return content


def annotated_boxes(source: ImageSource, index: int) -> torch.Tensor | None:
    """Boxes around the objects of image `index`, float32 (N, 4): left, top, right, bottom in pixels from the corner.

    Calls the source's method ``boxes``. None if the source has no such method or the image has no annotation.
    """
    method = getattr(source, "boxes", None)
    found: torch.Tensor | None = method(index) if method is not None else None
    return found
