"""What linear heads read of a network: the pooled features, their beginnings, or tokens and maps of its last blocks.

Where a network hands out its class token, the tokens of the last n blocks are read as DINOv2 does (Oquab et al. 2023,
2304.07193): the final norm is applied to every block, registers belong neither to the class token nor to the patches,
and the average beside class tokens is that of the last block. Any other network is read by its maps: the last of them
is the pooled features as the network gives them, those before are averaged over their places.
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
    """Which columns of the features heads read."""

    title: str
    """Such as ``class tokens of the last 4 blocks``."""
    start: int
    stop: int
    blocks: int = 0
    """How many last blocks are read; 0: the pooled features."""
    prefix: bool = False
    """Whether it is the beginning of another input, and is judged apart."""

    def of(self, features: Tensor) -> Tensor:
        """(B, F) → (B, D)."""
        return features[:, self.start : self.stop]


@dataclass(frozen=True)
class BlockFeatures:
    """(backbone, normalized images (B, 3, h, w)) → (B, F): class tokens of the last blocks, then averages.

    The class tokens are those of the last `classes` blocks, the last block's last; the averages those of the last
    `averages`, the last block's first. So each input is a range of columns.
    """

    classes: int
    averages: int

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
        return torch.cat([norm(part) for part in tokens + averages], dim=1)

    def _maps(self, backbone: Backbone, images: Tensor) -> Tensor:
        model = cast(Any, backbone.model)
        if self.averages == 1:
            return backbone.pooled(images)
        alike = len({stage.channels for stage in backbone.stages}) == 1  # else the final norm fits the last map alone
        options = {"norm": True} if alike and "norm" in _parameters(model) else {}
        final, found = model.forward_intermediates(images, indices=self.averages, output_fmt="NCHW", **options)
        norm = _norm_after_pooling(model) if alike else nn.Identity()
        averages = [norm(one.mean(dim=(2, 3))) for one in reversed(found[:-1])]
        return torch.cat([model.forward_head(final, pre_logits=True).flatten(1), *averages], dim=1)


def has_class_token(backbone: Backbone) -> bool:
    """Whether the network has a class token and hands it out with its feature maps."""
    model = backbone.model
    return "return_prefix_tokens" in _parameters(model) and getattr(model, "cls_token", None) is not None


def _parameters(model: Any) -> tuple[str, ...]:
    """Of ``forward_intermediates``; () without it."""
    forward = getattr(model, "forward_intermediates", None)
    return () if forward is None else tuple(inspect.signature(forward).parameters)


def _norm_after_pooling(model: Any) -> nn.Module:
    """timm moves the final norm behind the average of transformers that pool so."""
    norm = getattr(model, "fc_norm", None)
    return norm if norm is not None and isinstance(getattr(model, "norm", None), nn.Identity) else nn.Identity()


def pooled_inputs(width: int, prefixes: tuple[int, ...]) -> list[Input]:
    """All `width` features, and those of their beginnings that are shorter."""
    shorter = sorted({length for length in prefixes if length < width})
    return [Input("pooled features", 0, width)] + [
        Input(f"the first {length} features", 0, length, prefix=True) for length in shorter
    ]


def block_inputs(
    backbone: Backbone, blocks: Sequence[int], pooling: Sequence[Pooling] = (), *, fall_back: bool = False
) -> tuple[BlockFeatures, list[Input]]:
    """What to compute for `blocks` x `pooling` (empty: cls where there is a class token), and the columns of each.

    `fall_back`: a network without a class token is read by averages, whatever `pooling` says. Raises ConfigError for
    more blocks than the network has and for a class token that it lacks.
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
    """Width of each part of the features, in their order."""
    channels = [stage.channels for stage in reversed(backbone.stages)]
    averages = channels[: reading.averages]
    if not token:
        averages[0] = backbone.embed_dim
    return channels[: reading.classes][::-1] + averages


def _input(blocks: int, pooling: Pooling, widths: list[int], classes: int, token: bool) -> Input:
    """The columns of one input among parts of `widths`, of which the first `classes` are class tokens."""
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
