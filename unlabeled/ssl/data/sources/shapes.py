"""Drawn shapes with labels and masks, which need no files."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unlabeled.ssl.data.source import SourceConfig, Split

Array = npt.NDArray[np.float32]
_Draw = Callable[[Array, Array], Any]
"""Signed distance to a shape's edge at its own coordinates u and v: negative inside, in units of its radius."""


class ShapesConfig(SourceConfig):
    """Synthetic images of shapes, 64x64 pixels in 8 classes, with labels and masks; no files needed."""

    debug: ClassVar[Mapping[str, Any]] = {"count": 256}

    count: int = Field(2048, ge=1)
    """Training images to draw; a quarter as many are drawn for testing. [images]"""


class ShapesSource:
    """Drawn shapes, 64 x 64 pixels in 8 classes, with labels and masks; no files needed.

    `config.count` for training, a quarter as many for testing. Image `index` of a split is always the same. The shape
    alone makes the class: size, place, tilt, colors and light are random, and a raw-pixel neighbor knows little.
    Every shape has a top and stands upright within 20 degrees, and nothing else in the image tells what is up:
    whoever can say how it was rotated knows the shapes.
    """

    size = 64
    classes = ["arrow", "house", "mushroom", "heart", "key", "flag", "fish", "moon"]

    Config: ClassVar[type[SourceConfig]] = ShapesConfig

    def __init__(self, config: ShapesConfig, split: Split = "train") -> None:
        self._split = split
        self._count = config.count if split == "train" else max(config.count // 4, 1)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> torch.Tensor:
        """Image `index`, uint8 (3, 64, 64)."""
        draw, random = self._draw(index), self._random(index)
        pose = _pose(random)
        image = _paint(random, pose, _coverage(draw, pose, self.size), self.size)
        return torch.from_numpy((image * 255 + 0.5).astype(np.uint8))

    def mask(self, index: int) -> torch.Tensor:
        """uint8 (64, 64): 0 is background, class c is c + 1."""
        coverage = _coverage(self._draw(index), _pose(self._random(index)), self.size)
        return torch.from_numpy((coverage > 0.5).astype(np.uint8) * np.uint8(self._label(index) + 1))

    def labels(self) -> torch.Tensor:
        """The classes in turn, int64 (N,), as many of one as of another."""
        return torch.arange(self._count) % len(self.classes)

    def describe(self, index: int) -> str:
        """Such as ``train shape 7 (moon)``."""
        return f"{self._split} shape {index} ({self.classes[self._label(index)]})"

    def _label(self, index: int) -> int:
        if index >= self._count:  # any number would make an image
            raise IndexError(f"there are {self._count} shapes, and no {index}")
        return index % len(self.classes)

    def _draw(self, index: int) -> _Draw:
        return _SHAPES[self.classes[self._label(index)]]

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((index, 0 if self._split == "train" else 1))


TILT = math.radians(20)
"""Largest tilt of a shape, radians."""

_Pose = tuple[float, float, float, float]
"""Radius, center x, center y (units of half the image, y down), angle."""


def _pose(random: np.random.Generator) -> _Pose:
    radius = random.uniform(0.45, 0.8)
    x, y = random.uniform(-0.95 + radius, 0.95 - radius, size=2)
    return radius, float(x), float(y), random.uniform(-TILT, TILT)


def _coverage(draw: _Draw, pose: _Pose, size: int) -> Array:
    """How much of each pixel the shape covers, 0..1 (size, size)."""
    radius, x, y, angle = pose
    across, down = _grid(size)
    cosine, sine = math.cos(angle) / radius, math.sin(angle) / radius
    u = (across - x) * cosine + (down - y) * sine
    v = (down - y) * cosine - (across - x) * sine
    pixels = draw(u, v) * (radius * size / 2)
    covered: Array = np.clip(0.5 - pixels, 0, 1).astype(np.float32)
    return covered


def _paint(random: np.random.Generator, pose: _Pose, coverage: Array, size: int) -> Array:
    """Background and object under light from any side, 0..1 (3, size, size)."""
    radius, x, y, _ = pose
    across, down = _grid(size)
    ground, color = random.uniform(0.15, 0.85, (2, 3, 1, 1)).astype(np.float32)
    if np.abs(ground - color).mean() < 0.25:
        color = (ground + 0.5) % 1
    cells = int(random.integers(3, 12))
    rough = random.uniform(-1, 1, (4, cells, cells)).astype(np.float32) * random.uniform(0.05, 0.2)
    blend = _blend(cells, size)
    texture = blend @ rough @ blend.T  # (4, size, size): three of the ground, one of the object
    light = random.uniform(0, 2 * np.pi)
    lit_across, lit_down = np.cos(light) * random.uniform(0.1, 0.3), np.sin(light) * random.uniform(0.05, 0.2)
    background = ground + texture[:3] + (lit_across * across + lit_down * down).astype(np.float32)
    shading = (lit_across * (across - x) + lit_down * (down - y)) / radius
    image = background + coverage * (color + texture[3] + shading - background)
    image += (random.integers(0, 256, (1, size, size), dtype=np.uint8) - np.float32(127.5)) * (0.05 / 128)
    painted: Array = np.clip(image, 0, 1).astype(np.float32)
    return painted


@functools.cache
def _grid(size: int) -> tuple[Array, Array]:
    """Coordinates of pixel centers, -1..1: across (1, size) and down (size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return line[None, :], line[:, None]


@functools.cache
def _blend(cells: int, size: int) -> Array:
    """Matrix (size, cells) that interpolates `cells` values linearly."""
    positions = np.linspace(0, cells - 1, size)
    weights: Array = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells)[None, :])).astype(np.float32)
    return weights


# Shapes by their distance in units of the radius, negative inside; u to the right, v down, all within a circle of 1.


def _box(u: Array, v: Array, x: float, y: float, width: float, height: float) -> Any:
    """Rectangle around (x, y) of half `width` and half `height`."""
    return np.maximum(np.abs(u - x) - width, np.abs(v - y) - height)


def _peak(u: Array, v: Array, top: float, bottom: float, width: float) -> Any:
    """Triangle with its tip at (0, `top`) and a base of half `width` at `bottom`; upside down if `top` is below."""
    height, sign = abs(bottom - top), math.copysign(1, bottom - top)
    side = (np.abs(u) * height - sign * (v - top) * width) / math.hypot(height, width)
    return np.maximum(sign * (v - bottom), side)


def _arrow(u: Array, v: Array) -> Any:
    return np.minimum(_box(u, v, 0, 0.4, 0.2, 0.55), _peak(u, v, -0.95, 0.0, 0.7))


def _house(u: Array, v: Array) -> Any:
    return np.minimum(_box(u, v, 0, 0.38, 0.6, 0.42), _peak(u, v, -0.9, 0.0, 0.85))


def _mushroom(u: Array, v: Array) -> Any:
    return np.minimum(np.maximum(np.hypot(u, v) - 0.9, v - 0.05), _box(u, v, 0, 0.45, 0.22, 0.48))


def _heart(u: Array, v: Array) -> Any:
    return np.minimum(np.hypot(np.abs(u) - 0.4, v + 0.3) - 0.46, _peak(u, v, 0.92, -0.12, 0.8))


def _key(u: Array, v: Array) -> Any:
    ring = np.abs(np.hypot(u, v + 0.55) - 0.3) - 0.13
    teeth = np.minimum(_box(u, v, 0.25, 0.78, 0.25, 0.1), _box(u, v, 0.22, 0.42, 0.22, 0.1))
    return np.minimum(np.minimum(ring, _box(u, v, 0, 0.35, 0.12, 0.55)), teeth)


def _flag(u: Array, v: Array) -> Any:
    return np.minimum(_box(u, v, -0.4, 0, 0.1, 0.9), _box(u, v, 0.15, -0.48, 0.5, 0.38))


def _fish(u: Array, v: Array) -> Any:
    body = (np.hypot((u - 0.22) / 0.72, v / 0.42) - 1) * 0.42
    return np.minimum(body, _peak(v, -u, 0.2, 0.88, 0.42))


def _moon(u: Array, v: Array) -> Any:
    return np.maximum(np.hypot(u, v) - 0.9, 0.72 - np.hypot(u - 0.4, v + 0.2))


_SHAPES: dict[str, _Draw] = {
    "arrow": _arrow,
    "house": _house,
    "mushroom": _mushroom,
    "heart": _heart,
    "key": _key,
    "flag": _flag,
    "fish": _fish,
    "moon": _moon,
}
