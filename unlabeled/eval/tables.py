"""Results as a Markdown table, for notebooks and terminals."""

from __future__ import annotations

import math

from unlabeled.eval.base import Estimate
from unlabeled.eval.comparison import TITLES, Comparison, measures, percent, summarize
from unlabeled.eval.results import Results


def results_table(results: Results) -> str:
    """The summary and a table of all metrics on all features, the headline metrics first and in bold.

    Values in parentheses are 95 % intervals.
    """
    names = list(results.encoders)
    rows = sorted((row for row in measures(results) if row.cut is None), key=lambda row: not row.headline)
    lines = [
        summarize(results).text,
        "",
        "| " + " | ".join(["", *(TITLES.get(name, name) for name in names)]) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        mark = "**" if row.headline else ""
        cells = [_cell(row, row.values.get(name)) for name in names]
        lines.append("| " + " | ".join([f"{mark}{row.label}{mark}", *cells]) + " |")
    return "\n".join(lines)


def _cell(row: Comparison, found: Estimate | None) -> str:
    if found is None:  # this encoder has no such metric
        return "–"
    shown = f"{found.value:.4g}" if row.unit == "number" else f"{percent(found.value)} %"
    if math.isnan(found.low):
        return shown
    low, high = (f"{end:.4g}" if row.unit == "number" else percent(end) for end in (found.low, found.high))
    return f"{shown} ({low} to {high})"
