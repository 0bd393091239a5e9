"""Removes from patches what would give their place away without anything being recognized: color fringes, contrast.

Doersch, Gupta, Efros, ICCV 2015, arXiv 1505.05192, section 3.1; numbers of github.com/cdoersch/deepcontext. Lenses
bend colors apart the more the further out they are, so that the fringes of an edge tell where in the image it was.
All functions take N patches (N, 3, h, w) of values 0..255, float32 or wider, and treat each one by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

RMS = 50.0
"""Root mean square of a patch after `to_rms`."""
_FAINT = 0.1
"""Root mean square below which a patch is not amplified further; noise of +-0.5 in two channels has 0.24."""
_GREEN_MAGENTA = (-1.0, 2.0, -1.0)


def pixelate(patches: Tensor, shrink: Tensor) -> Tensor:
    """Each patch reduced to trunc(side * shrink) pixels a side (at least 2) and enlarged again, both bilinearly.

    `shrink` (N,) in (0, 1]; 1 leaves a patch as it is. Each axis is one matrix per patch, so that patches of all
    degrees go in one batch.
    """
    height, width = patches.shape[-2:]
    with torch.autocast(patches.device.type, enabled=False):
        down = _reduce_and_enlarge(shrink, height).to(patches.dtype).unsqueeze(1)  # (N, 1, h, h)
        across = _reduce_and_enlarge(shrink, width).to(patches.dtype).unsqueeze(1)
        return down @ patches @ across.mT


def _reduce_and_enlarge(shrink: Tensor, length: int) -> Tensor:
    """(N,) → (N, length, length): the matrix that takes a line of pixels to `length * shrink` of them and back."""
    side = (length * shrink).trunc().clamp(min=2)[:, None]  # (N, 1)
    position = torch.arange(length, device=shrink.device, dtype=shrink.dtype)
    reduced = ((position + 0.5) * (length / side) - 0.5).clamp(0, length - 1)  # rows past `side` are never read
    enlarged = ((position + 0.5) * (side / length) - 0.5).clamp(min=0).minimum(side - 1)
    return _tent(enlarged, position) @ _tent(reduced, position)


def _tent(positions: Tensor, position: Tensor) -> Tensor:
    """Weights of bilinear interpolation at `positions` (N, M) among pixels at `position` (L,) → (N, M, L)."""
    return (1 - (positions.unsqueeze(-1) - position).abs()).clamp(min=0)


def keep_one_channel(patches: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """Channel `kept` (N,) without its own mean over the patch; `noise` (N, 3, h, w) in place of the two others."""
    channel = torch.arange(3, device=patches.device)
    return torch.where((channel == kept[:, None])[..., None, None], without_mean(patches), noise)


def drop_green_magenta(patches: Tensor) -> Tensor:
    """Every pixel projected along the axis from green to magenta, a = (-1, 2, -1): x - a (a.x) / (a.a); no mean."""
    axis = patches.new_tensor(_GREEN_MAGENTA).view(1, 3, 1, 1)
    centered = without_mean(patches)
    return centered - axis * (centered * axis).sum(1, keepdim=True) / axis.square().sum()


def without_mean(patches: Tensor) -> Tensor:
    """Each channel of each patch minus its mean."""
    return patches - patches.mean((2, 3), keepdim=True)


def to_rms(patches: Tensor) -> Tensor:
    """Each patch scaled to a root mean square of `RMS` over channels and pixels; a constant one stays finite."""
    size = patches.square().mean((1, 2, 3), keepdim=True).sqrt()
    return patches * (RMS / size.clamp(min=_FAINT))
