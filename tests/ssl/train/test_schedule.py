import math

import numpy as np
import pytest

from unlabeled.pretext.common.teacher import cosine_momentum
from unlabeled.ssl.config.schema import OptimConfig, ScheduleConfig
from unlabeled.ssl.train.schedule import Schedule, peak_learning_rate, weight_decay_at


def test_warm_up_starts_at_zero_reaches_the_peak_and_the_cosine_ends_near_zero() -> None:
    schedule = Schedule(ScheduleConfig(warmup_epochs=2), peak=1.0, steps_per_epoch=10, total_steps=100)
    assert schedule(0) == 0.0
    assert schedule(20) == 1.0
    assert schedule(60) == pytest.approx(0.5)
    assert schedule(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_multistep_is_the_table_of_the_rotation_paper() -> None:
    table = ScheduleConfig(name="multistep", warmup_epochs=0, milestones=(60, 120, 160), gamma=0.2)
    schedule = Schedule(table, peak=0.1, steps_per_epoch=1, total_steps=200)
    learning_rates = [schedule(epoch) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert learning_rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


def test_constant_stays_at_the_peak() -> None:
    schedule = Schedule(ScheduleConfig(name="constant", warmup_epochs=1), peak=0.5, steps_per_epoch=2, total_steps=9)
    assert [schedule(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(("rule", "peak"), [("linear", 2.4e-3), ("sqrt", 6e-4), ("none", 1.5e-4)])
def test_scaling_rules(rule: str, peak: float) -> None:
    assert peak_learning_rate(OptimConfig(lr=1.5e-4, lr_scaling=rule), 4096) == pytest.approx(peak)


def test_weight_decay_follows_a_cosine_to_its_end() -> None:
    optim = OptimConfig(weight_decay=0.04, weight_decay_end=0.2)
    assert [weight_decay_at(optim, step, 101) for step in (0, 50, 100)] == pytest.approx([0.04, 0.12, 0.2])
    assert weight_decay_at(OptimConfig(weight_decay=0.3), 7, 10) == 0.3


@pytest.mark.parametrize(("stretch", "left"), [(0.78, 0.115), (0.9, 0.024), (1.0, 0.0)])
def test_a_stretched_run_stops_before_its_cosines_end(stretch: float, left: float) -> None:
    """The remainders of POA's ViT and Swin, as parts of the cosines' amplitude."""
    optim = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    config = ScheduleConfig(warmup_epochs=0, min_lr=0.1, stretch=stretch)
    schedule = Schedule(config, peak=1.1, steps_per_epoch=100, total_steps=100_000)
    last = schedule.total_steps - 1
    assert schedule(0) == 1.1
    assert schedule(last) - 0.1 == pytest.approx(left, abs=5e-4)
    assert 0.4 - weight_decay_at(optim, last, schedule.cosine_steps) == pytest.approx(0.36 * left, abs=0.36 * 5e-4)


@pytest.mark.parametrize(("epochs", "warmup", "steps", "stretch"), [(346, 10, 8, 0.78), (346, 30, 6, 0.9)])
def test_schedules_of_poa(epochs: int, warmup: int, steps: int, stretch: float) -> None:
    """Against the rule of alipay/POA (``CosineScheduler``): int(T / s) steps, of which the warm-up is a part."""
    total = epochs * steps
    config = ScheduleConfig(warmup_epochs=warmup, min_lr=2e-5, stretch=stretch)
    schedule = Schedule(config, peak=0.005, steps_per_epoch=steps, total_steps=total)
    positions = np.arange(int(total / stretch) - warmup * steps)
    cosine = 2e-5 + 0.5 * (0.005 - 2e-5) * (1 + np.cos(np.pi * positions / len(positions)))
    learning_rates = np.array([schedule(step) for step in range(warmup * steps, total)])
    np.testing.assert_allclose(learning_rates, cosine[: total - warmup * steps], rtol=1e-12)


def test_a_momentum_is_stretched_through_its_progress() -> None:
    """What a task does for its teacher: at the end of POA's ViT, 11.5 % of the way from .9999 back to .992 are left."""
    schedule = Schedule(ScheduleConfig(stretch=0.78), peak=1.0, steps_per_epoch=1, total_steps=7800)
    optim = OptimConfig(weight_decay=0.992, weight_decay_end=0.9999)
    for step in (0, 100, 5000, 7799):
        momentum = cosine_momentum(0.992, 0.9999, 0.78 * step / schedule.total_steps)
        assert momentum == pytest.approx(weight_decay_at(optim, step, schedule.cosine_steps + 1), abs=1e-12)
