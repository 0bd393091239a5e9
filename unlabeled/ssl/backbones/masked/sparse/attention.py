"""Channel attention that cuts maps into branches: the masked form of two blocks whose own code needs a fifth axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap


def split_attention(module: Any, forward: Callable[..., Any], x: MaskedMap) -> MaskedMap:
    """ResNeSt's split attention (arXiv 2004.08955): its average is over visible places.

    `module` is timm's ``SplitAttn``.
    """
    if x.unmasked:
        return x.from_shown(forward(x.stored))
    mixed: MaskedMap = module.act0(module.drop(module.bn0(module.conv(x))))
    gathered = mixed.gathered()
    batch, radix = gathered.shape[0], module.radix
    branches = gathered.reshape(batch, radix, -1, *gathered.shape[2:])
    gap = branches.sum(1).mean((2, 3), keepdim=True)
    weights = module.rsoftmax(module.fc2(module.act1(module.bn1(module.fc1(gap)))))
    return mixed.with_gathered((branches * weights.reshape(batch, radix, -1, 1, 1)).sum(1).contiguous())


def selective_kernel(module: Any, forward: Callable[..., Any], x: MaskedMap) -> MaskedMap:
    """Selective kernels (arXiv 1903.06586): the average that chooses between kernels is over visible places.

    `module` is timm's ``SelectiveKernel``.
    """
    if x.unmasked:
        return x.from_shown(forward(x.stored))
    inputs = torch.split(x, module.in_channels // module.num_paths, 1) if module.split_input else [x] * module.num_paths
    paths: list[MaskedMap] = [path(part) for path, part in zip(module.paths, inputs, strict=True)]
    stacked = torch.stack([path.gathered() for path in paths], dim=1)
    return paths[0].with_gathered((stacked * module.attn(stacked)).sum(1))
