"""Every size of a small model of each family: gradients, extraction, and what timm builds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize
from unlabeled.ssl.core.errors import CapabilityError, ConfigError

PLAIN: dict[str, Any] = {"size": 32, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 4}
SWIN: dict[str, Any] = {
    "size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 1, 4, 1), "num_heads": (2, 4, 8, 16), "window_size": 2,
}  # fmt: skip
CONVNEXT: dict[str, Any] = {"size": 32, "dims": (16, 32, 40, 48), "depths": (1, 1, 4, 1)}
RESNET: dict[str, Any] = {"size": 32, "channels": (16, 16, 32, 32), "layers": (1, 1, 4, 1)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", PLAIN),
    "vit_norms": ("vit_tiny_patch16_224", PLAIN | {"qk_norm": True, "init_values": 1e-5, "pre_norm": True}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", PLAIN),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", PLAIN | {"mlp_ratio": 4}),
    "deit": ("deit_tiny_distilled_patch16_224", PLAIN),
    "deit3": ("deit3_small_patch16_224", PLAIN),
    "siglip": ("vit_base_patch16_siglip_224", PLAIN),
    "relpos": ("vit_relpos_small_patch16_224", PLAIN),
    "eva02_joint": ("eva02_tiny_patch14_224", PLAIN),
    "eva02_separate": ("eva02_base_patch14_224", PLAIN),
    "dinov3": ("vit_small_patch16_dinov3", PLAIN),
    "pe": ("vit_pe_core_tiny_patch16_384", PLAIN),
    "beit": ("beit_base_patch16_224", PLAIN),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_atto", CONVNEXT),
    "convnextv2": ("convnextv2_atto", CONVNEXT),
    "convnext_stem": ("convnext_atto_ols", CONVNEXT),
    "resnet_bn": ("resnet50", RESNET),
    "resnet_d": ("resnetaa50d", RESNET),
    "resnet_gn": ("resnet50", RESNET | {"size": 64, "norm_layer": "groupnorm", "channels": (64, 64, 64, 64)}),
}

GROUPS = (
    (r"\.qkv\.", 0, 3), (r"\.kv\.", 0, 2), (r"\.reduction\.", 1, 4),
)  # fmt: skip
"""Parameters split into equal groups: pattern, axis, number of groups; repeated here independently of the code."""
OWN_GROUPS = {
    "dinov2_swiglu": ((r"\.fc1\.", 0, 2),), "eva02_joint": ((r"\.fc1\.", 0, 2),),
    "swin": ((r"\.downsample\.norm\.", 0, 4),),
}  # fmt: skip


def build(case: str) -> tuple[Backbone, Elastic]:
    """A backbone with no parameter without effect, and its sizes: two or three widths, two depths."""
    name, arguments = CASES[case]
    torch.manual_seed(0)
    backbone = create_backbone(name, **arguments, drop_path_rate=0.0)
    elastic = Elastic(backbone, ElasticConfig(depth=backbone.depth - 1))
    randomize(backbone)
    return backbone, elastic


def randomize(backbone: nn.Module) -> None:
    with torch.no_grad():
        for parameter in backbone.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan_in**-0.5)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]


def source(elastic: Elastic, size: SubSize, name: str) -> str:
    """The full backbone's name of a parameter of a sub-network."""
    for stage, kept in enumerate(elastic.blocks(size)):
        prefix = f"model.{elastic.family.blocks(stage)}."
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{kept[int(number)]}.{rest}"
    return name


def selected(case: str, name: str, full: Tensor, shape: torch.Size) -> Tensor:
    """True where the sub-network's parameter comes from."""
    chosen = torch.ones_like(full, dtype=torch.bool)
    groups = [*GROUPS, *OWN_GROUPS.get(case, ())]
    for axis, (length, own) in enumerate(zip(full.shape, shape, strict=True)):
        parts = next((n for pattern, a, n in groups if a == axis and re.search(pattern, name)), 1)
        kept = torch.arange(length) % (length // parts) < own // parts
        chosen &= kept.view(-1, *[1] * (full.ndim - axis - 1))
    return chosen


@pytest.mark.parametrize("case", CASES)
def test_every_size(case: str) -> None:
    backbone, elastic = build(case)
    x = torch.randn(3, 3, *backbone.input_size)
    assert len(elastic.sizes) in (4, 6)
    reached = backbone.reached_by_pooled()
    for size in elastic.sizes:
        alone = elastic.extract(backbone, size)
        strictly_loads_into_timm(elastic, size, alone)
        for training in (False, True):
            backbone.train(training)
            alone.train(training)
            torch.manual_seed(1)
            features = elastic.take(backbone, size)(x)
            torch.manual_seed(1)
            assert features.isfinite().all()
            torch.testing.assert_close(features, alone(x), rtol=1e-5, atol=1e-5)
        backbone.zero_grad()
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        shapes = {source(elastic, size, name): parameter.shape for name, parameter in alone.named_parameters()}
        only_used_parts_have_gradients(case, backbone, shapes, reached)


def strictly_loads_into_timm(elastic: Elastic, size: SubSize, alone: Backbone) -> None:
    plain = timm.create_model(elastic.name, **elastic.arguments(size))
    plain.load_state_dict(alone.model.state_dict(), strict=True)
    assert elastic.family.read(plain) == size


def only_used_parts_have_gradients(
    case: str, backbone: Backbone, shapes: dict[str, torch.Size], reached: set[str]
) -> None:
    for name, parameter in backbone.named_parameters():
        grad = parameter.grad
        if name not in shapes:
            assert grad is None or not grad.any(), f"{name} is of a skipped block"
        elif name in reached:
            assert grad is not None, name
            assert grad.isfinite().all(), name
            chosen = selected(case, name, parameter, shapes[name])
            assert chosen.sum() == shapes[name].numel()
            assert not grad[~chosen].any(), f"{name} has gradients where it is not used"
            assert grad[chosen].any(), f"{name} has none where it is used"


@pytest.mark.parametrize(("name", "arguments", "reason"), [
    ("densenet121", {}, "sub-networks are known for ViT, DeiT, BEiT, EVA, Swin, ConvNeXt and bottleneck ResNets only"),
    ("resnet18", {}, "its blocks have no inner width; give a bottleneck ResNet, such as resnet50"),
    ("resnext50_32x4d", {}, "its 3x3 convolutions are grouped; give a plain ResNet, such as resnet50"),
    ("seresnet50", {}, "its channel attention has widths of its own; give a plain ResNet, such as resnet50"),
    ("vit_base_patch16_xp_224", PLAIN, "one layer of its blocks joins attention and MLP; give a plain transformer"),
    ("vit_small_patch16_rope_mixed_224", PLAIN, "its rotary frequencies are one table for all blocks; give"),
    ("vit_large_patch16_sapiens2", PLAIN | {"embed_dim": 64, "depth": 24, "num_heads": 16}, "its heads share keys"),
])  # fmt: skip
def test_models_that_cannot_be_elastic(name: str, arguments: dict[str, Any], reason: str) -> None:
    backbone = create_backbone(name, **arguments)
    with pytest.raises(CapabilityError, match=f"backbone: {name} cannot be elastic: {reason}"):
        Elastic(backbone, ElasticConfig())


def test_a_module_of_ones_own_cannot_be_elastic() -> None:
    backbone = Backbone(create_backbone("vit_tiny_patch16_224", **PLAIN).model, size=(32, 32))
    with pytest.raises(CapabilityError, match="a module of your own is not built by name; give the name of a timm"):
        Elastic(backbone, ElasticConfig())


def test_widths_that_no_head_divides_are_refused_with_the_remedy() -> None:
    wide = create_backbone("swin_base_patch4_window7_224", size=32, window_size=1, depths=(1, 1, 2, 1))
    with pytest.raises(ConfigError, match=(
        r"^elastic.width: 112 is not possible in a backbone of width 128; give a multiple of 32 that is no larger, "
        r"or more heads in backbone.kwargs.num_heads$"
    )):  # fmt: skip
        Elastic(wide, ElasticConfig(width=112))
    more = create_backbone(
        "swin_base_patch4_window7_224", size=32, window_size=1, depths=(1, 1, 2, 1), num_heads=(8, 16, 32, 64)
    )
    assert Elastic(more, ElasticConfig(width=112)).sizes[0].width == 112


def test_a_width_that_timm_rejects_fails_before_training() -> None:
    backbone = create_backbone("vit_giant_patch14_dinov2", **PLAIN | {"mlp_ratio": 2.625})
    with pytest.raises(CapabilityError, match=r"cannot be elastic: timm does not build it at width 24 \("):
        Elastic(backbone, ElasticConfig(candidates=((24, 2),)))
