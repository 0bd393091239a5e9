"""Learning rate and weight decay as pure functions of the step, so that a resumed run needs no schedule state.

One form covers the published schedules: a linear warmup, then a cosine, steps, or a constant. Their differences are
settings (`ScheduleConfig`), each tested against values from the authors' code in ``tests/golden/schedules``:

==========  =====================================================================================
MAE         defaults (facebookresearch/mae): warmup from 0, cosine over the steps after it
SimMIM      start_factor, min_factor, warmup_in_cosine, lag 1 (microsoft/SimMIM)
SparK       start_factor 0.005, min_factor 0.001, reach_min; weight decay by a cosine (keyu-tian/SparK)
OBoW        per_epoch (valeoai/obow)
PixPro      start_factor 0.01, min_lr 1e-6 (zdaxie/PixPro)
POA         stretch: cosines are cut off before their end (alipay/POA)
==========  =====================================================================================

timm's schedulers can express only the first two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unlabeled.ssl.config.schema import OptimConfig, ScheduleConfig


def peak_learning_rate(optim: OptimConfig, batch_size: int) -> float:
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
        """Steps of a complete cosine; the run covers the fraction ``config.stretch`` of them."""
        return int(self.total_steps / self.config.stretch)

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        config = self.config
        position = float(max(step - config.lag, 0))  # authors' code may set the learning rate after the step
        warmup = config.warmup_epochs * self.steps_per_epoch
        start = config.start_lr + config.start_factor * self.peak
        if position < warmup:
            return start + (self.peak - start) * position / warmup
        # after the warmup
        if config.per_epoch:  # down to the first step of the epoch
            position = float(int(position) // self.steps_per_epoch * self.steps_per_epoch)
        if config.name == "constant":
            return self.peak
        if config.name == "multistep":
            passed = sum(position >= milestone * self.steps_per_epoch for milestone in config.milestones)
            return self.peak * config.gamma**passed
        floor = config.min_lr + config.min_factor * self.peak
        begin = 0.0 if config.warmup_in_cosine else warmup
        # the last step has index total_steps - 1, so a cosine over all steps would reach its end one step too late
        end = self.cosine_steps - 1 if config.reach_min else self.cosine_steps
        return floor + (self.peak - floor) * _half_cosine(position - begin, end - begin)


def weight_decay_at(optim: OptimConfig, step: int, cosine_steps: int) -> float:
    """Weight decay of optimizer step `step`, counted from 0: constant, or a half cosine that reaches
    `weight_decay_end` at the last of `cosine_steps` (see `Schedule.cosine_steps`)."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    end = optim.weight_decay_end
    return end + (optim.weight_decay - end) * _half_cosine(step, cosine_steps - 1)


def _half_cosine(position: float, length: float) -> float:
    """Falls from 1 at position 0 to 0 at `length`, and stays 0 after it."""
    # the length is not positive if the warmup takes the entire run
    return 0.5 * (1 + math.cos(math.pi * min(position / length, 1.0))) if length > 0 else 0.0
