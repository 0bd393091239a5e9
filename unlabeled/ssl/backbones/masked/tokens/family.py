"""From the pixels of kept patches to encoded tokens, step by step, for timm's plain vision transformers.

`TokenFamily` is the plain family (``VisionTransformer``, ``Eva``); other families override the steps that differ.
If timm has a method for a step, that method is called, so that every variant matches timm bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, apply_keep_indices_nlc
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, GlobalResponseNorm)
"""Modules that mix tokens without attention."""


class Positions(NamedTuple):
    """Positional information of a model for one grid."""

    prefix: Tensor
    """Prefix tokens with their positions, (1, P, D)."""
    patches: Tensor | None
    """Absolute positions of patches, (L, D); None if the model has none."""
    table: Tensor | None = None
    """Positional input of blocks, in the family's own form; for the plain family the rotary table."""


class TokenFamily:
    """One family of models, around the instance `model`. Classes are named, since timm releases differ in them."""

    classes: ClassVar[tuple[str, ...]] = (
        "vision_transformer:VisionTransformer",
        "deit:VisionTransformerDistilled",
        "eva:Eva",
    )
    """``module:Class`` of the models, under ``timm.models``."""
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features", "_pos_embed")
    """Methods that are called or reimplemented here; a subclass that overrides one does not belong to the family."""
    block_names: ClassVar[frozenset[str]] = frozenset(
        {
            "Block",
            "DiffParallelScalingBlock",
            "EvaBlock",
            "EvaBlockPostNorm",
            "ParallelScalingBlock",
            "ParallelThingsBlock",
            "ResPostBlock",
        }
    )
    attention_names: ClassVar[frozenset[str]] = frozenset(
        {"Attention", "AttentionRope", "DiffAttention", "EvaAttention"}
    )
    """timm's classes that treat their tokens as a set."""
    reached: ClassVar[frozenset[str]] = frozenset(
        {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "rope", "norm_pre", "blocks", "norm"}
    )
    """Top-level names of all modules and parameters that encode tokens; the rest (heads, pooling) is not used."""
    has_own_table: ClassVar[bool] = True
    """Whether `pos_embed` has one entry for each patch of the model's own grid."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """Whether `model` belongs to this family and computes as the family does."""
        return any(_computes_like(model, known, cls.recomputed) for known in _existing(cls.classes))

    def missing_reason(self) -> str | None:
        """Why patches cannot be dropped from this model, in a few words; None if they can."""
        return self.unsupported_stem() or self.unsupported_blocks(self.trunk.blocks) or self.own_dropping()

    def unsupported_stem(self) -> str | None:
        """Why a token depends on more than its own patch; None if it does not."""
        if type(self.trunk.patch_embed) is not PatchEmbed:
            return "its stem mixes neighboring patches"
        return mixing_norm(self.trunk.patch_embed.norm)

    def unsupported_blocks(self, blocks: Iterable[nn.Module]) -> str | None:
        """Why `blocks` may mix tokens in an unknown way; None if they do not."""
        for block in blocks:
            if (unsupported := self._unsupported_module(block)) is not None:
                return f"its blocks hold {unsupported}, not known to treat tokens as a set"
        return None

    def own_dropping(self) -> str | None:
        """Why the model drops tokens by itself, which would disagree with `ids_keep`; None if it does not."""
        pos_drop, patch_drop = (getattr(self.trunk, name, None) for name in ("pos_drop", "patch_drop"))
        if getattr(pos_drop, "p", 0) > 0 or getattr(patch_drop, "prob", 0) > 0:
            return "it drops tokens or positions by itself; set pos_drop_rate and patch_drop_rate to 0"
        return None

    def _unsupported_module(self, block: nn.Module) -> str | None:
        """Class name of the first module in `block` that may mix tokens in an unknown way; None if there is none."""
        if not _is_timm(block, self.block_names):
            return type(block).__name__
        for name, module in block.named_modules():
            if isinstance(module, _MIXING) or (name == "attn" and not _is_timm(module, self.attention_names)):
                return type(module).__name__
        return None

    @property
    def trunk(self) -> Any:
        """The module that has the patch embedding and the blocks."""
        return self.model

    @property
    def cell(self) -> tuple[int, int]:
        """Size in pixels (height, width) of the unit that is kept or dropped."""
        height, width = self.trunk.patch_embed.patch_size
        return int(height), int(width)

    @property
    def own_size(self) -> tuple[int, int] | None:
        """The only image size (height, width) that the model takes; None: any multiple of its cell."""
        embed = self.trunk.patch_embed
        height, width = embed.img_size
        return (int(height), int(width)) if embed.strict_img_size else None

    @property
    def prefix(self) -> int:
        """P, the number of prefix tokens."""
        return int(self.trunk.num_prefix_tokens)

    @property
    def dim(self) -> int:
        """D, the channels of encoded tokens."""
        return int(self.trunk.embed_dim)

    @property
    def projection(self) -> nn.Parameter:
        """Weights of the map from the pixels of a patch, (D, ...)."""
        return cast(nn.Parameter, self.trunk.patch_embed.proj.weight)

    @property
    def absolute(self) -> nn.Parameter | None:
        """Table of absolute positions, (1, L, D) or (1, P + L, D)."""
        return getattr(self.trunk, "pos_embed", None) if self.has_own_table else None

    @property
    def absolute_grid(self) -> tuple[int, int]:
        gh, gw = self.trunk.patch_embed.grid_size
        return int(gh), int(gw)

    def encode(self, x: Tensor, ids: Tensor) -> Tensor:
        """Normalized (B, C, H, W) and kept patches (B, K) → (B, P + K, D), matching timm's ``forward_features``."""
        prefix, patches, table = self.positions((x.shape[-2] // self.cell[0], x.shape[-1] // self.cell[1]))
        tokens = self.embed(x, ids)
        # positions come before dropping: entry i of the table belongs to patch i, kept or not
        if patches is not None:
            tokens = tokens + F.embedding(ids, patches)
        # under autocast the patch tokens have another dtype than the prefix
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.finish(self.blocks(self.enter(tokens), table, ids))

    def positions(self, grid: tuple[int, int]) -> Positions:
        """Positions for `grid`, found by passing patch tokens of zero through timm's own `_pos_embed`."""
        weight = self.projection
        gh, gw = grid
        shape = (1, gh * gw, weight.shape[0]) if self.trunk.patch_embed.flatten else (1, gh, gw, weight.shape[0])
        embedded = self.trunk._pos_embed(weight.new_zeros(shape))
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        prefix, patches = tokens[:, : self.prefix], tokens[0, self.prefix :]
        absolute = getattr(self.trunk, "pos_embed", None)
        if absolute is None:
            return Positions(prefix, None, rope)
        # The graph also includes the prefix tokens; a frozen table needs no backward pass of its own.
        return Positions(prefix, patches if absolute.requires_grad else patches.detach(), rope)

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        """Tokens of kept patches without positions, (B, C, H, W) and (B, K) → (B, K, D).

        Only the pixels of kept patches are read; a linear map of them is what the patch convolution computes.
        """
        projection = self.trunk.patch_embed.proj
        patches = gather_patches(x, ids, self.cell).flatten(2)
        tokens: Tensor = F.linear(patches, projection.weight.flatten(1), projection.bias)
        return cast(Tensor, self.trunk.patch_embed.norm(tokens))

    def enter(self, tokens: Tensor) -> Tensor:
        """Steps on all tokens before the first block."""
        return cast(Tensor, self.trunk.norm_pre(tokens)) if hasattr(self.trunk, "norm_pre") else tokens

    def blocks(self, tokens: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
        """Runs all blocks on tokens (B, P + K, D), with the entries of `table` for the kept ones."""
        per_block = table is not None and self.rotates_per_block
        # prefix tokens are not rotated, so the table has entries for patches only
        kept = None if table is None or per_block else apply_keep_indices_nlc(tokens, table, ids).unsqueeze(1)
        for index, block in enumerate(self.trunk.blocks):
            if per_block:
                kept = apply_keep_indices_nlc(tokens, cast(Tensor, table)[index], ids)  # (B, heads, K, 2 * dim)
            tokens = self.run(block, tokens, **({} if kept is None else {"rope": kept}))
        return tokens

    @property
    def rotates_per_block(self) -> bool:
        """Whether each block has its own rotary table."""
        return bool(getattr(self.trunk, "rope_mixed", False))

    def run(self, block: Any, *arguments: Any, **named: Any) -> Any:
        """Runs `block` on its arguments, with gradient checkpointing if the model has it enabled."""
        if getattr(self.trunk, "grad_checkpointing", False) and self.model.training:
            return checkpoint(block, *arguments, use_reentrant=False, **named)
        return block(*arguments, **named)

    def finish(self, tokens: Tensor) -> Tensor:
        """Steps on all tokens after the last block."""
        return cast(Tensor, self.trunk.norm(tokens)) if hasattr(self.trunk, "norm") else tokens


def gather_patches(x: Tensor, ids: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels of the patches `ids` (B, K, raster order) of (B, C, H, W) → (B, K, C, ph, pw). Others are not read."""
    batch, channels, height, width = x.shape
    gh, gw = height // patch[0], width // patch[1]
    cells = x.reshape(batch, channels, gh, patch[0], gw, patch[1]).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(batch, device=x.device)[:, None]
    return cells[rows, ids // gw, ids % gw]


def gather_pairs(table: Tensor, ids: Tensor) -> Tensor:
    """Entries of `table` (N, N, C) for each pair of the tokens `ids` (B, K) → (B, K, K, C)."""
    # one flat lookup; F.embedding's backward pass accumulates entries that several images use
    positions = ids[:, :, None] * table.shape[0] + ids[:, None, :]
    return F.embedding(positions, table.flatten(0, 1))


def with_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Indices of kept patches (B, K) → of kept tokens (B, P + K); the P prefix tokens come first and are all kept."""
    first = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([first, ids + prefix], dim=1)


def mixing_norm(norm: nn.Module | None) -> str | None:
    """Why `norm`, before or after a patch projection, lets patches see each other; None if it does not."""
    return "the norm of its patch embedding mixes patches" if isinstance(norm, _MIXING) else None


def _existing(names: Iterable[str]) -> list[type[nn.Module]]:
    """The classes ``module:Class`` of ``timm.models`` that exist in the installed release."""
    pairs = [name.split(":") for name in names]
    found = [getattr(sys.modules.get(f"timm.models.{module}"), cls, None) for module, cls in pairs]
    return [cls for cls in found if cls is not None]


def _computes_like(model: nn.Module, known: type[nn.Module], methods: Iterable[str]) -> bool:
    """Whether `model` is a `known` model that overrides none of `methods`."""
    cls = type(model)
    return issubclass(cls, known) and all(getattr(cls, name) is getattr(known, name) for name in methods)


def _is_timm(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the exact type of `module` is one of timm's classes named in `names`."""
    cls = type(module)
    return cls.__module__.partition(".")[0] == "timm" and cls.__name__ in names
