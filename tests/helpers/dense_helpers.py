"""Sources with exactly known masks and boxes, and small backbones with feature maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.data.source import DecodeError

COLORS = torch.tensor([[20, 120, 20], [250, 20, 20], [20, 20, 250]], dtype=torch.uint8)
"""Colors of the background and of two classes."""


class BlockSource:
    """Images made of blocks, each in the color of its class, with masks of the same blocks."""

    classes = ("red", "blue")

    def __init__(self, blocks: Tensor, side: int = 8, *, corrupt: int = -1, boxes: list[Tensor] | None = None) -> None:
        """`blocks`: (N, rows, columns) of 0, 1, 2 or 255 (unknown, drawn as background)."""
        self.masks = blocks.to(torch.uint8).repeat_interleave(side, 1).repeat_interleave(side, 2)
        self.images = COLORS[torch.where(self.masks == 255, 0, self.masks.long())].permute(0, 3, 1, 2).contiguous()
        self.corrupt = corrupt
        if boxes is not None:
            self.boxes = lambda index: boxes[index]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        if index == self.corrupt:
            raise DecodeError(f"{self.describe(index)}: cut short")
        return self.images[index]

    def mask(self, index: int) -> Tensor:
        return self.masks[index]

    def labels(self) -> Tensor:
        return torch.arange(len(self)) % 2

    def describe(self, index: int) -> str:
        return f"image {index}"


def blocks(count: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (count, *grid), generator=torch.Generator().manual_seed(seed))


def dataset(
    train: object, test: object, backbone: Backbone, *, pixels: bool = False, seed: int = 0, batch_size: int = 4
) -> EncodedDataset:
    """An encoded dataset of two sources; pooled features, which dense evaluators do not use, are zeros."""
    splits = [FeatureSplit(np.zeros((2, 3), np.float32), np.arange(2)) for _ in range(2)]
    features = FeatureSet(*splits, tuple(train.classes))  # type: ignore[attr-defined]
    return EncodedDataset(
        features, None if pixels else backbone, (train, test), Loading(batch_size=batch_size), seed,  # type: ignore[arg-type]
        backbone if pixels else None,
    )  # fmt: skip


def small_vit(size: tuple[int, int] = (32, 48), name: str = "vit_tiny_patch16_224", **settings: object) -> Backbone:
    options: dict[str, object] = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2} | settings
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return create_backbone(name, size=size, **options)
