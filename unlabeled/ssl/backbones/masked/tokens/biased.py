"""Families whose attention knows the distance of two patches: a bias for each pair of tokens.

The bias of kept tokens is a choice of rows and columns of the full table, another one for each image.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.ssl.backbones.masked.tokens.family import Positions, TokenFamily, gather_pairs, with_prefix


class _BiasedFamily(TokenFamily):
    def blocks(self, tokens: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
        positions = with_prefix(ids, self.prefix)
        shared = self._gathered(self._shared_bias(), positions)
        for block in self.trunk.blocks:
            own = self._gathered(self._own_bias(block.attn), positions)
            biases = [bias for bias in (own, shared) if bias is not None]
            tokens = self.run(self._block, block, tokens, sum(biases) if biases else None)
        return tokens

    @staticmethod
    def _gathered(bias: Tensor | None, positions: Tensor) -> Tensor | None:
        """(..., heads, N, N) of all tokens → (B, heads, P + K, P + K) of the tokens `positions` (B, P + K)."""
        if bias is None:
            return None
        full = bias.reshape(bias.shape[-3:]).permute(1, 2, 0)
        return gather_pairs(full, positions).permute(0, 3, 1, 2)

    def _shared_bias(self) -> Tensor | None:
        """The bias of all blocks, ([1,] heads, N, N)."""
        raise NotImplementedError

    def _own_bias(self, attention: Any) -> Tensor | None:
        """The bias of one block, (1, heads, N, N)."""
        raise NotImplementedError

    def _block(self, block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """timm's block on (B, N, D) with the bias (B, heads, N, N) that it is given."""
        raise NotImplementedError


class Beit(_BiasedFamily):
    """BEiT and BEiT v2: a table of relative positions in each block, or one for all, or absolute positions."""

    classes: ClassVar[tuple[str, ...]] = ("beit:Beit",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features",)
    block_names: ClassVar[frozenset[str]] = frozenset({"Block"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"Attention"})
    reached: ClassVar[frozenset[str]] = frozenset(
        {"patch_embed", "cls_token", "pos_embed", "rel_pos_bias", "blocks", "norm"}
    )

    def positions(self, grid: tuple[int, int]) -> Positions:
        first, table = self.trunk.cls_token, self.trunk.pos_embed
        return Positions(first, None) if table is None else Positions(first + table[:, :1], table[0, 1:])

    def _shared_bias(self) -> Tensor | None:
        return self.trunk.rel_pos_bias() if self.trunk.rel_pos_bias is not None else None

    def _own_bias(self, attention: Any) -> Tensor | None:
        return attention._get_rel_pos_bias() if attention.relative_position_bias_table is not None else None

    def _block(self, block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        attention = block.attn
        biases = None
        if attention.q_bias is not None:
            biases = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        qkv = F.linear(block.norm1(x), attention.qkv.weight, biases)
        scales = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
        x = x + block.drop_path1(scales[0] * _attend(attention, qkv, bias))
        return cast(Tensor, x + block.drop_path2(scales[1] * block.mlp(block.norm2(x))))


class RelativePositions(_BiasedFamily):
    """timm's ViT with relative positions: a table, or a small network of the logarithmic distance."""

    classes: ClassVar[tuple[str, ...]] = ("vision_transformer_relpos:VisionTransformerRelPos",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features",)
    block_names: ClassVar[frozenset[str]] = frozenset({"RelPosBlock", "ResPostRelPosBlock"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"RelPosAttention"})
    reached: ClassVar[frozenset[str]] = frozenset({"patch_embed", "cls_token", "shared_rel_pos", "blocks", "norm"})

    def positions(self, grid: tuple[int, int]) -> Positions:
        first = self.trunk.cls_token
        return Positions(self.projection.new_zeros(1, 0, self.dim) if first is None else first, None)

    def _shared_bias(self) -> Tensor | None:
        return self.trunk.shared_rel_pos.get_bias() if self.trunk.shared_rel_pos is not None else None

    def _own_bias(self, attention: Any) -> Tensor | None:
        return attention.rel_pos.get_bias() if attention.rel_pos is not None else None

    def _block(self, block: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        attention = block.attn
        if type(block).__name__ == "ResPostRelPosBlock":
            x = x + block.drop_path1(block.norm1(_attend(attention, attention.qkv(x), bias)))
            return cast(Tensor, x + block.drop_path2(block.norm2(block.mlp(x))))
        x = x + block.drop_path1(block.ls1(_attend(attention, attention.qkv(block.norm1(x)), bias)))
        return cast(Tensor, x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def _attend(attention: Any, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Projected queries, keys and values (B, N, 3 * D) and a bias (B, heads, N, N) → (B, N, D)."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    bias = None if bias is None else bias.to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return cast(Tensor, attention.proj_drop(attention.proj(x.transpose(1, 2).flatten(2))))


class ConViT(TokenFamily):
    """ConViT: attention mixed with attention by distance; the class token joins after the blocks that have it."""

    classes: ClassVar[tuple[str, ...]] = ("convit:ConVit",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features",)
    block_names: ClassVar[frozenset[str]] = frozenset({"Block"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"GPSA", "MHSA"})
    reached: ClassVar[frozenset[str]] = frozenset({"patch_embed", "cls_token", "pos_embed", "blocks", "norm"})

    def missing_reason(self) -> str | None:
        if self.trunk.local_up_to_layer >= len(self.trunk.blocks):
            return "its class token joins after more blocks than it has; set local_up_to_layer lower"
        return super().missing_reason()

    def positions(self, grid: tuple[int, int]) -> Positions:
        nothing = self.projection.new_zeros(1, 0, self.dim)
        table = self.trunk.pos_embed[0] if self.trunk.use_pos_embed else None
        first = next((block.attn for block in self.trunk.blocks if block.use_gpsa), None)
        distances = None if first is None else first.get_rel_indices(grid[0] * grid[1])[0]  # (L, L, 3)
        return Positions(nothing, table, distances)

    def blocks(self, tokens: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
        distances = None if table is None else gather_pairs(table, ids)  # (B, K, K, 3)
        for index, block in enumerate(self.trunk.blocks):
            if index == self.trunk.local_up_to_layer:
                tokens = torch.cat([self.trunk.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = self._local_block(block, tokens, distances) if block.use_gpsa else block(tokens)
        return tokens

    @staticmethod
    def _local_block(block: Any, x: Tensor, distances: Tensor | None) -> Tensor:
        attention = block.attn
        y = block.norm1(x)
        q, k = attention.qk(y).unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v = attention.v(y).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        by_content = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
        by_distance = attention.pos_proj(distances).permute(0, 3, 1, 2).softmax(-1)
        gate = attention.gating_param.sigmoid().view(1, -1, 1, 1)
        weights = (1 - gate) * by_content + gate * by_distance
        weights = attention.attn_drop(weights / weights.sum(-1, keepdim=True))
        mixed = attention.proj_drop(attention.proj((weights @ v).transpose(1, 2).flatten(2)))
        x = x + block.drop_path(mixed)
        return cast(Tensor, x + block.drop_path(block.mlp(block.norm2(x))))
