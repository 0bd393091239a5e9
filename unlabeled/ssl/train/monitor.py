"""What a run tells while it goes: ``metrics.jsonl``, TensorBoard, Weights & Biases, the progress bar."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from unlabeled.ssl.config.schema import LogConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.files import write_atomically, writing

logger = logging.getLogger(__name__)


class Meter:
    """Sums of logged values since the last row; its state is part of a checkpoint, so that rows survive a kill."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call, and a fresh start."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.steps = dict(state["sums"]), int(state["steps"])


class Stopwatch:
    """Wall-clock since the last row: images per second and the part of it that was spent waiting for data."""

    def __init__(self) -> None:
        self._start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def take(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        row = {"images_per_s": self.images / elapsed, "data_wait": self.waited / elapsed}
        self._start, self.waited, self.images = time.perf_counter(), 0.0, 0
        return row


class Monitor:
    """Writes rows of the main process; on other ranks all methods do nothing."""

    def __init__(
        self, folder: Path, config: LogConfig, *, main: bool, start_step: int, total_steps: int, run: dict[str, Any]
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._main, self._total = main, total_steps
        self._board: Any = None
        self._wandb: Any = None
        self._progress: Progress | None = None
        if not main:
            return
        with writing(str(self._path)):
            _forget_after(self._path, start_step)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if config.wandb is not None:
            self._wandb = _start_wandb(config.wandb, folder, run)
        if config.progress and Console(stderr=True).is_terminal:
            self._progress = _progress_bar()
            self._bar = self._progress.add_task("", total=total_steps, completed=start_step, text="")
            self._progress.start()

    def row(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl`` after `step` optimizer steps, and the same to the other trackers."""
        if not self._main:
            return
        line = json.dumps({"step": step, "epoch": round(epoch, 6), **values})
        with writing(str(self._path)), self._path.open("a") as file:
            file.write(line + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if self._progress is None and "loss" in values:
            logger.info("step %d/%d  epoch %.2f  %s", step, self._total, epoch, _short(values))

    def show(self, step: int, values: Mapping[str, float], bad: int) -> None:
        """Moves the progress bar."""
        if self._progress is not None:
            text = _short(values) + (f"  [yellow]{bad} bad[/]" if bad else "")
            self._progress.update(self._bar, completed=step, text=text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the accelerator, else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _forget_after(path: Path, step: int) -> None:
    """Drops rows that a killed run wrote after the checkpoint it resumes from."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def _start_wandb(project: str, folder: Path, run: dict[str, Any]) -> Any:
    try:
        import wandb  # an extra
    except ImportError:
        raise ConfigError(
            "log.wandb: wandb is not installed; pip install 'unlabeled[wandb]', or log.wandb=null"
        ) from None
    return wandb.init(project=project, name=folder.name, dir=str(folder), config=run, resume="allow", id=folder.name)


def _progress_bar() -> Progress:
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=False)


def _short(values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts += [f"lr {values['lr']:.2e}"] if "lr" in values else []
    if "images_per_s" in values:
        parts.append(f"{values['images_per_s']:.0f} images/s")
        parts.append(f"wait {values['data_wait']:.0%}")
    return "  ".join(parts)
