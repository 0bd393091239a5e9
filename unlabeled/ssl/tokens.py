"""The *token_dropping* capability: an isotropic timm transformer run on some of its patches only.

Dropping is exact when each patch becomes one token from its own pixels, positions are attached to single tokens (added
to them, or rotating their queries and keys), and every block treats its tokens as a set. That holds for timm's
``VisionTransformer`` and ``Eva`` with a plain `PatchEmbed`, whichever of their own blocks they are built of.

Shapes: B images, L = gh * gw patches in raster order, K kept ones, P prefix tokens (class, distillation, registers),
D channels, (gh, gw) grid.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, apply_keep_indices_nlc
from timm.layers.grn import GlobalResponseNorm
from timm.models import deit, eva, vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlabeled.ssl.backbone import Backbone
from unlabeled.ssl.errors import ConfigError

_BLOCKS = frozenset(
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
_ATTENTION = frozenset({"Attention", "AttentionRope", "DiffAttention", "EvaAttention"})
"""timm's own classes (by name: not each release has all of them) that treat their tokens as a set."""
_MODELS = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, eva.Eva)
_RECOMPUTED = ("forward_features", "_pos_embed")
"""Methods that `TokenEncoder` calls or does again; a subclass that changes one is another network."""
_MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, GlobalResponseNorm)
"""Modules that let one token see others without attention."""
_REACHED = frozenset(
    {"patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "rope", "norm_pre", "blocks", "norm"}
)
"""Top-level names of everything that takes part in encoding tokens; the rest (heads, pooling) does not."""


def lacks_token_dropping(backbone: Backbone) -> str | None:
    """Why patches cannot be dropped from this backbone, in a few words; None when they can."""
    model = backbone.model
    if not any(_computes_like(model, known) for known in _MODELS):
        return _foreign_reason(model)
    parts = cast(Any, model)
    if type(parts.patch_embed) is not PatchEmbed:
        return "its stem mixes neighbouring patches"
    if not isinstance(parts.patch_embed.norm, nn.Identity) and isinstance(parts.patch_embed.norm, _MIXING):
        return "the norm of its patch embedding mixes patches"
    for block in parts.blocks:
        strange = _strange_part(block)
        if strange is not None:
            return f"its blocks hold {strange}, not known to treat tokens as a set"
    if parts.pos_drop.p > 0 or getattr(parts.patch_drop, "prob", 0) > 0:
        return "it drops tokens or positions by itself; set pos_drop_rate and patch_drop_rate to 0"
    return None


def _computes_like(model: nn.Module, known: type[nn.Module]) -> bool:
    cls = type(model)
    return issubclass(cls, known) and all(getattr(cls, name) is getattr(known, name) for name in _RECOMPUTED)


def _strange_part(block: nn.Module) -> str | None:
    """Name of the class inside `block` that may mix tokens in an unknown way; None when there is none."""
    if not _is_timm(block, _BLOCKS):
        return type(block).__name__
    for name, module in block.named_modules():
        if isinstance(module, _MIXING) or (name == "attn" and not _is_timm(module, _ATTENTION)):
            return type(module).__name__
    return None


def _is_timm(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the exact type of `module` is one of timm's classes `names`."""
    cls = type(module)
    return cls.__module__.partition(".")[0] == "timm" and cls.__name__ in names


def _foreign_reason(model: nn.Module) -> str:
    modules = list(model.modules())
    if not hasattr(model, "blocks") and any(getattr(module, "window_size", None) for module in modules):
        return "windows need the whole grid"
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    if any("rel_pos" in name or "relative_position" in name for name in names):
        return "relative positions need the whole grid"
    kernels = [max(module.kernel_size) for module in modules if isinstance(module, nn.Conv2d)]
    if sum(kernel > 1 for kernel in kernels) > 1:
        return "convolutional"
    return f"{type(model).__name__} is not known to keep one token per patch"


class TokenEncoder:
    """Runs the transformer inside `backbone` on kept patches; a view without parameters or state of its own.

    Build it where it is used (it costs nothing), after ``backbone.require({"token_dropping"}, ...)`` has passed.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model = cast(Any, backbone.model)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels of a patch, (height, width)."""
        height, width = self.model.patch_embed.patch_size
        return int(height), int(width)

    @property
    def prefix(self) -> int:
        """P, the number of tokens before the patches."""
        return int(self.model.num_prefix_tokens)

    @property
    def dim(self) -> int:
        """D, the channels of a token."""
        return int(self.model.embed_dim)

    @property
    def channels(self) -> int:
        """C, the channels of a picture."""
        return int(self.model.patch_embed.proj.in_channels)

    @property
    def absolute(self) -> nn.Parameter | None:
        """Table of absolute positions, (1, L, D) or (1, P + L, D); None where the network has none."""
        return cast("nn.Parameter | None", self.model.pos_embed)

    @property
    def absolute_grid(self) -> tuple[int, int]:
        """Grid (gh, gw) of `absolute`."""
        gh, gw = self.model.patch_embed.grid_size
        return int(gh), int(gw)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (gh, gw) of an input of `size` (height, width) pixels.

        Raises ConfigError when the patch does not divide the size, or the network takes another size only.
        """
        embed, patch = self.model.patch_embed, self.patch_size
        if size[0] % patch[0] or size[1] % patch[1]:
            below = tuple(max(1, pixels // step) * step for pixels, step in zip(size, patch, strict=True))
            raise ConfigError(
                f"backbone.size: {list(size)} is no multiple of {self.backbone.name}'s patch {list(patch)}; "
                f"set it to {list(below)}"
            )
        if embed.strict_img_size and tuple(embed.img_size) != tuple(size):
            raise ConfigError(
                f"backbone.size: {self.backbone.name} is built for {list(embed.img_size)} pixels, not {list(size)}; "
                "set backbone.size to the size of the pictures"
            )
        return size[0] // patch[0], size[1] // patch[1]

    def embed(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        """Tokens of the kept patches without positions, (B, C, H, W) and (B, K) → (B, K, D).

        Only the pixels of kept patches are read; a linear map of them is what the patch convolution computes.
        """
        projection = self.model.patch_embed.proj
        patches = gather_patches(x, ids_keep, self.patch_size).flatten(2)
        tokens: Tensor = F.linear(patches, projection.weight.flatten(1), projection.bias)
        return cast(Tensor, self.model.patch_embed.norm(tokens))

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prefix tokens with their positions (1, P, D), patch positions (L, D) or None, rotary table or None.

        timm's own `_pos_embed` is asked with patch tokens of zero, so each variant (class and register tokens with or
        without positions, distillation token, resampling to another grid) is timm's to the bit.
        """
        weight = self.model.patch_embed.proj.weight
        gh, gw = grid
        shape = (1, gh, gw, weight.shape[0]) if self.model.dynamic_img_size else (1, gh * gw, weight.shape[0])
        answer = self.model._pos_embed(weight.new_zeros(shape))
        table, rope = answer if isinstance(answer, tuple) else (answer, None)
        prefix, patches = table[:, : self.prefix], table[0, self.prefix :]
        if self.model.pos_embed is None:
            return prefix, None, rope
        # The table also carries gradients of the prefix tokens; a frozen table needs no backward pass of its own.
        return prefix, patches if self.model.pos_embed.requires_grad else patches.detach(), rope

    def encode(self, x: Tensor, ids_keep: Tensor) -> tuple[Tensor, int]:
        """Normalised (B, C, H, W) and raster indices of kept patches (B, K) → tokens (B, P + K, D), and P.

        Kept tokens stay in the order of `ids_keep`; the final norm is applied as in timm's ``forward_features``.
        """
        prefix, positions, rope = self.positions(self.grid((x.shape[-2], x.shape[-1])))
        tokens = self.embed(x, ids_keep)
        if positions is not None:
            tokens = tokens + F.embedding(ids_keep, positions)
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        tokens = self.model.norm_pre(tokens)
        tokens = self._blocks(tokens, rope, ids_keep)
        return cast(Tensor, self.model.norm(tokens)), self.prefix

    def _blocks(self, tokens: Tensor, rope: Tensor | None, ids_keep: Tensor) -> Tensor:
        per_block = rope is not None and bool(getattr(self.model, "rope_mixed", False))
        kept = None if rope is None or per_block else apply_keep_indices_nlc(tokens, rope, ids_keep).unsqueeze(1)
        for index, block in enumerate(self.model.blocks):
            if per_block:
                kept = apply_keep_indices_nlc(tokens, cast(Tensor, rope)[index], ids_keep)  # (B, heads, K, 2 * dim)
            arguments = {} if kept is None else {"rope": kept}
            if self.model.grad_checkpointing and self.model.training:
                tokens = checkpoint(block, tokens, use_reentrant=False, **arguments)
            else:
                tokens = block(tokens, **arguments)
        return tokens

    def unreached(self) -> list[nn.Parameter]:
        """Parameters of the model that `encode` does not use (heads, pooling, norms after pooling)."""
        named = cast(nn.Module, self.model).named_parameters()
        return [parameter for name, parameter in named if name.partition(".")[0] not in _REACHED]


def gather_patches(x: Tensor, ids: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels of the patches `ids` (B, K, raster order) of (B, C, H, W) → (B, K, C, ph, pw); the rest is not read."""
    batch, channels, height, width = x.shape
    gh, gw = height // patch[0], width // patch[1]
    cells = x.reshape(batch, channels, gh, patch[0], gw, patch[1]).permute(0, 2, 4, 1, 3, 5)
    rows = torch.arange(batch, device=x.device)[:, None]
    return cells[rows, ids // gw, ids % gw]
