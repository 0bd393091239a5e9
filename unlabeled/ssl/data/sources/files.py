"""Images that are files of their own: what sources of such files share."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unlabeled.ssl.data.decode import decode_rgb


class FileSource:
    """Images that are files of their own; subclasses give ``encoded``, the file of image `index`, and `_labels`."""

    _labels: torch.Tensor | None

    def encoded(self, index: int) -> Path:
        """The file of image `index`."""
        raise NotImplementedError

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, H, W). Raises DecodeError."""
        return decode_rgb(self.encoded(index), name=self.describe(index))

    def labels(self) -> torch.Tensor | None:
        """Index of each image's class, int64 (N,); None where there are no labels."""
        return self._labels

    def describe(self, index: int) -> str:
        """The path, with what is not UTF-8 replaced."""
        return os.fsencode(self.encoded(index)).decode("utf-8", "replace")
