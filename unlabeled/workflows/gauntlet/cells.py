"""What became of a cell, as ``OUT/cells/KEY.json`` holds it."""

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
    """One finished cell."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    entrant: str
    """Labels as they were when it was measured; the file's name alone says what it belongs to."""
    data: str
    evaluator: str
    seed: int
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, in one line."""
    measures: dict[str, Measure] = {}
    """What those of the metrics are that tables show; empty: from before cells held it, see `measure`."""
    metrics: dict[str, float | None] = {}
    """``evaluator/key`` → value; None: not finite."""
    intervals: dict[str, tuple[float, float]] = {}
    """95 % intervals of the metrics that bring their own."""
    notes: tuple[str, ...] = ()
    test_images: int = Field(0, validation_alias=AliasChoices("test_images", "test_pictures"))
    """Test images that were judged."""
    seconds: dict[str, float] = {}
    """``features`` (reading or computing them, once for all cells that share them) and ``evaluator``."""

    def measure(self, metric: str) -> Measure | None:
        """What a metric is; None for one that no table shows."""
        if not self.measures:  # a file from before the values said so themselves
            return measure_of(metric)
        return self.measures.get(metric)

    @classmethod
    def done(cls, cell: GauntletCell, found: EncoderResults, test_images: int, features: float) -> CellResult:
        return cls(
            entrant=cell.entrant,
            data=cell.data,
            evaluator=cell.evaluator,
            seed=cell.seed,
            status="done",
            metrics={name: value if math.isfinite(value) else None for name, value in found.metrics.items()},
            intervals={name: ends for name, ends in found.intervals.items() if all(map(math.isfinite, ends))},
            measures={name: one.measure for name, one in found.measures.items()},
            notes=found.notes,
            test_images=test_images,
            seconds={"features": round(features, 3), "evaluator": round(found.seconds.get(cell.evaluator, 0.0), 3)},
        )

    @classmethod
    def failed(cls, cell: GauntletCell, reason: str) -> CellResult:
        return cls(
            entrant=cell.entrant, data=cell.data, evaluator=cell.evaluator, seed=cell.seed, status="failed",
            reason=reason,
        )  # fmt: skip


class CellStore:
    """The finished cells of a folder, one file each, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, cell: GauntletCell) -> CellResult | None:
        """What became of `cell`; None when it has not been measured or its file is damaged."""
        file = self._file(cell)
        if not file.is_file():
            return None
        try:
            return CellResult.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            log.warning("%s is damaged (%s) and is measured again", file, first_line(error))
            return None

    def write(self, cell: GauntletCell, result: CellResult) -> None:
        """Raises CheckpointError when the disk refuses."""
        with writing(str(self._file(cell))):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(cell), result.model_dump_json(indent=1) + "\n")

    def _file(self, cell: GauntletCell) -> Path:
        return self.folder / f"{cell.key}.json"
