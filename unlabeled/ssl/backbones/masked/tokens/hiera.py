"""Hiera drops whole mask units: squares inside which its first stages stay, and which end as one token each.

Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML 2023, arXiv 2306.00989,
section 3. Its patch convolution reaches a few pixels past the unit; what it finds there is zero where the neighbor is
dropped, as in the authors' training and in timm's ``forward_features(x, mask)``.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.masked.tokens.family import TokenFamily


class Hiera(TokenFamily):
    """A *patch* of this family is a mask unit, for the usual sizes 32 pixels."""

    classes: ClassVar[tuple[str, ...]] = ("hiera:Hiera",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features", "_pos_embed")
    block_names: ClassVar[frozenset[str]] = frozenset({"HieraBlock"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"MaskUnitAttention"})
    reached: ClassVar[frozenset[str]] = frozenset({"patch_embed", "pos_embed", "pos_embed_win", "blocks"})
    has_own_table: ClassVar[bool] = False  # its tables have many entries for a unit

    def strange_stem(self) -> str | None:
        tokens = self.model.mu_size // math.prod(self.model.q_stride) ** self.model.q_pool
        if self.model.pos_embed is None or len(self.model.mask_unit_size) != 2:
            return "it is built for video"
        return None if tokens == 1 else f"its mask units end as {tokens} tokens each, not as one"

    def own_dropping(self) -> str | None:
        return "it drops mask units by itself; set patch_drop_rate to 0" if self.model.patch_drop_rate > 0 else None

    @property
    def cell(self) -> tuple[int, int]:
        height, width = (a * b for a, b in zip(self.model.mask_unit_size, self.model.patch_stride, strict=True))
        return int(height), int(width)

    @property
    def own_size(self) -> tuple[int, int] | None:
        rows, columns = self.model.mask_spatial_shape
        return rows * self.cell[0], columns * self.cell[1]

    @property
    def prefix(self) -> int:
        return 0

    @property
    def dim(self) -> int:
        return int(self.model.num_features)

    @property
    def projection(self) -> nn.Parameter:
        return cast(nn.Parameter, self.model.patch_embed.proj.weight)

    def encode(self, x: Tensor, ids: Tensor) -> Tensor:
        batch, units = ids.shape[0], math.prod(self.model.mask_spatial_shape)
        hidden = torch.ones(batch, units, dtype=torch.bool, device=x.device).scatter(1, ids, False)
        hidden = hidden.view(batch, 1, *self.model.mask_spatial_shape)
        hidden = hidden.repeat_interleave(self.cell[0], 2).repeat_interleave(self.cell[1], 3)
        tokens = self.model.unroll(self.model._pos_embed(self.model.patch_embed(x.masked_fill(hidden, 0.0))))
        tokens = tokens.view(batch, self.model.mu_size, units, -1)  # the units of one place inside the unit in a row
        positions = ids[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[-1])
        tokens = tokens.gather(2, positions).flatten(1, 2)
        for block in self.model.blocks:
            tokens = self.run(block, tokens)
        return cast(Tensor, tokens)
