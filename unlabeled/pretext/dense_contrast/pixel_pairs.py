"""Code that PixPro and PixContrast share: crops with known positions, pairs of nearby cells, a momentum teacher.

Shapes: B images, two views of each, C channels, a grid (gh, gw) of L cells in raster order.
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
"""Largest side of a view, in pixels, that `blur: auto` does not blur."""
_CELLS = 3
"""Smallest number of cells along each side of the feature map; with fewer, nearly all pairs are positive."""
_SHOWN = 8
"""Number of images that `visualize` shows."""


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
    """Two random crops of an image, each with its own color augmentation, and their boxes."""

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
    """Whether views of `size` are blurred with the probabilities of their colors, or never."""
    return max(size) > _SMALL if config.blur == "auto" else config.blur


def cell_diagonals(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) → length (...) of the diagonal of one cell of `grid` in the unit square of the image."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.hypot((x2 - x1) / grid[1], (y2 - y1) / grid[0])


def cell_distances(first: Tensor, second: Tensor, first_grid: tuple[int, int], second_grid: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of two views → distances (B, L1, L2) between the centers of their cells in the original image.

    Measured in the unit square of the image, and divided by the larger of the diagonals of the two views' cells.
    """
    first, second = widened(first), widened(second)
    offsets = cell_centers(first, first_grid).unsqueeze(2) - cell_centers(second, second_grid).unsqueeze(1)
    unit = torch.maximum(cell_diagonals(first, first_grid), cell_diagonals(second, second_grid))
    distances: Tensor = torch.linalg.vector_norm(offsets, dim=-1) / unit.view(-1, 1, 1)
    return distances


class PixelMLP(nn.Module):
    """An MLP at every position of a map: linear, batch norm, ReLU, linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        # named as in the authors' files; a 1x1 convolution is a linear layer at every position
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
        """Raises ConfigError for a level that the backbone does not have, and CapabilityError for a map with fewer than
        3x3 positions."""
        super().__init__(config, backbone)
        self.feature_map = LevelMap(backbone, config.level, task=type(self).__name__, positions=_CELLS)
        self.train_only(self.feature_map.reached(backbone))
        self.projector = PixelMLP(self.feature_map.channels, config.hidden_dim, config.feature_dim)
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
        rows, columns = self.feature_map.grid_of(self.backbone, size)
        if min(rows, columns) < _CELLS:
            raise ConfigError(
                f"task.level: map {self.config.level} of {self.backbone.name} has {rows}x{columns} positions for "
                f"images of {size[0]}x{size[1]}, at least {_CELLS}x{_CELLS} are needed; raise backbone.size"
            )

    def follow(self, name: str) -> None:
        """Adds a copy of the submodule `name` to `teacher`, under the same name."""
        self.teacher[name] = frozen_copy(cast(nn.Module, getattr(self, name)))

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher's parameters toward the student's; its batch norms keep their own running statistics."""
        for name, copy in self.teacher.items():
            ema_update(copy, getattr(self, name), momentum)

    def after_step(self, progress: float) -> None:
        """Moves the teacher toward the student."""
        # the authors do so during the next step, but before its forward pass, which is equivalent
        self.update_teacher(cosine_momentum(self.config.momentum, 1.0, progress))

    def images_of(self, batch: Batch) -> list[Tensor]:
        """``views`` uint8 (B, 2, 3, h, w) → normalized images of each view, (B, 3, h, w) each."""
        return [self.backbone.normalize(images) for images in batch["views"].unbind(1)]

    def each_view(self, module: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
        """Applies `module` to each view: in one pass per view as published, or in a single one with `joint_passes`."""
        if self.config.joint_passes:
            return list(module(torch.cat(list(views))).chunk(len(views)))
        return [module(view) for view in views]

    def student_maps(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Normalized views → feature maps (B, channels, gh, gw) and projections (B, C, gh, gw) of each view."""
        maps = self.each_view(lambda view: self.feature_map(self.backbone, view), images)
        return maps, self.each_view(self.projector, maps)

    @torch.no_grad()
    def teacher_maps(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As `student_maps`, but from the teacher and without gradients."""
        backbone = cast(Backbone, self.teacher["backbone"])
        maps = self.each_view(lambda view: self.feature_map(backbone, view), images)
        return maps, self.each_view(self.teacher["projector"], maps)

    def positive_pairs(self, boxes: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Boxes (B, 2, 4) → bool (B, L, L): True if a cell of the first view (row) is near one of the second (column).

        `grid` ends with (gh, gw), so the shape of a map will do.
        """
        cells = (grid[-2], grid[-1])
        return cell_distances(boxes[:, 0], boxes[:, 1], cells, cells) < self.config.threshold

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``pairs``: both views of the first 8 images, with the cells of a positive pair in the same color."""
        images, boxes = batch["views"][:_SHOWN], batch["boxes"][:_SHOWN]
        distances = cell_distances(boxes[:, 0], boxes[:, 1], self.feature_map.grid, self.feature_map.grid)
        return {"pairs": matched_cells(images, distances, self.feature_map.grid, self.config.threshold)}


def overlap_logs(positive: Tensor) -> dict[str, Tensor]:
    """``positives``: fraction of all pairs of cells that are near; ``overlap``: fraction of images with such a pair."""
    near = positive.flatten(1)
    return {"positives": near.float().mean(), "overlap": near.any(1).float().mean()}
