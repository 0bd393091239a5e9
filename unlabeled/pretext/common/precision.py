"""The precision in which targets and losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in at least float32: half precision becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
