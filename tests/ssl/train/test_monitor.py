import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unlabeled.ssl.config.schema import LogConfig
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.train.monitor import Meter, Monitor, read_metrics


def monitor(folder: Path, start: int = 0, **settings: Any) -> Monitor:
    config = LogConfig(**{"tensorboard": False, "progress": False, **settings})
    return Monitor(folder, config, main=True, start_step=start, total_steps=10, run={"seed": 1})


def test_meter_takes_means_and_its_state_goes_on(tmp_path: Path) -> None:
    meter = Meter()
    meter.add({"loss": 1.0})
    meter.add({"loss": 2.0})
    again = Meter()
    again.load_state_dict(meter.state_dict())
    for one in (meter, again):
        one.add({"loss": 6.0})
        assert one.take() == {"loss": 3.0}
        assert one.state_dict() == {"sums": {}, "steps": 0}


def test_rows_after_the_checkpoint_are_forgotten_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    first = monitor(tmp_path)
    for step in (2, 4, 6):
        first.row(step, step / 4, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    monitor(tmp_path, start=4).row(6, 1.5, {"loss": 9.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 2, "epoch": 0.5, "loss": 0.5},
        {"step": 4, "epoch": 1.0, "loss": 0.25},
        {"step": 6, "epoch": 1.5, "loss": 9.0},
    ]


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = monitor(tmp_path, tensorboard=True)
    one.row(3, 0.5, {"loss": 0.25})
    one.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]


def test_weights_and_biases_when_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings["project"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    one = monitor(tmp_path, wandb="vision")
    one.row(3, 0.5, {"loss": 0.25})
    one.close()
    assert calls == ["vision", (3, {"loss": 0.25}), "end"]


def test_weights_and_biases_when_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log.wandb: wandb is not installed; pip install 'unlabeled\[wandb\]'"):
        monitor(tmp_path, wandb="vision")


def test_a_disk_that_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl could not be written"):
        monitor(tmp_path)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Monitor(tmp_path, LogConfig(), main=False, start_step=0, total_steps=10, run={})
    other.row(1, 0.1, {"loss": 1.0})
    other.show(1, {"loss": 1.0}, bad=0)
    other.close()
    assert not list(tmp_path.iterdir())
