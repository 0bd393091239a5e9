"""Intervals against published numbers and their limits."""

from __future__ import annotations

import pytest

from unlabeled.eval.intervals import difference, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_table(hits: int, count: int, low: float, high: float) -> None:
    """Method 3 in Newcombe 1998, Statistics in Medicine 17, 857-872, table I."""
    assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_inside_zero_and_one() -> None:
    assert wilson(1.0, 5)[1] == 1.0
    assert wilson(0.0, 5)[0] == 0.0
    assert wilson(0.3, 0) == (0.0, 1.0)


def test_difference_gives_newcombes_table() -> None:
    """Method 10 in Newcombe 1998, Statistics in Medicine 17, 873-890, table II: 56/70 - 48/80 is one of the examples;
    here with equal numbers of images, 9/10 - 3/10."""
    assert difference(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_difference_is_antisymmetric_and_narrows() -> None:
    low, high = difference(0.7, 0.6, 200)
    assert difference(0.6, 0.7, 200) == pytest.approx((-high, -low))
    wide = high - low
    low, high = difference(0.7, 0.6, 20000)
    assert low > 0
    assert high - low < wide / 9
