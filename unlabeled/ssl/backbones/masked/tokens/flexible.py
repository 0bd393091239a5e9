"""Families for images of any shape: NaFlexViT, and the eyes of vision-language models."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.ssl.backbones.masked.tokens.family import Positions, TokenFamily, gather_patches, mixing_norm


class NaFlex(TokenFamily):
    """timm's NaFlexViT on images of one size: embeddings in a module of their own, any kind of positions."""

    classes: ClassVar[tuple[str, ...]] = ("naflexvit:NaFlexVit",)
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features", "_forward_embeds")
    reached: ClassVar[frozenset[str]] = frozenset({"embeds", "rope", "norm_pre", "blocks", "norm"})
    has_own_table: ClassVar[bool] = False  # it is resampled from a grid that need not be the image's

    def strange_stem(self) -> str | None:
        embeds = self.trunk.embeds
        if type(embeds).__name__ != "NaFlexEmbeds":
            return "its stem mixes neighboring patches"
        return mixing_norm(embeds.norm_input) or mixing_norm(embeds.norm)

    def own_dropping(self) -> str | None:
        if self.trunk.patch_drop is not None or self.trunk.embeds.pos_drop.p > 0:
            return "it drops tokens or positions by itself; set pos_drop_rate and patch_drop_rate to 0"
        return None

    @property
    def cell(self) -> tuple[int, int]:
        height, width = self.trunk.embeds.patch_size
        return int(height), int(width)

    @property
    def own_size(self) -> tuple[int, int] | None:
        return None

    @property
    def projection(self) -> nn.Parameter:
        return cast(nn.Parameter, self.trunk.embeds.proj.weight)

    @property
    def rotates_per_block(self) -> bool:
        return bool(self.trunk.rope_is_mixed)

    def positions(self, grid: tuple[int, int]) -> Positions:
        embeds = self.trunk.embeds
        tokens = [token for token in (embeds.cls_token, embeds.reg_token) if token is not None]
        nothing = self.projection.new_zeros(1, grid[0] * grid[1], self.dim)
        prefix = torch.cat([nothing[:, :0], *tokens], dim=1)
        rope = None if self.trunk.rope is None else self.trunk.rope.get_embed(shape=list(grid))
        if embeds.pos_embed_type == "none":
            return Positions(prefix, None, rope)
        add = {"learned": embeds._apply_learned_pos_embed, "factorized": embeds._apply_factorized_pos_embed}
        add[embeds.pos_embed_type](nothing, grid_size=list(grid))  # in place
        return Positions(prefix, nothing[0], rope)

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        embeds = self.trunk.embeds
        patches = gather_patches(x, ids, self.cell)
        if embeds.is_linear and embeds.channels_last:
            patches = patches.permute(0, 1, 3, 4, 2)
        flat = patches.flatten(2)
        flat = flat if embeds.norm_input is None else embeds.norm_input(flat)
        return cast(Tensor, embeds.norm(F.linear(flat, embeds.proj.weight.flatten(1), embeds.proj.bias)))


class VisionLanguage(TokenFamily):
    """The vision transformers of Qwen3-VL and DeepSeek, inside their classifiers: rotary positions, no class token."""

    classes: ClassVar[tuple[str, ...]] = ("qwen3_vit:Qwen3VitClassifier", "deepseek_vit:DeepseekVitClassifier")
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features",)
    block_names: ClassVar[frozenset[str]] = frozenset({"EvaBlock", "DeepseekVitBlock"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"AttentionRope", "EvaAttention"})
    reached: ClassVar[frozenset[str]] = frozenset({"encoder"})
    has_own_table: ClassVar[bool] = False  # Qwen's is resampled from a grid that need not be the image's
    encoders: ClassVar[frozenset[str]] = frozenset({"Qwen3VitEncoder", "DeepseekVitEncoder"})

    @property
    def trunk(self) -> Any:
        return self.model.encoder

    def missing_reason(self) -> str | None:
        if type(self.trunk).__name__ not in self.encoders:
            return f"its encoder is {type(self.trunk).__name__}, which is not known"
        if self.model.encoder_pool not in ("", "none"):
            return "its projector merges neighboring patches; set encoder_pool to ''"
        return super().missing_reason()


class Gemma(VisionLanguage):
    """The vision transformer of Gemma 4, inside its classifier: a table for rows and one for columns, and rotation."""

    classes: ClassVar[tuple[str, ...]] = ("gemma4_vit:Gemma4VitClassifier",)
    block_names: ClassVar[frozenset[str]] = frozenset({"Gemma4Block"})
    attention_names: ClassVar[frozenset[str]] = frozenset({"Gemma4Attention"})
    encoders: ClassVar[frozenset[str]] = frozenset({"Gemma4VitEncoder"})

    def strange_stem(self) -> str | None:
        known = type(self.trunk.patch_embed).__name__ == "Gemma4PatchEmbed"
        return None if known else "its stem mixes neighboring patches"

    @property
    def own_size(self) -> tuple[int, int] | None:
        return None

    @property
    def projection(self) -> nn.Parameter:
        return cast(nn.Parameter, self.trunk.patch_embed.input_proj.weight)

    def positions(self, grid: tuple[int, int]) -> Positions:
        (gh, gw), (columns, rows) = grid, self.trunk.patch_embed.position_embedding_table
        table = rows[:gh, None] + columns[None, :gw]
        y, x = torch.meshgrid(*(torch.arange(side, device=table.device) for side in grid), indexing="ij")
        positions = torch.stack([x.flatten(), y.flatten()], dim=-1)
        turns = self.trunk.rotary_emb(table, positions[None])  # cosines and sines, (1, L, channels of a head) each
        return Positions(table.new_zeros(1, 0, self.dim), table.flatten(0, 1), torch.cat(turns))

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        patches = gather_patches(x, ids, self.cell).flatten(2)
        return cast(Tensor, self.trunk.patch_embed.input_proj(2 * (patches - 0.5)))

    def blocks(self, tokens: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
        cos, sin = (F.embedding(ids, part) for part in cast(Tensor, table))
        for block in self.trunk.blocks:
            tokens = self.run(block, tokens, cos, sin)
        return tokens
