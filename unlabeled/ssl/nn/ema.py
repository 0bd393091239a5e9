"""Exponential moving average of a network's weights, for teachers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum * teacher + (1 - momentum) * student, in place, for every parameter.

    Buffers stay: a teacher in train mode keeps batch-norm statistics of its own. The two networks must have the same
    structure. Parameters of one dtype and device move in one fused operation.
    """
    moving: list[Tensor] = list(teacher.parameters())
    if moving:
        torch._foreach_lerp_(moving, list(student.parameters()), 1 - momentum)
