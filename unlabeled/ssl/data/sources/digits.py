"""scikit-learn's hand-written digits, which need no files."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits

from unlabeled.ssl.data.source import SourceConfig, Split
from unlabeled.ssl.data.sources.layout import holdout


class DigitsConfig(SourceConfig):
    """scikit-learn's 1797 images of handwritten digits, 8x8 pixels in 10 classes; no files needed."""


class DigitsSource:
    """scikit-learn's 1797 hand-written digits, 8 x 8 pixels in 10 classes, a quarter held out; no files needed."""

    Config: ClassVar[type[SourceConfig]] = DigitsConfig

    def __init__(self, config: DigitsConfig, split: Split = "train") -> None:
        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        rows = holdout(labels, 0.25, split)
        scaled = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
        self._images = scaled[rows]
        self._labels = labels[rows]
        self._split = split
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> torch.Tensor:
        """Digit `index`, uint8 (3, 8, 8)."""
        return self._images[index].expand(3, -1, -1).contiguous()

    def labels(self) -> torch.Tensor:
        """The digits, int64 (N,)."""
        return self._labels

    def describe(self, index: int) -> str:
        """Such as ``train digit 7``."""
        return f"{self._split} digit {index}"
