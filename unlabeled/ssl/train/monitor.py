"""Metrics during a run: ``metrics.jsonl``, TensorBoard, Weights & Biases, the progress bar."""

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
    """Averages logged values between two lines of ``metrics.jsonl``.

    Checkpoints include its state, so that a line that spans a resume has the same values as without the interruption.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the values of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Returns the means over the steps since the last call, and starts again."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.steps = dict(state["sums"]), int(state["steps"])


class Stopwatch:
    """Measures images per second and the fraction of time spent waiting for data.

    The loop adds to `waited` (seconds) and `images`.
    """

    def __init__(self) -> None:
        self._start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def take(self) -> dict[str, float]:
        """Returns ``images_per_s`` and ``data_wait`` since the last call, and starts again."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        row = {"images_per_s": self.images / elapsed, "data_wait": self.waited / elapsed}
        self._start, self.waited, self.images = time.perf_counter(), 0.0, 0
        return row


class Monitor:
    """Writes metrics to all trackers on the main process; on other ranks its methods do nothing.

    `run` is the configuration of the run, which Weights & Biases shows.
    """

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
            _drop_lines_after(self._path, start_step)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            # purge_step hides what a killed run logged after the checkpoint
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if config.wandb is not None:
            self._wandb = _start_wandb(config.wandb, folder, run)
        if config.progress and Console(stderr=True).is_terminal:  # a log file gets a line per row instead
            self._progress = _progress_bar()
            self._bar = self._progress.add_task("", total=total_steps, completed=start_step, text="")
            self._progress.start()

    def row(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes `values` after `step` optimizer steps as one line of ``metrics.jsonl``, and to the other trackers."""
        if not self._main:
            return
        # opened for each line, so that a crash loses none that was written
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
        """Updates the progress bar; `bad` is the number of images that could not be decoded."""
        if self._progress is not None:
            text = _short(values) + (f"  [yellow]{bad} bad[/]" if bad else "")
            self._progress.update(self._bar, completed=step, text=text)

    def close(self) -> None:
        """Closes all trackers."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without a last line that a crash cut short; empty if there is no file."""
    if not path.is_file():
        return []
    complete, _, _ = path.read_text().rpartition("\n")  # a complete line ends with a newline
    return [json.loads(line) for line in complete.splitlines()]


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB, of the GPU if `device` is one and of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # macOS counts bytes, Linux kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def _drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines that a killed run wrote after the checkpoint that it resumes from."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def _start_wandb(project: str, folder: Path, run: dict[str, Any]) -> Any:
    try:
        import wandb  # an optional dependency
    except ImportError:
        raise ConfigError(
            "log.wandb: wandb is not installed; pip install 'unlabeled[wandb]', or log.wandb=null"
        ) from None
    # the folder's name as id, so that a resumed run continues its own curves
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
    """The values that the progress bar and the log show."""
    shown = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    shown += [f"lr {values['lr']:.2e}"] if "lr" in values else []
    if "images_per_s" in values:
        shown.append(f"{values['images_per_s']:.0f} images/s")
        shown.append(f"wait {values['data_wait']:.0%}")
    return "  ".join(shown)
