"""The *masked_stages* capability: a backbone of convolution stages and a transformer, run on visible cells only.

A cell is one patch of the last stage, so each position of an earlier stage lies inside one cell. Everything but the
depthwise convolutions works inside cells. The model therefore gets the pixels of the K visible cells,
(B, K, c, c, C), and never reads the others. Only for a depthwise convolution are the positions scattered into a map of
zeros, convolved, and gathered again. At visible positions, the result equals masking the dense map before each such
convolution (arXiv 2205.03892, section 3.2), without computing the rest. ``execution="dense"`` does the latter, for
comparison.

Shapes: B images, L = gh * gw cells in raster order, K visible ones, c positions along a cell's side, C and D channels.
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
    """Why this backbone cannot run on visible cells stage by stage, in a few words; None if it can."""
    if type(backbone.model) is not ConvViT:
        return "only convmae_* have convolution stages that mask themselves before a transformer"
    return None


class Stages(NamedTuple):
    """Outputs of the stages at visible cells, in the order of their ids."""

    first: Tensor
    """Positions of the first stage, (B, K, c1, c1, C1)."""
    second: Tensor
    """Positions of the second stage, (B, K, c2, c2, C2)."""
    tokens: Tensor
    """Tokens of the transformer before its last norm, (B, K, D)."""


class StageEncoder:
    """Runs the model inside `backbone` on visible cells; a wrapper without parameters or state of its own.

    Create it where you need it (this costs nothing), after ``backbone.require({"masked_stages"}, ...)`` has passed.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model = cast(ConvViT, backbone.model)

    @property
    def cell(self) -> tuple[int, int]:
        """Size of a cell in pixels, (height, width)."""
        return self.model.strides[-1], self.model.strides[-1]

    @property
    def sides(self) -> tuple[int, int]:
        """Positions along a cell's side, in the first and in the second stage."""
        first, second, cell = self.model.strides
        return cell // first, cell // second

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.model.patch_embed1.proj.in_channels

    def encode(self, x: Tensor, masking: Masking, execution: Execution = "gathered") -> Stages:
        """Normalized images (B, C, gh * 16, gw * 16) and their mask → outputs of all stages at visible cells.

        ``gathered`` computes only these, ``dense`` computes the full maps. Masked cells get no gradient either way.
        """
        cells = Cells(masking)
        if execution == "gathered":
            pixels = _cells_of(x, masking, self.cell[0])
            mixes = [_at_visible_positions(cells, side) for side in self.sides]
            first, second = self.model.conv_stages(pixels, (mixes[0], mixes[1]))
        else:
            # compute dense maps, then take the visible cells out of them
            mixes = [_times_mask(cells, side) for side in self.sides]
            maps = self.model.conv_stages(x.permute(0, 2, 3, 1), (mixes[0], mixes[1]))
            first, second = (
                _cells_of(features.permute(0, 3, 1, 2), masking, side)
                for features, side in zip(maps, self.sides, strict=True)
            )
        # the last embedding sees one patch per cell, so both executions continue with gathered cells
        tokens = self.model.embed(second).flatten(1, 3)  # (B, K, 1, 1, D) → (B, K, D)
        tokens = tokens + F.embedding(masking.ids_keep, self.model.positions(masking.grid))
        return Stages(first, second, self.model.transform(tokens))

    def unreached(self) -> list[nn.Parameter]:
        """Parameters of the model that neither `encode` nor the last norm uses (a norm after pooling, a head)."""
        # one of the two norms is an Identity, depending on the model's `fc_norm`
        return [p for name, p in self.model.named_parameters() if name.startswith(("fc_norm.", "head."))]


def _cells_of(x: Tensor, masking: Masking, side: int) -> Tensor:
    """(B, C, gh * side, gw * side) → the visible cells, (B, K, side, side, C)."""
    return gather_patches(x, masking.ids_keep, (side, side)).permute(0, 1, 3, 4, 2)


def _at_visible_positions(cells: Cells, side: int) -> Mix:
    """The `Mix` for visible cells, (B, K, side, side, C): all other positions of the map are zero."""

    def mix(conv: nn.Conv2d, x: Tensor) -> Tensor:
        mixed = conv(scatter_tokens(x.flatten(1, 3), cells, (side, side)))
        return gather_tokens(mixed, cells, (side, side)).view(x.shape)

    return mix


def _times_mask(cells: Cells, side: int) -> Mix:
    """The `Mix` for dense maps, (B, H, W, C), as the authors compute it: masked positions are multiplied by zero."""
    visible = cells.active((side, side))[:, 0, :, :, None]
    return lambda conv, x: convolve(conv, x * visible)
