"""Images in NumPy arrays: ``train_images.npy``, ``test_images.npy``, and ``*_labels.npy`` where there are labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unlabeled import DataError, SourceConfig, Split


class NpyConfig(SourceConfig):
    """Settings of arrays in a folder: ``data=npy data.path=FOLDER``."""

    path: Path
    """The folder. Images are uint8, (N, H, W) or (N, H, W, 3); labels are integers, (N,)."""


class NpySource:
    """The images of one array, in its order; the file is mapped and not read whole."""

    Config: ClassVar[type[SourceConfig]] = NpyConfig

    def __init__(self, config: NpyConfig, split: Split = "train") -> None:
        self.folder, self.split = config.path.expanduser(), split
        images, labels = self._array("images"), self._array("labels")
        if images is None:
            raise DataError(f"data.path: {self.folder} has no {split}_images.npy; put it there, or give another folder")
        if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)):
            raise DataError(f"data.path: {split}_images.npy is {images.dtype} {images.shape}; give uint8 (N, H, W, 3)")
        self._count = len(images)
        self._labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.classes = None if self._labels is None else [str(name) for name in range(int(self._labels.max()) + 1)]

    def _array(self, name: str) -> Any:
        # opened by each call: an array that is mapped would be pickled whole, to every worker
        file = self.folder / f"{self.split}_{name}.npy"
        return np.load(file, mmap_mode="r") if file.is_file() else None

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Tensor:
        """Image `index`, uint8 (3, H, W), from (H, W) or (H, W, 3)."""
        image = torch.from_numpy(np.array(self._array("images")[index]))
        return image.expand(3, -1, -1).contiguous() if image.ndim == 2 else image.permute(2, 0, 1).contiguous()

    def labels(self) -> Tensor | None:
        return self._labels

    def describe(self, index: int) -> str:
        return f"image {index} of {self.folder / self.split}_images.npy"
