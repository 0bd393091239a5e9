"""What the masked autoencoders with a transformer share: blocks with unfused attention, the decoder, the loss.

Shapes as in `unlabeled.ssl.task`; P prefix tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlabeled.pretext.masked_image.mae import TransformerDecoder


class Shuffle(NamedTuple):
    """A random choice of patches by sorting noise twice."""

    keep: Tensor
    """Indices of the visible patches, (B, K)."""
    restore: Tensor
    """Where each patch of the raster went, (B, L)."""
    removed: Tensor
    """1 for a hidden patch, 0 for a visible one, float (B, L)."""


def shuffle(noise: Tensor, keep: int) -> Shuffle:
    """Keeps the `keep` patches with the smallest `noise` (B, L)."""
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    removed = torch.ones_like(noise)
    removed[:, :keep] = 0
    return Shuffle(order[:, :keep], restore, removed.gather(1, restore))


def taken(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens `ids` (B, K) of (B, L, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def attention(x: Tensor, layer: Any) -> Tensor:
    """Softmax of the products of all queries and keys, written out; (B, N, D) → (B, N, D)."""
    batch, tokens, dim = x.shape
    heads = layer.num_heads
    qkv = layer.qkv(x).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    weights = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(dim=-1)
    mixed: Tensor = layer.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return mixed


def run_blocks(x: Tensor, blocks: nn.ModuleList) -> Tensor:
    """Pre-norm blocks without dropout, drop path or layer scale."""
    for block in blocks:
        parts: Any = block
        x = x + attention(parts.norm1(x), parts.attn)
        x = x + parts.mlp(parts.norm2(x))
    return x


def decode(decoder: TransformerDecoder, latent: Tensor, restore: Tensor, prefix: int) -> Tensor:
    """(B, P + K, D) → predictions of all patches (B, L, n): mask tokens fill up, then every block sees every token."""
    x = decoder.embed(latent)
    hidden = decoder.mask_token.expand(x.shape[0], restore.shape[1] - (x.shape[1] - prefix), -1)
    patches = taken(torch.cat([x[:, prefix:], hidden.to(x.dtype)], dim=1), restore)
    x = torch.cat([x[:, :prefix], patches], dim=1)
    table: Tensor = decoder.get_buffer("positions")
    x = x + torch.cat([table.new_zeros(prefix, table.shape[1]), table])
    x = run_blocks(x, decoder.blocks)
    predicted: Tensor = decoder.pred(decoder.norm(x))
    return predicted[:, prefix:]


def patches_of(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """All patches in raster order, the channel fastest: (B, C, H, W) → (B, L, ph * pw * C)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cells = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return torch.einsum("ncyhxw->nyxhwc", cells).reshape(batch, rows * columns, -1)


def reconstruction_loss(predicted: Tensor, images: Tensor, patch: tuple[int, int], removed: Tensor) -> Tensor:
    """Squared error of every patch's normalized pixels, then the mean over those that `removed` (B, L) marks."""
    target = patches_of(images, patch)
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    error = ((predicted - target) ** 2).mean(dim=-1)
    return (error * removed).sum() / removed.sum()
