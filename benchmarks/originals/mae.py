"""MAE (arXiv 2111.06377): every patch is embedded, a quarter gathered; the decoder runs on all tokens to the end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.originals.transformer import decode, reconstruction_loss, run_blocks, shuffle, taken


def original_loss(task: Any, images: Tensor, noise: Tensor) -> Tensor:
    """See the package. For a vision transformer with a class token and absolute positions of the images' grid."""
    model = task.backbone.model
    patch = task.cell
    masks = shuffle(noise, task.keep(task.grid_of(tuple(images.shape[-2:]))))
    projection = model.patch_embed.proj
    x = F.conv2d(images, projection.weight, projection.bias, stride=patch).flatten(2).transpose(1, 2)
    x = taken(x + model.pos_embed[:, 1:], masks.keep)
    first = (model.cls_token + model.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    x = model.norm(run_blocks(torch.cat([first, x], dim=1), model.blocks))
    return reconstruction_loss(decode(task.decoder, x, masks.restore, prefix=1), images, patch, masks.removed)
