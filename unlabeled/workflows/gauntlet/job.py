"""Runs the cells of the plan that are not finished yet, and stores each result immediately.

If the job is killed, only the current cell is lost. The same command continues from there and reads back features that
were already computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml

from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.eval.runner import encode_dataset, evaluate_features
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import CheckpointError, UnlabeledError, first_line
from unlabeled.ssl.core.files import write_atomically, writing
from unlabeled.workflows.gauntlet.cells import CellResult, CellStore
from unlabeled.workflows.gauntlet.page import write_pages
from unlabeled.workflows.gauntlet.plan import Entrant, GauntletCell, GauntletPlan, Group, make_plan, settled
from unlabeled.workflows.gauntlet.settings import GauntletRun
from unlabeled.workflows.gauntlet.table import gauntlet_document

SETTINGS = "gauntlet.yaml"

OnCell = Callable[[GauntletCell, CellResult], None]
"""Called with each cell as soon as it is finished."""

Build = Callable[[Entrant, int], Backbone | None]
"""(row, seed of random weights) → its backbone; None for raw pixels."""

log = logging.getLogger(__name__)


def run_gauntlet(run: GauntletRun, begin: Callable[[int, int], OnCell] | None = None) -> dict[str, Any]:
    """Measures the missing cells, writes the table into ``run.out`` and returns the contents of ``table.json``.

    `begin` is called with the number of cells and the number already finished, and returns the function to call after
    each other cell. Raises a subclass of UnlabeledError for settings and inputs that cannot work. A cell that fails is
    listed in the table, and the job continues.
    """
    _claim(run)
    plan = make_plan(run)
    _write_settings(run.model_copy(update={"evaluate": settled(run)}))
    store = CellStore(run.out / "cells")
    results = _known(run, plan, store)
    on_cell = begin(len({cell.key for cell in plan.cells()}), len(results)) if begin is not None else _ignore
    build = _last_kept()
    for group in plan.groups:
        pending = [cell for cell in group.cells if cell.key not in results]
        for cell, result in _measured(run, plan, group, pending, build):
            store.write(cell, result)
            results[cell.key] = result
            on_cell(cell, result)
        if pending:  # update the table while the job is running
            write_pages(gauntlet_document(run, plan, results), run.out)
    document = gauntlet_document(run, plan, results)
    write_pages(document, run.out)
    return document


def _ignore(cell: GauntletCell, result: CellResult) -> None:
    pass


def _claim(run: GauntletRun) -> None:
    """Raises CheckpointError for a folder that contains something else."""
    out = run.out
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"out: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise CheckpointError(f"out: {out} is not empty and contains no gauntlet; choose another folder")


def _write_settings(run: GauntletRun) -> None:
    with writing(f"out: {run.out}"):
        run.out.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(run.out / SETTINGS, text)


def _known(run: GauntletRun, plan: GauntletPlan, store: CellStore) -> dict[str, CellResult]:
    """The results of earlier jobs, by key of the cell."""
    found = {cell.key: store.read(cell) for cell in plan.cells()}
    return {
        key: result
        for key, result in found.items()
        if result is not None and (result.status == "done" or not run.retry_failed)
    }


def _measured(
    run: GauntletRun, plan: GauntletPlan, group: Group, cells: Sequence[GauntletCell], build: Build
) -> Iterator[tuple[GauntletCell, CellResult]]:
    """Yields each of `cells`, which share their features, with its result."""
    if not cells:
        return
    began = time.perf_counter()
    try:
        dataset = _dataset(run, group, build)
    except Exception as error:  # any error is recorded as the result of these cells, and the job continues
        for cell in cells:
            yield cell, CellResult.failed(cell, _reason(error, cell))
        return
    features = time.perf_counter() - began
    for cell in cells:
        # features are seed-independent, so the encoded dataset is shared and only its seed changes
        yield cell, _run_cell(run, plan, replace(dataset, seed=cell.seed), cell, features)


def _last_kept() -> Build:
    """Returns a function that builds backbones and keeps the last one, for the next dataset of the same row."""
    kept: list[tuple[Entrant, int, Backbone | None]] = []

    def build(entrant: Entrant, init: int) -> Backbone | None:
        if not kept or kept[0][:2] != (entrant, init):
            kept.clear()  # before building the next one, so that only one is in memory
            kept.append((entrant, init, entrant.build(init) if entrant.build is not None else None))
        return kept[0][2]

    return build


def _dataset(run: GauntletRun, group: Group, build: Build) -> EncodedDataset:
    load = Loading(run.evaluate.batch_size, run.workers, run.compute, "fp32", run.out / "features")
    encoder = build(group.entrant, group.init)
    return encode_dataset(encoder, group.data.sources, load, recalibrate=group.entrant.recalibrate)


def _run_cell(
    run: GauntletRun, plan: GauntletPlan, dataset: EncodedDataset, cell: GauntletCell, features: float
) -> CellResult:
    try:
        found = evaluate_features(dataset, plan.evaluators[cell.evaluator], run.evaluate.prefixes)
    except Exception as error:  # as in _measured
        return CellResult.failed(cell, _reason(error, cell))
    return CellResult.done(cell, found, len(dataset.features.test), features)


def _reason(error: Exception, cell: GauntletCell) -> str:
    """The error in one line. The traceback of an unexpected error, which is a bug, goes to the log."""
    if isinstance(error, UnlabeledError):
        return str(error)
    log.warning(
        "%s on %s, %s: unexpected error, which is a bug", cell.entrant, cell.data, cell.evaluator, exc_info=error
    )
    return f"{type(error).__name__}: {first_line(error, 200)}"
