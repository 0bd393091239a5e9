"""Which of timm's networks are elastic: how their size is read, asked for and numbered.

A family needs residual blocks that keep the shape, norms over the channels of one place or image, and widths that
are prefixes in all layers of the residual stream. Networks that join maps (DenseNet), have no residuals (VGG) or
irregular widths (EfficientNet) have no such sub-networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import AttentionRope, GluMlp
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import PatchMerging, SwinTransformer
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic.sizes import SubSize
from unlabeled.ssl.core.errors import CapabilityError

_KNOWN = "ViT, DeiT, BEiT, EVA, Swin, ConvNeXt and ResNets of bottlenecks"
_JOINT = {"qkv": 3, "kv": 2}
"""Names of linear layers that make queries, keys and values at once → how many of these."""


@dataclass(frozen=True)
class ElasticFamily:
    """One kind of network. Functions take the model, and its full size where it is needed."""

    kind: type[nn.Module]
    read: Callable[[Any], SubSize]
    """The model's own size."""
    unit: Callable[[Any], int]
    """What widths must be multiples of."""
    arguments: Callable[[Any, SubSize], Mapping[str, Any]]
    """What ``timm.create_model`` is to be told for a sub-network, beside the arguments of the model itself."""
    blocks: Callable[[int], str]
    """Path of the list of blocks of a stage."""
    shifts: bool = False
    """Whether even and odd blocks differ."""
    remedy: str = ""
    """What else would do for a width that is no multiple of the unit."""
    multiplied_by_width: bool = True
    """Whether small widths are published to be drawn more often."""


def family_of(backbone: Backbone) -> ElasticFamily:
    """The family of a network. Raises CapabilityError when it has none."""
    if reason := elastic_missing_reason(backbone):
        raise CapabilityError(f"backbone: {backbone.name} cannot be elastic: {reason}")
    return next(family for family in FAMILIES if type(backbone.model) is family.kind)


def elastic_missing_reason(backbone: Backbone) -> str | None:
    """Why the network has no sub-networks, in a few words; None when it has."""
    model = backbone.model
    if type(model) not in {family.kind for family in FAMILIES}:
        return f"networks of its kind have no known sub-networks, those of {_KNOWN} have"
    if backbone.custom:
        return "a module of your own is not built by name; give the name of a timm model"
    return _obstacle(model)


def axis_groups(parent: nn.Module | None, role: str, axes: int) -> tuple[int, ...]:
    """Into how many equal parts each axis falls (see `unlabeled.ssl.backbones.elastic.slices`) of a parameter of the
    module that `parent` calls `role`."""
    groups = [1] * axes
    if role in _JOINT:
        groups[0] = _JOINT[role]
    elif role == "fc1" and isinstance(parent, GluMlp):
        groups[0] = 2
    elif isinstance(parent, (PatchMerging, PatchMergingV2)) and role == "reduction":
        groups[-1] = 4
    elif isinstance(parent, PatchMerging) and role == "norm":
        groups[0] = 4
    return tuple(groups)


_OBSTACLES: dict[type[nn.Module], str] = {
    ParallelScalingBlock: "one layer of its blocks joins attention and MLP",
    DiffParallelScalingBlock: "one layer of its blocks joins attention and MLP",
    DiffAttention: "its attention depends on the number of the block",
    RotaryEmbeddingMixed: "rotary frequencies of all blocks are one table",
}


def _obstacle(model: nn.Module) -> str | None:
    """Why `model` has no sub-networks although its class has, and what would do instead."""
    for module in model.modules():
        if reason := _OBSTACLES.get(type(module)):
            return f"{reason}; give a plain transformer, such as vit_small_patch16_224"
        if isinstance(module, AttentionRope) and module.num_kv_heads != module.num_heads:
            return "its heads share keys and values; give a plain transformer, such as vit_small_patch16_224"
    if isinstance(model, ResNet) and not isinstance(model.layer1[0], Bottleneck):
        return "its blocks have no inner width; give a ResNet of bottlenecks, such as resnet50"
    if isinstance(model, ResNet) and model.layer1[0].conv2.groups > 1:
        return "its 3x3 convolutions fall into groups; give a plain ResNet, such as resnet50"
    if isinstance(model, ResNet) and getattr(model.layer1[0], "se", None) is not None:
        return "attention over its channels has widths of its own; give a plain ResNet, such as resnet50"
    return None


def _head_unit(model: Any) -> int:
    """Width per attention head, or the least multiple that leaves each attention a whole number of heads."""
    heads = [module.num_heads for module in model.modules() if isinstance(getattr(module, "num_heads", None), int)]
    return int(model.embed_dim // math.gcd(model.embed_dim, *heads))


def _heads(block: Any) -> int:
    return int(next(module.num_heads for module in block.modules() if hasattr(module, "num_heads")))


_MORE_HEADS = ", or more heads in backbone.kwargs.num_heads"


def _plain(kind: type[nn.Module]) -> ElasticFamily:
    """Transformers without stages."""

    def arguments(model: Any, size: SubSize) -> dict[str, Any]:
        given = {"embed_dim": size.width, "depth": size.depths[0], "num_heads": _heads(model.blocks[0])}
        if kind is Eva and model.attn_pool is not None:
            given["attn_pool_num_heads"] = model.attn_pool.num_heads
        heads = {name: count * size.width // model.embed_dim for name, count in given.items() if "heads" in name}
        return given | heads

    return ElasticFamily(
        kind,
        read=lambda model: SubSize(model.embed_dim, (len(model.blocks),)),
        unit=_head_unit,
        arguments=arguments,
        blocks=lambda stage: "blocks",
        remedy=_MORE_HEADS,
    )


def _swin(kind: type[nn.Module]) -> ElasticFamily:
    return ElasticFamily(
        kind,
        read=lambda model: SubSize(model.embed_dim, tuple(len(stage.blocks) for stage in model.layers)),
        unit=_head_unit,
        arguments=lambda model, size: {
            "embed_dim": size.width,
            "depths": size.depths,
            "num_heads": tuple(_heads(stage) * size.width // model.embed_dim for stage in model.layers),
        },
        blocks=lambda stage: f"layers.{stage}.blocks",
        shifts=True,
        remedy=_MORE_HEADS,
    )


def _convnext_size(model: Any) -> SubSize:
    return SubSize(_channels(model)[0], tuple(len(stage.blocks) for stage in model.stages))


def _channels(model: Any) -> list[int]:
    return [int(info["num_chs"]) for info in model.feature_info]


def _scaled(channels: list[int], width: int) -> tuple[int, ...]:
    return tuple(count * width // channels[0] for count in channels)


def _resnet_size(model: Any) -> SubSize:
    stages = [getattr(model, f"layer{stage + 1}") for stage in range(4)]
    return SubSize(stages[0][0].conv2.out_channels, tuple(map(len, stages)))


def _resnet_unit(model: Any) -> int:
    """Groups of the group norms, so that each keeps whole channels; 8 for other norms."""
    norm = model.layer1[0].bn1
    return int(norm.num_groups) if isinstance(norm, nn.GroupNorm) else 8


FAMILIES: tuple[ElasticFamily, ...] = (
    *(_plain(kind) for kind in (VisionTransformer, VisionTransformerDistilled, VisionTransformerRelPos, Eva, Beit)),
    *(_swin(kind) for kind in (SwinTransformer, SwinTransformerV2)),
    ElasticFamily(
        ConvNeXt,
        read=_convnext_size,
        unit=lambda model: 8,
        arguments=lambda model, size: {"dims": _scaled(_channels(model), size.width), "depths": size.depths},
        blocks=lambda stage: f"stages.{stage}.blocks",
    ),
    ElasticFamily(
        ResNet,
        read=_resnet_size,
        unit=_resnet_unit,
        arguments=lambda model, size: {
            "base_width": 64 * size.width // (model.layer1[0].conv3.out_channels // 4), "layers": size.depths
        },
        blocks=lambda stage: f"layer{stage + 1}",
        multiplied_by_width=False,
    ),
)  # fmt: skip
