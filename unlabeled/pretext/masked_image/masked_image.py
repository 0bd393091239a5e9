"""What all masked image models share: one crop, a mask over a grid of cells, and pictures of what was predicted."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import make_grid

from unlabeled.pretext.common.patches import normalize_patches, patch_statistics, patchify, unpatchify, widened
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import (
    Masking,
    Method,
    Pattern,
    Rounding,
    count_keep,
    mask_noise,
    masking_of,
    random_masking,
)
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, FloatPictures, PretextTask, StepOutput, TaskConfig

_PICTURES = 8
"""Rows of a visualisation."""
_SHOWN_PIXELS = 96
"""Smaller pictures are enlarged to about this size in a visualisation."""

Part = Annotated[float, Field(gt=0, le=1)]


class MaskedImageConfig(TaskConfig):
    """Settings of every masked image model; each method gives its own defaults."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Part of the cells that is hidden."""
    mask_pattern: Pattern = "random"
    """random: each cell by itself. block: rectangles. grid: a regular pattern. See `mask_noise`."""
    mask_count: Rounding = "exact"
    """How the number of visible cells is rounded; see `count_keep`. official: as the authors' code does."""
    crop_scale: tuple[Part, Part] = (0.2, 1.0)
    """Part of the picture's area that a crop covers, smallest and largest."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskedImageConfig:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)} begins above its end; give [smallest, largest]")
        return self


class CropViews:
    """One random crop with a flip: picture, uint8 (3, H, W) → ``{"image": uint8 (3, h, w)}``."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], interpolation: v2.InterpolationMode) -> None:
        self.crop = v2.RandomResizedCrop(list(size), scale=scale, interpolation=interpolation, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5)

    def __call__(self, picture: Tensor) -> dict[str, Tensor]:
        return {"image": self.flip(self.crop(picture))}


class MaskedImageTask(PretextTask):
    """Base of the masked image models. A subclass sets `method` and `cell`, and implements `reconstruct`."""

    Config: ClassVar[type[TaskConfig]] = MaskedImageConfig
    method: ClassVar[Method]
    """Whose way of counting visible cells is used."""
    interpolation: ClassVar[v2.InterpolationMode] = v2.InterpolationMode.BICUBIC
    """Of the random crop."""
    float_pictures: ClassVar[FloatPictures] = "normalised"
    config: MaskedImageConfig
    cell: tuple[int, int]
    """Pixels (rows, columns) of one cell of the mask; set before `forward` is called."""

    @classmethod
    def views(cls, config: MaskedImageConfig, backbone: Backbone) -> Views:
        return CropViews(backbone.input_size, config.crop_scale, cls.interpolation)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, L), in [0, 1): the cells with the smallest stay visible."""
        images = batch["image"]
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        return {"noise": mask_noise(self.config.mask_pattern, images.shape[0], grid, images.device)}

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalised (B, C, H, W) and its mask → the predicted pictures (B, C, H, W), normalised, at least float32."""
        raise NotImplementedError

    @torch.no_grad()
    def visualize(
        self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``reconstruction``: a row per picture (the first 8): original, masked, reconstruction; uint8 (3, H, W).

        Predictions stand at hidden cells only. The networks run in eval mode.
        """
        images = self.images_of(batch)[:_PICTURES]
        noise, visible = (None if given is None else given[:_PICTURES] for given in (noise, visible))
        masking = self.mask(images, noise, visible)
        with modes_kept(self):
            self.eval()
            predicted = self.reconstruct(images, masking).to(images.dtype)
        shown = masking.enlarged(self.cell)[:, None]
        columns = [images, torch.where(shown, images, 0.0), torch.where(shown, images, predicted)]
        tiles = _to_uint8(torch.stack(columns, dim=1).flatten(0, 1), self.backbone)  # (3 B, C, H, W), row by row
        enlarge = max(1, _SHOWN_PIXELS // min(tiles.shape[-2:]))
        tiles = tiles.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
        return {"reconstruction": make_grid(tiles, nrow=len(columns), padding=2, pad_value=255)}

    def images_of(self, batch: Batch) -> Tensor:
        """``batch["image"]`` normalised, (B, 3, H, W); float pictures are taken as normalised already."""
        images = batch["image"]
        return images if images.is_floating_point() else self.backbone.normalize(images)

    def mask(self, images: Tensor, noise: Tensor | None = None, visible: Tensor | None = None) -> Masking:
        """The mask of `images` (B, C, H, W): given by `visible` (bool, B, gh, gw) or `noise` (B, L), else drawn."""
        if visible is not None:
            return masking_of(visible)
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        noise = self.draw({"image": images})["noise"] if noise is None else noise
        return random_masking(noise, self.keep(grid), grid)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Cells (gh, gw) of pictures of `size` (height, width) pixels. Raises ConfigError when they do not fit."""
        if size[0] % self.cell[0] or size[1] % self.cell[1]:
            below = [max(1, pixels // step) * step for pixels, step in zip(size, self.cell, strict=True)]
            raise ConfigError(
                f"backbone.size: {list(size)} is no multiple of the mask's cells, {list(self.cell)}; set it to {below}"
            )
        return size[0] // self.cell[0], size[1] // self.cell[1]

    def size_step(self) -> tuple[int, int]:
        """Whole cells, and whole places of the last map."""
        height, width = self.backbone.size_step()
        return math.lcm(height, self.cell[0]), math.lcm(width, self.cell[1])

    def require_size(self, size: tuple[int, int]) -> None:
        self.keep(self.grid_of(size))

    def keep(self, grid: tuple[int, int]) -> int:
        """Visible cells of `grid`. Raises ConfigError when none or all would be visible."""
        cells, ratio = grid[0] * grid[1], self.config.mask_ratio
        keep = count_keep(cells, ratio, self.method, self.config.mask_count)
        if not 0 < keep < cells:
            remedy = f"set it between {1 / cells:.2g} and {1 - 1 / cells:.2g}" if cells > 1 else "it cannot be masked"
            raise ConfigError(
                f"task.mask_ratio: {ratio} leaves {keep} of {grid[0]}x{grid[1]} cells visible; "
                f"{remedy}, or use more pixels or smaller cells"
            )
        return keep


class CellRegression(MaskedImageTask):
    """Base of the tasks that predict the pixels of hidden cells under a squared error, each cell by itself."""

    @property
    def norm_pix(self) -> bool:
        """Whether each cell is predicted normalised by its own mean and deviation."""
        return True

    def target(self, images: Tensor, ids: Tensor) -> Tensor:
        """What is to be predicted for the cells `ids` (B, M): at least float32 (B, M, ph * pw * C)."""
        patches = patchify(images, self.cell, ids)
        return normalize_patches(patches) if self.norm_pix else widened(patches)

    def score(self, predictions: Tensor, images: Tensor, masking: Masking) -> StepOutput:
        """Mean squared error of predictions (B, L - K, ph * pw * C) of the hidden cells, and the part of their variance
        that they explain."""
        target = self.target(images, masking.ids_masked)
        loss = (predictions.to(target.dtype) - target).square().mean()
        return StepOutput(loss, {"explained": 1 - loss.detach() / (target.square().mean() + 1e-6)})

    def pictures_of(self, predictions: Tensor, images: Tensor, masking: Masking) -> Tensor:
        """Predictions of all cells (B, L, ph * pw * C) as pictures (B, C, H, W), normalised, at least float32.

        With `norm_pix` each cell gets back its true mean and deviation.
        """
        predictions = widened(predictions)
        if self.norm_pix:
            mean, deviation = patch_statistics(patchify(images, self.cell))
            predictions = predictions * deviation + mean
        return unpatchify(predictions, self.cell, masking.grid)


def _to_uint8(images: Tensor, backbone: Backbone) -> Tensor:
    """Normalised pictures (B, C, H, W) → uint8 of the same shape."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
