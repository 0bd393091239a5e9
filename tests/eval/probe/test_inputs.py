"""Inputs of linear heads, against timm's own intermediate layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unlabeled.eval.probe.inputs import BlockFeatures, block_inputs, has_class_token, pooled_inputs
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import ConfigError

VIT = {"embed_dim": 24, "depth": 5, "num_heads": 2, "patch_size": 8, "size": 32}


def seeded_backbone(name: str, **options: Any) -> Backbone:
    """In evaluation mode, its final norm far from one that does nothing."""
    torch.manual_seed(0)
    backbone = create_backbone(name, **options).eval()
    for part in ("norm", "fc_norm"):
        for parameter in getattr(backbone.model, part, torch.nn.Identity()).parameters():
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return backbone


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read(backbone: Backbone, images: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Title → features of each input."""
    reading, inputs = block_inputs(backbone, **settings)
    features = reading(backbone, images)
    assert max(one.stop for one in inputs) == features.shape[1]
    return {one.title: one.of(features) for one in inputs}


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_tokens_are_those_of_timm_normed_and_without_registers(images: Tensor, registers: int) -> None:
    backbone = seeded_backbone("vit_tiny_patch16_224", reg_tokens=registers, **VIT)
    found = read(backbone, images, blocks=(1, 4), pooling=("cls", "avg", "cls+avg"))
    layers = backbone.model.get_intermediate_layers(images, n=4, return_prefix_tokens=True, norm=True)  # type: ignore
    assert layers[0][0].shape == (3, 16, 24)
    assert layers[0][1].shape == (3, 1 + registers, 24)
    tokens = [prefix[:, 0] for _, prefix in layers]
    averages = [patches.mean(1) for patches, _ in layers]
    expected = {
        "class token of the last block": tokens[-1:],
        "class tokens of the last 4 blocks": tokens,
        "average of the last block": averages[-1:],
        "averages of the last 4 blocks": averages[::-1],
        "class token of the last block and the average of the patches": [tokens[-1], averages[-1]],
        "class tokens of the last 4 blocks and the average of the patches": [*tokens, averages[-1]],
    }
    assert list(found) == list(expected)
    for title, parts in expected.items():
        torch.testing.assert_close(found[title], torch.cat(parts, 1), msg=title)
    torch.testing.assert_close(found["class token of the last block"], backbone(images))


@torch.no_grad()
def test_a_norm_behind_the_average_is_applied_to_every_block(images: Tensor) -> None:
    """timm's transformers that pool by the average have their final norm there."""
    for options in ({}, {"class_token": False}):
        backbone = seeded_backbone("vit_tiny_patch16_224", global_pool="avg", **options, **VIT)
        assert has_class_token(backbone) == (not options)
        found = list(read(backbone, images, blocks=(1, 3), pooling=("avg",)).values())
        model: Any = backbone.model
        maps = model.get_intermediate_layers(images, n=3)
        assert not isinstance(model.fc_norm, torch.nn.Identity)
        torch.testing.assert_close(found[0], backbone(images))
        torch.testing.assert_close(found[1], torch.cat([model.fc_norm(one.mean(1)) for one in maps[::-1]], 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {"size": 32}),
        ("convnext_atto", {"size": 32, "depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
        ("mobilenetv3_small_050", {"size": 32}),
        ("swin_tiny_patch4_window7_224",
         {"size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_maps_are_averaged_and_the_last_is_the_pooled_features(
    images: Tensor, name: str, options: dict[str, Any]
) -> None:
    backbone = seeded_backbone(name, **options)
    pooled, three = read(backbone, images, blocks=(1, 3)).values()
    maps = [one.mean((2, 3)) for one in backbone.maps(images, [-2, -3])]
    torch.testing.assert_close(pooled, backbone(images))
    torch.testing.assert_close(three, torch.cat([backbone(images), *maps], 1), atol=1e-5, rtol=1e-4)


def test_the_grid_of_dinov2_has_four_inputs_with_a_class_token_and_two_without() -> None:
    grid: dict[str, Any] = {"blocks": (1, 4), "pooling": ("cls", "cls+avg"), "fall_back": True}
    reading, inputs = block_inputs(seeded_backbone("vit_tiny_patch16_224", **VIT), **grid)
    assert reading == BlockFeatures(classes=4, averages=1)
    assert [(one.start, one.stop) for one in inputs] == [(72, 96), (0, 96), (72, 120), (0, 120)]
    reading, inputs = block_inputs(seeded_backbone("resnet10t", size=32), **grid)
    assert reading == BlockFeatures(classes=0, averages=4)
    assert [(one.start, one.stop, one.blocks) for one in inputs] == [(0, 512, 1), (0, 960, 4)]


def test_what_a_network_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.linear\.pooling: resnet10t has no class token for 'cls'"):
        block_inputs(seeded_backbone("resnet10t", size=32), (1,), ("cls",))
    with pytest.raises(ConfigError, match=r"evaluate\.linear\.blocks: 6 is not possible, .* has 5 feature maps; give"):
        block_inputs(seeded_backbone("vit_tiny_patch16_224", **VIT), (1, 6))


def test_prefixes_are_those_shorter_than_the_whole() -> None:
    assert [(one.stop, one.prefix) for one in pooled_inputs(32, (64, 8, 32, 8, 16))] == [
        (32, False), (8, True), (16, True),
    ]  # fmt: skip
