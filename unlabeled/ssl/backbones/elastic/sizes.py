"""Sizes of sub-networks, and which blocks of the full backbone each of them keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlabeled.ssl.backbones.elastic.config import ElasticConfig
from unlabeled.ssl.core.errors import ConfigError


class SubSize(NamedTuple):
    """Width and depth of one sub-network."""

    width: int
    """Channels of the first stage's residual stream; for ResNets, of its 3x3 convolutions."""
    depths: tuple[int, ...]
    """Blocks of each stage; one number for models without stages."""

    @property
    def depth(self) -> int:
        """Total number of blocks."""
        return sum(self.depths)

    def __str__(self) -> str:
        return f"{self.width}x{'-'.join(map(str, self.depths))}"


def evenly(kept: int, blocks: int) -> tuple[int, ...]:
    """Indices of the `kept` blocks out of `blocks`: floor(j (blocks - 1) / (kept - 1)), which includes both ends.

    Source: alipay/POA, which truncates; the paper does not state how to round.
    """
    if kept == 1:
        return (0,)
    return tuple(j * (blocks - 1) // (kept - 1) for j in range(kept))


def alternating(kept: int, blocks: int) -> tuple[int, ...]:
    """Like `evenly`, with indices moved by one where needed, so that even and odd indices alternate.

    When an odd number of blocks is kept out of an even number, the last block cannot be among them.
    """
    chosen: list[int] = []
    for j, number in enumerate(evenly(kept, blocks)):
        if number % 2 != j % 2:
            # down by default; up if that would repeat the previous block or fall below 0
            number += 1 if number and chosen and number - 1 <= chosen[-1] else -1
        chosen.append(number)
    return tuple(chosen)


def smallest(config: ElasticConfig, full: SubSize, unit: int, remedy: str = "") -> SubSize:
    """The smallest size that `config` describes. Raises ConfigError if it is larger than `full` or does not fit."""
    # -(-a // b) rounds a / b up
    width = config.width or -(-full.width // (2 * unit)) * unit
    if width > full.width or width % unit:
        raise ConfigError(_bad_width(width, full, unit, remedy))
    depths = _depths(config.depth, full)
    return SubSize(width, depths)


def candidates(config: ElasticConfig, full: SubSize, unit: int, remedy: str = "") -> list[SubSize]:
    """All sizes from the smallest to `full`, by width, then depth. Raises ConfigError for impossible settings."""
    if config.candidates is not None:
        sizes = {SubSize(width, _depths(depth, full)) for width, depth in config.candidates} | {full}
        for size in sizes:
            if size.width > full.width or size.width % unit:
                raise ConfigError(_bad_width(size.width, full, unit, remedy))
        return sorted(sizes, key=lambda size: (size.width, size.depth, size.depths))
    least = smallest(config, full, unit, remedy)
    step = config.width_step or unit
    if step % unit or (full.width - least.width) % step:
        raise ConfigError(
            f"elastic.width_step: {step} does not lead from {least.width} to {full.width} in steps of {unit}; "
            f"give a multiple of {unit} that divides {full.width - least.width}"
        )
    ranges = (range(low, high + 1) for low, high in zip(least.depths, full.depths, strict=True))
    depths = sorted(itertools.product(*ranges), key=sum)  # stable, so equal sums keep the published order
    return [SubSize(width, depth) for width in range(least.width, full.width + 1, step) for depth in depths]


def find(sizes: Sequence[SubSize], width: int, depth: int | Sequence[int]) -> SubSize:
    """The entry of `sizes` with this `width` and `depth` (total or per stage). Raises ConfigError if there is none, or
    several with this total."""
    known = sorted({size.width for size in sizes})
    if width not in known:
        raise ConfigError(f"width: {width} is not among the sizes; choose from {_shown(known)}")
    same_width = [size for size in sizes if size.width == width]
    wanted = depth if isinstance(depth, int) else tuple(depth)
    found = [size for size in same_width if (size.depth if isinstance(depth, int) else size.depths) == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        ways = ", ".join(str(list(size.depths)) for size in found[:4])
        raise ConfigError(
            f"depth: {depth} blocks can be spread in {len(found)} ways; give each stage's, such as {ways}"
        )
    depths = sorted({size.depth for size in same_width})
    raise ConfigError(f"depth: {depth} is not among the sizes of width {width}; choose from {_shown(depths)}")


def _shown(numbers: Sequence[int]) -> str:
    """Numbers for a message, as ``first, second .. last`` if they are evenly spaced."""
    step = numbers[1] - numbers[0] if len(numbers) > 3 else 0
    if step and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}, {numbers[1]} .. {numbers[-1]}"
    return ", ".join(map(str, numbers))


def multiplicities(sizes: Sequence[SubSize], scale: float, *, by_width: bool = True) -> list[int]:
    """How many times each of `sizes` is in the list for one pass; the smallest size most often.

    round(w d), where w and d fall linearly from `scale` at the smallest width or depth to 1 at the largest; w = 1
    without `by_width` (the published ResNets). Source: alipay/POA, ``create_dynamic_networks``.
    """
    widths = sorted({size.width for size in sizes})
    depths = sorted({size.depths for size in sizes}, key=lambda depth: (sum(depth), depth))
    wide, deep = _falling(scale, len(widths)), _falling(scale, len(depths))
    return [
        round((wide[widths.index(size.width)] if by_width else 1.0) * deep[depths.index(size.depths)]) for size in sizes
    ]


def _falling(scale: float, count: int) -> list[float]:
    return [float(value) for value in np.linspace(scale, 1, count)]


def _depths(requested: int | Sequence[int] | None, full: SubSize) -> tuple[int, ...]:
    """The depth of each stage for the setting `requested`. Raises ConfigError if `full` does not allow it."""
    if requested is None:
        single = len(full.depths) == 1
        # short stages keep all blocks: half of two would be one, and a shortened stage needs two
        return tuple(-(-depth // 2) if single or depth > 3 else depth for depth in full.depths)
    if isinstance(requested, int):
        deepest = full.depths.index(max(full.depths))
        missing = full.depth - requested
        depths = tuple(depth - missing * (stage == deepest) for stage, depth in enumerate(full.depths))
    else:
        depths = tuple(requested)
    if len(depths) != len(full.depths) or any(not 1 <= d <= most for d, most in zip(depths, full.depths, strict=True)):
        raise ConfigError(
            f"elastic.depth: {requested if isinstance(requested, int) else list(requested)} does not fit a backbone of "
            f"{list(full.depths)} blocks; give at most as many for each stage"
        )
    # `evenly` keeps the first and the last block, so a shortened stage needs two
    if short := [d for d, most in zip(depths, full.depths, strict=True) if d < most and d < 2]:
        raise ConfigError(f"elastic.depth: {short[0]} block keeps no last one; give at least 2 blocks for a stage")
    return depths


def _bad_width(width: int, full: SubSize, unit: int, remedy: str) -> str:
    return (
        f"elastic.width: {width} is not possible in a backbone of width {full.width}; "
        f"give a multiple of {unit} that is no larger{remedy}"
    )
