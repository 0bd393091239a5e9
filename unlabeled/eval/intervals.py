"""95 % intervals of accuracies measured on n images, of their differences, and of means over a few draws.

Wilson 1927 for one proportion; Newcombe 1998 (method 10) for a difference, which combines two Wilson intervals as if
they were measured on separate images, so it is slightly too wide for the same images; Student 1908 for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from unlabeled.eval.base import Estimate

_Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval (low, high) of a fraction `accuracy` measured on `count` images.

    >>> [round(limit, 4) for limit in wilson(0.9, 100)]
    [0.8256, 0.9448]
    """
    if count < 1:
        return 0.0, 1.0
    square = _Z95**2
    center = (accuracy + square / (2 * count)) / (1 + square / count)
    half = _Z95 / (1 + square / count) * math.sqrt(accuracy * (1 - accuracy) / count + square / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def difference(first: float, second: float, count: int) -> tuple[float, float]:
    """95 % interval (low, high) of ``first - second``, two fractions measured on `count` images each."""
    gap = less(Estimate(first, *wilson(first, count)), Estimate(second, *wilson(second, count)))
    return gap.low, gap.high


def less(first: Estimate, second: Estimate) -> Estimate:
    """``first - second``, with an interval computed from the intervals of both, as if they were independent.

    Newcombe's method 10 generalized to any intervals (MOVER: Zou and Donner 2008). If either interval is NaN, so is
    the result's.
    """
    gap = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(gap, gap - down, gap + up)


def of_mean(values: Sequence[float]) -> Estimate:
    """Mean of `values` with Student's 95 % interval; a single value has no interval (NaN).

    >>> found = of_mean([0.1, 0.2, 0.3])
    >>> [round(limit, 3) for limit in (found.low, found.high)]
    [-0.048, 0.448]
    """
    if len(values) < 2:
        return Estimate(values[0], math.nan, math.nan)
    if min(values) == max(values):  # the sum would round, and the mean could differ from the values
        return Estimate(values[0], values[0], values[0])
    mean = float(np.mean(values))
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def over_draws(values: Sequence[float]) -> Estimate:
    """Like `of_mean`, for fractions: the interval is clipped to 0..1."""
    found = of_mean(values)
    if math.isnan(found.low):
        return found
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))
