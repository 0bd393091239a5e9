"""Base class of sources with one file per image."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unlabeled.ssl.data.decode import decode_rgb


class FileSource:
    """A source with one file per image; subclasses implement ``encoded`` and set `_labels`."""

    _labels: torch.Tensor | None

    def encoded(self, index: int) -> Path:
        """The file of image `index`."""
        raise NotImplementedError

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        return decode_rgb(self.encoded(index), name=self.describe(index))

    def labels(self) -> torch.Tensor | None:
        """Class index of each image, int64 (N,); None if there are no labels."""
        return self._labels

    def describe(self, index: int) -> str:
        """The path, with bytes that are not UTF-8 replaced."""
        return os.fsencode(self.encoded(index)).decode("utf-8", "replace")
