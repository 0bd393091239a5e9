"""FCMAE (arXiv 2301.00808): ConvNeXt V2 on whole maps, masked before and after each spatial convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.originals.transformer import reconstruction_loss, shuffle


def original_loss(task: Any, images: Tensor, noise: Tensor) -> Tensor:
    """See the package. For timm's ``ConvNeXt`` with response norms."""
    model, cell = task.backbone.model, task.cell
    grid = task.grid_of(tuple(images.shape[-2:]))
    masks = shuffle(noise, task.keep(grid))
    removed = masks.removed.view(-1, 1, *grid)
    x = _encode(model, images, 1 - removed)
    decoder = task.decoder
    x = F.conv2d(x, decoder.proj.weight[:, :, None, None], decoder.proj.bias)
    x = x * (1 - removed) + decoder.mask_token.view(1, -1, 1, 1) * removed
    for block in decoder.blocks:
        x = _block(block, x, None)
    x = F.conv2d(x, decoder.pred.weight[:, :, None, None], decoder.pred.bias)
    return reconstruction_loss(x.flatten(2).transpose(1, 2), images, cell, masks.removed)


def _encode(model: Any, images: Tensor, visible: Tensor) -> Tensor:
    """(B, 3, H, W) and 1 for visible cells, float (B, 1, gh, gw) → the last map (B, C, gh, gw)."""
    first, norm = model.stem
    x = _norm_of_channels(F.conv2d(images, first.weight, first.bias, first.stride), norm)
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            norm, convolution = stage.downsample
            x = _norm_of_channels(x, norm) * _enlarged(visible, x)
            x = F.conv2d(x, convolution.weight, convolution.bias, convolution.stride)
        mask = _enlarged(visible, x)
        x = x * mask
        for block in stage.blocks:
            x = _block(block, x, mask)
    return x


def _enlarged(visible: Tensor, x: Tensor) -> Tensor:
    rows, columns = (x.shape[axis] // visible.shape[axis] for axis in (2, 3))
    return visible.to(x.dtype).repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


def _block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """A ConvNeXt V2 block; with a `mask`, float (B, 1, h, w), on its visible places."""
    layer, shortcut = block.conv_dw, x
    x = F.conv2d(x if mask is None else x * mask, layer.weight, layer.bias, padding=layer.padding, groups=layer.groups)
    x = (x if mask is None else x * mask).permute(0, 2, 3, 1)  # (B, h, w, C) from here on
    x = F.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps)
    x = F.gelu(block.mlp.fc1(x))
    x = _response_norm(x if mask is None else x * mask.permute(0, 2, 3, 1), block.mlp.grn)
    x = block.mlp.fc2(x)
    return shortcut + x.permute(0, 3, 1, 2)


def _response_norm(x: Tensor, layer: Any) -> Tensor:
    """Per image, over the places of the whole map (B, h, w, C)."""
    size = x.norm(p=2, dim=(1, 2), keepdim=True)
    relative = size / (size.mean(dim=-1, keepdim=True) + layer.eps)
    normed: Tensor = layer.weight * (x * relative) + layer.bias + x
    return normed


def _norm_of_channels(x: Tensor, layer: Any) -> Tensor:
    """Layer norm over axis 1, step by step."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / (variance + layer.eps).sqrt()
    normed: Tensor = layer.weight[:, None, None] * x + layer.bias[:, None, None]
    return normed
