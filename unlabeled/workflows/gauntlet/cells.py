"""The result of a cell, stored as ``OUT/cells/KEY.json``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from unlabeled.eval.base import Measure
from unlabeled.eval.registry import measure_of
from unlabeled.eval.results import EncoderResults
from unlabeled.ssl.core.errors import first_line
from unlabeled.ssl.core.files import write_atomically, writing
from unlabeled.workflows.gauntlet.plan import GauntletCell

log = logging.getLogger(__name__)


class CellResult(BaseModel):
    """The result of one cell: its metrics, or why it failed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    entrant: str
    """Label when it was measured, for people; the file name identifies the cell, so labels can change later."""
    data: str
    evaluator: str
    seed: int
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, in one line."""
    measures: dict[str, Measure] = {}
    """Label and unit of each metric that tables show; empty in files of older versions, see `measure`."""
    metrics: dict[str, float | None] = {}
    """``evaluator/key`` → value; None: NaN or infinite."""
    intervals: dict[str, tuple[float, float]] = {}
    """95 % intervals of the metrics for which the evaluator provides one."""
    notes: tuple[str, ...] = ()
    # the alias reads files of version 0.1.0
    test_images: int = Field(0, validation_alias=AliasChoices("test_images", "test_pictures"))
    """Test images that were evaluated, without unreadable ones."""
    seconds: dict[str, float] = {}
    """``features``: time to compute or read them, once for all cells that share them; ``evaluator``: its own time."""

    def measure(self, metric: str) -> Measure | None:
        """Label and unit of a metric; None if no table shows it."""
        if not self.measures:  # a file of an older version, which did not store them
            return measure_of(metric)
        return self.measures.get(metric)

    @classmethod
    def done(cls, cell: GauntletCell, found: EncoderResults, test_images: int, features: float) -> CellResult:
        """The result of a cell that was measured; `features`: seconds to get its features."""
        return cls(
            entrant=cell.entrant,
            data=cell.data,
            evaluator=cell.evaluator,
            seed=cell.seed,
            status="done",
            # JSON has no NaN
            metrics={name: value if math.isfinite(value) else None for name, value in found.metrics.items()},
            intervals={name: ends for name, ends in found.intervals.items() if all(map(math.isfinite, ends))},
            measures={name: one.measure for name, one in found.measures.items()},
            notes=found.notes,
            test_images=test_images,
            seconds={"features": round(features, 3), "evaluator": round(found.seconds.get(cell.evaluator, 0.0), 3)},
        )

    @classmethod
    def failed(cls, cell: GauntletCell, reason: str) -> CellResult:
        """The result of a cell that raised an error."""
        return cls(
            entrant=cell.entrant, data=cell.data, evaluator=cell.evaluator, seed=cell.seed, status="failed",
            reason=reason,
        )  # fmt: skip


class CellStore:
    """The finished cells in a folder, one file each. Files are written atomically, so a killed job leaves none behind
    that is incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, cell: GauntletCell) -> CellResult | None:
        """The result of `cell`; None if it has not been measured, or its file is damaged."""
        file = self._file(cell)
        if not file.is_file():
            return None
        try:
            return CellResult.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            log.warning("%s is damaged (%s); measuring the cell again", file, first_line(error))
            return None

    def write(self, cell: GauntletCell, result: CellResult) -> None:
        """Stores `result`. Raises CheckpointError if the file cannot be written."""
        with writing(str(self._file(cell))):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(cell), result.model_dump_json(indent=1) + "\n")

    def _file(self, cell: GauntletCell) -> Path:
        return self.folder / f"{cell.key}.json"
