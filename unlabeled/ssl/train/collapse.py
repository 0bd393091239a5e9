"""Detects collapse of a joint-embedding task: all images get the same features, or features along a single direction.

Two metrics of the L2-normalized features z (N, D), as the loss compares them:

- spread: standard deviation over images, averaged over channels, times sqrt(D). 1 for directions drawn uniformly from
  a sphere, 0 if all images give the same features (as in SimSiam, arXiv 2011.10566, section 4.1).
- rank: effective rank of the centered features, the exponential of the entropy of their normalized singular values
  (RankMe, arXiv 2210.02885). 1 if all differences lie along one line.

Two more, if a task logs them:

- ``teacher_information``: how much the teacher's assignment p says about the image, (H(mean p) - mean H(p)) / log K; 0
  if all images get the same assignment, sharp or uniform.
- ``channel_deviation``: standard deviation over images, averaged over channels, of features that the loss does not
  normalize. They can shrink to zero while spread and rank, which only see directions, stay high.

The limits lie between the values of healthy and of collapsing runs on drawn shapes, after step 50 of 110 to 200, with
backbones of 8 to 16 channels, heads of 8 to 16, batches of 16 and AdamW. The limit of the spread is low because heads
that divide by a small temperature need only small differences between images: iBOT's spread starts near 0.06.

======================================================  =============  ==========  ===========  =============
run (learning rate)                                     spread         rank        information  deviation
======================================================  =============  ==========  ===========  =============
SimCLR (0.001 to 0.01)                                  0.55 - 0.99    8 - 11
BYOL (0.001 to 0.02)                                    0.15 - 0.65    4.6 - 11
VICReg (0.001 to 0.02)                                  0.76 - 0.85    7.5 - 12                 0.32 - 0.41
PixPro, PixContrast (0.001)                             0.40 - 0.54    5.6 - 6.1
OBoW (0.001)                                            0.58 - 0.65    9.5 - 11    0.19 - 0.23
DINO (0.0001 to 0.001)                                  0.07 - 0.30    1.6 - 4.2   0.06 - 0.44
iBOT (0.00003 to 0.0003)                                0.019 - 0.10   2.0 - 3.5   0.06 - 0.22
======================================================  =============  ==========  ===========  =============
iBOT (0.001), without warmup                            0.006 - 0.013  1.3 - 1.5   0.003
BYOL without predictor and momentum (0.01 to 0.02)      0.002 - 0.026  2.4 - 10
the same (0.001): still falling, not detected yet       0.055 - 0.2    8 - 11
VICReg without variance and covariance (0.02)           0.74 - 0.84    7.9 - 9.4                0.017 - 0.026
the same (0.005): still falling, not detected yet       0.73 - 0.77    11                       0.12 - 0.15
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
"""Metric → value below which features count as collapsed."""
_MEANING = {
    "feature_spread": "the features of all images are nearly the same",
    "feature_rank": "the features of all images lie along one line",
    INFORMATION: "the teacher assigns every image alike",
    DEVIATION: "the features of all images have shrunk to nearly nothing",
}
WATCH_EVERY = 10
"""Optimizer steps between checks."""
_MAX_IMAGES = 256
"""Features that the metrics use at most, since a singular value decomposition of a large batch takes long."""


@torch.no_grad()
def feature_metrics(features: Tensor) -> dict[str, float]:
    """Features (N, D) → ``feature_spread`` and ``feature_rank``; empty for fewer than four images."""
    if features.shape[0] < 4:  # centered, three or fewer images have a rank of at most two: no sign of collapse
        return {}
    z = torch.nn.functional.normalize(features[:_MAX_IMAGES].float(), dim=1)
    centered = z - z.mean(0)
    spread = centered.square().mean(0).sqrt().mean() * z.shape[1] ** 0.5
    # in float64 on the CPU: nearly collapsed features have tiny singular values, and small matrices are slow on a GPU
    values = torch.linalg.svdvals(centered.double().cpu())
    p = values / values.sum().clamp(min=1e-12) + 1e-12  # the second one keeps the logarithm finite, as in RankMe
    return {"feature_spread": spread.item(), "feature_rank": (-p * p.log()).sum().exp().item()}


class CollapseAlarm:
    """Warns once per run, when a metric has been below its limit for several checks in a row."""

    def __init__(self, remedy: str, *, after: int = 50, readings: int = 5) -> None:
        """`remedy` ends the warning. The first `after` steps are ignored; `readings` low values in a row trigger it."""
        # new backbones give nearly constant features, which are no collapse: hence `after`
        self.remedy = remedy
        self.after = after
        self.warned = False
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=readings) for name in _LIMITS}

    def update(self, step: int, values: Mapping[str, float]) -> str | None:
        """Records the metrics after `step` optimizer steps. Logs and returns the warning when it is due, else None."""
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
