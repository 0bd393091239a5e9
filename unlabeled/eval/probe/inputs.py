"""Inputs of linear heads: pooled features, prefixes of them, or tokens and maps of the last blocks of a backbone.

If a backbone returns its class token, the tokens of the last n blocks are read as in DINOv2 (Oquab et al. 2023,
2304.07193): the final norm is applied to every block, register tokens are ignored, and the average that joins the class
tokens is that of the last block. Other backbones are read by their feature maps: the last one as the backbone's own
pooled features, earlier ones averaged over positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import ConfigError

Pooling = Literal["cls", "avg", "cls+avg"]


@dataclass(frozen=True)
class Input:
    """The columns of the features that a head reads."""

    title: str
    """Such as ``class tokens of the last 4 blocks``."""
    start: int
    stop: int
    blocks: int = 0
    """Number of last blocks that are read; 0: the pooled features."""
    prefix: bool = False
    """Whether it is a prefix of the pooled features, which is evaluated separately."""

    def of(self, features: Tensor) -> Tensor:
        """Selects the columns: (B, F) → (B, D)."""
        return features[:, self.start : self.stop]


@dataclass(frozen=True)
class BlockFeatures:
    """(backbone, normalized images (B, 3, h, w)) → (B, F): class tokens of the last blocks, then averages.

    Class tokens are in the order of the blocks, averages in reverse. So those of the last block are adjacent, and each
    input is a contiguous range of columns.
    """

    classes: int
    """Number of last blocks whose class tokens are returned."""
    averages: int
    """Number of last blocks whose averages are returned."""

    def __call__(self, backbone: Backbone, images: Tensor) -> Tensor:
        if has_class_token(backbone):
            return self._tokens(backbone, images)
        return self._maps(backbone, images)

    def _tokens(self, backbone: Backbone, images: Tensor) -> Tensor:
        model = cast(Any, backbone.model)
        found = model.forward_intermediates(
            images, indices=max(self.classes, self.averages), return_prefix_tokens=True, norm=True, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        norm = _norm_after_pooling(model)
        tokens = [prefix[:, 0] for _, prefix in found[len(found) - self.classes :]]
        averages = [patches.mean(dim=1) for patches, _ in reversed(found[len(found) - self.averages :])]
        return torch.cat([norm(pooled) for pooled in tokens + averages], dim=1)

    def _maps(self, backbone: Backbone, images: Tensor) -> Tensor:
        model = cast(Any, backbone.model)
        if self.averages == 1:
            return backbone.pooled(images)
        # with different widths, the final norm fits the last map only
        same_width = len({stage.channels for stage in backbone.stages}) == 1
        options = {"norm": True} if same_width and "norm" in _parameters(model) else {}
        final, found = model.forward_intermediates(images, indices=self.averages, output_fmt="NCHW", **options)
        norm = _norm_after_pooling(model) if same_width else nn.Identity()
        averages = [norm(one.mean(dim=(2, 3))) for one in reversed(found[:-1])]
        return torch.cat([model.forward_head(final, pre_logits=True).flatten(1), *averages], dim=1)


def has_class_token(backbone: Backbone) -> bool:
    """Whether the backbone has a class token and returns it with its feature maps."""
    model = backbone.model
    return "return_prefix_tokens" in _parameters(model) and getattr(model, "cls_token", None) is not None


def _parameters(model: Any) -> tuple[str, ...]:
    """Names of the parameters of ``forward_intermediates``; () if the model has no such method."""
    forward = getattr(model, "forward_intermediates", None)
    return () if forward is None else tuple(inspect.signature(forward).parameters)


def _norm_after_pooling(model: Any) -> nn.Module:
    """The norm to apply after pooling: timm moves a transformer's final norm there if it pools by average."""
    norm = getattr(model, "fc_norm", None)
    return norm if norm is not None and isinstance(getattr(model, "norm", None), nn.Identity) else nn.Identity()


def pooled_inputs(width: int, prefixes: tuple[int, ...]) -> list[Input]:
    """The input of all `width` features, and one for each shorter prefix of them."""
    shorter = sorted({length for length in prefixes if length < width})
    return [Input("pooled features", 0, width)] + [
        Input(f"the first {length} features", 0, length, prefix=True) for length in shorter
    ]


def block_inputs(
    backbone: Backbone, blocks: Sequence[int], pooling: Sequence[Pooling] = (), *, fall_back: bool = False
) -> tuple[BlockFeatures, list[Input]]:
    """The features to compute for all combinations of `blocks` and `pooling`, and the inputs as columns of these.

    An empty `pooling` means cls if there is a class token, else avg. `fall_back`: use averages for a backbone without a
    class token, whatever `pooling` says. Raises ConfigError for more blocks than the backbone has, and for class tokens
    if it has none.
    """
    token = has_class_token(backbone)
    pooling = pooling or ("cls" if token else "avg",)
    if not token:
        if fall_back:
            pooling = ("avg",)
        elif wrong := [one for one in pooling if one != "avg"]:
            raise ConfigError(f"evaluate.linear.pooling: {backbone.name} has no class token for {wrong[0]!r}; give avg")
    count = len(backbone.stages)
    if max(blocks) > count:
        raise ConfigError(
            f"evaluate.linear.blocks: {max(blocks)} is not possible, {backbone.name} has {count} feature maps; "
            f"give at most {count}"
        )
    wanted = [(number, one) for one in dict.fromkeys(pooling) for number in dict.fromkeys(blocks)]
    reading = BlockFeatures(
        classes=max((number for number, one in wanted if one != "avg"), default=0),
        averages=max(number if one == "avg" else 1 if one == "cls+avg" else 0 for number, one in wanted),
    )
    widths = _widths(backbone, reading, token)
    return reading, [_input(number, one, widths, reading.classes, token) for number, one in wanted]


def _widths(backbone: Backbone, reading: BlockFeatures, token: bool) -> list[int]:
    """Widths of the class tokens and averages, in the order of the columns."""
    channels = [stage.channels for stage in reversed(backbone.stages)]
    averages = channels[: reading.averages]
    if not token:
        averages[0] = backbone.embed_dim  # the pooled features, which may be wider than the last map
    return channels[: reading.classes][::-1] + averages


def _input(blocks: int, pooling: Pooling, widths: list[int], classes: int, token: bool) -> Input:
    """The columns of one input, given the `widths` of all tokens and averages; the first `classes` are class tokens."""
    # the titles below are also part of the seed of initial weights: changing them changes results
    first = classes if pooling == "avg" else classes - blocks
    last = {"cls": classes, "avg": classes + blocks, "cls+avg": classes + 1}[pooling]
    name = "blocks" if token else "maps"
    several = f"the last {blocks} {name}" if blocks > 1 else f"the last {name[:-1]}"
    plural = "s" if blocks > 1 else ""
    title = {
        "cls": f"class token{plural} of {several}",
        "avg": f"average{plural} of {several}",
        "cls+avg": f"class token{plural} of {several} and the average of the patches",
    }[pooling]
    return Input(title, sum(widths[:first]), sum(widths[:last]), blocks)
