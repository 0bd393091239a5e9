"""The *masked_stages* capability: a network of convolution stages and a transformer, run on its visible cells only.

A cell is the patch of the last stage, and places of an earlier stage lie inside one cell. Everything but the depthwise
convolutions works inside cells, so the network is given the pixels of the K visible cells, (B, K, c, c, C), and never
reads the others. Only around a depthwise convolution do they become a map: their places are put into zeros, convolved,
and taken out again. At visible places that is what masking the whole map before each such convolution gives
(arXiv 2205.03892, section 3.2), without computing the rest; ``execution="dense"`` does that, to compare with.

Shapes: B images, L = gh * gw cells in raster order, K visible ones, c places along a cell's side, C and D channels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking
from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, gather_tokens, scatter_tokens
from unlabeled.ssl.backbones.masked.tokens import gather_patches
from unlabeled.ssl.backbones.networks.convmae import ConvViT, Mix, convolve

Execution = Literal["gathered", "dense"]


def masked_stages_missing_reason(backbone: Backbone) -> str | None:
    """Why this backbone cannot run on visible cells stage by stage, in a few words; None when it can."""
    if type(backbone.model) is not ConvViT:
        return "only convmae_* have convolution stages that mask themselves before a transformer"
    return None


class Stages(NamedTuple):
    """What the visible cells give, in the order of their ids."""

    first: Tensor
    """Places of the first stage, (B, K, c1, c1, C1)."""
    second: Tensor
    """Places of the second stage, (B, K, c2, c2, C2)."""
    tokens: Tensor
    """The transformer's tokens before its last norm, (B, K, D)."""


class StageEncoder:
    """Runs the network inside `backbone` on visible cells; a view without parameters or state of its own.

    Build it where it is used (it costs nothing), after ``backbone.require({"masked_stages"}, ...)`` has passed.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model = cast(ConvViT, backbone.model)

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels of a cell, (height, width)."""
        return self.model.strides[-1], self.model.strides[-1]

    @property
    def sides(self) -> tuple[int, int]:
        """Places along a cell's side in the first and in the second stage."""
        first, second, cell = self.model.strides
        return cell // first, cell // second

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.model.patch_embed1.proj.in_channels

    def encode(self, x: Tensor, masking: Masking, execution: Execution = "gathered") -> Stages:
        """Normalized (B, C, gh * 16, gw * 16) and its mask → what each of the stages gives at visible cells.

        ``is_gathered`` computes these only, ``dense`` everything. The rest gets no gradient either way.
        """
        cells = Cells(masking)
        if execution == "gathered":
            pixels = _cells_of(x, masking, self.cell[0])
            mixes = [_at_visible_positions(cells, side) for side in self.sides]
            first, second = self.model.conv_stages(pixels, (mixes[0], mixes[1]))
        else:
            mixes = [_times_mask(cells, side) for side in self.sides]
            maps = self.model.conv_stages(x.permute(0, 2, 3, 1), (mixes[0], mixes[1]))
            first, second = (
                _cells_of(positions.permute(0, 3, 1, 2), masking, side)
                for positions, side in zip(maps, self.sides, strict=True)
            )
        tokens = self.model.embed(second).flatten(1, 3)  # (B, K, 1, 1, D) → (B, K, D)
        tokens = tokens + F.embedding(masking.ids_keep, self.model.positions(masking.grid))
        return Stages(first, second, self.model.transform(tokens))

    def unreached(self) -> list[nn.Parameter]:
        """Parameters of the model that neither `encode` nor its last norm uses (a norm after pooling, a head)."""
        return [p for name, p in self.model.named_parameters() if name.startswith(("fc_norm.", "head."))]


def _cells_of(x: Tensor, masking: Masking, side: int) -> Tensor:
    """(B, C, gh * side, gw * side) → the visible cells, (B, K, side, side, C)."""
    return gather_patches(x, masking.ids_keep, (side, side)).permute(0, 1, 3, 4, 2)


def _at_visible_positions(cells: Cells, side: int) -> Mix:
    """The `Mix` of visible cells alone, (B, K, side, side, C): all other places of the map are zero."""

    def mix(conv: nn.Conv2d, x: Tensor) -> Tensor:
        mixed = conv(scatter_tokens(x.flatten(1, 3), cells, (side, side)))
        return gather_tokens(mixed, cells, (side, side)).view(x.shape)

    return mix


def _times_mask(cells: Cells, side: int) -> Mix:
    """The `Mix` of whole maps, (B, H, W, C), as the authors compute it: masked places are multiplied by zero."""
    visible = cells.active((side, side))[:, 0, :, :, None]
    return lambda conv, x: convolve(conv, x * visible)
