"""What PixPro and PixContrast share: two crops whose places are known, pairs of near cells, a momentum teacher.

Legend: B images, two views of each, C channels, a grid (gh, gw) of L cells, in raster order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy
from unlabeled.pretext.common.views import ColorConfig, Colors, Fraction, Probability, RandomCrop, cell_centers
from unlabeled.pretext.dense_contrast.pair_images import matched_cells
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.level_map import LevelMap
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import Batch, PretextTask, TaskConfig

logger = logging.getLogger(__name__)

Aspect = Annotated[float, Field(gt=0)]

_SMALL = 64
"""Pixels up to which `blur: auto` does not blur."""
_POSITIONS = 3
"""Cells along each side that a map must have: in a smaller one nearly all pairs are near."""
_SHOWN = 8
"""Images that `visualize` shows."""


class FirstPixelColors(ColorConfig):
    """Color augmentation of the first view."""

    blur: Probability = 1.0


class SecondPixelColors(ColorConfig):
    """Color augmentation of the second view."""

    blur: Probability = 0.1
    solarize: Probability = 0.2


class PixelPairsConfig(TaskConfig):
    """Settings of PixPro and PixContrast; the defaults are those of PixPro's paper and code."""

    level: int = -1
    """Feature map to train, counted as in a list: -1 is the last. It must have at least 3x3 cells."""
    hidden_dim: int = Field(4096, ge=1)
    """Width of the hidden layers of the projections. [channels]"""
    feature_dim: int = Field(256, ge=1)
    """Width of the projected features that the loss compares. [channels]"""
    threshold: float = Field(0.7, gt=0)
    """Two cells form a positive pair if their centers in the original image are closer than this, measured in diagonals
    of the coarser view's cell. On grids finer than 7x7 the threshold grows with the grid, so that the distance in the
    image stays the same. [cell diagonals]"""
    momentum: float = Field(0.99, ge=0, le=1)
    """Decay rate of the teacher's weights at the start of the run; it rises to 1 along a half cosine."""
    joint_passes: bool = False
    """Run both views through a network in one pass. This is faster, but batch norms then mix both views, unlike in the
    paper."""
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest fraction of the image area that a view covers. [fraction]"""
    crop_ratio: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio (width / height) of a crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip of a view."""
    first: FirstPixelColors = FirstPixelColors()
    """Color augmentation of the first view."""
    second: SecondPixelColors = SecondPixelColors()
    """Color augmentation of the second view."""
    blur: Literal["auto"] | bool = "auto"
    """Whether views are blurred, as often as `first` and `second` say. auto: only views of more than 64 pixels."""


class PixelPairViews:
    """Two random crops of an image, colored each in its own way, and where they were taken."""

    def __init__(self, config: PixelPairsConfig, size: tuple[int, int]) -> None:
        self.crop = RandomCrop(size, scale=config.crop_scale, ratio=config.crop_ratio, flip=config.flip)
        unblurred = {} if blurs(config, size) else {"blur": 0.0}
        self.colors = [Colors(colors.model_copy(update=unblurred)) for colors in (config.first, config.second)]

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) → ``views`` uint8 (2, 3, h, w) and their ``boxes`` float32 (2, 4), see `common.views`."""
        crops = [self.crop(image) for _ in self.colors]
        images = [change(crop.image) for change, crop in zip(self.colors, crops, strict=True)]
        return {"views": torch.stack(images), "boxes": torch.stack([crop.box for crop in crops])}


def blurs(config: PixelPairsConfig, size: tuple[int, int]) -> bool:
    """Whether views of `size` are blurred at all."""
    return max(size) > _SMALL if config.blur == "auto" else config.blur


def cell_diagonals(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) → length (...) of the diagonal of one cell of `grid`; mirrored boxes have the same."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.hypot((x2 - x1) / grid[1], (y2 - y1) / grid[0])


def cell_distances(first: Tensor, second: Tensor, first_grid: tuple[int, int], second_grid: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of two views → (B, L1, L2): how far apart the centers of their cells lie in the original image.

    In units of the larger of the two cells' diagonals. Each axis of the image counts as 1, whatever its shape.
    """
    first, second = widened(first), widened(second)
    offsets = cell_centers(first, first_grid).unsqueeze(2) - cell_centers(second, second_grid).unsqueeze(1)
    unit = torch.maximum(cell_diagonals(first, first_grid), cell_diagonals(second, second_grid))
    distances: Tensor = torch.linalg.vector_norm(offsets, dim=-1) / unit.view(-1, 1, 1)
    return distances


class PixelMLP(nn.Module):
    """The same two linear layers with a batch norm between them at every place; the authors' names for its parts."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv2d(inputs, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.linear2 = nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, gh, gw) → (B, outputs, gh, gw)."""
        out: Tensor = self.linear2(torch.relu(self.bn1(self.linear1(x))))
        return out


class PixelPairs(PretextTask):
    """Base of both tasks: `backbone` and `projector`, and a `teacher` that holds a momentum copy of each.

    A subclass implements `forward` with `student_maps`, `teacher_maps`, `each_view` and `positive_pairs`.
    """

    Config: ClassVar[type[TaskConfig]] = PixelPairsConfig
    requires: ClassVar[frozenset[str]] = frozenset({"dense_map"})
    synced_statistics: ClassVar[bool] = True
    small_settings: ClassVar[dict[str, Any]] = {"level": 1, "hidden_dim": 64, "feature_dim": 32}
    collapse_remedy: ClassVar[str] = "lower optim.lr, lengthen schedule.warmup_epochs, or raise task.momentum"
    config: PixelPairsConfig

    def __init__(self, config: PixelPairsConfig, backbone: Backbone) -> None:
        """Raises ConfigError for a level that the backbone lacks, CapabilityError for a map below 3x3 places."""
        super().__init__(config, backbone)
        self.level = LevelMap(backbone, config.level, task=type(self).__name__, positions=_POSITIONS)
        self.train_only(self.level.reached(backbone))
        self.projector = PixelMLP(self.level.channels, config.hidden_dim, config.feature_dim)
        self.teacher = nn.ModuleDict()
        for name in ("backbone", "projector"):
            self.follow(name)
        if config.blur == "auto" and not blurs(config, backbone.input_size):
            shown = "x".join(str(pixels) for pixels in backbone.input_size)
            logger.info("task.blur: views of %s pixels are not blurred; set task.blur=true for the paper's blur", shown)

    @classmethod
    def views(cls, config: PixelPairsConfig, backbone: Backbone) -> Views:
        return PixelPairViews(config, backbone.input_size)

    def require_size(self, size: tuple[int, int]) -> None:
        rows, columns = self.level.grid_of(self.backbone, size)
        if min(rows, columns) < _POSITIONS:
            raise ConfigError(
                f"task.level: map {self.config.level} of {self.backbone.name} has {rows}x{columns} places for images "
                f"of {size[0]}x{size[1]}, at least {_POSITIONS}x{_POSITIONS} are needed; raise backbone.size"
            )

    def follow(self, name: str) -> None:
        """Gives the submodule `name` a copy of the same name in `teacher`, equal to it now."""
        self.teacher[name] = frozen_copy(cast(nn.Module, getattr(self, name)))

    def update_teacher(self, momentum: float) -> None:
        """Moves every parameter of the teacher toward the student's; its batch norms keep their own statistics."""
        for name, copy in self.teacher.items():
            ema_update(copy, getattr(self, name), momentum)

    def after_step(self, progress: float) -> None:
        """The authors move the teacher in the middle of the next step, before it looks at anything: the same."""
        self.update_teacher(cosine_momentum(self.config.momentum, 1.0, progress))

    def images_of(self, batch: Batch) -> list[Tensor]:
        """``views`` (B, 2, 3, h, w) → two of (B, 3, h, w), normalized."""
        return [self.backbone.normalize(images) for images in batch["views"].unbind(1)]

    def each_view(self, network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
        """What `network` gives for each view: pass by pass as published, or in one with `joint_passes`."""
        if self.config.joint_passes:
            return list(network(torch.cat(list(views))).chunk(len(views)))
        return [network(view) for view in views]

    def student_maps(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Normalized views → feature maps (B, channels, gh, gw) and projections (B, C, gh, gw), one of each a view."""
        maps = self.each_view(lambda view: self.level(self.backbone, view), images)
        return maps, self.each_view(self.projector, maps)

    @torch.no_grad()
    def teacher_maps(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same by the teacher, without gradient."""
        backbone = cast(Backbone, self.teacher["backbone"])
        maps = self.each_view(lambda view: self.level(backbone, view), images)
        return maps, self.each_view(self.teacher["projector"], maps)

    def positive_pairs(self, boxes: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Boxes (B, 2, 4) → bool (B, L, L): cells of the first view (rows) near cells of the second (columns)."""
        positions = (grid[-2], grid[-1])
        return cell_distances(boxes[:, 0], boxes[:, 1], positions, positions) < self.config.threshold

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``pairs``: the two views of each of the first 8 images, cells of a positive pair in the same color.

        A cell of the second view has the color of the nearest of its partners; cells without one are darkened.
        """
        images, boxes = batch["views"][:_SHOWN], batch["boxes"][:_SHOWN]
        distances = cell_distances(boxes[:, 0], boxes[:, 1], self.level.grid, self.level.grid)
        return {"pairs": matched_cells(images, distances, self.level.grid, self.config.threshold)}


def overlap_logs(positive: Tensor) -> dict[str, Tensor]:
    """``positives``: part of all pairs of cells that are near; ``overlap``: part of images with any such pair."""
    near = positive.flatten(1)
    return {"positives": near.float().mean(), "overlap": near.any(1).float().mean()}
