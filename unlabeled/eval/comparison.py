"""Compares a backbone with its baselines, and states in plain words what the differences show."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unlabeled.eval.base import Cut, Direction, Estimate, Measure, Point, Unit
from unlabeled.eval.intervals import less, wilson
from unlabeled.eval.results import Metric, Results
from unlabeled.ssl.core.renamed import OldNames

Level = Literal["better", "even", "worse", "mixed", "alone", "none"]
Outcome = Literal["better", "even", "worse"]

_VAGUE = 0.1
"""Half the width of an interval of a difference above which the test split is too small to tell."""

TITLES = {"backbone": "this backbone", "pixels": "raw pixels", "random": "random weights"}


@dataclass(frozen=True)
class Comparison:
    """One metric of every encoder. Limits are NaN where there is no interval."""

    metric: str
    """Such as ``knn/k20``; ``knn/k20@64`` on the first 64 features, ``@pca64`` on 64 principal components."""
    label: str
    """Such as ``kNN, k = 20``."""
    headline: bool
    """Whether it is one of the metrics to quote."""
    values: dict[str, Estimate]
    """Encoder → value."""
    differences: dict[str, Estimate]
    """Baseline → value of the backbone minus value of that baseline; empty for plain numbers."""
    unit: Unit = "accuracy"
    better: Direction | None = "higher"
    evaluator: str = ""
    whole: str = ""
    """The label without the subset of the features: equal for all subsets that were evaluated."""
    cut: Cut | None = None
    """The subset of the features that was evaluated; None: all of them."""
    point: Point | None = None
    guesses: int = 1

    def stronger(self) -> str | None:
        """The baseline with the higher value; None without baselines."""
        return max(self.differences, key=lambda name: self.values[name].value, default=None)


@dataclass(frozen=True)
class Summary(OldNames, summary="text"):
    """The result of an evaluation in one sentence, with a sentence of details for each headline metric."""

    level: Level
    """better, even or worse than the stronger baseline; mixed: better in some headline metrics only; alone: there are
    no baselines; none: nothing was evaluated."""
    text: str
    details: tuple[str, ...] = ()


def compare(results: Results) -> list[Comparison]:
    """Accuracies of the backbone versus its baselines, on all features, with the headline metrics first."""
    accuracies = [row for row in measures(results) if row.unit == "accuracy" and row.cut is None]
    order = {metric: position for position, metric in enumerate(results.headline)}
    # the sort is stable, so that other metrics stay in the order of the evaluators
    return sorted(accuracies, key=lambda row: (order.get(row.metric, len(order)), row.guesses > 1))


def measures(results: Results) -> list[Comparison]:
    """Every metric that tables show, for the backbone and its baselines, in the order of evaluation."""
    return [_comparison(results, name, metric) for name, metric in results.encoders["backbone"].measures.items()]


def _comparison(results: Results, name: str, metric: Metric) -> Comparison:
    measure = metric.measure
    values = {
        encoder: _estimate(results, encoder, name, measure)
        for encoder, found in results.encoders.items()
        if name in found.metrics
    }
    # a difference of plain numbers, such as ranks, has no scale that a reader could judge
    baselines = [encoder for encoder in values if encoder != "backbone" and measure.unit != "number"]
    return Comparison(
        metric=name,
        label=measure.text,
        headline=name in results.headline,
        values=values,
        differences={encoder: less(values["backbone"], values[encoder]) for encoder in baselines},
        unit=measure.unit,
        better=measure.better,
        evaluator=metric.evaluator,
        whole=measure.label,
        cut=measure.cut,
        point=measure.point,
        guesses=measure.guesses,
    )


def _estimate(results: Results, encoder: str, metric: str, measure: Measure) -> Estimate:
    """The value with the evaluator's own interval, or with Wilson's for an accuracy without one."""
    found = results.encoders[encoder]
    value = found.metrics[metric]
    if metric in found.intervals:
        return Estimate(value, *found.intervals[metric])
    has_wilson = measure.unit == "accuracy" and 0 <= value <= 1  # a plugin may yield anything
    return Estimate(value, *(wilson(value, results.test_images) if has_wilson else (math.nan, math.nan)))


def summarize(results: Results | None) -> Summary:
    """Compares each headline metric with the stronger of its baselines; None gives the summary "not evaluated".

    A difference counts only if its 95 % interval excludes zero.
    """
    if results is None:
        return Summary("none", "No results: the representation was not evaluated on labeled data.")
    quoted = [comparison for comparison in compare(results) if comparison.headline]
    details = [_detail(comparison, results.test_images) for comparison in quoted]
    low = [c.label for c in quoted if c.values["backbone"].low <= results.majority]
    if low:
        guess = f"always guessing the most common class ({percent(results.majority)} %)"
        details.append(f"Not clearly above {guess}: {' and '.join(map(_inside, low))}.")
    outcomes = {_outcome(comparison) for comparison in quoted}
    if None in outcomes or not quoted:
        return Summary("alone", "Evaluated without baselines, so there is nothing to compare with.", tuple(details))
    baselines = list(dict.fromkeys(name for comparison in quoted for name in comparison.differences))
    other = "both baselines" if len(baselines) > 1 else TITLES[baselines[0]]
    gaps = " and ".join(_gap(comparison) for comparison in quoted)
    level = _level(outcomes)
    opening = {
        "better": f"Better than {other}:",
        "even": f"No clear difference from {'the stronger baseline' if len(baselines) > 1 else other}:",
        "worse": f"Not better than {'the baselines' if len(baselines) > 1 else other}:",
        "mixed": "Mixed results:",
    }
    if level == "even" and all(map(_is_vague, quoted)):
        opening["even"] = f"Cannot tell yet: too few test images ({results.test_images:,});"
    return Summary(level, f"{opening[level]} {gaps}.", tuple(details))


def _level(outcomes: Collection[Outcome | None]) -> Literal["better", "even", "worse", "mixed"]:
    if "better" in outcomes:
        return "better" if len(outcomes) == 1 else "mixed"
    return "worse" if "worse" in outcomes else "even"


def _is_vague(comparison: Comparison) -> bool:
    """Whether the interval of the difference from the stronger baseline is wider than ±10 points."""
    stronger = comparison.stronger()
    assert stronger is not None
    gap = comparison.differences[stronger]
    return gap.high - gap.low > 2 * _VAGUE


def _outcome(comparison: Comparison) -> Outcome | None:
    stronger = comparison.stronger()
    if stronger is None:
        return None
    gap = comparison.differences[stronger]
    return "better" if gap.low > 0 else "worse" if gap.high < 0 else "even"


def _gap(comparison: Comparison) -> str:
    stronger = comparison.stronger()
    assert stronger is not None
    doubt = " (the interval includes 0)" if _outcome(comparison) == "even" else ""
    return f"{_against(comparison.differences[stronger].value, stronger)} in {_inside(comparison.label)}{doubt}"


def _against(gap: float, baseline: str) -> str:
    """0.123 → ``12.3 points above raw pixels``."""
    if percent(abs(gap)) == "0.0":  # "0.0 points above" would read like a difference
        return f"level with {TITLES[baseline]}"
    return f"{percent(abs(gap))} points {'above' if gap >= 0 else 'below'} {TITLES[baseline]}"


def _inside(label: str) -> str:
    """The label within a sentence: ``kNN, k = 20``, but ``the linear probe``."""
    return label if label.startswith("kNN") else f"the {label}"


def _detail(comparison: Comparison, count: int) -> str:
    own = comparison.values["backbone"]
    sentence = comparison.label if comparison.label.startswith("kNN") else comparison.label.capitalize()
    sentence += f": {percent(own.value)} % of {count:,} test images (95 %: {percent(own.low)} to {percent(own.high)})"
    for name, gap in comparison.differences.items():
        sentence += f"; {_against(gap.value, name)} ({signed(gap.low)} to {signed(gap.high)})"
    return sentence + "."


def percent(fraction: float) -> str:
    """0.7123 → ``71.2``."""
    return f"{100 * fraction:.1f}"


def shown(value: float | None, unit: str) -> str:
    """A value as a table shows it: ``71.2 %`` for fractions, at least three digits for numbers, – for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit != "number":
        return f"{percent(value)} %".replace("-", "−")
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def limits(cell: Mapping[str, Any], unit: str) -> str:
    """The interval of a value as a table shows it: ``69.0 to 73.1``."""
    return " to ".join(shown(cell[limit], unit).removesuffix(" %") for limit in ("low", "high"))


def signed(fraction: float) -> str:
    """-0.0123 → ``−1.2``, with a real minus sign."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def as_row(comparison: Comparison) -> dict[str, Any]:
    """The comparison as a row of report.json."""
    fields = ("metric", "label", "headline", "values", "differences", "unit", "better")  # part of its schema
    everything = asdict(comparison)
    return {name: everything[name] for name in fields}
