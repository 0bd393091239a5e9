"""Momentum teachers: a copy of a network that follows it slowly (mean teacher, arXiv 1703.01780; MoCo; BYOL; DINO)."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(student: ModuleT) -> ModuleT:
    """An exact copy of `student`, buffers included, that no optimizer moves; `unlabeled.ssl.nn.ema.ema_update` does."""
    return copy.deepcopy(student).requires_grad_(False)


def without_dropping(network: ModuleT) -> ModuleT:
    """Sets the rates of dropout and stochastic depth to zero, as teachers have none; in train mode, for batch norms."""
    for module in network.modules():
        names = ["drop_prob", "drop_rate", "prob"] + ["p"] * isinstance(module, _DropoutNd)
        for name in names:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end`: end - (end - start) (1 + cos(pi progress)) / 2, `progress` in [0, 1]."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
