"""Crops patches of an image on a jittered grid with gaps, and lists which patches are neighbors.

Doersch, Gupta, Efros, ICCV 2015, arXiv 1505.05192. Gaps prevent edges from continuing into the next patch, jitter
prevents long lines from matching up. Shapes: P patches of a grid in raster order, Q ordered pairs of neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from unlabeled.pretext.common.drawing import Color, enlarged, enlargement, framed

OFFSETS = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))
"""Label → (columns to the right, rows down) from the first patch of a pair to the second."""
_LONGEST = 8
"""Longest side of a resized image, as a multiple of what the grid needs; longer images are squeezed."""
_BACKGROUND = 40
"""Gray value between drawn patches: dark, so that white dots are visible."""


class PatchPairs(NamedTuple):
    """All ordered pairs of neighbors of a grid, int64 (Q,) each."""

    first: Tensor
    """Index of the first patch in the grid, in raster order."""
    second: Tensor
    """Index of the second patch."""
    label: Tensor
    """Position of the second patch relative to the first, an index into `OFFSETS`. Swapping a pair gives 7 - label."""


def neighbor_pairs(rows: int, columns: int) -> PatchPairs:
    """All pairs of patches that are neighbors, also diagonally, in both directions: 40 for a 3 x 3 grid."""
    found = [
        (row * columns + column, (row + down) * columns + column + right, label)
        for row in range(rows)
        for column in range(columns)
        for label, (right, down) in enumerate(OFFSETS)
        if 0 <= row + down < rows and 0 <= column + right < columns
    ]
    return PatchPairs(*(torch.tensor(column) for column in zip(*found, strict=True)))


class GridLayout(NamedTuple):
    """A grid, in pixels of the resized image; all pairs are (vertical, horizontal)."""

    grid: tuple[int, int]
    """Rows and columns."""
    patch: tuple[int, int]
    gap: tuple[int, int]
    jitter: tuple[int, int]
    """Largest shift of a patch, in either direction."""

    @property
    def extent(self) -> tuple[int, int]:
        """Size of the whole grid, without jitter."""
        down, across = (
            count * (patch + gap) - gap for count, patch, gap in zip(self.grid, self.patch, self.gap, strict=True)
        )
        return down, across

    @property
    def needs(self) -> tuple[int, int]:
        """Size of the smallest image that the grid fits into: the grid plus one jitter, as in the authors' code."""
        return self.extent[0] + self.jitter[0], self.extent[1] + self.jitter[1]

    def draw(self, size: tuple[int, int]) -> Tensor:
        """Draws the upper left corners of all patches in an image of `size`, int64 (P, 2) as (top, left)."""
        # corners of the regular grid, (P, 2)
        steps = [torch.arange(count) * (patch + gap) for count, patch, gap in zip(*self[:3], strict=True)]
        regular = torch.cartesian_prod(*steps)
        axes = []
        for axis in (0, 1):
            # one position for the grid, one shift for each patch; clamped where the shift leaves the image
            origin = torch.randint(size[axis] - self.extent[axis] + 1, ())
            shift = torch.randint(-self.jitter[axis], self.jitter[axis] + 1, (len(regular),))
            axes.append((origin + regular[:, axis] + shift).clamp(0, size[axis] - self.patch[axis]))
        return torch.stack(axes, dim=1)


class GridViews:
    """Resizes an image to a random number of pixels and crops the patches of one grid."""

    def __init__(self, layout: GridLayout, pixels: tuple[float, float]) -> None:
        """`pixels`: smallest and largest area of the resized image, in pixels; exceeded if the grid does not fit."""
        self.layout = layout
        self.pixels = pixels

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → ``patches``, uint8 (P, 3, h, w), and ``corners``, int64 (P, 2): (top, left)."""
        resized = self.resize(image)
        corners = self.layout.draw((resized.shape[1], resized.shape[2]))
        height, width = self.layout.patch
        patches = [resized[:, top : top + height, left : left + width] for top, left in corners.tolist()]
        return {"patches": torch.stack(patches), "corners": corners}

    def resize(self, image: Tensor) -> Tensor:
        """Resizes uint8 (3, H, W) to an area drawn from U(pixels), keeping its aspect ratio; the grid always fits."""
        sides, needs = image.shape[1:], self.layout.needs
        pixels = torch.empty(()).uniform_(*self.pixels).item()
        factor = math.sqrt(pixels / (sides[0] * sides[1]))
        factor = max(factor, *(need / side for need, side in zip(needs, sides, strict=True)))
        # int() may fall one pixel short of `need`; only extremely long images lose their aspect ratio
        size = [min(max(int(side * factor), need), _LONGEST * need) for side, need in zip(sides, needs, strict=True)]
        resized: Tensor = F.resize(image, size, antialias=True)
        return resized


class Mark(NamedTuple):
    """A frame around one patch of a drawn grid."""

    position: int
    color: Color
    label: int | None = None
    """Draws a white dot on the frame, on the side or corner that this label stands for; None: no dot."""


def draw_grid(layout: GridLayout, patches: Tensor, corners: Tensor, marks: Iterable[Mark]) -> Tensor:
    """Draws `patches` uint8 (P, 3, h, w) at their `corners` int64 (P, 2), with frames `marks` → uint8 (3, H, W).

    Small patches are enlarged to about 96 pixels. The size of the result depends on `layout` only.
    """
    enlarge = enlargement(layout.patch)
    frame = max(3, enlarge * min(layout.patch) // 20)
    sides = [enlarge * (extent + 2 * jitter) for extent, jitter in zip(layout.extent, layout.jitter, strict=True)]
    canvas = torch.full((3, sides[0] + 2 * frame, sides[1] + 2 * frame), _BACKGROUND, dtype=torch.uint8)
    marked = {mark.position: mark for mark in marks}
    # corners relative to the uppermost and leftmost patch: the gap around the grid is not drawn
    for position, (patch, corner) in enumerate(zip(patches, corners - corners.min(dim=0).values, strict=True)):
        tile = enlarged(patch, enlarge)
        top, left = (enlarge * int(pixels) + frame for pixels in corner)
        if position in marked:
            tile, top, left = _marked(tile, frame, marked[position]), top - frame, left - frame  # frames grow outward
        canvas[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return canvas


def _marked(tile: Tensor, frame: int, mark: Mark) -> Tensor:
    """Puts a frame of `frame` pixels around `tile` (3, H, W), with the dot of the mark's label."""
    shown = framed(tile, frame, mark.color)
    if mark.label is not None:
        dot, (right, down) = 2 * frame, OFFSETS[mark.label]
        top, left = (down + 1) * (shown.shape[1] - dot) // 2, (right + 1) * (shown.shape[2] - dot) // 2
        shown[:, top : top + dot, left : left + dot] = 255
    return shown
