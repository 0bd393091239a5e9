"""Keys and class-token attention of the last block of a timm transformer.

Both are read by hooks during one ordinary forward pass; backbones without such a block give None.

Shapes: B images, P prefix tokens (class, distillation, registers), L = gh gw positions in raster order, N = P + L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone

Run = Callable[[], Tensor]
"""Runs the backbone once and returns its last feature map (B, C, gh, gw)."""


def last_attention(backbone: Backbone) -> nn.Module | None:
    """The attention module of the last block; None if the model has no ``blocks`` or these have no ``attn``."""
    blocks = getattr(backbone.model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        return None
    attention = getattr(blocks[-1], "attn", None)
    return attention if isinstance(attention, nn.Module) else None


def key_map(backbone: Backbone, run: Run) -> Tensor | None:
    """The keys of the last attention block, heads concatenated, before any norm or rotation: (B, D, gh, gw).

    None if the backbone has no such block, or if its tokens are not the positions of the map that `run` returns.
    """
    attention = last_attention(backbone)
    if attention is None or _key_projection(attention) is None:
        return None
    captured: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured.extend(value for value in inputs[:1] if isinstance(value, Tensor))

    handle = attention.register_forward_pre_hook(capture)
    try:
        found = run()
    finally:
        handle.remove()
    grid = (found.shape[-2], found.shape[-1])
    prefix = _prefix(backbone)
    # for instance, windows or pooled tokens do not match the map
    if len(captured) != 1 or captured[0].ndim != 3 or captured[0].shape[1] != prefix + grid[0] * grid[1]:
        return None
    weight, bias = cast("tuple[Tensor, Tensor | None]", _key_projection(attention))
    keys = F.linear(captured[0][:, prefix:], weight, bias)  # (B, L, D)
    return keys.transpose(1, 2).reshape(len(keys), -1, *grid)


def class_attention(backbone: Backbone, run: Run) -> Tensor | None:
    """Attention of the class token to each position in the last block, averaged over heads: (B, gh, gw).

    The values of an image sum to 1 minus the attention to prefix tokens. None if the backbone has no class token, or if
    its attention cannot be read.
    """
    attention = last_attention(backbone)
    if attention is None or getattr(backbone.model, "cls_token", None) is None or _prefix(backbone) < 1:
        return None
    with _attention_weights(attention) as captured:
        found = run()
    grid = (found.shape[-2], found.shape[-1])
    prefix = _prefix(backbone)
    count = prefix + grid[0] * grid[1]
    if len(captured) != 1 or captured[0].ndim != 4 or captured[0].shape[2:] != (count, count):
        return None
    return captured[0][:, :, 0, prefix:].mean(dim=1).view(-1, *grid)


@contextmanager
def _attention_weights(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the attention weights (B, heads, N, N) of passes within the block; none if they cannot be read."""
    captured: list[Tensor] = []
    dropout = getattr(attention, "attn_drop", None)
    if not isinstance(dropout, nn.Module) or not hasattr(attention, "fused_attn"):
        yield captured
        return
    fused = attention.fused_attn
    # the weights are the input of their dropout; the fused kernel never computes them, so it is switched off
    handle = dropout.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    cast(Any, attention).fused_attn = False
    try:
        yield captured
    finally:
        cast(Any, attention).fused_attn = fused
        handle.remove()


def _prefix(backbone: Backbone) -> int:
    return int(getattr(backbone.model, "num_prefix_tokens", 0))


def _key_projection(attention: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (D, C) and bias (D,) of the key projection; None if the module has none that is known."""
    joint = getattr(attention, "qkv", None)
    if isinstance(joint, nn.Linear) and joint.out_features % 3 == 0:
        keys = slice(joint.out_features // 3, joint.out_features // 3 * 2)  # the second third of q, k, v
        return joint.weight[keys], None if joint.bias is None else joint.bias[keys]
    own = next((one for name in ("k_proj", "k") if isinstance(one := getattr(attention, name, None), nn.Linear)), None)
    return None if own is None else (own.weight, own.bias)
