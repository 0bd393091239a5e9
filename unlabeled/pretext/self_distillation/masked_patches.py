"""Masks patches of crops, feeds masked crops to a backbone, and reads the features of patches (iBOT, arXiv 2111.07832).

A patch here is one position of the last feature map: several tokens of the stem in Swin and similar backbones, or a
fraction of a position if `PatchMaskConfig.fine` is above 1. If the backbone has one token per image patch (see
`unlabeled.ssl.backbones.stem`), a learned token replaces masked ones before position embeddings are added. For other
backbones, masked patches of the image are filled with one learned color, which is not in the paper.

Shapes: N crops, L = gh * gw patches of each, M masked patches over all crops, D features, C channels of a patch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.multi_crop import crop_sheet
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.self_distillation.self_distillation import by_crop, crop_major
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.level_map import LevelMap
from unlabeled.ssl.backbones.masked.masking import Pattern, mask_noise
from unlabeled.ssl.backbones.stem import find_stem, substituted
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.task import Batch, TaskConfig

Spread = Literal["uniform", "even"]


class PatchMaskConfig(TaskConfig):
    """What is masked; the defaults are iBOT's."""

    masked_crops: Fraction = 0.5
    """Fraction of the large crops that have masked patches. [fraction]"""
    mask_ratio: tuple[Fraction, Fraction] = (0.1, 0.5)
    """Smallest and largest fraction of the patches of such a crop that is masked. [fraction]"""
    mask_spread: Spread = "uniform"
    """How mask ratios are drawn. uniform: independently. even: spread evenly over the range within each batch
    (DINOv2)."""
    mask_pattern: Pattern = "block"
    """random: each patch is masked independently. block: rectangles are masked. grid: a regular pattern is masked."""
    fine: int = Field(1, ge=1)
    """Mask at a grid this many times finer than the last feature map; POA uses 2 for networks of stride 32."""

    @model_validator(mode="after")
    def _mask_ratio_is_ordered(self) -> PatchMaskConfig:
        if self.mask_ratio[0] > self.mask_ratio[1]:
            raise ValueError(f"mask_ratio {list(self.mask_ratio)} begins above its end; give [smallest, largest]")
        return self


class MaskedPatches(NamedTuple):
    """The masked patches of N crops."""

    visible: Tensor
    """Bool (N, gh, gw)."""
    indices: Tensor
    """int64 (M,): crop * L + position of each masked patch, crop by crop."""
    weights: Tensor
    """(M,): 1 / number of masked patches in the same crop."""


class PatchMasker:
    """Masks patches for backbones of one architecture and reads the features of patches.

    Attributes: `stem` (None if masked patches are a color), `normed` (whether features of patches come after the
    backbone's final norm).
    """

    def __init__(self, config: PatchMaskConfig, backbone: Backbone, *, task: str) -> None:
        """`task`: its name, for messages.

        Raises CapabilityError for a backbone without feature maps or with a single position, and ConfigError for
        patches that are smaller than a token of the stem.
        """
        self.config, self.task = config, task
        self.stem = find_stem(backbone.model, backbone.input_size)
        self.last_map = LevelMap(backbone, -1, task=task)
        self.normed = self.last_map.normed
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        size, grid = backbone.input_size, self.grid_of(backbone, backbone.input_size)
        if self.stem is not None and any(count > self._stem_grid(size)[axis] for axis, count in enumerate(grid)):
            rows, columns = self._stem_grid(size)
            raise ConfigError(
                f"task.fine: {config.fine} gives {grid[0]}x{grid[1]} positions, more than the "
                f"{rows}x{columns} patches of {backbone.name}; give a smaller number"
            )

    def new_token(self) -> nn.Parameter:
        """The initial mask token: (1, 1, D), or a color (1, 3, 1, 1) for backbones without one token per patch."""
        if self.stem is None:
            return nn.Parameter(torch.zeros(1, 3, 1, 1))
        # not zero, unlike in the paper: at positions that are zero throughout, each norm multiplies gradients by
        # 1 / sqrt(eps), which overflows in backbones that normalize the output of their blocks (FocalNet)
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.stem.dim), std=0.02))

    @property
    def entry(self) -> str:
        """How masked patches enter the backbone, for the log."""
        return "as one color in the image" if self.stem is None else f"as one token after {self.stem.name}"

    def grid_of(self, backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (gh, gw) of patches for images of `size` pixels. Raises CapabilityError for a single patch."""
        if size not in self._grids:  # finding it runs the backbone once
            rows, columns = self.last_map.grid_of(backbone, size)
            self._grids[size] = rows * self.config.fine, columns * self.config.fine
        grid = self._grids[size]
        if grid == (1, 1):
            raise CapabilityError(
                f"backbone: {backbone.name} cannot do {self.task}: its last map has one position for "
                f"{size[0]}x{size[1]} pixels, so nothing can be masked; use a larger backbone.size or task.fine=2"
            )
        return grid

    def _stem_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (rows, columns) of the stem's tokens, which may be finer than that of patches."""
        assert self.stem is not None
        return size[0] // self.stem.patch[0], size[1] // self.stem.patch[1]

    def draw(self, backbone: Backbone, crops: Tensor) -> tuple[Tensor, Tensor]:
        """For crops (B, V, 3, h, w): noise (B, V, L), whose largest values are masked, and the mask ratio (B, V) of
        each crop, 0 for crops that are not masked."""
        images, views = crops.shape[:2]
        grid = self.grid_of(backbone, (crops.shape[-2], crops.shape[-1]))
        noise = mask_noise(self.config.mask_pattern, images * views, grid, crops.device)
        low, high = self.config.mask_ratio
        # a random permutation rather than a coin flip per crop: every batch has exactly `masked_crops` masked crops
        order = torch.rand(images * views, device=crops.device).argsort().argsort().view(images, views)
        masked_crops = max(1, round(self.config.masked_crops * order.numel()))
        fraction = torch.rand(images, views, device=crops.device)
        if self.config.mask_spread == "even":  # one crop in each of `masked_crops` equal intervals
            fraction = (order + fraction) / masked_crops
        return noise.view(images, views, -1), (low + (high - low) * fraction) * (order < masked_crops)

    def mask(self, backbone: Backbone, noise: Tensor, ratio: Tensor, crops: Tensor) -> MaskedPatches:
        """`noise` (B, V, L) and `ratio` (B, V) for `crops` (..., h, w) → the masked patches, crop by crop.

        A crop with a ratio above 0 has at least one masked patch and at least one visible one.
        """
        grid = self.grid_of(backbone, (crops.shape[-2], crops.shape[-1]))
        # to the order of crops in a backbone's batch: the first crop of each image, then the second of each
        noise, ratios = noise.transpose(0, 1).flatten(0, 1), ratio.t().flatten()  # (V B, L), (V B,)
        patches = noise.shape[1]
        most = min(max(round(self.config.mask_ratio[1] * patches), 1), patches - 1)
        count = (ratios * patches).round().clamp(1, most) * (ratios > 0)
        # mask the `count` patches with the largest noise; unlike in masked autoencoders, it differs between crops
        ranks = noise.argsort(dim=1, descending=True).argsort(dim=1)
        masked = ranks < count[:, None]  # (V B, L)
        # `nonzero` waits for the device, which costs less than running heads on unmasked patches
        indices = masked.flatten().nonzero().flatten()
        weights = (1 / count.clamp(min=1))[indices // patches].to(noise.dtype)
        return MaskedPatches(~masked.view(-1, *grid), indices, weights)

    def encode(
        self, backbone: Backbone, images: Tensor, visible: Tensor | None = None, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalized (N, 3, h, w) → pooled features (N, D) and features of all patches (N, L, C), in one pass.

        `token` replaces patches that are not `visible` (bool, N, gh, gw). Features of patches come after the backbone's
        final norm if the backbone supports that. `backbone` may be a sub-network, which takes the token's first
        channels.
        """
        model: Any = backbone.model
        masking: Any = nullcontext()
        size = (images.shape[-2], images.shape[-1])
        if visible is not None and token is not None:
            if self.stem is None:  # no layer outputs one token per patch: fill the image with a color instead
                images = torch.where(enlarged(visible, size)[:, None], images, token.to(images.dtype))
            else:
                masking = substituted(model, self.stem, enlarged(visible, self._stem_grid(size)), token)
        options = {"norm": True} if self.normed else {}
        with masking:
            # `pooled` and `maps` of the backbone would be two passes
            features, maps = model.forward_intermediates(
                images, indices=[len(backbone.stages) - 1], output_fmt="NCHW", **options
            )
            pooled: Tensor = model.forward_head(features, pre_logits=True)
        last, fine = maps[0], self.config.fine  # (N, C, gh / fine, gw / fine)
        # patches that share a position of the map have the same features
        last = last.repeat_interleave(fine, 2).repeat_interleave(fine, 3) if fine > 1 else last
        return pooled.flatten(1), last.flatten(2).transpose(1, 2)  # (N, D), (N, L, C)

    def sheet(self, backbone: Backbone, batch: Batch, noise: Tensor, ratio: Tensor) -> Tensor:
        """One row per image (the first 4): large crops, the same with masked patches in gray, small crops."""
        large = batch["globals"]
        size = (large.shape[-2], large.shape[-1])
        masked = self.mask(backbone, noise, ratio, large)
        shown = torch.where(enlarged(masked.visible, size)[:, None], crop_major(large), 128)
        kinds = [large, by_crop(shown, len(large)).transpose(0, 1), *([batch["locals"]] if "locals" in batch else [])]
        return crop_sheet(kinds)


def at_masked(patches: Tensor, masked: MaskedPatches) -> Tensor:
    """Features of all patches (N, L, C) → those of the masked ones (M, C)."""
    return patches.flatten(0, 1).index_select(0, masked.indices)


def enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool (N, gh, gw) → bool (N, *size): resizes a mask with nearest-neighbor interpolation."""
    # through float, as `interpolate` does not take bool; "nearest-exact" keeps cells of equal size
    return F.interpolate(mask[:, None].float(), size=size, mode="nearest-exact")[:, 0] > 0
