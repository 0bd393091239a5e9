"""Costs of sizes against a closed form, and against each sub-network counted by itself."""

from __future__ import annotations

import pytest
import torch

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig
from unlabeled.ssl.backbones.elastic.cost import cost_of, costs_of

NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4}, {"depth": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 32, "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "window_size": 4, "drop_path_rate": 0.2},
        {"depth": (2, 2, 2, 2)},
    ),
    "resnet": (
        "resnet50",
        {"layers": (2, 3, 4, 2), "channels": (32, 32, 32, 32), "base_width": 128},
        {"width": 32, "depth": (2, 2, 2, 2)},
    ),
    "convnext": ("convnext_atto", {"dims": (16, 32, 64, 128), "depths": (1, 1, 4, 1)}, {"depth": (1, 1, 2, 1)}),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_size_costs_what_its_network_costs(name: str) -> None:
    model, arguments, sizes = NETWORKS[name]
    with torch.device("meta"):
        full = create_backbone(model, size=32, **arguments)
        elastic = Elastic(full, ElasticConfig(**sizes))
        costs = costs_of(elastic, full)
        assert list(costs) == elastic.sizes
        assert costs[elastic.full] == cost_of(full)
        for size in elastic.sizes[:: max(1, len(elastic.sizes) // 2)]:
            assert costs[size] == cost_of(create_backbone(model, size=32, **elastic.arguments(size))), size


def test_multiply_adds_of_a_transformer_by_hand() -> None:
    width, depth, tokens = 32, 3, 17
    backbone = create_backbone("vit_tiny_patch16_224", size=32, patch_size=8, embed_dim=width, depth=depth, num_heads=2)
    linear = tokens * 12 * width * width  # qkv 3, proj 1, mlp 4 + 4
    attention = 2 * tokens * tokens * width  # scores and their sum over values
    embedding = 16 * 3 * 8 * 8 * width
    assert cost_of(backbone).macs == embedding + depth * (linear + attention)
    assert cost_of(backbone).parameters == sum(parameter.numel() for parameter in backbone.parameters())
