"""Custom models with timm's methods, but without a name that timm knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TinyConv(nn.Module):
    """Two convolutions with a batch norm and feature maps; ``wide`` sets the number of channels."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(wide)
        self.block = nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1)
        self.feature_info = [{"num_chs": wide, "reduction": 2}, {"num_chs": 2 * wide, "reduction": 4}]

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, output_fmt: str = "NCHW", intermediates_only: bool = False
    ) -> Any:
        first = self.norm(self.stem(x)).relu()
        maps = [first, self.block(first).relu()]
        chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (maps[-1], chosen)

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.forward_intermediates(x)[0]
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Scaled(TinyConv):
    """A model with a parameter that no layer initializes, so it has no random twin."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(features) * self.scale


class Uncopyable(TinyConv):
    """A model with an attribute that Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = (line for line in "abc")
