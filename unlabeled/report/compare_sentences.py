"""The comparison of two runs in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unlabeled.eval.comparison import percent, signed


def pair_sentences(document: Mapping[str, Any]) -> list[str]:
    """One sentence for each headline metric of a `compare_runs` document of two runs.

    A difference is clear if its 95 % interval excludes zero. Metrics without an interval get no sentence.
    """
    first, second = (run["label"] for run in document["runs"])
    return [
        f"{row['label']}: {_sentence(row['differences'][1], first, second, lower=row['better'] == 'lower')}"
        for row in document["measures"]
        if row["headline"] and row["better"] is not None and (row["differences"][1] or {}).get("low") is not None
    ]


def _sentence(gap: Mapping[str, float], first: str, second: str, *, lower: bool) -> str:
    """`gap`: the second run minus the first; `lower`: lower values are better."""
    value, low, high = (gap[name] for name in ("value", "low", "high"))
    if low <= 0 <= high:
        return (
            f"no clear difference between {first} and {second} "
            f"({signed(value)} points for {second}, {signed(low)} to {signed(high)})"
        )
    best, other = (second, first) if (value > 0) != lower else (first, second)
    low, high = sorted((abs(low), abs(high)))
    return f"{best} is better than {other} by {percent(abs(value))} points ({percent(low)} to {percent(high)})"
