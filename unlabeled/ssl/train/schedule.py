"""Learning rate and weight decay as pure functions of the step, so that a resumed run needs no schedule state.

One family covers the published schedules: a linear warm-up, then a cosine, steps, or nothing. Their differences are
settings (`ScheduleConfig`), each checked against the authors' own values in ``tests/golden/schedules``:

==========  =====================================================================================
MAE         defaults (facebookresearch/mae): warm-up from 0, cosine over what follows it
SimMIM      start_factor, min_factor, warmup_in_cosine, lag 1 (microsoft/SimMIM)
SparK       start_factor 0.005, min_factor 0.001, reach_min; weight decay by a cosine (keyu-tian/SparK)
OBoW        per_epoch (valeoai/obow)
PixPro      start_factor 0.01, min_lr 1e-6 (zdaxie/PixPro)
POA         stretch: cosines are cut off before their end (alipay/POA)
==========  =====================================================================================

timm's schedulers express the first two only, hence this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unlabeled.ssl.config.schema import OptimConfig, ScheduleConfig


def peak_rate(optim: OptimConfig, batch_size: int) -> float:
    """Peak learning rate for a batch of `batch_size` images under the scaling rule of `optim`."""
    ratio = batch_size / optim.lr_batch
    return optim.lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[optim.lr_scaling]


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each optimizer step of a run: ``schedule(step)``, step in [0, total_steps)."""

    config: ScheduleConfig
    peak: float
    steps_per_epoch: int
    total_steps: int

    @property
    def cosine_steps(self) -> int:
        """Steps that cosines are made for, of which a run that is shorter by ``config.stretch`` sees the first."""
        return int(self.total_steps / self.config.stretch)

    def __call__(self, step: int) -> float:
        """Learning rate that optimizer step `step` uses."""
        config = self.config
        position = float(max(step - config.lag, 0))
        warmup = config.warmup_epochs * self.steps_per_epoch
        start = config.start_lr + config.start_factor * self.peak
        if position < warmup:
            return start + (self.peak - start) * position / warmup
        if config.per_epoch:
            position = float(int(position) // self.steps_per_epoch * self.steps_per_epoch)
        if config.name == "constant":
            return self.peak
        if config.name == "multistep":
            passed = sum(position >= milestone * self.steps_per_epoch for milestone in config.milestones)
            return self.peak * config.gamma**passed
        floor = config.min_lr + config.min_factor * self.peak
        begin = 0.0 if config.warmup_in_cosine else warmup
        end = self.cosine_steps - 1 if config.reach_min else self.cosine_steps
        return floor + (self.peak - floor) * _half_cosine(position - begin, end - begin)


def weight_decay_at(optim: OptimConfig, step: int, cosine_steps: int) -> float:
    """Weight decay of optimizer step `step`: constant, or a half cosine to `weight_decay_end` at the last of
    `cosine_steps` (see `Schedule.cosine_steps`)."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    end = optim.weight_decay_end
    return end + (optim.weight_decay - end) * _half_cosine(step, cosine_steps - 1)


def _half_cosine(position: float, length: float) -> float:
    """From 1 at position 0 to 0 at `length`, and 0 beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(position / length, 1.0))) if length > 0 else 0.0
