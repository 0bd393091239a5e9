"""The hybrid network of ConvMAE, two stages of convolutions and one of attention, with timm's surface.

Gao, Ma, Li, Lin, Dai, Qiao: MCMAE: Masked Convolution Meets Masked Autoencoders, NeurIPS 2022, arXiv 2205.03892;
repository github.com/Alpha-VL/ConvMAE, whose names the parameters have. It calls this network ConvViT.

Inside, maps have their channels last: (B, H, W, C). All but the depthwise convolutions then works on the last axes of
a tensor of any rank, so that a masked run can give it the visible cells alone, (B, K, c, c, C), and say with a `Mix`
how those meet their neighbors; see `unlabeled.ssl.backbones.masked.stages`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, global_pool_nlc, resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Mix = Callable[[nn.Conv2d, Tensor], Tensor]
"""Applies a depthwise convolution of the same resolution to channels-last places, and gives them back so."""


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The `Mix` of a whole map, (B, H, W, C) → (B, H, W, C)."""
    mixed: Tensor = conv(x.permute(0, 3, 1, 2))
    return mixed.permute(0, 2, 3, 1)


class PatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel, for channels last: (..., H, W, C) → (..., H / p, W / p, D)."""

    def __init__(self, inputs: int, outputs: int, patch: int) -> None:
        super().__init__(inputs, outputs, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patch, (*leading, height, width, channels) = self.kernel_size[0], x.shape
        x = x.reshape(*leading, height // patch, patch, width // patch, patch, channels).transpose(-4, -3).flatten(-3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)  # x: (..., H / p, W / p, p * p * C)


class PatchEmbed(nn.Module):
    """Patches to channels, then norm and GELU: (..., H, W, C) → (..., H / p, W / p, D)."""

    def __init__(self, inputs: int, dim: int, patch: int, norm_eps: float) -> None:
        super().__init__()
        self.proj = PatchConv(inputs, dim, patch)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.act(self.norm(self.proj(x)))
        return embedded


class ConvBlock(nn.Module):
    """A transformer block whose attention is a 5 x 5 depthwise convolution between two pointwise ones."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.conv1 = PatchConv(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = PatchConv(dim, dim, 1)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict[str, nn.Module](fc1=PatchConv(dim, hidden, 1), act=nn.GELU(), fc2=PatchConv(hidden, dim, 1))
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, mix: Mix = convolve) -> Tensor:
        """(B, ..., C) → (B, ..., C)."""
        x = x + self.drop_path(self.conv2(mix(self.attn, self.conv1(self.norm1(x)))))
        y: Tensor = self.drop_path(self.mlp(self.norm2(x)))
        return x + y


class ConvViT(nn.Module):
    """Stages of strides 4, 8 (convolutions) and 16 (transformer) by default; no class token.

    `patch_size` gives the strides of the three embeddings: their product is the cell of a mask. `fc_norm` moves the
    last norm behind the pooling, as the authors fine-tune; without it tokens are normed and then pooled. Positions are
    a parameter; a table for another grid is resampled bicubically.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: Sequence[int] = (4, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4.0, 4.0, 4.0),
        fc_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        conv_norm_eps: float = 1e-5,
    ) -> None:
        """Raises ValueError for a number of stages other than three and for an image that cells do not tile."""
        super().__init__()
        for name, values in {"patch_size": patch_size, "dims": dims, "depths": depths, "mlp_ratio": mlp_ratio}.items():
            if len(values) != 3:
                raise ValueError(f"{name}: {list(values)} is not possible; give three numbers, one per stage")
        if dims[2] % num_heads:
            raise ValueError(f"dims: {dims[2]} is no multiple of num_heads {num_heads}; change one of them")
        self.strides = tuple(math.prod(patch_size[: stage + 1]) for stage in range(3))
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = dims[2]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"blocks{stage}"}
            for stage, (dim, stride) in enumerate(zip(dims, self.strides, strict=True), start=1)
        ]
        self.grad_checkpointing = False
        self.grid_size = self._grid((img_size, img_size) if isinstance(img_size, int) else tuple(img_size))

        drops = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.patch_embed1 = PatchEmbed(in_chans, dims[0], patch_size[0], conv_norm_eps)
        self.blocks1 = nn.ModuleList(
            ConvBlock(dims[0], mlp_ratio[0], next(drops), conv_norm_eps) for _ in range(depths[0])
        )
        self.patch_embed2 = PatchEmbed(dims[0], dims[1], patch_size[1], conv_norm_eps)
        self.blocks2 = nn.ModuleList(
            ConvBlock(dims[1], mlp_ratio[1], next(drops), conv_norm_eps) for _ in range(depths[1])
        )
        self.patch_embed3 = PatchEmbed(dims[1], dims[2], patch_size[2], conv_norm_eps)
        self.patch_embed4 = nn.Linear(dims[2], dims[2])
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid_size), dims[2]))
        self.blocks3 = nn.ModuleList(
            Block(dims[2], num_heads, mlp_ratio[2], qkv_bias=True, drop_path=next(drops), norm_layer=norm)
            for _ in range(depths[2])
        )
        self.norm = nn.Identity() if fc_norm else norm(dims[2])
        self.fc_norm = norm(dims[2]) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[2], num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        """Linear layers and positions from a normal distribution of 0.02, cut off at 2; convolutions as they were."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Cells (gh, gw) of an image of `size` (height, width)."""
        if any(pixels % self.strides[-1] for pixels in size):
            raise ValueError(f"size: {list(size)} is no multiple of the cells of {self.strides[-1]} pixels")
        return size[0] // self.strides[-1], size[1] // self.strides[-1]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a (gh, gw) grid in raster order, (gh * gw, D)."""
        if grid == self.grid_size:
            return self.pos_embed[0]
        table: Tensor = resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid_size), num_prefix_tokens=0)
        return table[0]

    def conv_stages(self, x: Tensor, mixes: tuple[Mix, Mix] = (convolve, convolve)) -> Iterator[Tensor]:
        """Pixels (B, ..., H, W, 3) → places (B, ..., H / 4, W / 4, C1), then (B, ..., H / 8, W / 8, C2)."""
        x = self._run(self.blocks1, self.patch_embed1(x), mixes[0])
        yield x
        yield self._run(self.blocks2, self.patch_embed2(x), mixes[1])

    def embed(self, second: Tensor) -> Tensor:
        """Places of stage 2 → tokens without positions, (B, ..., H / 16, W / 16, D)."""
        tokens: Tensor = self.patch_embed4(self.patch_embed3(second))
        return tokens

    def transform(self, tokens: Tensor) -> Tensor:
        """Tokens with positions through the third stage, before the last norm: (B, K, D) → (B, K, D)."""
        return self._run(self.blocks3, tokens)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, *arguments: Any) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x = block(x, *arguments)
        return x

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        """(B, 3, H, W) → one map (B, H_i, W_i, C_i) after another, the third before the last norm."""
        grid = self._grid(tuple(x.shape[-2:]))
        for positions in self.conv_stages(x.permute(0, 2, 3, 1)):
            yield positions
        tokens = self.transform(self.embed(positions).flatten(1, 2) + self.positions(grid))
        yield tokens.view(-1, *grid, self.embed_dim)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → tokens (B, L, D)."""
        *_, last = self._stages(x)
        tokens: Tensor = self.norm(last.flatten(1, 2))
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, L, D) → (B, num_classes), or (B, D) with `pre_logits`."""
        x = self.head_drop(self.fc_norm(global_pool_nlc(x, self.global_pool, num_prefix_tokens=0)))
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages `indices` (a number: the last so many), and the tokens too unless asked not to.

        `norm` applies the last norm to the map of the third stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: {output_fmt!r} is not possible; give 'NCHW'")
        wanted, last = feature_take_indices(3, indices)
        maps = list(islice(self._stages(x), last + 1 if stop_early and intermediates_only else 3))
        chosen = [self.norm(maps[stage]) if norm and stage == 2 else maps[stage] for stage in sorted(wanted)]
        intermediates = [one.permute(0, 3, 1, 2).contiguous() for one in chosen]
        return intermediates if intermediates_only else (self.norm(maps[-1].flatten(1, 2)), intermediates)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations anew in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers as the authors number them: all before the transformer is the stem."""
        stem = r"^pos_embed|^patch_embed|^blocks1|^blocks2"
        return {"stem": stem, "blocks": [(r"^blocks3\.(\d+)", None), (r"^norm|^fc_norm", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of `num_classes`; 0: none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: ConvViT) -> dict[str, Tensor]:
    """`state` with positions of the model's grid (timm's hook for files of weights)."""
    converted = dict(state)
    table = converted.get("pos_embed")
    if table is not None and table.shape != model.pos_embed.shape:
        converted["pos_embed"] = resample_abs_pos_embed(table, list(model.grid_size), num_prefix_tokens=0)
    return converted


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "num_classes": 1000,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2205.03892",
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("convmae_small.untrained", "convmae_base.untrained", "convmae_large.untrained")}
)


def _create(name: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> ConvViT:
    features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    model: ConvViT = build_model_with_cfg(
        ConvViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=features,
        **{**sizes, **kwargs},
    )
    return model


def convmae_small(pretrained: bool = False, **kwargs: Any) -> ConvViT:
    """ConvMAE-S: widths 128, 256, 384 and 6 heads, as code built on the authors' FastConvMAE has it."""
    return _create("convmae_small", pretrained, {"dims": (128, 256, 384), "num_heads": 6}, kwargs)


def convmae_base(pretrained: bool = False, **kwargs: Any) -> ConvViT:
    """ConvMAE-B, the only size in the authors' repository: widths 256, 384, 768, depths 2, 2, 11, 12 heads."""
    return _create("convmae_base", pretrained, {}, kwargs)


def convmae_large(pretrained: bool = False, **kwargs: Any) -> ConvViT:
    """ConvMAE-L: widths 384, 768, 1024, depths 2, 2, 23, 16 heads, mlp ratios 8, 8, 4.

    As code derived from the authors' has it. Issue 32 of their repository reports that released files of this size
    differ from the paper's table in the ratios, so ``mlp_ratio`` may have to be given.
    """
    sizes = {"dims": (384, 768, 1024), "depths": (2, 2, 23), "num_heads": 16, "mlp_ratio": (8.0, 8.0, 4.0)}
    return _create("convmae_large", pretrained, sizes, kwargs)


for _entry in (convmae_small, convmae_base, convmae_large):
    register_model(_entry)
