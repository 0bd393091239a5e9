"""Crops with hidden places: which, how they enter the network, and what it gives for them (iBOT, arXiv 2111.07832).

Where a backbone turns each patch into a token of its own (see `unlabeled.ssl.backbones.stem`), hidden patches are a
learned token before positions are added; else one learned color in the image, which the paper does not have. A place
is one of the last feature map, so several patches in Swin and its like, or a part of one under `PatchMaskConfig.fine`.

Shapes: N crops, L = gh * gw places, M of them hidden over all crops, D features, C channels of a place.
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
    """The hidden places of N crops."""

    visible: Tensor
    """Bool (N, gh, gw)."""
    rows: Tensor
    """int64 (M,): crop * L + place of each hidden place, crop by crop."""
    weights: Tensor
    """(M,): one over the number of hidden places of its crop."""


class PatchMasker:
    """Hides places of the crops of one architecture and reads what it gives for them.

    Attributes: `stem` (None where hidden places are a color), `normed` (whether places come after the network's final
    norm).
    """

    def __init__(self, config: PatchMaskConfig, backbone: Backbone, *, task: str) -> None:
        """Raises CapabilityError for a backbone without feature maps, or of one place, and ConfigError for places that
        are smaller than a patch."""
        self.config, self.task = config, task
        self.stem = find_stem(backbone.model, backbone.input_size)
        self.level = LevelMap(backbone, -1, task=task)
        self.normed = self.level.normed
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        size, grid = backbone.input_size, self.grid_of(backbone, backbone.input_size)
        if self.stem is not None and any(positions > self._patches(size)[axis] for axis, positions in enumerate(grid)):
            raise ConfigError(
                f"task.fine: {config.fine} gives {grid[0]}x{grid[1]} places, more than the "
                f"{self._patches(size)[0]}x{self._patches(size)[1]} patches of {backbone.name}; give a smaller number"
            )

    def new_token(self) -> nn.Parameter:
        """What hidden places are before training: (1, 1, D) for a token, (1, 3, 1, 1), at zero, for a color.

        A token is not at zero, as published, but a little off it: norms of places that are zero throughout multiply
        gradients by 1 / sqrt(eps) each, which overflows in networks that norm what their blocks give (FocalNet).
        """
        if self.stem is None:
            return nn.Parameter(torch.zeros(1, 3, 1, 1))
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.stem.dim), std=0.02))

    @property
    def entry(self) -> str:
        """Where hidden places enter, in words."""
        return "as one color in the image" if self.stem is None else f"as one token after {self.stem.name}"

    def grid_of(self, backbone: Backbone, size: tuple[int, int]) -> tuple[int, int]:
        """Places (gh, gw) of images of `size` pixels. Raises CapabilityError when there is only one."""
        if size not in self._grids:
            rows, columns = self.level.grid_of(backbone, size)
            self._grids[size] = rows * self.config.fine, columns * self.config.fine
        grid = self._grids[size]
        if grid == (1, 1):
            raise CapabilityError(
                f"backbone: {backbone.name} cannot do {self.task}: its last map has one place for {size[0]}x{size[1]} "
                "pixels, so nothing can be hidden; use a larger backbone.size or task.fine=2"
            )
        return grid

    def _patches(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (rows, columns) of the stem."""
        assert self.stem is not None
        return size[0] // self.stem.patch[0], size[1] // self.stem.patch[1]

    def draw(self, backbone: Backbone, crops: Tensor) -> tuple[Tensor, Tensor]:
        """For crops (B, V, 3, h, w): noise (B, V, L), of which the largest values are hidden, and the ratio (B, V) of
        hidden places, 0 for none."""
        images, views = crops.shape[:2]
        grid = self.grid_of(backbone, (crops.shape[-2], crops.shape[-1]))
        noise = mask_noise(self.config.mask_pattern, images * views, grid, crops.device)
        low, high = self.config.mask_ratio
        # ranks of noise and not a coin for each: exactly `masked` crops of every batch have hidden places
        order = torch.rand(images * views, device=crops.device).argsort().argsort().view(images, views)
        masked = max(1, round(self.config.masked_crops * order.numel()))
        part = torch.rand(images, views, device=crops.device)
        if self.config.mask_spread == "even":
            part = (order + part) / masked
        return noise.view(images, views, -1), (low + (high - low) * part) * (order < masked)

    def hide(self, backbone: Backbone, noise: Tensor, ratio: Tensor, crops: Tensor) -> MaskedPatches:
        """`noise` (B, V, L) and `ratio` (B, V) of `crops` (..., h, w) → what is hidden, crop by crop.

        At least one place of a crop that has hidden ones at all, and never all of them.
        """
        grid = self.grid_of(backbone, (crops.shape[-2], crops.shape[-1]))
        noise, part = noise.transpose(0, 1).flatten(0, 1), ratio.t().flatten()  # (V B, L), (V B,)
        positions = noise.shape[1]
        most = min(max(round(self.config.mask_ratio[1] * positions), 1), positions - 1)
        count = (part * positions).round().clamp(1, most) * (part > 0)
        ranks = noise.argsort(dim=1, descending=True).argsort(dim=1)
        masked = ranks < count[:, None]  # (V B, L); crops hide different numbers, unlike in masked autoencoders
        rows = masked.flatten().nonzero().flatten()  # waits for the device, which costs less than heads of unused rows
        weights = (1 / count.clamp(min=1))[rows // positions].to(noise.dtype)
        return MaskedPatches(~masked.view(-1, *grid), rows, weights)

    def encode(
        self, backbone: Backbone, images: Tensor, visible: Tensor | None = None, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalized (N, 3, h, w), what is `visible` (bool, N, gh, gw) and what stands for the rest → pooled (N, D)
        and places (N, L, C), after the network's final norm where it can be had. In one pass.

        `backbone` may be a sub-network, which takes the token's first channels.
        """
        model: Any = backbone.model
        masking: Any = nullcontext()
        size = (images.shape[-2], images.shape[-1])
        if visible is not None and token is not None:
            if self.stem is None:  # no layer with a token a patch: a color in the image instead
                images = torch.where(enlarged(visible, size)[:, None], images, token.to(images.dtype))
            else:
                masking = substituted(model, self.stem, enlarged(visible, self._patches(size)), token)
        options = {"norm": True} if self.normed else {}
        with masking:
            # not `pooled` and `map` of the backbone, which would be two passes
            features, maps = model.forward_intermediates(
                images, indices=[len(backbone.stages) - 1], output_fmt="NCHW", **options
            )
            pooled: Tensor = model.forward_head(features, pre_logits=True)
        positions, fine = maps[0], self.config.fine  # (N, C, gh / fine, gw / fine)
        positions = positions.repeat_interleave(fine, 2).repeat_interleave(fine, 3) if fine > 1 else positions
        return pooled.flatten(1), positions.flatten(2).transpose(1, 2)  # (N, D), (N, L, C)

    def sheet(self, backbone: Backbone, batch: Batch, noise: Tensor, ratio: Tensor) -> Tensor:
        """A row an image (the first 4): large crops, the same with hidden places in gray, small crops."""
        large = batch["globals"]
        size = (large.shape[-2], large.shape[-1])
        hidden = self.hide(backbone, noise, ratio, large)
        masked = torch.where(enlarged(hidden.visible, size)[:, None], crop_major(large), 128)
        kinds = [large, by_crop(masked, len(large)).transpose(0, 1), *([batch["locals"]] if "locals" in batch else [])]
        return crop_sheet(kinds)


def at_positions(positions: Tensor, hidden: MaskedPatches) -> Tensor:
    """(N, L, C) → (M, C), those that are hidden."""
    return positions.flatten(0, 1).index_select(0, hidden.rows)


def enlarged(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool (N, gh, gw) → bool (N, *size), each cell as large as its share."""
    return F.interpolate(cells[:, None].float(), size=size, mode="nearest-exact")[:, 0] > 0
