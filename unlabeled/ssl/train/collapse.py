"""Watches the features of a joint-embedding task for collapse: every image giving the same, or one direction only.

Two figures of the L2-normalized features z (N, D), as the loss compares them:

- spread: standard deviation over images, averaged over channels, times sqrt(D). 1 for directions drawn evenly from a
  sphere, 0 when all images give the same (the figure of SimSiam, arXiv 2011.10566, section 4.1).
- rank: effective rank of the centered features, the exponential of the entropy of their normalized singular values
  (RankMe, arXiv 2210.02885). 1 when all differences lie along one line.

Two more, where a task logs them:

- ``teacher_information``: how much the teacher's assignment says about the image, H(mean p) - mean H(p) over log K; 0
  when all images get the same one, be it sharp or even.
- ``channel_deviation``: standard deviation over images, averaged over channels, of features that the loss takes as
  long as they are. These may shrink to nothing while their directions, which spread and rank look at, stay apart.

The limits lie between what healthy and collapsing runs gave on drawn shapes, after step 50 of 110 to 200, with networks
of 8 to 16 channels, heads of 8 to 16, batches of 16 and AdamW. That of the spread is low since heads that divide by a
small temperature tell images apart by little: iBOT's begin near 0.06.

======================================================  =============  ==========  ===========  =============
run (rate)                                              spread         rank        information  deviation
======================================================  =============  ==========  ===========  =============
SimCLR (0.001 to 0.01)                                  0.55 - 0.99    8 - 11
BYOL (0.001 to 0.02)                                    0.15 - 0.65    4.6 - 11
VICReg (0.001 to 0.02)                                  0.76 - 0.85    7.5 - 12                 0.32 - 0.41
PixPro, PixContrast (0.001)                             0.40 - 0.54    5.6 - 6.1
OBoW (0.001)                                            0.58 - 0.65    9.5 - 11    0.19 - 0.23
DINO (0.0001 to 0.001)                                  0.07 - 0.30    1.6 - 4.2   0.06 - 0.44
iBOT (0.00003 to 0.0003)                                0.019 - 0.10   2.0 - 3.5   0.06 - 0.22
======================================================  =============  ==========  ===========  =============
iBOT (0.001), without warm-up                           0.006 - 0.013  1.3 - 1.5   0.003
BYOL without predictor and momentum (0.01 to 0.02)      0.002 - 0.026  2.4 - 10
the same (0.001): still falling, not told yet           0.055 - 0.2    8 - 11
VICReg without variance and covariance (0.02)           0.74 - 0.84    7.9 - 9.4                0.017 - 0.026
the same (0.005): still falling, not told yet           0.73 - 0.77    11                       0.12 - 0.15
======================================================  =============  ==========  ===========  =============
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

INFORMATION = "teacher_information"
DEVIATION = "channel_deviation"
_LIMITS = {"feature_spread": 0.02, "feature_rank": 1.2, INFORMATION: 1e-4, DEVIATION: 0.1}
"""Figure → value below which features count as collapsed."""
_MEANING = {
    "feature_spread": "the features of all images are nearly the same",
    "feature_rank": "the features of all images lie along one line",
    INFORMATION: "the teacher assigns every image alike",
    DEVIATION: "the features of all images have shrunk to nearly nothing",
}
WATCH_EVERY = 10
"""Optimizer steps between readings."""
_ROWS = 256
"""Features that are looked at."""


@torch.no_grad()
def feature_metrics(features: Tensor) -> dict[str, float]:
    """(N, D) → ``feature_spread`` and ``feature_rank``; empty for fewer than four rows."""
    if features.shape[0] < 4:
        return {}
    z = torch.nn.functional.normalize(features[:_ROWS].float(), dim=1)
    centered = z - z.mean(0)
    spread = centered.square().mean(0).sqrt().mean() * z.shape[1] ** 0.5
    values = torch.linalg.svdvals(centered.double().cpu())
    part = values / values.sum().clamp(min=1e-12) + 1e-12
    return {"feature_spread": spread.item(), "feature_rank": (-part * part.log()).sum().exp().item()}


class CollapseAlarm:
    """Warns once a run when a figure has stayed below its limit for some readings in a row."""

    def __init__(self, remedy: str, *, after: int = 50, readings: int = 5) -> None:
        """`after`: steps at the start that are not judged (new networks give nearly constant features);
        `readings`: how many low ones in a row it takes."""
        self.remedy = remedy
        self.after = after
        self.warned = False
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=readings) for name in _LIMITS}

    def update(self, step: int, values: Mapping[str, float]) -> str | None:
        """Takes the figures after `step` steps; returns the warning, which it also logs, when it is time for one."""
        if step <= self.after:
            return None
        for name, recent in self._recent.items():
            if name not in values:
                continue
            recent.append(values[name] < _LIMITS[name])
            if len(recent) == recent.maxlen and all(recent) and not self.warned:
                self.warned = True
                warning = (
                    f"collapse: {_MEANING[name]} since step {step} or before "
                    f"({name} {values[name]:.2g}, healthy above {_LIMITS[name]:g}); {self.remedy}"
                )
                logger.warning(warning)
                return warning
        return None
