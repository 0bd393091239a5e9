"""What was measured of an elastic run's sizes, as ``RUN/sizes.json`` holds it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from unlabeled.eval.registry import measure_of
from unlabeled.ssl.backbones.weights import WEIGHTS
from unlabeled.ssl.core.errors import CheckpointError, DataError, first_line
from unlabeled.ssl.core.files import write_atomically, writing

FILE = "sizes.json"

log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SizeResult(_Record):
    """One network and its accuracies."""

    kind: Literal["extracted", "alone"]
    """extracted: a sub-network of the run. alone: another run, of a network of this size."""
    title: str
    """Such as ``384x12``; of another run its name."""
    width: int
    depths: tuple[int, ...]
    """Blocks of each stage."""
    parameters: int
    macs: int
    """Multiply-adds for one image."""
    metrics: dict[str, float]
    """``evaluator/name`` → accuracy on the test split, a fraction."""
    random: dict[str, float] = {}
    """The same of the same network with random weights; empty: not measured."""
    recalibrated: int = 0
    """Training images on which the statistics of its batch norms were estimated; 0: they were not."""
    seconds: float = 0.0
    weights: str
    """SHA-256 of the file that the weights come from."""


class SizeCurve(_Record):
    """All sizes that were measured under one protocol."""

    model_config = ConfigDict(populate_by_name=True)

    settings: dict[str, Any]
    """What the numbers depend on; ``weights`` is the SHA-256 of the run's weights."""
    headline: tuple[str, ...]
    """Metrics to quote, such as ``knn/k20``."""
    labels: dict[str, str] = {}
    """What tables call them."""
    train_images: int = Field(validation_alias=AliasChoices("train_images", "train_pictures"))
    test_images: int = Field(validation_alias=AliasChoices("test_images", "test_pictures"))
    sizes: int
    """How many the run holds, measured or not."""
    pixels: dict[str, float] = {}
    """Accuracies of raw pixels; empty: not measured."""
    results: tuple[SizeResult, ...] = ()

    def label(self, metric: str) -> str:
        """What tables call a metric to quote."""
        if metric in self.labels:
            return self.labels[metric]
        measure = measure_of(metric)  # of a file from before it held labels
        return measure.text if measure is not None else metric

    def find(self, kind: str, title: str) -> SizeResult | None:
        return next((result for result in self.results if (result.kind, result.title) == (kind, title)), None)

    def adding(self, result: SizeResult) -> SizeCurve:
        """With `result`, in place of an earlier one of the same network; smallest network first."""
        others = [one for one in self.results if (one.kind, one.title) != (result.kind, result.title)]
        ordered = sorted([*others, result], key=lambda one: (one.parameters, one.kind == "alone", one.title))
        return self.model_copy(update={"results": tuple(ordered)})

    def front(self, metric: str) -> list[SizeResult]:
        """The extracted sizes that are better than every smaller one (the Pareto front), smallest first."""
        found: list[SizeResult] = []
        extracted = [result for result in self.results if result.kind == "extracted" and metric in result.metrics]
        for result in sorted(extracted, key=lambda one: (one.parameters, -one.metrics[metric])):
            if not found or result.metrics[metric] > found[-1].metrics[metric]:
                found.append(result)
        return found


def read_curve(folder: Path) -> SizeCurve | None:
    """What was measured of the run in `folder`; None when nothing was, or of other weights than it holds now.

    Raises DataError when the file is damaged.
    """
    curve = load_curve(folder)
    if curve is None or curve.settings.get("weights") == file_digest(folder / WEIGHTS):
        return curve
    log.warning("%s was measured with other weights than the run has now, and is left out", folder / FILE)
    return None


def load_curve(folder: Path) -> SizeCurve | None:
    """As `read_curve`, whatever the weights."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return SizeCurve.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{file}: cannot be read ({first_line(error)}); remove it to measure anew") from None


def write_curve(folder: Path, curve: SizeCurve) -> None:
    """Replaces ``folder/sizes.json`` in one move."""
    with writing(str(folder / FILE)):
        write_atomically(folder / FILE, curve.model_dump_json(indent=1) + "\n")


def file_digest(file: Path) -> str:
    """SHA-256 of a file. Raises CheckpointError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
