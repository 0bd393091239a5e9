"""Exponential moving average of a student's weights, for teachers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum * teacher + (1 - momentum) * student, in place, for every parameter.

    Buffers are unchanged, so that a teacher in training mode keeps its own batch-norm statistics. The two modules must
    have the same structure.
    """
    averages: list[Tensor] = list(teacher.parameters())
    if averages:  # torch refuses an empty list
        # one fused operation for all parameters of a dtype and device
        torch._foreach_lerp_(averages, list(student.parameters()), 1 - momentum)
