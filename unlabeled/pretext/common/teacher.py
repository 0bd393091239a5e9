"""Momentum teachers: a copy of the student follows it slowly (mean teacher, arXiv 1703.01780; MoCo; BYOL; DINO)."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(student: ModuleT) -> ModuleT:
    """A copy of `student`, buffers included, without gradients; update it with `unlabeled.ssl.nn.ema.ema_update`."""
    return copy.deepcopy(student).requires_grad_(False)


def without_dropout(teacher: ModuleT) -> ModuleT:
    """Sets all rates of dropout and stochastic depth in `teacher` to zero, in place, and returns it."""
    # eval mode would do too, but teachers stay in train mode: their batch norms use the statistics of the batch
    for module in teacher.modules():
        # the names under which timm and torch store a rate; `p` is too common a name for other modules
        names = ["drop_prob", "drop_rate", "prob"] + ["p"] * isinstance(module, _DropoutNd)
        for name in names:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return teacher


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """Value of a half cosine from `start` to `end` at `progress` in [0, 1]."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2
