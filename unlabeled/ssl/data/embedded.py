"""Pictures that need no files: scikit-learn's digits, and drawn shapes with labels and masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

from unlabeled.ssl.data.layout import holdout
from unlabeled.ssl.data.source import Split
from unlabeled.ssl.schema import DataConfig

Array = npt.NDArray[np.float32]
_Draw = Callable[[Array, Array], Any]
"""Signed distance to a shape's edge at its own coordinates u and v: negative inside, in units of its radius."""


class DigitsSource:
    """1797 hand-written digits of 8 x 8 pixels in 10 classes (scikit-learn's ``load_digits``), a quarter held out."""

    def __init__(self, config: DataConfig, split: Split = "train") -> None:
        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        rows = holdout(labels, 0.25, split)
        scaled = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
        self._images = scaled[rows]
        self._labels = labels[rows]
        self._split = split
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> torch.Tensor:
        """Digit `index`, uint8 (3, 8, 8)."""
        return self._images[index].expand(3, -1, -1).contiguous()

    def labels(self) -> torch.Tensor:
        """The digits, int64 (N,)."""
        return self._labels

    def describe(self, index: int) -> str:
        """Such as ``train digit 7``."""
        return f"{self._split} digit {index}"


class ShapesSource:
    """Drawn shapes: RGB 64 x 64, label and mask; `config.count` for training, a quarter as many for testing.

    Picture `index` of a split is always the same. The shape alone makes the class: size, place, rotation and colours
    are random, and a raw-pixel neighbour knows little. Light comes from above (brighter sky, shaded objects with a
    shadow below), so that pictures have an up direction.
    """

    size = 64
    classes = ["circle", "square", "triangle", "star", "cross", "ring", "ellipse", "bars"]

    def __init__(self, config: DataConfig, split: Split = "train") -> None:
        self._split = split
        self._count = config.count if split == "train" else max(config.count // 4, 1)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> torch.Tensor:
        """Picture `index`, uint8 (3, 64, 64)."""
        random = self._random(index)
        pose = _pose(random)
        picture = _paint(random, pose, _coverage(self._draw(index), pose, self.size), self.size)
        return torch.from_numpy((picture * 255 + 0.5).astype(np.uint8))

    def mask(self, index: int) -> torch.Tensor:
        """uint8 (64, 64): 0 is background, class c is c + 1."""
        coverage = _coverage(self._draw(index), _pose(self._random(index)), self.size)
        return torch.from_numpy((coverage > 0.5).astype(np.uint8) * np.uint8(self._label(index) + 1))

    def labels(self) -> torch.Tensor:
        """The classes in turn, int64 (N,), as many of one as of another."""
        return torch.arange(self._count) % len(self.classes)

    def describe(self, index: int) -> str:
        """Such as ``train shape 7 (bars)``."""
        return f"{self._split} shape {index} ({self.classes[self._label(index)]})"

    def _label(self, index: int) -> int:
        return index % len(self.classes)

    def _draw(self, index: int) -> _Draw:
        return _SHAPES[self.classes[self._label(index)]]

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((index, 0 if self._split == "train" else 1))


_Pose = tuple[float, float, float, float]
"""Radius, centre x, centre y (units of half the picture, y down), angle."""


def _pose(random: np.random.Generator) -> _Pose:
    radius = random.uniform(0.28, 0.5)
    x, y = random.uniform(-0.95 + radius, 0.95 - radius, size=2)
    return radius, float(x), float(y), random.uniform(0, 2 * np.pi)


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
    """Background, shadow and object, 0..1 (3, size, size)."""
    radius, _, y, _ = pose
    _, down = _grid(size)
    ground, colour = random.uniform(0.15, 0.85, (2, 3, 1, 1)).astype(np.float32)
    if np.abs(ground - colour).mean() < 0.25:
        colour = (ground + 0.5) % 1
    cells = int(random.integers(3, 12))
    rough = random.uniform(-1, 1, (4, cells, cells)).astype(np.float32) * random.uniform(0.1, 0.3)
    blend = _blend(cells, size)
    texture = blend @ rough @ blend.T  # (4, size, size): three of the ground, one of the object
    background = ground + texture[:3] - random.uniform(0.15, 0.3) * down
    shadow = np.zeros_like(coverage)
    shadow[4:] = coverage[:-4]
    background *= 1 - 0.45 * shadow
    shading = random.uniform(0.15, 0.3) * (down - y) / radius
    picture = background + coverage * (colour + texture[3] - shading - background)
    picture += (random.integers(0, 256, (1, size, size), dtype=np.uint8) - np.float32(127.5)) * (0.08 / 128)
    painted: Array = np.clip(picture, 0, 1).astype(np.float32)
    return painted


@functools.cache
def _grid(size: int) -> tuple[Array, Array]:
    """Coordinates of pixel centres, -1..1: across (1, size) and down (size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return line[None, :], line[:, None]


@functools.cache
def _blend(cells: int, size: int) -> Array:
    """Matrix (size, cells) that interpolates `cells` values linearly."""
    places = np.linspace(0, cells - 1, size)
    weights: Array = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells)[None, :])).astype(np.float32)
    return weights


def _star(u: Array, v: Array) -> Any:
    # fold the plane onto one half of one point: a triangle between the tip (1, 0) and the notch
    half = math.pi / 5
    notch = 0.42 * math.cos(half), 0.42 * math.sin(half)
    normal = notch[1], 1 - notch[0]
    length = math.hypot(*normal)
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    folded = np.abs((angle + half) % (2 * half) - half)
    across = (distance * np.cos(folded) - 1) * normal[0] + distance * np.sin(folded) * normal[1]
    return across / length


def _cross(u: Array, v: Array) -> Any:
    long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(long - 0.9, short - 0.28)


def _bars(u: Array, v: Array) -> Any:
    from_nearest = np.minimum(np.abs(v), np.abs(np.abs(v) - 0.62))
    return np.maximum(np.abs(u) - 0.85, from_nearest - 0.19)


_SHAPES: dict[str, _Draw] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: np.maximum(v, np.abs(u) * (math.sqrt(3) / 2) - v / 2) - 0.5,
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.2,
    "ellipse": lambda u, v: (np.hypot(u / 0.98, v / 0.5) - 1) * 0.5,
    "bars": _bars,
}
