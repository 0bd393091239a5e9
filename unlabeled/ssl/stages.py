"""The *masked_stages* capability: a network of convolution stages and a transformer, run on its visible cells only.

A cell is the patch of the last stage, and places of an earlier stage lie inside one cell. Everything but the depthwise
convolutions works inside cells, so the network is given the pixels of the K visible cells, (B, K, c, c, C), and never
reads the others. Only around a depthwise convolution do they become a map: their places are put into zeros, convolved,
and taken out again. That is what masking the whole map before each such convolution gives at the visible places
(arXiv 2205.03892, section 3.2), without computing the rest; `execution="dense"` does the latter, to compare with.

Shapes: B images, L = gh * gw cells in raster order, K visible ones, c places along a cell's side, C and D channels.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbone import Backbone
from unlabeled.ssl.networks.convmae import ConvViT, Mix, convolve
from unlabeled.ssl.tokens import gather_patches

Execution = Literal["gathered", "dense"]


def lacks_masked_stages(backbone: Backbone) -> str | None:
    """Why this backbone cannot run on visible cells stage by stage, in a few words; None when it can."""
    if type(backbone.model) is not ConvViT:
        return "only the networks convmae_* have stages of masked convolutions before a transformer"
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
        """Places along a cell's side in the first and the second stage."""
        first, second, cell = self.model.strides
        return cell // first, cell // second

    @property
    def channels(self) -> int:
        """Channels of a picture."""
        return self.model.patch_embed1.proj.in_channels

    def encode(self, x: Tensor, ids_keep: Tensor, execution: Execution = "gathered") -> Stages:
        """Normalised (B, C, H, W) and raster indices of visible cells (B, K) → what each of the stages gives there.

        The sides of the pictures are multiples of the cell's.
        """
        size, grid = self.model.strides[-1], (x.shape[-2] // self.model.strides[-1], x.shape[-1] // self.cell[1])
        if execution == "gathered":
            pixels = gather_patches(x, ids_keep, (size, size)).permute(0, 1, 3, 4, 2)  # (B, K, 16, 16, 3)
            mixes = [_gathered(ids_keep, grid, side) for side in self.sides]
            first, second = self.model.conv_stages(pixels, (mixes[0], mixes[1]))
        else:
            mixes = [_masked(ids_keep, grid, side) for side in self.sides]
            maps = self.model.conv_stages(x.permute(0, 2, 3, 1), (mixes[0], mixes[1]))
            first, second = (_cells(map_, ids_keep, grid) for map_ in maps)
        tokens = self.model.embed(second).flatten(1, 3)  # (B, K, 1, 1, D) → (B, K, D)
        tokens = tokens + F.embedding(ids_keep, self.model.positions(grid))
        return Stages(first, second, self.model.transform(tokens))

    def unreached(self) -> list[nn.Parameter]:
        """Parameters of the model that `encode` and its last norm do not use (norm after pooling, head)."""
        return [p for name, p in self.model.named_parameters() if name.startswith(("fc_norm", "head"))]


def _gathered(ids: Tensor, grid: tuple[int, int], side: int) -> Mix:
    """The `Mix` of visible cells alone, (B, K, side, side, C): all other places of the map are zero."""
    shape = (ids.shape[0], grid[0] * side, grid[1] * side)
    index = _places(ids, grid, side)

    def mix(conv: nn.Conv2d, x: Tensor) -> Tensor:
        full = _Scatter.apply(x.flatten(0, -2), index, shape[0] * shape[1] * shape[2])
        mixed = convolve(conv, cast(Tensor, full).view(*shape, -1)).flatten(0, 2)
        return cast(Tensor, _Gather.apply(mixed, index)).view(x.shape)

    return mix


def _masked(ids: Tensor, grid: tuple[int, int], side: int) -> Mix:
    """The `Mix` of whole maps that the authors use: a product with the visible places, then the convolution."""
    visible = torch.zeros(ids.shape[0], grid[0] * grid[1], device=ids.device).scatter_(1, ids, 1.0).view(-1, *grid)
    places = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]  # (B, H, W, 1)
    return lambda conv, x: convolve(conv, x * places.to(x.dtype))


def _cells(map_: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Map (B, H, W, C) → its cells `ids`, (B, K, side, side, C)."""
    side = map_.shape[1] // grid[0]
    return gather_patches(map_.permute(0, 3, 1, 2), ids, (side, side)).permute(0, 1, 3, 4, 2)


def _places(ids: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Where the places of the cells `ids` (B, K) lie in a flat map (B * H * W): (B * K * side * side,), all different."""
    height, width = grid[0] * side, grid[1] * side
    along = torch.arange(side, device=ids.device)
    rows = (ids // grid[1] * side)[..., None] + along  # (B, K, side)
    columns = (ids % grid[1] * side)[..., None] + along
    flat = rows[..., :, None] * width + columns[..., None, :]  # (B, K, side, side)
    pictures = torch.arange(ids.shape[0], device=ids.device) * (height * width)
    return (pictures.view(-1, 1, 1, 1) + flat).flatten()


class _Gather(torch.autograd.Function):
    """Rows `index` of (N, C). They are all different, so its gradient is a copy and needs no atomic sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Scatter.apply(grads[0], ctx.saved_tensors[0], ctx.rows), None


class _Scatter(torch.autograd.Function):
    """Puts (M, C) into the rows `index` of zeros (N, C): the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Gather.apply(grads[0], ctx.saved_tensors[0]), None, None
