"""Sentences that several evaluators and reports write about their numbers."""

from __future__ import annotations

from collections.abc import Sequence

_NAMES = 5
"""Up to this many skipped images are listed."""


def cut_k(wanted: Sequence[int], count: int, items: str) -> str | None:
    """Names the values of k that are larger than `count`, the number of `items`; None if there are none."""
    above = [str(k) for k in sorted(set(wanted)) if k > count]
    if not above:
        return None
    listed = " and ".join(filter(None, (", ".join(above[:-1]), above[-1])))
    return f"k = {listed} need{'s' * (len(above) == 1)} more {items} than the {count} here; k = {count} is used instead"


def edge_of_grid(lr: float, grid: Sequence[float], field: str) -> str | None:
    """Warns if `lr`, the best learning rate, is at an end of the `grid` set in `field`; None if it is not."""
    if len(set(grid)) <= 2 or min(grid) < lr < max(grid):
        return None
    end = "largest" if lr >= max(grid) else "smallest"
    return (
        f"the best learning rate, {lr:g}, is the {end} one tried, so this accuracy may be slightly low; to try others, "
        f"set {field}"
    )


def skipped_images(split: str, names: Sequence[str]) -> str:
    """States how many images of a split could not be decoded, and names the first few."""
    kind = "training" if split == "train" else split
    one = len(names) == 1
    count = (
        f"{len(names):,} {kind} image{'' if one else 's'} could not be decoded and {'was' if one else 'were'} skipped"
    )
    return f"{count}: {', '.join(names[:_NAMES])}" + (", ..." if len(names) > _NAMES else "")
