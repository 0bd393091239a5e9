"""Layers and weight decay from parameter names."""

from __future__ import annotations

import pytest

from unlabeled.ssl.backbones.layer_index import block_layers, count_blocks, decay_applies, layer_scale


def test_between_blocks_belongs_to_the_earlier_one_and_the_rest_to_the_last():
    names = [
        "cls_token",
        "layers.0.blocks.0.mlp.weight",
        "layers.0.blocks.1.mlp.weight",
        "layers.0.downsample.reduction.weight",
        "layers.1.blocks.0.mlp.weight",
        "norm.weight",
    ]
    assert block_layers(names) == [0, 1, 2, 2, 3, 4]
    assert count_blocks(names) == 3


@pytest.mark.parametrize(
    ("names", "depth"),
    [
        (["blocks.0.0.conv.weight", "blocks.1.0.conv.weight", "blocks.1.1.conv.weight"], 3),  # EfficientNet
        (["blocks.0.0.fn.weight", "blocks.0.2.weight", "blocks.1.0.fn.weight", "blocks.1.2.weight"], 2),  # ConvMixer
        (["stages.0.0.conv.weight", "stages.1.0.weight", "stages.1.1.conv.weight", "stages.1.2.conv.weight"], 3),
        (["network.0.0.norm.weight", "network.1.proj.weight", "network.2.0.norm.weight"], 2),  # VOLO
        (["encoder.layer.0.q.weight", "encoder.layer.1.q.weight"], 2),
        (["patch_embed.backbone.stages.0.0.conv.weight", "blocks.0.norm.weight"], 1),  # a stem with stages of its own
        (["conv.weight", "fc.weight"], 0),
    ],
)
def test_what_counts_as_a_block(names, depth):
    assert count_blocks(names) == depth


def test_without_blocks_all_is_stem():
    assert block_layers(["conv.weight", "fc.weight"]) == [0, 0]
    assert block_layers([]) == []


def test_layer_scale():
    assert layer_scale(13, 12, 0.75) == 1
    assert layer_scale(0, 2, 0.5) == pytest.approx(0.125, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "shape", "rules"),
    [
        ("blocks.0.mlp.fc1.weight", (4, 4), {"pretrain", "finetune", "swin"}),
        ("blocks.0.norm1.weight", (4,), set()),
        ("blocks.0.attn.table.bias", (4, 4), set()),
        ("logit_scale", (), set()),
        ("model.cls_token", (1, 1, 4), {"pretrain", "swin"}),
        ("pos_embed", (1, 5, 4), {"pretrain", "swin"}),
        ("blocks.0.attn.relative_position_bias_table", (9, 2), {"pretrain", "finetune"}),
    ],
)
def test_decay_rules(name, shape, rules):
    assert {rule for rule in ("pretrain", "finetune", "swin") if decay_applies(name, shape, rule)} == rules
