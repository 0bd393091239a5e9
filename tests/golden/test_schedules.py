"""The published schedules at given steps; tensors to 1e-7 and float64 values to 1e-12 of the peak."""

from dataclasses import replace

import pytest

from unlabeled.ssl.config.schema import OptimConfig, ScheduleConfig
from unlabeled.ssl.train.schedule import Schedule, peak_learning_rate, weight_decay_at


def published(method: str, settings: dict) -> tuple[Schedule, OptimConfig]:
    """Our schedule under the settings of the fixture."""
    iterations, epochs = settings["iterations_per_epoch"], settings["epochs"]
    common = {"warmup_epochs": settings["warmup_epochs"]}
    optim = OptimConfig(lr=settings.get("base_lr", settings.get("lr")), lr_scaling="none")
    batch = 1
    if method == "mae":
        batch = settings["batch_per_device"] * settings["accumulate"] * settings["devices"]
        config = ScheduleConfig(min_lr=settings["min_lr"], **common)
    elif method == "simmim":
        batch = settings["batch_per_device"] * settings["accumulate"] * settings["devices"]
        base = settings["base_lr"]
        config = ScheduleConfig(
            name=settings["name"],
            start_factor=settings["warmup_lr"] / base,
            min_factor=settings["min_lr"] / base,
            warmup_in_cosine=True,
            milestones=tuple(settings.get("milestones", ())),
            gamma=settings.get("gamma", 0.1),
            **common,
        )
    elif method == "spark":
        batch = settings["batch_size"]
        config = ScheduleConfig(start_factor=0.005, min_factor=0.001, reach_min=True, **common)
        optim = optim.model_copy(
            update={"weight_decay": settings["weight_decay"], "weight_decay_end": settings["weight_decay_end"]}
        )
    elif method == "obow":
        config = ScheduleConfig(min_lr=settings["end_lr"], per_epoch=True, **common)
    else:
        config = ScheduleConfig(start_factor=1 / settings["warmup_multiplier"], min_lr=settings["min_lr"], **common)
    if "lr_scale_divisor" in settings:
        optim = optim.model_copy(update={"lr_scaling": "linear", "lr_batch": settings["lr_scale_divisor"]})
    return Schedule(config, peak_learning_rate(optim, batch), iterations, iterations * epochs), optim


def check(pair, name: str, values: list[float], peak: float) -> None:
    exact = pair.meta["values_float64"][f"expect/{name}"]
    exact = exact if isinstance(exact, list) else [exact]
    rounded = pair[f"expect/{name}"].reshape(-1).tolist()
    assert len(values) == len(exact) == len(rounded) > 0
    assert max(abs(a - b) for a, b in zip(values, exact, strict=True)) <= 1e-12 * peak, name
    assert max(abs(a - b) for a, b in zip(values, rounded, strict=True)) <= 1e-7 * peak, name


@pytest.mark.parametrize("method", ["mae", "simmim", "spark", "obow", "pixpro"])
def test_published_schedule(golden, method: str) -> None:
    pair = golden("schedules")
    assert pair.config[method]
    for index, settings in enumerate(pair.config[method]):
        schedule, optim = published(method, settings)
        steps, prefix = pair[f"input/{method}{index}_iteration"].tolist(), f"{method}{index}"
        if f"expect/{prefix}_peak_lr" in pair.tensors:
            check(pair, f"{prefix}_peak_lr", [schedule.peak], schedule.peak)
        used = "lr_of_update" if method == "simmim" else "lr"
        check(pair, f"{prefix}_{used}", [schedule(step) for step in steps], schedule.peak)
        if method == "simmim":
            lagged = replace(schedule, config=schedule.config.model_copy(update={"lag": 1}))
            check(pair, f"{prefix}_lr_used", [lagged(step) for step in steps], schedule.peak)
        if method == "spark":
            decays = [weight_decay_at(optim, step, schedule.total_steps) for step in steps]
            check(pair, f"{prefix}_weight_decay", decays, settings["weight_decay_end"])
    assert not [name for name in pair.unused() if name.startswith(f"expect/{method}")]
