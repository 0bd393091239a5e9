"""Code that all masked image models share: one random crop, a mask over a grid of cells, targets, and `visualize`.

The target of a cell is a vector of its pixels in the order row, column, channel: element ``(dy * pw + dx) * C + c`` is
channel c of the pixel dy rows below and dx columns right of the cell's corner (as in MAE, arXiv 2111.06377).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms import v2

from unlabeled.pretext.common.drawing import displayed, enlarged, tiled
from unlabeled.pretext.common.views import Fraction
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
from unlabeled.ssl.backbones.masked.tokens import gather_patches
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, FloatImages, PretextTask, StepOutput, TaskConfig

_SHOWN = 8
"""Number of images that `visualize` shows."""
_EPS = 1e-6
"""Added to the variance of a cell, inside the square root."""


class MaskedImageConfig(TaskConfig):
    """Settings of every masked image model; each method has its own defaults."""

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of the cells (patches) that is masked. [fraction]"""
    mask_pattern: Pattern = "random"
    """random: each cell is masked independently. block: rectangles are masked. grid: a regular pattern is masked."""
    mask_count: Rounding = "exact"
    """How the number of visible cells is rounded. exact: from the decimal product. official: as the authors' code does,
    which may differ by one cell."""
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Smallest and largest fraction of the image area that a crop covers. [fraction]"""

    @model_validator(mode="after")
    def _ordered(self) -> MaskedImageConfig:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)} begins above its end; give [smallest, largest]")
        return self


class CropViews:
    """One random crop and flip: uint8 image (3, H, W) of any size → ``image``, uint8 (3, h, w)."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], interpolation: v2.InterpolationMode) -> None:
        self.crop = v2.RandomResizedCrop(list(size), scale=scale, interpolation=interpolation, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {"image": self.flip(self.crop(image))}


class MaskedImageTask(PretextTask):
    """Base of the masked image models: views, masks and `visualize`; the method itself is in the subclass's `forward`.

    A subclass sets `method` and `cell`, and implements `forward` and, for `visualize`, `reconstruct`.
    """

    Config: ClassVar[type[TaskConfig]] = MaskedImageConfig
    method: ClassVar[Method]
    """The method by whose published rule the number of visible cells is rounded."""
    interpolation: ClassVar[v2.InterpolationMode] = v2.InterpolationMode.BICUBIC
    """Interpolation of the random crop."""
    float_images: ClassVar[FloatImages] = "normalized"
    config: MaskedImageConfig
    cell: tuple[int, int]
    """Size (height, width) of one cell of the mask, in pixels; a subclass sets it in its constructor."""

    @classmethod
    def views(cls, config: MaskedImageConfig, backbone: Backbone) -> Views:
        return CropViews(backbone.input_size, config.crop_scale, cls.interpolation)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, L) in [0, 1): the cells with the smallest values stay visible."""
        images = batch["image"]
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        return {"noise": mask_noise(self.config.mask_pattern, images.shape[0], grid, images.device)}

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, C, H, W) and its mask → predicted images (B, C, H, W), normalized, at least float32."""
        raise NotImplementedError

    @torch.no_grad()
    def visualize(
        self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``reconstruction``: one row per image (the first 8): original, masked, reconstructed; uint8 (3, H, W).

        In the reconstruction, visible cells show the original. The task runs in eval mode.
        """
        images = self.images_of(batch)[:_SHOWN]
        noise, visible = (None if given is None else given[:_SHOWN] for given in (noise, visible))
        masking = self.mask(images, noise, visible)
        with modes_kept(self):
            self.eval()
            predicted = self.reconstruct(images, masking).to(images.dtype)
        shown = masking.enlarged(self.cell)[:, None]  # True at visible pixels, (B, 1, H, W)
        # masked cells are 0, which is the mean color
        columns = [images, torch.where(shown, images, 0.0), torch.where(shown, images, predicted)]
        tiles = displayed(torch.stack(columns, dim=1).flatten(0, 1), self.backbone)  # (3 B, C, H, W), row by row
        return {"reconstruction": tiled(enlarged(tiles), len(columns))}

    def images_of(self, batch: Batch) -> Tensor:
        """Normalized ``batch["image"]``, (B, 3, H, W); float images are expected to be normalized already."""
        images = batch["image"]
        return images if images.is_floating_point() else self.backbone.normalize(images)

    def mask(self, images: Tensor, noise: Tensor | None = None, visible: Tensor | None = None) -> Masking:
        """The mask for `images` (B, C, H, W): from `visible` (bool, B, gh, gw) or `noise` (B, L), or else drawn."""
        if visible is not None:
            return masking_of(visible)
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        if noise is None:
            noise = mask_noise(self.config.mask_pattern, images.shape[0], grid, images.device)
        return random_masking(noise, self.keep(grid), grid)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (gh, gw) of cells for images of `size` (height, width) pixels. Raises ConfigError if none fits."""
        if size[0] % self.cell[0] or size[1] % self.cell[1]:
            below = [max(1, pixels // step) * step for pixels, step in zip(size, self.cell, strict=True)]
            raise ConfigError(
                f"backbone.size: {list(size)} is no multiple of the mask's cells, {list(self.cell)}; set it to {below}"
            )
        return size[0] // self.cell[0], size[1] // self.cell[1]

    def size_step(self) -> tuple[int, int]:
        """See the base class: a multiple of both the backbone's step and the cells of the mask."""
        height, width = self.backbone.size_step()
        return math.lcm(height, self.cell[0]), math.lcm(width, self.cell[1])

    def require_size(self, size: tuple[int, int]) -> None:
        self.keep(self.grid_of(size))

    def keep(self, grid: tuple[int, int]) -> int:
        """Number of visible cells in `grid`. Raises ConfigError if none or all would be visible."""
        cells, ratio = grid[0] * grid[1], self.config.mask_ratio
        keep = count_keep(cells, ratio, self.method, self.config.mask_count)
        if not 0 < keep < cells:
            remedy = f"set it between {1 / cells:.2g} and {1 - 1 / cells:.2g}" if cells > 1 else "it cannot be masked"
            raise ConfigError(
                f"task.mask_ratio: {ratio} leaves {keep} of {grid[0]}x{grid[1]} cells visible; "
                f"{remedy}, or use more pixels or smaller cells"
            )
        return keep


def patchify(images: Tensor, patch: tuple[int, int], ids: Tensor | None = None) -> Tensor:
    """(B, C, H, W) → patches (B, L, ph * pw * C) in raster order; only those in `ids` (B, M) if given."""
    if ids is not None:
        return gather_patches(images, ids, patch).permute(0, 1, 3, 4, 2).flatten(2)
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch[0] * patch[1] * channels)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(B, gh * gw, ph * pw * C) → (B, C, gh * ph, gw * pw); the inverse of `patchify`."""
    cells = patches.reshape(patches.shape[0], *grid, *patch, -1).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(patches.shape[0], -1, grid[0] * patch[0], grid[1] * patch[1])


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch: (..., n) → two tensors (..., 1), in at least float32.

    The variance is the unbiased one (over n - 1), plus 1e-6.
    """
    # cast first: in half precision, the result is off by more than 1 on patches of low contrast
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=1)
    return mean, (variance + _EPS).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalizes each patch (..., n) by its own mean and standard deviation, in at least float32."""
    mean, deviation = patch_statistics(patches)
    return (patches.to(mean.dtype) - mean) / deviation


def cell_targets(images: Tensor, cell: tuple[int, int], ids: Tensor, *, norm_pix: bool = True) -> Tensor:
    """Targets (B, M, ph * pw * C): the pixels of the cells `ids` (B, M); with `norm_pix`, each cell is normalized."""
    patches = patchify(images, cell, ids)
    return normalize_patches(patches) if norm_pix else patches


def squared_error(predictions: Tensor, targets: Tensor) -> StepOutput:
    """Mean squared error of predictions (B, M, n) for M cells, in at least float32.

    Logs ``explained``, an R² relative to predicting zero: 1 for perfect predictions, 0 for zeros.
    """
    dtype = torch.promote_types(torch.result_type(predictions, targets), torch.float32)  # also under autocast
    predictions, targets = predictions.to(dtype), targets.to(dtype)
    loss = (predictions - targets).square().mean()
    return StepOutput(loss, {"explained": 1 - loss.detach() / (targets.square().mean() + 1e-6)})


def cell_images(
    predictions: Tensor, images: Tensor, cell: tuple[int, int], grid: tuple[int, int], *, norm_pix: bool = True
) -> Tensor:
    """Predictions of all cells (B, L, ph * pw * C) → normalized images (B, C, H, W), no less precise than `images`."""
    predictions = predictions.to(torch.promote_types(predictions.dtype, images.dtype))
    if norm_pix:  # the prediction is relative to the cell's mean and deviation, so take these from the original
        mean, deviation = patch_statistics(patchify(images, cell))
        predictions = predictions * deviation + mean
    return unpatchify(predictions, cell, grid)
