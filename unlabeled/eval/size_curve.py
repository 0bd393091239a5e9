"""Accuracies of the sizes of an elastic run, as stored in ``RUN/sizes.json``."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from unlabeled.eval.registry import measure_of
from unlabeled.ssl.backbones.weights import WEIGHTS
from unlabeled.ssl.config.renamed import new_name
from unlabeled.ssl.core.errors import CheckpointError, DataError, first_line
from unlabeled.ssl.core.files import write_atomically, writing

FILE = "sizes.json"

log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SizeResult(_Record):
    """One backbone and its accuracies."""

    kind: Literal["extracted", "alone"]
    """extracted: a subnetwork of the run. alone: another run with a backbone of this size."""
    title: str
    """Such as ``384x12``; for another run, its name."""
    width: int
    depths: tuple[int, ...]
    """Number of blocks in each stage."""
    parameters: int
    macs: int
    """Multiply-adds for one image."""
    metrics: dict[str, float]
    """``evaluator/key`` → accuracy on the test split, as a fraction."""
    random: dict[str, float] = {}
    """Accuracies of the same architecture with random weights; empty: not measured."""
    recalibrated: int = 0
    """Training images on which the batch-norm statistics were re-estimated; 0: they were not."""
    seconds: float = 0.0
    """Wall-clock time of the evaluation. [seconds]"""
    weights: str
    """SHA-256 of the file with the weights."""


class SizeCurve(_Record):
    """All sizes that were measured with the same protocol."""

    model_config = ConfigDict(populate_by_name=True)

    settings: dict[str, Any]
    """The settings that the accuracies depend on; ``weights`` is the SHA-256 of the run's weights."""
    headline: tuple[str, ...]
    """Metrics to quote, such as ``knn/k20``."""
    labels: dict[str, str] = {}
    """Their names in tables."""
    # the aliases read files written before these fields were renamed
    train_images: int = Field(validation_alias=AliasChoices("train_images", "train_pictures"))
    test_images: int = Field(validation_alias=AliasChoices("test_images", "test_pictures"))
    sizes: int
    """Number of sizes in the run, measured or not."""
    pixels: dict[str, float] = {}
    """Accuracies of raw pixels; empty: not measured."""
    results: tuple[SizeResult, ...] = ()

    @field_validator("settings")
    @classmethod
    def _with_new_names(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {new_name(key): value for key, value in settings.items()}

    def label(self, metric: str) -> str:
        """Name of a headline metric in tables."""
        if metric in self.labels:
            return self.labels[metric]
        measure = measure_of(metric)  # older files have no labels
        return measure.text if measure is not None else metric

    def find(self, kind: str, title: str) -> SizeResult | None:
        """The result of this kind and title, or None."""
        return next((result for result in self.results if (result.kind, result.title) == (kind, title)), None)

    def adding(self, result: SizeResult) -> SizeCurve:
        """A copy with `result` added, in place of an earlier one for the same size; sorted by parameters."""
        others = [one for one in self.results if (one.kind, one.title) != (result.kind, result.title)]
        ordered = sorted([*others, result], key=lambda one: (one.parameters, one.kind == "alone", one.title))
        return self.model_copy(update={"results": tuple(ordered)})

    def front(self, metric: str) -> list[SizeResult]:
        """The Pareto front: extracted sizes that are better than every smaller one, smallest first."""
        found: list[SizeResult] = []
        extracted = [result for result in self.results if result.kind == "extracted" and metric in result.metrics]
        # of several results with equal parameters, the best comes first and excludes the others
        for result in sorted(extracted, key=lambda one: (one.parameters, -one.metrics[metric])):
            if not found or result.metrics[metric] > found[-1].metrics[metric]:
                found.append(result)
        return found


def read_curve(folder: Path) -> SizeCurve | None:
    """The sizes measured for the run in `folder`; None if there are none, or if its weights have changed since.

    Raises DataError if the file is damaged.
    """
    curve = load_curve(folder)
    if curve is None or curve.settings.get("weights") == file_digest(folder / WEIGHTS):
        return curve
    log.warning("%s is ignored: it was measured with other weights than the run has now", folder / FILE)
    return None


def load_curve(folder: Path) -> SizeCurve | None:
    """Like `read_curve`, but without a check of the weights."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return SizeCurve.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{file}: cannot be read ({first_line(error)}); remove it to measure again") from None


def write_curve(folder: Path, curve: SizeCurve) -> None:
    """Replaces ``folder/sizes.json`` atomically."""
    with writing(str(folder / FILE)):
        write_atomically(folder / FILE, curve.model_dump_json(indent=1) + "\n")


def file_digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
