"""The contract of a data source and of its settings.

A source answers four questions about an index: the image, its label, what to call it, and (where it has one) its
segmentation mask. Sources are opened in the main process, pickled to loader workers, and must therefore hold paths
and tables rather than open files. A class of sources has its settings as ``Config``, a subclass of `SourceConfig`, and
is built as ``Source(config, split)``; `unlabeled.ssl.data.registry` finds it by its name.
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
    """One image cannot be decoded; the loader skips it, counts it and lists it."""


class SourceConfig(Section):
    """What every source can be told; a source adds its own settings, each with a docstring under it.

    Reports call data by its settings ``dataset`` and ``path``, where there are such. A source that reads labels only
    when it is asked to has a setting ``labels``, false by default, which evaluation and fine-tuning turn on.
    """

    debug: ClassVar[Mapping[str, Any]] = {}
    """Settings of tiny mode (``debug=true``), such as fewer images where the source makes them."""

    limit: int | None = Field(None, ge=1)
    """Use at most this many images per split, chosen by a fixed shuffle; null: all. [images]"""


@runtime_checkable
class ImageSource(Protocol):
    """Map-style collection of images."""

    classes: Sequence[str] | None
    """Class names, index = label; None when the source has no labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as RGB, uint8 (3, H, W). Raises DecodeError when it cannot be decoded."""
        ...

    def labels(self) -> torch.Tensor | None:
        """All labels, int64 (N,), without decoding an image; -1 for one that has none; None when there are none."""
        ...

    def describe(self, index: int) -> str:
        """What a person calls image `index`: its path, or its row and file."""
        ...


class SourceClass(Protocol):
    """A class of sources, as the registry holds it."""

    Config: ClassVar[type[SourceConfig]]
    """Its settings; defaults for all that a user need not say."""
    __name__: str

    def __call__(self, config: Any, split: Split = "train") -> ImageSource:
        """Opens one split of what `config`, an instance of `Config`, names.

        Raises ConfigError for settings that cannot be, DataError for data that is missing or lacks the split.
        """
        ...


@runtime_checkable
class MaskSource(ImageSource, Protocol):
    """A source that also knows which pixels show what."""

    def mask(self, index: int) -> torch.Tensor:
        """Segmentation of image `index`, uint8 (H, W): 0 is background, class c is c + 1.

        255 says that nobody knows, or that it does not matter: such pixels are left out of every measure.
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
    """The first `limit` images of a fixed shuffle of `source`, or all when there are no more than that."""
    if limit is None or limit >= len(source):
        return source
    shuffled = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    kind = MaskSubset if isinstance(source, MaskSource) else Subset
    # a clone, since a slice would carry the whole shuffle to every worker
    return kind(source, shuffled[:limit].clone())


def encoded(source: ImageSource, index: int) -> bytes | Path | None:
    """The file or the bytes behind image `index`; None where images are made or kept as arrays.

    A source offers this by a method of the same name. Raises DecodeError when there is nothing where it should be.
    """
    method = getattr(source, "encoded", None)
    content: bytes | Path | None = method(index) if method is not None else None
    return content


def annotated_boxes(source: ImageSource, index: int) -> torch.Tensor | None:
    """Boxes around the objects of image `index`, float32 (N, 4): left, top, right, bottom in pixels from the corner.

    None where nobody drew any. A source offers this by a method ``boxes``.
    """
    method = getattr(source, "boxes", None)
    found: torch.Tensor | None = method(index) if method is not None else None
    return found
