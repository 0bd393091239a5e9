"""What the numbers say in plain words, and no more than they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unlabeled.eval.base import Estimate
from unlabeled.eval.intervals import difference, wilson
from unlabeled.eval.registry import measure_of
from unlabeled.eval.suite import Evidence

Level = Literal["better", "even", "worse", "mixed", "alone", "none"]

TITLES = {"backbone": "this backbone", "pixels": "raw pixels", "random": "random weights"}


@dataclass(frozen=True)
class Comparison:
    """One accuracy, of each encoder."""

    metric: str
    """Such as ``knn/k20``."""
    label: str
    """Such as ``kNN, k = 20``."""
    headline: bool
    values: dict[str, Estimate]
    """Encoder → accuracy."""
    differences: dict[str, Estimate]
    """Baseline → this backbone less that baseline."""

    def stronger(self) -> str | None:
        """The baseline with the higher accuracy; None without baselines."""
        return max(self.differences, key=lambda name: self.values[name].value, default=None)


@dataclass(frozen=True)
class Verdict:
    """The one sentence to remember, and the sentences that carry it."""

    level: Level
    summary: str
    details: tuple[str, ...] = ()


def compare(evidence: Evidence) -> list[Comparison]:
    """Every accuracy of the backbone beside the baselines', those to quote first."""
    metrics = [name for name in evidence.encoders["backbone"].metrics if label_of(name) and "@" not in name]
    order = {metric: place for place, metric in enumerate(evidence.headline)}
    metrics.sort(key=lambda metric: (order.get(metric, len(order)), metric.endswith("top5")))
    return [_comparison(evidence, metric) for metric in metrics]


def _comparison(evidence: Evidence, metric: str) -> Comparison:
    count = evidence.test_pictures
    found = {name: encoder.metrics[metric] for name, encoder in evidence.encoders.items() if metric in encoder.metrics}
    own = found["backbone"]
    return Comparison(
        metric,
        label_of(metric) or metric,
        metric in evidence.headline,
        {name: Estimate(value, *wilson(value, count)) for name, value in found.items()},
        {
            name: Estimate(own - value, *difference(own, value, count))
            for name, value in found.items()
            if name != "backbone"
        },
    )


def label_of(metric: str) -> str | None:
    """``knn/k20_top5`` → ``kNN, k = 20, top 5``; None for values that are not accuracies on the test split."""
    measure = measure_of(metric)
    return measure.label if measure is not None and measure.unit == "accuracy" else None


def judge(evidence: Evidence | None) -> Verdict:
    """The verdict on the headline metrics, each against the stronger of its baselines.

    A difference counts as one when its 95 % interval does not hold zero.
    """
    if evidence is None:
        return Verdict("none", "No evidence: the representation was not measured on labelled data.")
    quoted = [comparison for comparison in compare(evidence) if comparison.headline]
    details = [_detail(comparison, evidence.test_pictures) for comparison in quoted]
    low = [c.label for c in quoted if c.values["backbone"].low <= evidence.majority]
    if low:
        guess = f"always guessing the commonest class ({percent(evidence.majority)} %)"
        details.append(f"Not clearly above {guess}: {' and '.join(map(_inside, low))}.")
    outcomes = {_outcome(comparison) for comparison in quoted}
    if None in outcomes or not quoted:
        return Verdict("alone", "Measured without baselines, so nothing to be better than.", tuple(details))
    baselines = list(dict.fromkeys(name for comparison in quoted for name in comparison.differences))
    other = "both baselines" if len(baselines) > 1 else TITLES[baselines[0]]
    gaps = " and ".join(_gap(comparison) for comparison in quoted)
    level = outcomes.pop() if len(outcomes) == 1 else "mixed"
    opening = {
        "better": f"Better than {other}",
        "even": f"No clear difference from {'the stronger baseline' if len(baselines) > 1 else other}",
        "worse": f"Not better than {'the baselines' if len(baselines) > 1 else other}",
        "mixed": "A mixed picture",
    }
    assert level is not None
    return Verdict(level, f"{opening[level]}: {gaps}.", tuple(details))


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
    sentence += f": {percent(own.value)} % of {count:,} test pictures (95 %: {percent(own.low)} to {percent(own.high)})"
    for name, gap in comparison.differences.items():
        sentence += f"; {_against(gap.value, name)} ({signed(gap.low)} to {signed(gap.high)})"
    return sentence + "."


def percent(fraction: float) -> str:
    """0.7123 → ``71.2``."""
    return f"{100 * fraction:.1f}"


def signed(fraction: float) -> str:
    """-0.0123 → ``−1.2``, with a real minus sign."""
    return f"{100 * fraction:+.1f}".replace("-", "−")
