"""What the numbers say in plain words, and no more than they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unlabeled.eval.base import Cut, Direction, Estimate, Measure, Point, Unit
from unlabeled.eval.intervals import less, wilson
from unlabeled.eval.results import Metric, Results
from unlabeled.ssl.core.renamed import OldNames

Level = Literal["better", "even", "worse", "mixed", "alone", "none"]

TITLES = {"backbone": "this backbone", "pixels": "raw pixels", "random": "random weights"}


@dataclass(frozen=True)
class Comparison:
    """One measure, of each encoder. Limits are NaN where there is no interval."""

    metric: str
    """Such as ``knn/k20``; of the first 64 features ``knn/k20@64``, of as many principal components ``@pca64``."""
    label: str
    """Such as ``kNN, k = 20``."""
    headline: bool
    values: dict[str, Estimate]
    """Encoder → value."""
    differences: dict[str, Estimate]
    """Baseline → this backbone less that baseline; none for plain numbers."""
    unit: Unit = "accuracy"
    better: Direction | None = "higher"
    evaluator: str = ""
    whole: str = ""
    """The label without the part of the features, which measures on several parts share."""
    cut: Cut | None = None
    """The part of the features that was measured; None: all of them."""
    point: Point | None = None
    guesses: int = 1

    def stronger(self) -> str | None:
        """The baseline with the higher accuracy; None without baselines."""
        return max(self.differences, key=lambda name: self.values[name].value, default=None)


@dataclass(frozen=True)
class Summary(OldNames, summary="text"):
    """The one sentence to remember, and the sentences that carry it."""

    level: Level
    text: str
    details: tuple[str, ...] = ()


def compare(results: Results) -> list[Comparison]:
    """Every accuracy of the backbone beside the baselines', those to quote first; of all features only."""
    found = [one for one in measures(results) if one.unit == "accuracy" and one.cut is None]
    order = {metric: position for position, metric in enumerate(results.headline)}
    return sorted(found, key=lambda one: (order.get(one.metric, len(order)), one.guesses > 1))


def measures(results: Results) -> list[Comparison]:
    """Everything that a table shows of the backbone beside the baselines, in the order it was measured in."""
    return [_comparison(results, metric, one) for metric, one in results.encoders["backbone"].measures.items()]


def _comparison(results: Results, metric: str, one: Metric) -> Comparison:
    measure = one.measure
    values = {
        name: _estimate(results, name, metric, measure)
        for name, encoder in results.encoders.items()
        if metric in encoder.metrics
    }
    baselines = [name for name in values if name != "backbone" and measure.unit != "number"]
    return Comparison(
        metric=metric,
        label=measure.text,
        headline=metric in results.headline,
        values=values,
        differences={name: less(values["backbone"], values[name]) for name in baselines},
        unit=measure.unit,
        better=measure.better,
        evaluator=one.evaluator,
        whole=measure.label,
        cut=measure.cut,
        point=measure.point,
        guesses=measure.guesses,
    )


def _estimate(results: Results, encoder: str, metric: str, measure: Measure) -> Estimate:
    """With the interval that the evaluator gave; an accuracy that has none gets Wilson's."""
    found = results.encoders[encoder]
    value = found.metrics[metric]
    if metric in found.intervals:
        return Estimate(value, *found.intervals[metric])
    wilsons = measure.unit == "accuracy" and 0 <= value <= 1
    return Estimate(value, *(wilson(value, results.test_images) if wilsons else (math.nan, math.nan)))


def summarize(results: Results | None) -> Summary:
    """The verdict on the headline metrics, each against the stronger of its baselines.

    A difference counts as one when its 95 % interval does not hold zero.
    """
    if results is None:
        return Summary("none", "No evidence: the representation was not measured on labeled data.")
    quoted = [comparison for comparison in compare(results) if comparison.headline]
    details = [_detail(comparison, results.test_images) for comparison in quoted]
    low = [c.label for c in quoted if c.values["backbone"].low <= results.majority]
    if low:
        guess = f"always guessing the commonest class ({percent(results.majority)} %)"
        details.append(f"Not clearly above {guess}: {' and '.join(map(_inside, low))}.")
    outcomes = {_outcome(comparison) for comparison in quoted}
    if None in outcomes or not quoted:
        return Summary("alone", "Measured without baselines, so nothing to be better than.", tuple(details))
    baselines = list(dict.fromkeys(name for comparison in quoted for name in comparison.differences))
    other = "both baselines" if len(baselines) > 1 else TITLES[baselines[0]]
    gaps = " and ".join(_gap(comparison) for comparison in quoted)
    level = outcomes.pop() if len(outcomes) == 1 else "mixed"
    opening = {
        "better": f"Better than {other}",
        "even": f"No clear difference from {'the stronger baseline' if len(baselines) > 1 else other}",
        "worse": f"Not better than {'the baselines' if len(baselines) > 1 else other}",
        "mixed": "Mixed results",
    }
    assert level is not None
    return Summary(level, f"{opening[level]}: {gaps}.", tuple(details))


def _outcome(comparison: Comparison) -> Literal["better", "even", "worse"] | None:
    stronger = comparison.stronger()
    if stronger is None:
        return None
    gap = comparison.differences[stronger]
    return "better" if gap.low > 0 else "worse" if gap.high < 0 else "even"


def _gap(comparison: Comparison) -> str:
    stronger = comparison.stronger()
    assert stronger is not None
    doubt = " (within chance)" if _outcome(comparison) == "even" else ""
    return f"{_against(comparison.differences[stronger].value, stronger)} in {_inside(comparison.label)}{doubt}"


def _against(gap: float, baseline: str) -> str:
    """0.123 → ``12.3 points above raw pixels``."""
    if percent(abs(gap)) == "0.0":
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
    """A value for a table: ``71.2 %`` of fractions, three or more digits of a number, – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit != "number":
        return f"{percent(value)} %".replace("-", "−")
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def limits(cell: Mapping[str, Any], unit: str) -> str:
    """The interval of a value: ``69.0 to 73.1``."""
    return " to ".join(shown(cell[limit], unit).removesuffix(" %") for limit in ("low", "high"))


def signed(fraction: float) -> str:
    """-0.0123 → ``−1.2``, with a real minus sign."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def as_row(comparison: Comparison) -> dict[str, Any]:
    """What report.json holds of a comparison: that which a table shows."""
    fields = ("metric", "label", "headline", "values", "differences", "unit", "better")
    everything = asdict(comparison)
    return {name: everything[name] for name in fields}
