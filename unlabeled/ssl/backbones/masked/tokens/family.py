"""From the pixels of kept patches to tokens, step by step, as timm's plain vision transformers do it.

`TokenFamily` is the plain family (``VisionTransformer``, ``Eva``); other families override the steps that differ.
A step that timm offers as a method is asked of timm, so that each variant is timm's to the bit.
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
"""Modules that let one token see others without attention."""


class Positions(NamedTuple):
    """What a network knows of places on a grid."""

    prefix: Tensor
    """Prefix tokens with their positions, (1, P, D)."""
    patches: Tensor | None
    """Absolute positions of patches, (L, D); None where the network has none."""
    table: Tensor | None = None
    """What blocks need of positions, in the family's own form; plain: the rotary table."""


class TokenFamily:
    """One family of networks around the network `model`; names of classes are timm's, since releases differ in them."""

    classes: ClassVar[tuple[str, ...]] = (
        "vision_transformer:VisionTransformer",
        "deit:VisionTransformerDistilled",
        "eva:Eva",
    )
    """``module:Class`` of the networks, under ``timm.models``."""
    recomputed: ClassVar[tuple[str, ...]] = ("forward_features", "_pos_embed")
    """Methods that are called or done again here; a subclass that changes one is another network."""
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
    """timm's own classes that treat their tokens as a set."""
    reached: ClassVar[frozenset[str]] = frozenset(
        {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "rope", "norm_pre", "blocks", "norm"}
    )
    """Top-level names of everything that takes part in encoding tokens; the rest (heads, pooling) does not."""
    has_own_table: ClassVar[bool] = True
    """Whether `pos_embed` has an entry for each patch of the network's own grid."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """Whether `model` is of this family and computes as the family does."""
        return any(_computes_like(model, known, cls.recomputed) for known in _existing(cls.classes))

    def missing_reason(self) -> str | None:
        """Why patches cannot be dropped from this network, in a few words; None when they can."""
        return self.strange_stem() or self.strange_blocks(self.trunk.blocks) or self.own_dropping()

    def strange_stem(self) -> str | None:
        if type(self.trunk.patch_embed) is not PatchEmbed:
            return "its stem mixes neighboring patches"
        return mixing_norm(self.trunk.patch_embed.norm)

    def strange_blocks(self, blocks: Iterable[nn.Module]) -> str | None:
        for block in blocks:
            if (strange := self._strange_part(block)) is not None:
                return f"its blocks hold {strange}, not known to treat tokens as a set"
        return None

    def own_dropping(self) -> str | None:
        pos_drop, patch_drop = (getattr(self.trunk, name, None) for name in ("pos_drop", "patch_drop"))
        if getattr(pos_drop, "p", 0) > 0 or getattr(patch_drop, "prob", 0) > 0:
            return "it drops tokens or positions by itself; set pos_drop_rate and patch_drop_rate to 0"
        return None

    def _strange_part(self, block: nn.Module) -> str | None:
        """Name of the class inside `block` that may mix tokens in an unknown way; None when there is none."""
        if not _is_timm(block, self.block_names):
            return type(block).__name__
        for name, module in block.named_modules():
            if isinstance(module, _MIXING) or (name == "attn" and not _is_timm(module, self.attention_names)):
                return type(module).__name__
        return None

    @property
    def trunk(self) -> Any:
        """The module that holds patch embedding and blocks."""
        return self.model

    @property
    def cell(self) -> tuple[int, int]:
        """Pixels (height, width) of what is dropped or kept as a whole."""
        height, width = self.trunk.patch_embed.patch_size
        return int(height), int(width)

    @property
    def own_size(self) -> tuple[int, int] | None:
        """The only size (height, width) of images that the network takes; None: any multiple of its cell."""
        embed = self.trunk.patch_embed
        height, width = embed.img_size
        return (int(height), int(width)) if embed.strict_img_size else None

    @property
    def prefix(self) -> int:
        """P."""
        return int(self.trunk.num_prefix_tokens)

    @property
    def dim(self) -> int:
        """D of the encoded tokens."""
        return int(self.trunk.embed_dim)

    @property
    def projection(self) -> nn.Parameter:
        """Weights of the map from a patch's pixels, (D, ...)."""
        return cast(nn.Parameter, self.trunk.patch_embed.proj.weight)

    @property
    def absolute(self) -> nn.Parameter | None:
        """(1, L, D) or (1, P + L, D)."""
        return getattr(self.trunk, "pos_embed", None) if self.has_own_table else None

    @property
    def absolute_grid(self) -> tuple[int, int]:
        gh, gw = self.trunk.patch_embed.grid_size
        return int(gh), int(gw)

    def encode(self, x: Tensor, ids: Tensor) -> Tensor:
        """Normalized (B, C, H, W) and kept patches (B, K) → (B, P + K, D), as ``forward_features`` would give them."""
        prefix, patches, table = self.positions((x.shape[-2] // self.cell[0], x.shape[-1] // self.cell[1]))
        tokens = self.embed(x, ids)
        if patches is not None:
            tokens = tokens + F.embedding(ids, patches)
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.finish(self.blocks(self.enter(tokens), table, ids))

    def positions(self, grid: tuple[int, int]) -> Positions:
        """What timm's own `_pos_embed` adds to patch tokens of zero."""
        weight = self.projection
        gh, gw = grid
        shape = (1, gh * gw, weight.shape[0]) if self.trunk.patch_embed.flatten else (1, gh, gw, weight.shape[0])
        answer = self.trunk._pos_embed(weight.new_zeros(shape))
        tokens, rope = answer if isinstance(answer, tuple) else (answer, None)
        prefix, patches = tokens[:, : self.prefix], tokens[0, self.prefix :]
        absolute = getattr(self.trunk, "pos_embed", None)
        if absolute is None:
            return Positions(prefix, None, rope)
        # The table also carries gradients of the prefix tokens; a frozen table needs no backward pass of its own.
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
        """What happens to all tokens before the first block."""
        return cast(Tensor, self.trunk.norm_pre(tokens)) if hasattr(self.trunk, "norm_pre") else tokens

    def blocks(self, tokens: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
        """All blocks on tokens (B, P + K, D), with the entries of `table` that belong to them."""
        per_block = table is not None and self.rotates_per_block
        kept = None if table is None or per_block else apply_keep_indices_nlc(tokens, table, ids).unsqueeze(1)
        for index, block in enumerate(self.trunk.blocks):
            if per_block:
                kept = apply_keep_indices_nlc(tokens, cast(Tensor, table)[index], ids)  # (B, heads, K, 2 * dim)
            tokens = self.run(block, tokens, **({} if kept is None else {"rope": kept}))
        return tokens

    @property
    def rotates_per_block(self) -> bool:
        """Whether each block has a rotary table of its own."""
        return bool(getattr(self.trunk, "rope_mixed", False))

    def run(self, block: Any, *arguments: Any, **named: Any) -> Any:
        """`block` on its arguments, with gradient checkpointing where the network has it switched on."""
        if getattr(self.trunk, "grad_checkpointing", False) and self.model.training:
            return checkpoint(block, *arguments, use_reentrant=False, **named)
        return block(*arguments, **named)

    def finish(self, tokens: Tensor) -> Tensor:
        """What happens to all tokens after the last block."""
        return cast(Tensor, self.trunk.norm(tokens)) if hasattr(self.trunk, "norm") else tokens


def gather_patches(x: Tensor, ids: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels of the patches `ids` (B, K, raster order) of (B, C, H, W) → (B, K, C, ph, pw); the rest is not read."""
    batch, channels, height, width = x.shape
    gh, gw = height // patch[0], width // patch[1]
    cells = x.reshape(batch, channels, gh, patch[0], gw, patch[1]).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(batch, device=x.device)[:, None]
    return cells[rows, ids // gw, ids % gw]


def gather_pairs(table: Tensor, ids: Tensor) -> Tensor:
    """Entries of `table` (N, N, C) for each pair of the tokens `ids` (B, K) → (B, K, K, C)."""
    positions = ids[:, :, None] * table.shape[0] + ids[:, None, :]
    return F.embedding(positions, table.flatten(0, 1))


def with_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Indices of kept patches (B, K) → of kept tokens (B, P + K), where P prefix tokens stand first and are kept."""
    first = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([first, ids + prefix], dim=1)


def mixing_norm(norm: nn.Module | None) -> str | None:
    """Why `norm`, after or before a patch projection, lets patches see each other; None when it does not."""
    return "the norm of its patch embedding mixes patches" if isinstance(norm, _MIXING) else None


def _existing(names: Iterable[str]) -> list[type[nn.Module]]:
    """The classes ``module:Class`` of ``timm.models`` that the installed release has."""
    pairs = [name.split(":") for name in names]
    found = [getattr(sys.modules.get(f"timm.models.{module}"), cls, None) for module, cls in pairs]
    return [cls for cls in found if cls is not None]


def _computes_like(model: nn.Module, known: type[nn.Module], methods: Iterable[str]) -> bool:
    cls = type(model)
    return issubclass(cls, known) and all(getattr(cls, name) is getattr(known, name) for name in methods)


def _is_timm(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the exact type of `module` is one of timm's classes `names`."""
    cls = type(module)
    return cls.__module__.partition(".")[0] == "timm" and cls.__name__ in names
