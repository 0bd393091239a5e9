"""A source and a backbone small enough for tests that run in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from unlabeled.eval.base import Estimate, Measured, Value
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.data.source import DecodeError


class MemorySource:
    """Noise images tinted by class; those in `corrupt` cannot be decoded. Counts its reads."""

    def __init__(
        self,
        count: int,
        *,
        classes: Sequence[str] | None = ("red", "green", "blue"),
        shape: tuple[int, int] = (32, 32),
        corrupt: Sequence[int] = (),
        seed: int = 0,
        split: str = "train",
    ) -> None:
        self.classes = classes
        self.corrupt = frozenset(corrupt)
        self.split = split
        self.reads = 0
        kinds = len(classes or ("red", "green", "blue"))
        generator = torch.Generator().manual_seed(seed)
        self._labels = torch.arange(count) % kinds
        noise = torch.randint(0, 120, (count, 3, *shape), generator=generator)
        for row, label in enumerate(self._labels.tolist()):
            noise[row, label % 3] += 90
        self._images = noise.to(torch.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Tensor:
        self.reads += 1
        if index in self.corrupt:
            raise DecodeError(f"{self.describe(index)}: cut short")
        return self._images[index]

    def labels(self) -> Tensor | None:
        return None if self.classes is None else self._labels

    def describe(self, index: int) -> str:
        return f"{self.split}-{index}.png"


def tiny_vit(seed: int = 0) -> Backbone:
    """A transformer for 32 x 32 images with 32 features."""
    torch.manual_seed(seed)
    return create_backbone("vit_tiny_patch16_224", size=32, embed_dim=32, depth=1, num_heads=2, patch_size=8)


def plain_pairs(found: Iterable[tuple[str, Value]]) -> list[tuple[str, Any]]:
    """The pairs an evaluator yields, without descriptions: a number, or an `Estimate` if there is an interval."""
    return [(key, _plain(value) if isinstance(value, Measured) else value) for key, value in found]


def plain_values(found: Iterable[tuple[str, Value]]) -> dict[str, Any]:
    """Like `plain_pairs`, as a dict; of several notes, only the last."""
    return dict(plain_pairs(found))


def _plain(found: Measured) -> float | Estimate:
    return found.value if math.isnan(found.low) else Estimate(found.value, found.low, found.high)
