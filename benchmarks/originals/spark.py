"""SparK (arXiv 2301.03580): dense layers over zeros, and a search for the visible places in every norm layer."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import ConvNeXt, ResNet
from torch import Tensor, nn

from benchmarks.originals.dense import Active, convnext_maps, resnet_maps
from benchmarks.originals.transformer import patches_of, reconstruction_loss


def original_loss(task: Any, images: Tensor, noise: Tensor) -> Tensor:
    """See the package. For timm's ``ConvNeXt`` without response norms, and its ``ResNet`` with bottlenecks."""
    model, cell = task.backbone.model, task.cell
    grid = task.grid_of(tuple(images.shape[-2:]))
    keep = noise.argsort(dim=1)[:, : task.keep(grid)]
    visible = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, keep, True).view(-1, 1, *grid)
    active = Active(visible)
    images_seen = images * active.at(images)
    if isinstance(model, ConvNeXt):
        maps = convnext_maps(model, images_seen, active)
    else:
        assert isinstance(model, ResNet), type(model)
        maps = resnet_maps(model, images_seen, active)
    predicted = task.decoder(_densified(task.densify, maps[::-1], active))
    removed = (~visible).flatten(1).float()
    return reconstruction_loss(patches_of(predicted, cell), images, cell, removed)


def _densified(densify: Any, maps: list[Tensor], active: Active) -> list[Tensor]:
    """Normed maps, coarsest first, with a learned embedding at masked places, projected to the decoder's widths."""
    whole = []
    for x, norm, token, project in zip(maps, densify.norms, densify.mask_tokens, densify.projs, strict=True):
        batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        x = active.batch_normed(x, norm) if batch_norm else active.layer_normed(x, norm)
        whole.append(project(torch.where(active.at(x).expand_as(x), x, token.to(x.dtype).expand_as(x))))
    return whole
