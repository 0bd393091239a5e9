"""Momentum teachers: a copy of a network that follows it slowly (mean teacher, arXiv 1703.01780; MoCo; BYOL; DINO)."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(student: ModuleT) -> ModuleT:
    """An exact copy of `student`, buffers included, that no optimizer moves; `unlabeled.ssl.nn.ema.ema_update` does."""
    return copy.deepcopy(student).requires_grad_(False)


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end`: end - (end - start) (1 + cos(pi progress)) / 2, `progress` in [0, 1]."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
