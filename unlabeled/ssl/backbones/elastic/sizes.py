"""Sizes of sub-networks, and which blocks of the whole network each of them keeps."""

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
    """Channels of the residual stream of the first stage; of ResNets, of its 3x3 convolutions."""
    depths: tuple[int, ...]
    """Blocks of each stage; one number for networks without stages."""

    @property
    def depth(self) -> int:
        """Blocks of all stages together."""
        return sum(self.depths)

    def __str__(self) -> str:
        return f"{self.width}x{'-'.join(map(str, self.depths))}"


def evenly(kept: int, blocks: int) -> tuple[int, ...]:
    """Numbers of the `kept` blocks of `blocks`: floor(j (blocks - 1) / (kept - 1)), the first and the last among them.

    Source: alipay/POA, which truncates; the paper prints no rounding.
    """
    if kept == 1:
        return (0,)
    return tuple(j * (blocks - 1) // (kept - 1) for j in range(kept))


def alternating(kept: int, blocks: int) -> tuple[int, ...]:
    """Like `evenly`, moved by one where it takes that for even and odd numbers to alternate.

    For an odd number of an even number of blocks the last cannot be kept.
    """
    chosen: list[int] = []
    for j, number in enumerate(evenly(kept, blocks)):
        if number % 2 != j % 2:
            number += 1 if number and chosen and number - 1 <= chosen[-1] else -1
        chosen.append(number)
    return tuple(chosen)


def smallest(config: ElasticConfig, full: SubSize, unit: int, remedy: str = "") -> SubSize:
    """The smallest size that `config` asks for. Raises ConfigError when it is larger than `full` or does not fit."""
    width = config.width or -(-full.width // (2 * unit)) * unit
    if width > full.width or width % unit:
        raise ConfigError(_bad_width(width, full, unit, remedy))
    depths = _depths(config.depth, full)
    return SubSize(width, depths)


def candidates(config: ElasticConfig, full: SubSize, unit: int, remedy: str = "") -> list[SubSize]:
    """All sizes from the smallest to `full`, widths first, within a width by depth; ConfigError for impossible ones."""
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
    depths = sorted(itertools.product(*ranges), key=sum)  # stable: as published for depths of one sum
    return [SubSize(width, depth) for width in range(least.width, full.width + 1, step) for depth in depths]


def find(sizes: Sequence[SubSize], width: int, depth: int | Sequence[int]) -> SubSize:
    """The one of `sizes` that `width` and `depth` (of all stages together, or of each) mean; ConfigError if none."""
    known = sorted({size.width for size in sizes})
    if width not in known:
        raise ConfigError(f"width: {width} is not among the sizes; choose from {_shown(known)}")
    wide = [size for size in sizes if size.width == width]
    wanted = depth if isinstance(depth, int) else tuple(depth)
    found = [size for size in wide if (size.depth if isinstance(depth, int) else size.depths) == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        ways = ", ".join(str(list(size.depths)) for size in found[:4])
        raise ConfigError(
            f"depth: {depth} blocks can be spread in {len(found)} ways; give each stage's, such as {ways}"
        )
    depths = sorted({size.depth for size in wide})
    raise ConfigError(f"depth: {depth} is not among the sizes of width {width}; choose from {_shown(depths)}")


def _shown(numbers: Sequence[int]) -> str:
    """Numbers for a message: a range where they are one."""
    step = numbers[1] - numbers[0] if len(numbers) > 3 else 0
    if step and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}, {numbers[1]} .. {numbers[-1]}"
    return ", ".join(map(str, numbers))


def multiplicities(sizes: Sequence[SubSize], scale: float, *, by_width: bool = True) -> list[int]:
    """How often each of `sizes` stands in the list that training walks through; the smallest most often.

    round(w d), w and d falling linearly from `scale` for the smallest width or depth to 1 for the largest; w = 1
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


def _depths(asked: int | Sequence[int] | None, full: SubSize) -> tuple[int, ...]:
    """The depth of each stage that `asked` means. Raises ConfigError when `full` does not have it."""
    if asked is None:
        alone = len(full.depths) == 1
        return tuple(-(-depth // 2) if alone or depth > 3 else depth for depth in full.depths)
    if isinstance(asked, int):
        deepest = full.depths.index(max(full.depths))
        missing = full.depth - asked
        depths = tuple(depth - missing * (stage == deepest) for stage, depth in enumerate(full.depths))
    else:
        depths = tuple(asked)
    if len(depths) != len(full.depths) or any(not 1 <= d <= most for d, most in zip(depths, full.depths, strict=True)):
        raise ConfigError(
            f"elastic.depth: {asked if isinstance(asked, int) else list(asked)} does not fit a network of "
            f"{list(full.depths)} blocks; give at most as many for each stage"
        )
    if short := [d for d, most in zip(depths, full.depths, strict=True) if d < most and d < 2]:
        raise ConfigError(f"elastic.depth: {short[0]} block keeps no last one; give at least 2 blocks for a stage")
    return depths


def _bad_width(width: int, full: SubSize, unit: int, remedy: str) -> str:
    return (
        f"elastic.width: {width} is not possible in a network of width {full.width}; "
        f"give a multiple of {unit} that is no larger{remedy}"
    )
