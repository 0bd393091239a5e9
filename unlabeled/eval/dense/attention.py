"""What the last attention block of a timm transformer knows: its keys, and where its class token looks.

Read by hooks around one ordinary forward pass; a network that keeps no such block gives None.

Shapes: B images, P prefix tokens (class, distillation, registers), L = gh gw places in raster order, N = P + L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone

Run = Callable[[], Tensor]
"""Runs the network once and returns its last map (B, C, gh, gw)."""


def last_attention(backbone: Backbone) -> nn.Module | None:
    """The attention of the last block, if its tokens are places of one grid after `num_prefix_tokens` others."""
    blocks = getattr(backbone.model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        return None
    attention = getattr(blocks[-1], "attn", None)
    return attention if isinstance(attention, nn.Module) else None


def key_map(backbone: Backbone, run: Run) -> Tensor | None:
    """The keys of the last attention, all heads side by side, before any norm or rotation: (B, D, gh, gw).

    None where there are none, or where its tokens are not the places of the map that `run` returns.
    """
    attention = last_attention(backbone)
    if attention is None or _key_projection(attention) is None:
        return None
    seen: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.extend(one for one in inputs[:1] if isinstance(one, Tensor))

    handle = attention.register_forward_pre_hook(before)
    try:
        found = run()
    finally:
        handle.remove()
    grid = (found.shape[-2], found.shape[-1])
    prefix = _prefix(backbone)
    if len(seen) != 1 or seen[0].ndim != 3 or seen[0].shape[1] != prefix + grid[0] * grid[1]:
        return None
    weight, bias = cast("tuple[Tensor, Tensor | None]", _key_projection(attention))
    keys = F.linear(seen[0][:, prefix:], weight, bias)
    return keys.transpose(1, 2).reshape(len(keys), -1, *grid)


def class_attention(backbone: Backbone, run: Run) -> Tensor | None:
    """How much the class token looks at each place in the last attention, mean of the heads: (B, gh, gw).

    A row sums to 1 less what goes to the prefix tokens. None for a network without a class token, or whose attention
    cannot be read.
    """
    attention = last_attention(backbone)
    if attention is None or getattr(backbone.model, "cls_token", None) is None or _prefix(backbone) < 1:
        return None
    with _attention_weights(attention) as seen:
        found = run()
    grid = (found.shape[-2], found.shape[-1])
    prefix = _prefix(backbone)
    count = prefix + grid[0] * grid[1]
    if len(seen) != 1 or seen[0].ndim != 4 or seen[0].shape[2:] != (count, count):
        return None
    return seen[0][:, :, 0, prefix:].mean(dim=1).view(-1, *grid)


@contextmanager
def _attention_weights(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what enters the dropout of attention, (B, heads, N, N), for which the fused kernel is switched off."""
    seen: list[Tensor] = []
    dropout = getattr(attention, "attn_drop", None)
    if not isinstance(dropout, nn.Module) or not hasattr(attention, "fused_attn"):
        yield seen
        return
    fused = attention.fused_attn
    handle = dropout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cast(Any, attention).fused_attn = False
    try:
        yield seen
    finally:
        cast(Any, attention).fused_attn = fused
        handle.remove()


def _prefix(backbone: Backbone) -> int:
    return int(getattr(backbone.model, "num_prefix_tokens", 0))


def _key_projection(attention: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (D, C) and bias (D,) that make keys, from one matrix for all three or from one of their own."""
    joint = getattr(attention, "qkv", None)
    if isinstance(joint, nn.Linear) and joint.out_features % 3 == 0:
        part = slice(joint.out_features // 3, joint.out_features // 3 * 2)
        return joint.weight[part], None if joint.bias is None else joint.bias[part]
    own = next((one for name in ("k_proj", "k") if isinstance(one := getattr(attention, name, None), nn.Linear)), None)
    return None if own is None else (own.weight, own.bias)
