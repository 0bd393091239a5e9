import math

import pytest

from unlabeled.ssl.schedule import Schedule, peak_rate, weight_decay_at
from unlabeled.ssl.schema import OptimConfig, ScheduleConfig


def test_warm_up_starts_at_zero_reaches_the_peak_and_the_cosine_ends_near_zero() -> None:
    schedule = Schedule(ScheduleConfig(warmup_epochs=2), peak=1.0, steps_per_epoch=10, total_steps=100)
    assert schedule(0) == 0.0
    assert schedule(20) == 1.0
    assert schedule(60) == pytest.approx(0.5)
    assert schedule(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_multistep_is_the_table_of_the_rotation_paper() -> None:
    table = ScheduleConfig(name="multistep", warmup_epochs=0, milestones=(60, 120, 160), gamma=0.2)
    schedule = Schedule(table, peak=0.1, steps_per_epoch=1, total_steps=200)
    rates = [schedule(epoch) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


def test_constant_stays_at_the_peak() -> None:
    schedule = Schedule(ScheduleConfig(name="constant", warmup_epochs=1), peak=0.5, steps_per_epoch=2, total_steps=9)
    assert [schedule(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(("rule", "peak"), [("linear", 2.4e-3), ("sqrt", 6e-4), ("none", 1.5e-4)])
def test_scaling_rules(rule: str, peak: float) -> None:
    assert peak_rate(OptimConfig(lr=1.5e-4, lr_scaling=rule), 4096) == pytest.approx(peak)


def test_weight_decay_follows_a_cosine_to_its_end() -> None:
    optim = OptimConfig(weight_decay=0.04, weight_decay_end=0.2)
    assert [weight_decay_at(optim, step, 101) for step in (0, 50, 100)] == pytest.approx([0.04, 0.12, 0.2])
    assert weight_decay_at(OptimConfig(weight_decay=0.3), 7, 10) == 0.3
