"""Patches of one image on a grid with gaps, each moved a little: where they lie and who is whose neighbor.

Doersch, Gupta, Efros, ICCV 2015, arXiv 1505.05192. The gaps keep edges from running on into the next patch, the
jitter keeps long lines from meeting. Shapes: P patches of a grid in raster order, Q ordered pairs of neighbors.
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
"""Longest side of a resized image in multiples of what the grid needs; slivers beyond that are squeezed."""
_GROUND = 40
"""Gray between drawn patches: dark, so that white dots show."""


class PatchPairs(NamedTuple):
    """All ordered pairs of neighbors of a grid, int64 (Q,) each."""

    first: Tensor
    """Place of the first patch in the grid, in raster order."""
    second: Tensor
    label: Tensor
    """Where the second lies as seen from the first: an index into `OFFSETS`. (a, b) and (b, a) sum up to 7."""


def neighbor_pairs(rows: int, columns: int) -> PatchPairs:
    """Every pair of the 8-neighborhood in both directions: 40 for a grid of 3 x 3."""
    found = [
        (row * columns + column, (row + down) * columns + column + right, label)
        for row in range(rows)
        for column in range(columns)
        for label, (right, down) in enumerate(OFFSETS)
        if 0 <= row + down < rows and 0 <= column + right < columns
    ]
    return PatchPairs(*(torch.tensor(column) for column in zip(*found, strict=True)))


class GridLayout(NamedTuple):
    """A grid in pixels of the resized image; all pairs are (down, across)."""

    grid: tuple[int, int]
    """Rows and columns."""
    patch: tuple[int, int]
    gap: tuple[int, int]
    jitter: tuple[int, int]
    """Largest shift of a patch, either way."""

    @property
    def extent(self) -> tuple[int, int]:
        """Pixels from the first patch's edge to the last one's."""
        down, across = (
            count * (patch + gap) - gap for count, patch, gap in zip(self.grid, self.patch, self.gap, strict=True)
        )
        return down, across

    @property
    def needs(self) -> tuple[int, int]:
        """Smallest image, as in the authors' code: the grid and one jitter."""
        return self.extent[0] + self.jitter[0], self.extent[1] + self.jitter[1]

    def draw(self, size: tuple[int, int]) -> Tensor:
        """Upper left corners of all patches in an image of `size`, int64 (P, 2) as (top, left).

        The grid's place is drawn once, the jitter for each patch and axis; what it would push out is held at the edge.
        """
        steps = [torch.arange(count) * (patch + gap) for count, patch, gap in zip(*self[:3], strict=True)]
        regular = torch.cartesian_prod(*steps)
        axes = []
        for axis in (0, 1):
            origin = torch.randint(size[axis] - self.extent[axis] + 1, ())
            shift = torch.randint(-self.jitter[axis], self.jitter[axis] + 1, (len(regular),))
            axes.append((origin + regular[:, axis] + shift).clamp(0, size[axis] - self.patch[axis]))
        return torch.stack(axes, dim=1)


class GridViews:
    """An image, resized to a random number of pixels, gives the patches of one grid."""

    def __init__(self, layout: GridLayout, pixels: tuple[float, float]) -> None:
        """`pixels`: fewest and most of the resized image; more where the grid would not fit."""
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
        """uint8 (3, H, W) with a pixel count drawn from U(pixels), its aspect kept; never too small for the grid."""
        sides, needs = image.shape[1:], self.layout.needs
        pixels = torch.empty(()).uniform_(*self.pixels).item()
        factor = math.sqrt(pixels / (sides[0] * sides[1]))
        factor = max(factor, *(need / side for need, side in zip(needs, sides, strict=True)))
        size = [min(max(int(side * factor), need), _LONGEST * need) for side, need in zip(sides, needs, strict=True)]
        resized: Tensor = F.resize(image, size, antialias=True)
        return resized


class Mark(NamedTuple):
    """A frame around one patch of a drawn grid."""

    position: int
    color: Color
    label: int | None = None
    """A white dot sits on the frame where this label points to, as seen from the patch's middle; None: no dot."""


def draw_grid(layout: GridLayout, patches: Tensor, corners: Tensor, marks: Iterable[Mark]) -> Tensor:
    """The patches where they lay in the image, with their frames: uint8 (3, H, W) of a size that `layout` fixes.

    `patches` is uint8 (P, 3, h, w), `corners` int64 (P, 2); small patches are enlarged to about 96 pixels.
    """
    enlarge = enlargement(layout.patch)
    frame = max(3, enlarge * min(layout.patch) // 20)
    sides = [enlarge * (extent + 2 * jitter) for extent, jitter in zip(layout.extent, layout.jitter, strict=True)]
    canvas = torch.full((3, sides[0] + 2 * frame, sides[1] + 2 * frame), _GROUND, dtype=torch.uint8)
    marked = {mark.position: mark for mark in marks}
    for position, (patch, corner) in enumerate(zip(patches, corners - corners.min(dim=0).values, strict=True)):
        tile = enlarged(patch, enlarge)
        top, left = (enlarge * int(pixels) + frame for pixels in corner)
        if position in marked:
            tile, top, left = _marked(tile, frame, marked[position]), top - frame, left - frame
        canvas[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return canvas


def _marked(tile: Tensor, frame: int, mark: Mark) -> Tensor:
    """`tile` (3, H, W) in a frame of `frame` pixels, with the dot of the mark's label on it."""
    shown = framed(tile, frame, mark.color)
    if mark.label is not None:
        dot, (right, down) = 2 * frame, OFFSETS[mark.label]
        top, left = (down + 1) * (shown.shape[1] - dot) // 2, (right + 1) * (shown.shape[2] - dot) // 2
        shown[:, top : top + dot, left : left + dot] = 255
    return shown
