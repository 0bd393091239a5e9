"""Progress of the job: a progress bar in a terminal, otherwise a log line per cell."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unlabeled.workflows.gauntlet.cells import CellResult
from unlabeled.workflows.gauntlet.job import OnCell
from unlabeled.workflows.gauntlet.plan import GauntletCell

log = logging.getLogger(__name__)


class CellProgress:
    """Context manager that displays progress; pass its `begin` to `run_gauntlet`."""

    def __init__(self) -> None:
        columns = (MofNCompleteColumn(), TextColumn("cells"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
        self._shown = self._bar.console.is_terminal
        self._began, self._done, self._known, self._total = 0.0, 0, 0, 0

    def __enter__(self) -> CellProgress:
        if self._shown:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()

    def begin(self, total: int, known: int) -> OnCell:
        """Starts the clock. `known` of `total` cells were finished by earlier jobs."""
        self._began, self._done, self._known, self._total = time.monotonic(), known, known, total
        if known:
            log.info("%d of %d cells are already finished", known, total)
        bar = self._bar.add_task("", total=total, completed=known)

        def on_cell(cell: GauntletCell, result: CellResult) -> None:
            self._done += 1
            description = f"{cell.entrant} on {cell.data}, {cell.evaluator}" + (
                " failed" if result.status == "failed" else ""
            )
            if self._shown:
                self._bar.update(bar, advance=1, description=description)
            else:
                log.info("%d of %d cells, %s left: %s", self._done, total, self._left(), description)

        return on_cell

    def _left(self) -> str:
        """Estimated time for the remaining cells, from the mean time per cell of this job."""
        # cells of earlier jobs took no time here
        mean = (time.monotonic() - self._began) / (self._done - self._known)
        seconds = mean * (self._total - self._done)
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
