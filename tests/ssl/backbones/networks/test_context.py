"""The network of context prediction: the table of the paper's repository, and timm's surface."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.networks.context import ResponseNorm

TINY = {"widths": (8, 12, 16, 16, 12), "embed_dim": 20}


def test_registered_by_importing_the_backbone():
    assert timm.is_model("contextnet")
    data = timm.data.resolve_model_data_config(timm.create_model("contextnet", **TINY))
    assert data["input_size"] == (3, 96, 96)
    assert [255 * value for value in data["std"]] == pytest.approx([1, 1, 1])  # images keep the scale 0..255


def test_parameter_count_is_the_released_trunks_without_the_biases_that_norms_undo():
    released = {
        "conv1": 3 * 121 * 96 + 96, "conv2": 96 * 25 * 256 + 256, "conv3": 256 * 9 * 384, "conv4": 384 * 9 * 384,
        "conv5": 384 * 9 * 256, "fc6": 256 * 9 * 4096,
    }  # fmt: skip
    model = timm.create_model("contextnet", num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(released.values()) == 13_183_360


def test_maps_of_the_paper():
    """96 → 24 → 12 → 6 → 3, by a padding of 5 and poolings that round up."""
    model = timm.create_model("contextnet", num_classes=0).eval()
    images = torch.randn(2, 3, 96, 96)
    last, maps = model.forward_intermediates(images)
    assert [tuple(one.shape[1:]) for one in maps] == [
        (96, 24, 24), (256, 12, 12), (384, 6, 6), (384, 6, 6), (256, 6, 6),
    ]  # fmt: skip
    assert last.shape == (2, 256, 3, 3)
    assert torch.equal(last, model.forward_features(images))
    assert model(images).shape == (2, 4096)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 16, 16]


def test_poolings_round_up():
    block = timm.create_model("contextnet", **TINY).blocks[1]
    assert block.pool(torch.zeros(1, 1, 24, 13)).shape == (1, 1, 12, 6)
    rising = torch.arange(24.0).expand(1, 1, 24, 24)
    assert block.pool(rising)[0, 0, 0].tolist() == [*range(2, 24, 2), 23]  # the last window is cut off


def test_forward_is_layer_by_layer_what_the_table_says():
    model = timm.create_model("contextnet", num_classes=5, **TINY).double()
    images = 50 * torch.randn(3, 3, 96, 96, dtype=torch.double)
    x = images
    for number, block in enumerate(model.blocks):
        if number in (1, 2):
            x = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
            squares = nn.functional.pad(x.square(), (0, 0, 0, 0, 2, 2))
            around = sum(squares[:, start : start + x.shape[1]] for start in range(5))
            x = x / (1 + 1e-4 / 5 * around) ** 0.75
        x = nn.functional.conv2d(
            x, block.conv.weight, block.conv.bias, stride=4 if number == 0 else 1, padding=(5, 2, 1, 1, 1)[number]
        )
        if number >= 2:
            x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        x = x.relu()
    features = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
    hidden = features.flatten(1) @ model.head.fc6.weight.flatten(1).T
    hidden = ((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(model.forward_features(images), features)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), hidden)
    torch.testing.assert_close(model(images), hidden @ model.head.fc.weight.T + model.head.fc.bias)


def test_no_batch_norm_can_learn():
    """With scale and shift the network can silence itself and predict everything alike (the authors' warning)."""
    model = timm.create_model("contextnet", **TINY)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 4
    assert all(norm.weight is None and norm.bias is None and norm.eps == 1e-5 for norm in norms)
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == [
        "blocks.0.conv.bias", "blocks.1.conv.bias", "head.fc.bias",
    ]  # fmt: skip


def test_initialization_is_caffes_xavier():
    torch.manual_seed(0)
    model = timm.create_model("contextnet")
    for layer in (model.blocks[0].conv, model.blocks[3].conv, model.head.fc6, model.head.fc):
        bound = math.sqrt(3 / layer.weight[0].numel())
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert layer.bias is None or not layer.bias.any()


def test_the_response_norm_survives_half_precision():
    x = torch.full((1, 6, 2, 2), 300.0)  # 300² is past fp16
    assert ResponseNorm()(x.half()).dtype == torch.float16
    torch.testing.assert_close(ResponseNorm()(x.half()).float(), ResponseNorm()(x), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [32, 64, (96, 160)])
def test_other_sizes(size):
    backbone = create_backbone("contextnet", size=size, **TINY).eval()
    assert backbone.pooled(torch.randn(2, 3, *backbone.input_size)).shape == (2, 20)
    assert backbone.missing_reason("dense_map") is None


def test_larger_images_average_fc6_over_places():
    model = timm.create_model("contextnet", num_classes=0, **TINY).eval()
    features = torch.randn(1, 12, 3, 4)
    expected = (model.forward_head(features[..., :3]) + model.forward_head(features[..., 1:])) / 2
    torch.testing.assert_close(model.forward_head(features), expected)


def test_choice_of_maps():
    model = timm.create_model("contextnet", **TINY).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(images, intermediates_only=True)
    chosen = model.forward_intermediates(images, indices=[0, -2], intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(chosen, (maps[0], maps[3]), strict=True))
    assert torch.equal(model.forward_intermediates(images, indices=2, intermediates_only=True)[1], maps[4])
    assert torch.equal(model.forward_intermediates(images, stop_early=True)[0], model.forward_features(images))
    with pytest.raises(ValueError, match="output_fmt: 'NHWC' is not possible"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match="global_pool: 'max' is not possible; give 'avg' or ''"):
        timm.create_model("contextnet", global_pool="max", **TINY)


def test_heads():
    model = timm.create_model("contextnet", num_classes=4, **TINY).eval()
    images = torch.randn(2, 3, 96, 96)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), model.get_classifier()(features))
    model.reset_classifier(7)
    assert (model(images).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), features)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, global_pool="")
    assert model(images).shape == (2, 20, 1, 1)


def test_timms_tools_work_on_it():
    features = timm.create_model("contextnet", features_only=True, out_indices=(1, 4), **TINY)
    assert [tuple(one.shape[1:]) for one in features(torch.randn(1, 3, 96, 96))] == [(12, 12, 12), (12, 6, 6)]
    model = timm.create_model("contextnet", num_classes=4, **TINY)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert [sorted(names) for names in groups.values()] == [
        ["blocks.0.conv.bias", "blocks.0.conv.weight"],
        ["blocks.1.conv.bias", "blocks.1.conv.weight"],
        ["blocks.2.conv.weight"],
        ["blocks.3.conv.weight"],
        ["blocks.4.conv.weight", "head.fc6.weight"],
        ["head.fc.bias", "head.fc.weight"],
    ]
