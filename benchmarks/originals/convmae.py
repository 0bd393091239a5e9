"""ConvMAE (arXiv 2205.03892): convolution stages and skips on whole maps, the mask inside each convolution block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.originals.transformer import decode, reconstruction_loss, run_blocks, shuffle, taken


def original_loss(task: Any, images: Tensor, noise: Tensor) -> Tensor:
    """See the package. For the hybrid of `unlabeled.ssl.backbones.networks.convmae`."""
    model, cell = task.backbone.model, task.cell
    grid = task.grid_of(tuple(images.shape[-2:]))
    masks = shuffle(noise, task.keep(grid))
    visible = (1 - masks.removed).view(-1, 1, *grid)
    first = _run(model.blocks1, _embed(images, model.patch_embed1), visible)
    second = _run(model.blocks2, _embed(first, model.patch_embed2), visible)
    x = model.patch_embed4(_embed(second, model.patch_embed3).flatten(2).transpose(1, 2)) + model.pos_embed
    x = run_blocks(taken(x, masks.keep), model.blocks3)
    for stage, layer in ((first, task.stage1_output_decode), (second, task.stage2_output_decode)):
        x = x + taken(_patch_convolution(stage, layer).flatten(2).transpose(1, 2), masks.keep)
    predicted = decode(task.decoder, model.norm(x), masks.restore, prefix=0)
    return reconstruction_loss(predicted, images, cell, masks.removed)


def _patch_convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A dense convolution whose stride is its kernel (our layer of that form wants channels last)."""
    return F.conv2d(x, layer.weight, layer.bias, stride=layer.kernel_size)


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """Layer norm over the channels of (B, C, h, w)."""
    result: Tensor = norm(x.permute(0, 2, 3, 1))
    return result.permute(0, 3, 1, 2)


def _embed(x: Tensor, embed: Any) -> Tensor:
    return F.gelu(_normed(_patch_convolution(x, embed.proj), embed.norm))


def _run(blocks: nn.ModuleList, x: Tensor, visible: Tensor) -> Tensor:
    """Convolution blocks over a whole map (B, C, h, w); `visible` is 1 or 0, float (B, 1, gh, gw)."""
    mask = visible.repeat_interleave(x.shape[2] // visible.shape[2], dim=2)
    mask = mask.repeat_interleave(x.shape[3] // visible.shape[3], dim=3)
    for block in blocks:
        parts: Any = block
        inner = mask.to(x.dtype) * _patch_convolution(_normed(x, parts.norm1), parts.conv1)
        x = x + _patch_convolution(parts.attn(inner), parts.conv2)
        hidden = F.gelu(_patch_convolution(_normed(x, parts.norm2), parts.mlp.fc1))
        x = x + _patch_convolution(hidden, parts.mlp.fc2)
    return x
