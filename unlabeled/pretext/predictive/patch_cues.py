"""Removes cues that give the position of a patch away without recognizing anything: color fringes and contrast.

Lenses separate colors more the farther from the center, so the color fringes of an edge reveal its position in the
image (chromatic aberration). Doersch, Gupta, Efros, ICCV 2015, arXiv 1505.05192, section 3.1; constants from
github.com/cdoersch/deepcontext. All functions take N patches (N, 3, h, w) with values 0..255, in at least float32, and
treat each patch independently.
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
    """Reduces each patch to trunc(side * shrink) pixels a side (at least 2) and enlarges it again, both bilinearly.

    `shrink` (N,) is in (0, 1]; 1 leaves a patch unchanged.
    """
    # one matrix per patch and axis, so that patches with different factors are processed in one batch
    height, width = patches.shape[-2:]
    with torch.autocast(patches.device.type, enabled=False):
        down = _reduce_and_enlarge(shrink, height).to(patches.dtype).unsqueeze(1)  # (N, 1, h, h)
        across = _reduce_and_enlarge(shrink, width).to(patches.dtype).unsqueeze(1)
        return down @ patches @ across.mT


def _reduce_and_enlarge(shrink: Tensor, length: int) -> Tensor:
    """(N,) → (N, length, length): matrices that resize a line of `length` pixels to `length * shrink` and back."""
    side = (length * shrink).trunc().clamp(min=2)[:, None]  # (N, 1)
    position = torch.arange(length, device=shrink.device, dtype=shrink.dtype)
    # + 0.5 and - 0.5: pixels are sampled at their centers (align_corners=False)
    reduced = ((position + 0.5) * (length / side) - 0.5).clamp(0, length - 1)  # rows past `side` are never read
    enlarged = ((position + 0.5) * (side / length) - 0.5).clamp(min=0).minimum(side - 1)
    return _tent(enlarged, position) @ _tent(reduced, position)


def _tent(positions: Tensor, position: Tensor) -> Tensor:
    """Weights of linear interpolation at `positions` (N, M) between pixels at `position` (L,) → (N, M, L)."""
    return (1 - (positions.unsqueeze(-1) - position).abs()).clamp(min=0)


def keep_one_channel(patches: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """Keeps channel `kept` (N,), minus its mean over the patch; `noise` (N, 3, h, w) replaces the other two."""
    channel = torch.arange(3, device=patches.device)
    return torch.where((channel == kept[:, None])[..., None, None], without_mean(patches), noise)


def drop_green_magenta(patches: Tensor) -> Tensor:
    """Subtracts the mean and each pixel's component along the green-magenta axis a: x - a (a.x) / (a.a)."""
    axis = patches.new_tensor(_GREEN_MAGENTA).view(1, 3, 1, 1)
    centered = without_mean(patches)
    return centered - axis * (centered * axis).sum(1, keepdim=True) / axis.square().sum()


def without_mean(patches: Tensor) -> Tensor:
    """Each channel of each patch minus its mean."""
    return patches - patches.mean((2, 3), keepdim=True)


def to_rms(patches: Tensor) -> Tensor:
    """Scales each patch to a root mean square of `RMS` over channels and pixels."""
    rms = patches.square().mean((1, 2, 3), keepdim=True).sqrt()
    return patches * (RMS / rms.clamp(min=_FAINT))  # a constant patch has an RMS of 0 and must stay finite
