"""In which precision targets and losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is that: what targets and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
