"""Families whose tokens run in two streams: the class token apart from the patches, or pixels inside of each patch."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.masked.tokens.family import Positions, TokenFamily, gather_patches, with_prefix


class CaiT(TokenFamily):
    """CaiT: patches attend to each other through talking heads; a class token then attends to all of them."""

    classes: ClassVar[tuple[str, ...]] = ("cait:Cait",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features", "forward_cls")
    block_names: ClassVar[frozenset[str]] = frozenset({"LayerScaleBlock", "LayerScaleBlockClassAttn"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"TalkingHeadAttn", "ClassAttn"})
    reached: ClassVar[frozenset[str]] = frozenset(
        {"patch_embed", "cls_token", "pos_embed", "blocks", "blocks_token_only", "norm"}
    )

    def missing_reason(self) -> str | None:
        if self.trunk.blocks_token_only is None:
            return "its class attention was cut off"
        return super().missing_reason() or self.strange_blocks(self.trunk.blocks_token_only)

    def positions(self, grid: tuple[int, int]) -> Positions:
        return Positions(self.projection.new_zeros(1, 0, self.dim), self.trunk.pos_embed[0])

    def finish(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.trunk.norm(self.trunk.forward_cls(tokens)))


class TNT(TokenFamily):
    """Transformer in transformer: the pixels of a patch are tokens among themselves and add up to the patch's token."""

    classes: ClassVar[tuple[str, ...]] = ("tnt:TNT",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features",)
    block_names: ClassVar[frozenset[str]] = frozenset({"Block"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"Attention"})
    reached: ClassVar[frozenset[str]] = frozenset(
        {"pixel_embed", "norm1_proj", "proj", "norm2_proj", "cls_token", "patch_pos", "pixel_pos", "blocks", "norm"}
    )

    def strange_stem(self) -> str | None:
        return "its stem mixes neighboring patches" if self.trunk.pixel_embed.legacy else None

    @property
    def cell(self) -> tuple[int, int]:
        height, width = self.trunk.pixel_embed.patch_size
        return int(height), int(width)

    @property
    def own_size(self) -> tuple[int, int] | None:
        height, width = self.trunk.pixel_embed.img_size
        return int(height), int(width)

    @property
    def projection(self) -> nn.Parameter:
        return cast(nn.Parameter, self.trunk.pixel_embed.proj.weight)

    @property
    def absolute(self) -> nn.Parameter | None:
        return cast(nn.Parameter, self.trunk.patch_pos)

    @property
    def absolute_grid(self) -> tuple[int, int]:
        gh, gw = self.trunk.pixel_embed.grid_size
        return int(gh), int(gw)

    def encode(self, x: Tensor, ids: Tensor) -> Tensor:
        pixels = self._pixels(x, ids)
        flat = pixels.reshape(*ids.shape, -1)
        patches = self.trunk.norm2_proj(self.trunk.proj(self.trunk.norm1_proj(flat)))
        tokens = torch.cat([self.trunk.cls_token.expand(ids.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        tokens = tokens + F.embedding(with_prefix(ids, self.prefix), self.trunk.patch_pos[0])
        for block in self.trunk.blocks:
            pixels, tokens = self.run(block, pixels, tokens)
        return self.finish(tokens)

    def _pixels(self, x: Tensor, ids: Tensor) -> Tensor:
        """Pixel tokens of kept patches, (B * K, pixels of a patch, D'): a small map of each patch by itself."""
        embed = self.trunk.pixel_embed
        maps = embed.proj(gather_patches(x, ids, self.cell).flatten(0, 1)) + self.trunk.pixel_pos
        return cast(Tensor, maps.flatten(2).transpose(1, 2))
