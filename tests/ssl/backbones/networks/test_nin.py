"""RotNet's network-in-network: the table of the paper's repository, and timm's surface."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import unlabeled.ssl.backbones.backbone  # noqa: F401  registers the network


def test_registered_by_importing_the_backbone():
    assert timm.is_model("nin_cifar")
    assert timm.get_pretrained_cfg("nin_cifar").input_size == (3, 32, 32)


@pytest.mark.parametrize(("blocks", "parameters"), [(3, 1_004_484), (4, 1_411_140), (5, 1_817_796)])
def test_parameter_count_with_the_head_of_four(blocks, parameters):
    """1,411,140 is the released network's; a block more is 192 * 192 * (9 + 1 + 1) + 6 * 192."""
    model = timm.create_model("nin_cifar", num_blocks=blocks, num_classes=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_maps_of_the_paper():
    model = timm.create_model("nin_cifar").eval()
    images = torch.randn(2, 3, 32, 32)
    last, maps = model.forward_intermediates(images)
    assert [tuple(one.shape[1:]) for one in maps] == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (96, 2),
        (192, 4),
        (192, 4),
        (192, 4),
    ]
    assert torch.equal(last, model.forward_features(images))
    assert torch.equal(last, maps[-1])
    chosen = model.forward_intermediates(images, indices=[0, -2], intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(chosen, (maps[0], maps[2]), strict=True))
    assert torch.equal(model.forward_intermediates(images, indices=2, intermediates_only=True)[0], maps[2])
    with pytest.raises(ValueError, match="output_fmt: 'NHWC' is not possible"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_average_pooling_counts_the_padding():
    """A map of ones: a corner's window has 4 of 9 places inside, an edge's 6, the zeros of the padding count."""
    pool = timm.create_model("nin_cifar").blocks[1].pool
    pooled = pool(torch.ones(1, 1, 16, 16))[0, 0]
    assert pooled.shape == (8, 8)
    assert pooled[0, 0] == pytest.approx(4 / 9)
    assert pooled[0, 3] == pytest.approx(6 / 9)
    assert pooled[3, 3] == pytest.approx(1)


def test_heads():
    model = timm.create_model("nin_cifar", num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, model.forward_features(images).mean((2, 3)))
    torch.testing.assert_close(model(images), model.get_classifier()(features))
    model.reset_classifier(7)
    assert (model(images).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), features)
    assert isinstance(model.get_classifier(), nn.Identity)


def test_statistics_are_those_of_the_cifar_recipe():
    data = timm.data.resolve_model_data_config(timm.create_model("nin_cifar"))
    assert data["input_size"] == (3, 32, 32)
    assert [value * 255 for value in data["mean"]] == pytest.approx([125.3, 123.0, 113.9])
    assert [value * 255 for value in data["std"]] == pytest.approx([63.0, 62.1, 66.7])


def test_framework_default_initialization():
    torch.manual_seed(3)
    model = timm.create_model("nin_cifar")
    torch.manual_seed(3)
    first = nn.Conv2d(3, 192, 5, padding=2, bias=False)
    assert torch.equal(model.blocks[0].conv1.conv.weight, first.weight)


def test_timms_tools_work_on_it():
    features = timm.create_model("nin_cifar", features_only=True)
    assert [tuple(one.shape[1:]) for one in features(torch.randn(1, 3, 32, 32))] == [
        (96, 16, 16),
        (192, 8, 8),
        (192, 8, 8),
    ]
    model = timm.create_model("nin_cifar", num_classes=4)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert [sorted(names)[0] for names in groups.values()] == [
        "blocks.0.conv1.bn.bias",
        "blocks.1.conv1.bn.bias",
        "blocks.2.conv1.bn.bias",
        "blocks.3.conv1.bn.bias",
        "head.fc.bias",
    ]
