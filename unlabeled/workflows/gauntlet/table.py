"""Turns cells into a table: means over seeds, intervals, ranks, and the best values with their overlaps.

A value has up to two 95 % intervals. Over seeds: mean ± t s / √n (Student 1908), with at least two seeds. Over images:
Wilson's interval for an accuracy on n test images, the evaluator's own for other metrics; with several seeds, the mean
of each end. If both are known, `low` and `high` span them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from unlabeled.eval.base import Measure
from unlabeled.eval.environment import hardware, versions
from unlabeled.eval.evaluators.knn import KnnEvaluator
from unlabeled.eval.intervals import of_mean, wilson
from unlabeled.eval.registry import build_evaluator
from unlabeled.workflows.gauntlet.cells import CellResult
from unlabeled.workflows.gauntlet.plan import GauntletCell, GauntletPlan, LabeledData
from unlabeled.workflows.gauntlet.settings import GauntletRun

SCHEMA = 2

Ends = tuple[float, float]
Results = Mapping[str, CellResult]
"""Key of a cell → its result."""


@dataclass(frozen=True)
class Value:
    """One row in one column."""

    row: str
    value: float
    """Mean over seeds."""
    low: float | None
    """Lower end of both intervals; None without an interval."""
    high: float | None
    over_seeds: Ends | None
    over_images: Ends | None
    seeds: int
    """Number of seeds."""
    rank: float | None = None
    """1 is best, ties share their mean rank; None if neither direction is better."""
    best: bool = False
    """Whether it is the best of its column, or its interval overlaps that of the best."""


def gauntlet_document(run: GauntletRun, plan: GauntletPlan, results: Results) -> dict[str, Any]:
    """Returns the contents of ``table.json``. Fractions are 0..1, times in seconds.

    ``schema``    2; increases when a key changes its meaning or is removed.
    ``cells``     ``total``, ``done``, ``failed``.
    ``rows``      best mean rank first: ``label``, ``kind`` (given, random, pixels), ``backbone``, ``parameters``,
                  ``input_size`` ([h, w], null for raw pixels), ``recalibrated``, ``mean_rank`` (over all columns with
                  ``ranked``; null if a value is missing).
    ``data``      ``label``, ``train_images``, ``test_images``, ``majority``.
    ``columns``   one per dataset and metric: ``data``, ``metric``, ``evaluator``, ``label``, ``unit``, ``better``,
                  ``shown`` (whether the page shows it; the files have all columns), ``ranked`` (whether it counts in
                  the mean rank), ``values`` (the fields of `Value`, best first).
    ``failures``  ``entrant``, ``data``, ``evaluator``, ``seed``, ``reason``.
    ``notes``     the evaluators' notes: ``note`` and ``where`` (rows and datasets).
    ``seeds``, ``limit``, ``versions``, ``hardware``, and ``seconds`` of all evaluators together.
    """
    columns = [
        _column(labeled, column, results) for labeled in plan.data for column in _columns(plan, labeled, results)
    ]
    shown = _shown(run, columns)
    for column in columns:
        column["shown"] = column["metric"] in shown[column["data"]]
        # plain numbers have no scale that is comparable between backbones, so they get no rank
        column["ranked"] = column["shown"] and column["better"] is not None and column["unit"] != "number"
    known = [result for cell in _unique(plan.cells()) if (result := results.get(cell.key)) is not None]
    failures = _failures(plan, results)
    # by key: two rows with the same weights share a failed cell, which counts once
    failed = {failure.pop("key") for failure in failures}
    return {
        "schema": SCHEMA,
        "cells": {
            "total": len(_unique(plan.cells())),
            "done": len(known) - len(failed),
            "failed": len(failed),
        },
        "rows": _rows(plan, columns),
        "data": [_data(labeled) for labeled in plan.data],
        "columns": columns,
        "failures": failures,
        "notes": _notes(plan, results),
        "seeds": list(run.seeds),
        "limit": run.limit,
        "seconds": round(sum(result.seconds.get("evaluator", 0.0) for result in known), 1),
        "versions": versions(),
        "hardware": hardware(run.compute),
    }


def over_seeds(values: Sequence[float]) -> Ends | None:
    """95 % t interval of the mean of `values`; None for fewer than two values."""
    found = of_mean(values)
    return None if math.isnan(found.low) else (found.low, found.high)


def _mean(values: Sequence[float]) -> float:
    return of_mean(values).value


def ranked(values: Sequence[Value], better: str | None) -> list[Value]:
    """`values` sorted from best to worst, with their ranks and flags for the best and those that overlap with it."""
    if better is None or not values:
        return list(values)
    sign = -1.0 if better == "higher" else 1.0
    # scipy ranks ascending and gives ties their mean
    ranks = rankdata([sign * one.value for one in values])
    ordered = sorted(zip(ranks.tolist(), values, strict=True), key=lambda pair: pair[0])
    first = ordered[0][1]
    return [Value(**{**asdict(one), "rank": rank, "best": _overlap(one, first)}) for rank, one in ordered]


def _overlap(one: Value, first: Value) -> bool:
    """Whether the intervals of both overlap; a value without an interval counts as a point."""
    low, high = _ends(one)
    first_low, first_high = _ends(first)
    return low <= first_high and first_low <= high


def _ends(one: Value) -> Ends:
    return (one.value if one.low is None else one.low), (one.value if one.high is None else one.high)


@dataclass(frozen=True)
class Column:
    """One metric on one dataset."""

    metric: str
    evaluator: str
    measure: Measure
    cells: list[GauntletCell]
    """The cells in which it was measured."""


def _columns(plan: GauntletPlan, labeled: LabeledData, results: Results) -> list[Column]:
    """The columns available for one dataset, in the order in which the evaluators yield them."""
    found: dict[str, Column] = {}
    done = [
        cell
        for cell in plan.cells()
        if cell.data == labeled.label and (result := results.get(cell.key)) is not None and result.status == "done"
    ]
    for evaluator in plan.evaluators:
        for cell in [cell for cell in done if cell.evaluator == evaluator]:
            result = results[cell.key]
            for metric in result.metrics:
                if (measure := result.measure(metric)) is not None:
                    found.setdefault(metric, Column(metric, evaluator, measure, [])).cells.append(cell)
    return list(found.values())


def _column(labeled: LabeledData, column: Column, results: Results) -> dict[str, Any]:
    metric, measure = column.metric, column.measure
    rows: dict[str, list[CellResult]] = {}
    for cell in column.cells:
        if results[cell.key].metrics[metric] is not None:  # None: NaN or infinite, which has no rank
            rows.setdefault(cell.entrant, []).append(results[cell.key])
    values = [_value(row, metric, measure, found) for row, found in rows.items()]
    return {
        "data": labeled.label,
        "metric": metric,
        "evaluator": column.evaluator,
        "label": measure.text,
        "unit": measure.unit,
        "better": measure.better,
        "values": [asdict(value) for value in ranked(values, measure.better)],
    }


def _value(row: str, metric: str, measure: Measure, found: Sequence[CellResult]) -> Value:
    values = [value for result in found if (value := result.metrics[metric]) is not None]
    images = [ends for result in found if (ends := _of_images(metric, measure, result)) is not None]
    by_seed = over_seeds(values)
    if by_seed is not None and measure.unit != "number":
        # a t interval may leave the range of a fraction
        by_seed = (max(0.0, by_seed[0]), min(1.0, by_seed[1]))
    by_image = (_mean([low for low, _ in images]), _mean([high for _, high in images])) if images else None
    both = [ends for ends in (by_seed, by_image) if ends is not None]
    return Value(
        row=row,
        value=_mean(values),
        low=min((low for low, _ in both), default=None),
        high=max((high for _, high in both), default=None),
        over_seeds=by_seed,
        over_images=by_image,
        seeds=len(values),
    )


def _of_images(metric: str, measure: Measure, result: CellResult) -> Ends | None:
    value = result.metrics[metric]
    if metric in result.intervals:
        return result.intervals[metric]
    if measure.unit == "accuracy" and value is not None and 0 <= value <= 1:
        return wilson(value, result.test_images)
    return None


def _shown(run: GauntletRun, columns: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dataset → metrics on the page: the requested ones, else one per evaluator (kNN's headline k, or the first)."""
    knn = build_evaluator(run.evaluate, "knn")
    assert isinstance(knn, KnnEvaluator), "plugins cannot replace a built-in evaluator"
    headline = f"knn/k{knn.headline_k(sys.maxsize)}"
    found: dict[str, dict[str, str]] = {}
    for column in columns:
        found.setdefault(column["data"], {})[column["metric"]] = column["evaluator"]
    if run.measures:
        return {data: [metric for metric in run.measures if metric in metrics] for data, metrics in found.items()}
    shown: dict[str, list[str]] = {}
    for data, metrics in found.items():
        first: dict[str, str] = {}
        for metric, evaluator in metrics.items():
            first.setdefault(evaluator, metric)
        shown[data] = [headline if name == "knn" and headline in metrics else metric for name, metric in first.items()]
    return shown


def _rows(plan: GauntletPlan, columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ranks: dict[str, list[float]] = {entrant.label: [] for entrant in plan.entrants}
    counted = [column for column in columns if column["ranked"]]
    for column in counted:
        for value in column["values"]:
            ranks[value["row"]].append(value["rank"])
    rows = [
        {
            "label": entrant.label,
            "kind": entrant.kind,
            "backbone": entrant.backbone,
            "parameters": entrant.parameters,
            "input_size": None if entrant.input_size is None else list(entrant.input_size),
            "recalibrated": entrant.recalibrate,
            # comparable between rows only if all have the same columns
            "mean_rank": float(np.mean(found)) if counted and len(found) == len(counted) else None,
        }
        for entrant in plan.entrants
        for found in [ranks[entrant.label]]
    ]
    # rows without a mean rank come last, in the order of the settings (the sort is stable)
    return sorted(rows, key=lambda row: math.inf if row["mean_rank"] is None else row["mean_rank"])


def _data(labeled: LabeledData) -> dict[str, Any]:
    train, test = labeled.images
    return {
        "label": labeled.label,
        "train_images": train,
        "test_images": test,
        "majority": labeled.majority,
    }


def _unique(cells: Iterable[GauntletCell]) -> list[GauntletCell]:
    """One cell per key: two rows with the same weights share their cells."""
    return list({cell.key: cell for cell in cells}.values())


def _failures(plan: GauntletPlan, results: Results) -> list[dict[str, Any]]:
    """The failed cells of backbones. Evaluators that do not apply to raw pixels are listed as notes instead."""
    return [
        {name: getattr(cell, name) for name in ("key", "entrant", "data", "evaluator", "seed")}
        | {"reason": results[cell.key].reason}
        for group in plan.groups
        if group.entrant.kind != "pixels"
        for cell in group.cells
        if cell.key in results and results[cell.key].status == "failed"
    ]


def _notes(plan: GauntletPlan, results: Results) -> list[dict[str, Any]]:
    """The notes of evaluators with their rows and datasets, and the reasons why some do not apply to raw pixels."""
    where: dict[str, dict[str, None]] = {}
    for group in plan.groups:
        for cell in group.cells:
            if (result := results.get(cell.key)) is not None:
                refused = (result.reason,) if result.reason and group.entrant.kind == "pixels" else ()
                for note in result.notes + refused:
                    where.setdefault(note, {})[f"{cell.entrant} on {cell.data}"] = None
    return [{"note": note, "where": list(names)} for note, names in where.items()]
