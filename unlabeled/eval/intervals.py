"""How far an accuracy measured on n pictures can be trusted.

Both are Wilson score intervals: Wilson 1927 for one proportion; for a difference, Newcombe 1998 (method 10), which
combines two of them as if measured on separate pictures. On the same pictures that is a little too wide.
"""

from __future__ import annotations

import math

_Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval of a fraction `accuracy` measured on `count` pictures.

    >>> [round(limit, 4) for limit in wilson(0.9, 100)]
    [0.8256, 0.9448]
    """
    if count < 1:
        return 0.0, 1.0
    square = _Z95**2
    centre = (accuracy + square / (2 * count)) / (1 + square / count)
    half = _Z95 / (1 + square / count) * math.sqrt(accuracy * (1 - accuracy) / count + square / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(first: float, second: float, count: int) -> tuple[float, float]:
    """95 % interval of ``first - second``, two fractions measured on `count` pictures each."""
    (low1, high1), (low2, high2) = wilson(first, count), wilson(second, count)
    gap = first - second
    return (
        gap - math.sqrt((first - low1) ** 2 + (high2 - second) ** 2),
        gap + math.sqrt((high1 - first) ** 2 + (second - low2) ** 2),
    )
