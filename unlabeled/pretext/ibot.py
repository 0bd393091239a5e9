"""iBOT: DINO on pictures of which a part is hidden, and the same distillation for each hidden patch.

Zhou, Wei, Wang, Shen, Xie, Yuille, Kong, "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, arXiv
2111.07832; code of the authors: github.com/bytedance/ibot.

Shapes: B pictures, V = 2 + n crops of each, L = gh * gw places of the last feature map, M of them at most hidden, C
channels there, K prototypes.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.base import Batch, StepOutput, TaskConfig
from unlabeled.pretext.common.level_map import LevelMap
from unlabeled.pretext.common.masking import Pattern, mask_noise
from unlabeled.pretext.common.multi_crop import GLOBALS, by_crop, crop_sheet
from unlabeled.pretext.common.self_distillation import (
    HeadConfig,
    SelfDistillation,
    SelfDistillationConfig,
    assignment_figures,
    cross_view_loss,
    directions,
    scores,
)
from unlabeled.pretext.common.views import Part
from unlabeled.ssl.backbone import Backbone
from unlabeled.ssl.errors import ConfigError
from unlabeled.ssl.stem import find_stem, substituted

logger = logging.getLogger(__name__)


class IBOTConfig(SelfDistillationConfig):
    """Settings of iBOT; the defaults are the paper's (section 4)."""

    head: HeadConfig = HeadConfig(prototypes=8192)
    patch_head: HeadConfig | None = None
    """Head of the patches. None: they share that of whole crops, as published, or have one like it where the last map
    has another number of channels than pooled features."""
    masked_crops: Part = 0.5
    """Part of the large crops that have hidden places."""
    mask_ratio: tuple[Part, Part] = (0.1, 0.5)
    """Part of their places that is hidden, smallest and largest; uniform."""
    mask_pattern: Pattern = "block"
    """See `unlabeled.pretext.common.masking.mask_noise`."""
    patch_weight: float = Field(1.0, gt=0)
    """Of the loss of patches; that of whole crops weighs one."""

    @model_validator(mode="after")
    def _mask_ratio_is_ordered(self) -> IBOTConfig:
        if self.mask_ratio[0] > self.mask_ratio[1]:
            raise ValueError(f"mask_ratio {list(self.mask_ratio)} begins above its end; give [smallest, largest]")
        return self


class Hidden(NamedTuple):
    """The hidden places of N crops."""

    visible: Tensor
    """Bool (N, gh, gw)."""
    places: Tensor
    """Raster indices, int64 (N, M): the hidden places first, then others."""
    weights: Tensor
    """(N, M): one over their number for hidden places, 0 for others."""


class IBOT(SelfDistillation):
    """Self-distillation of whole crops and hidden patches.

    Submodules beside those of `SelfDistillation`: `mask_token`, and `patch_head` where it is not shared. Hidden places
    enter as in SimMIM: where the backbone turns each patch into a token of its own (see `unlabeled.ssl.stem`), as
    `mask_token` (1, 1, D) before positions are added; else as one learned colour (1, 3, 1, 1) in the picture, which the
    paper does not have. A place is one of the last feature map, so several patches in Swin and its like.
    """

    Config: ClassVar[type[TaskConfig]] = IBOTConfig
    requires: ClassVar[frozenset[str]] = frozenset({"pooled", "dense_map"})
    config: IBOTConfig

    def __init__(self, config: IBOTConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without feature maps, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        channels, self.stride = backbone.stages[-1]
        self.normed = LevelMap(backbone, -1, task="iBOT").normed
        self.stem = find_stem(backbone.model, backbone.input_size)
        self.level: Literal["token", "pixel"] = "pixel" if self.stem is None else "token"
        self.most_hidden(self.grid_of(backbone.input_size))
        self.mask_token = nn.Parameter(torch.zeros((1, 3, 1, 1) if self.stem is None else (1, 1, self.stem.dim)))
        self.shared = config.patch_head is None and channels == backbone.embed_dim
        patch_head = config.patch_head or config.head
        if not self.shared:
            self.add_head("patch_head", channels, patch_head)
        self.add_center("patch_head", patch_head.prototypes)
        place = "as one colour in the picture" if self.stem is None else f"as one token after {self.stem.name}"
        heads = "share a head" if self.shared else "have heads of their own"
        logger.info("ibot: hidden places enter %s %s; crops and patches %s", backbone.name, place, heads)

    def reached(self) -> set[str]:
        return self.backbone.reached_by_pooled() | self.backbone.reached_by_maps([-1])

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Places (gh, gw) of pictures of `size` pixels. Raises ConfigError when they do not fit."""
        if size[0] % self.stride or size[1] % self.stride:
            below = [max(1, pixels // self.stride) * self.stride for pixels in size]
            raise ConfigError(
                f"backbone.size: {list(size)} is no multiple of the stride of the last map, {self.stride}; "
                f"set it to {below}"
            )
        return size[0] // self.stride, size[1] // self.stride

    def most_hidden(self, grid: tuple[int, int]) -> int:
        """M: the largest number of hidden places of a crop. Raises ConfigError when no place would stay."""
        places = grid[0] * grid[1]
        if places < 2:
            raise ConfigError(
                f"backbone.size: the last map has one place only, of {self.stride} pixels, so nothing can be hidden; "
                "use more pixels or a backbone of smaller stride"
            )
        return min(max(round(self.config.mask_ratio[1] * places), 1), places - 1)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``noise`` (B, 2, L): the places with the largest are hidden. ``ratio`` (B, 2): how many, 0 for none."""
        crops = batch["globals"]
        pictures, device = len(crops), crops.device
        noise = mask_noise(
            self.config.mask_pattern, pictures * GLOBALS, self.grid_of((crops.shape[-2], crops.shape[-1])), device
        )
        low, high = self.config.mask_ratio
        ratio = low + (high - low) * torch.rand(pictures, GLOBALS, device=device)
        order = torch.rand(pictures * GLOBALS, device=device).argsort().argsort().view_as(ratio)
        chosen = order < max(1, round(self.config.masked_crops * order.numel()))
        return {"noise": noise.view(pictures, GLOBALS, -1), "ratio": ratio * chosen}

    def forward(self, batch: Batch, *, noise: Tensor | None = None, ratio: Tensor | None = None) -> StepOutput:
        """``globals`` (B, 2, 3, h, w) and ``locals`` (B, n, 3, h', w'), uint8 → DINO's loss, of a student that sees
        the large crops with hidden places, and the cross-entropy of these places.

        `noise` and `ratio` decide what is hidden; None: as `draw` gives them.
        """
        if noise is None or ratio is None:
            noise, ratio = self.draw(batch).values()
        large, *small = self.crops(batch)
        pictures = len(batch["globals"])
        hidden = self.hide(noise, ratio, (large.shape[-2], large.shape[-1]))
        assigned, assigned_patches = self.assigned(large, hidden)
        pooled, patches = self.encode(self.backbone, large, hidden.visible)
        pooled = torch.cat([pooled, *(self.backbone.pooled(crops) for crops in small)])
        units = directions(self.head, pooled)  # (V B, bottleneck)
        crop_loss = cross_view_loss(assigned, by_crop(self.log_predicted(self.head, units), pictures))
        head = self.head if self.shared else self.patch_head
        predicted = self.log_predicted(head, directions(head, _at(patches, hidden.places)))  # (2 B, M, K)
        patch_loss = hidden_loss(assigned_patches, predicted, hidden.weights)
        logs = {"crop_loss": crop_loss.detach(), "patch_loss": patch_loss.detach(), **assignment_figures(assigned)}
        return StepOutput(crop_loss + self.config.patch_weight * patch_loss, logs, units[:pictures].detach())

    @torch.no_grad()
    def assigned(self, crops: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """The teacher's assignments of whole large crops (2, B, K), and of the places that are hidden (2 B, M, K)."""
        teacher: Any = self.teacher["backbone"]
        pooled, patches = self.encode(teacher, crops)
        head = self.teacher["head" if self.shared else "patch_head"]
        units = directions(head, patches)  # (2 B, L, bottleneck)
        self.observe(scores(head, units.mean((0, 1))[None]), "patch_head")  # of all places: logits are linear in them
        return self.assigned_crops(pooled), self.assign(scores(head, _at(units, hidden.places)), "patch_head")

    def encode(self, backbone: Backbone, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised (N, 3, h, w), and what is `visible` (bool, N, gh, gw) → pooled (N, D) and places (N, L, C), after
        the network's final norm where it can be had. In one pass."""
        model: Any = backbone.model
        masking: Any = nullcontext()
        if visible is not None and self.stem is None:
            shown = _enlarged(visible, self.stride, self.stride)[:, None]
            images = torch.where(shown, images, self.mask_token.to(images.dtype))
        elif visible is not None and self.stem is not None:
            cells = _enlarged(visible, self.stride // self.stem.patch[0], self.stride // self.stem.patch[1])
            masking = substituted(model, self.stem, cells, self.mask_token)
        options = {"norm": True} if self.normed else {}
        with masking:
            features, maps = model.forward_intermediates(
                images, indices=[len(backbone.stages) - 1], output_fmt="NCHW", **options
            )
            pooled: Tensor = model.forward_head(features, pre_logits=True)
        places, grid = maps[0], self.grid_of((images.shape[-2], images.shape[-1]))
        if places.shape[-2:] != grid:  # networks without padding lose places at the edge
            places = F.interpolate(places, size=grid, mode="bilinear", align_corners=False)
        return pooled.flatten(1), places.flatten(2).transpose(1, 2)

    def hide(self, noise: Tensor, ratio: Tensor, size: tuple[int, int]) -> Hidden:
        """`noise` (B, 2, L) and `ratio` (B, 2) of large crops of `size` pixels → what is hidden, crop by crop."""
        grid = self.grid_of(size)
        noise, part = noise.transpose(0, 1).flatten(0, 1), ratio.t().flatten()  # (2 B, L), (2 B,)
        most, places = self.most_hidden(grid), noise.shape[1]
        count = (part * places).round().clamp(1, most) * (part > 0)
        order = noise.argsort(dim=1, descending=True)
        ranks = torch.arange(places, device=noise.device)
        masked = (ranks < count[:, None]).to(noise.dtype)  # (2 B, L), in this order
        visible = torch.ones_like(noise).scatter(1, order, 1 - masked) > 0
        weights = (masked / count.clamp(min=1)[:, None])[:, :most]
        return Hidden(visible.view(-1, *grid), order[:, :most], weights)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``crops``: a row a picture (the first 4): large crops, the same with hidden places in grey, small crops."""
        large = batch["globals"]
        draw = self.draw(batch)
        hidden = self.hide(draw["noise"], draw["ratio"], (large.shape[-2], large.shape[-1]))
        shown = by_crop(_enlarged(hidden.visible, self.stride, self.stride), len(large)).transpose(0, 1)
        masked = torch.where(shown[:, :, None], large, 128)
        return {"crops": crop_sheet([large, masked, *([batch["locals"]] if "locals" in batch else [])])}


def hidden_loss(assigned: Tensor, log_predicted: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of hidden places: mean over those of a crop, then over all N crops, also those without.

    `assigned` and `log_predicted` (N, M, K), `weights` (N, M) as in `Hidden`. Source: equation 2 of iBOT.
    """
    entropies = -(assigned * log_predicted).sum(-1)
    return (entropies * weights).sum() / len(weights)


def _at(tokens: Tensor, places: Tensor) -> Tensor:
    """(N, L, C) and places (N, M) → (N, M, C)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def _enlarged(cells: Tensor, rows: int, columns: int) -> Tensor:
    """(N, gh, gw) with each cell repeated: (N, gh * rows, gw * columns)."""
    return cells.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
