"""One rate of stochastic depth for all residual branches."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.nn.drop_path import uniform_drop_path

NETWORKS = [  # with the number of residual branches
    ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}, 6),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}, 6),
    ("convnext_atto", {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 8)}, 5),
    ("eva02_tiny_patch14_224", {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8}, 6),
    ("resnet26", {"channels": (8, 8, 8, 8)}, 8),
]


def rates(model: torch.nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize("before", [0.0, 0.1])
@pytest.mark.parametrize(("name", "kwargs", "branches"), NETWORKS)
def test_every_branch_has_the_rate(name: str, kwargs: dict, branches: int, before: float) -> None:
    backbone = create_backbone(name, size=32, drop_path_rate=before, **kwargs)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = backbone.eval().pooled(images)
    uniform_drop_path(backbone.model, 0.2)
    assert rates(backbone.model) == [0.2] * branches
    assert torch.equal(backbone.pooled(images), whole)  # in evaluation nothing is dropped
    uniform_drop_path(backbone.model, 0.5)
    assert rates(backbone.model) == [0.5] * branches


def test_branches_are_dropped_at_the_rate_in_the_first_block_too() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", size=32, embed_dim=16, depth=1, num_heads=2, patch_size=8)
    uniform_drop_path(backbone.model, 0.2)
    drop = backbone.model.blocks[0].drop_path1  # type: ignore[union-attr,index]
    torch.manual_seed(0)
    dropped = (drop(torch.ones(20_000, 1)) == 0).double().mean()
    assert dropped.item() == pytest.approx(0.2, abs=0.01)  # 3.5 standard deviations


def test_a_sub_network_takes_the_rate() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", size=32, embed_dim=16, depth=4, num_heads=2, patch_size=8)
    elastic = Elastic(backbone, ElasticConfig(width=8, depth=2))
    uniform_drop_path(backbone.model, 0.2)
    sub = elastic.take(backbone, elastic.sizes[0])
    uniform_drop_path(sub.model, 0.2)
    assert rates(sub.model) == [0.2] * 4
    assert rates(backbone.model) == [0.2] * 8
    assert rates(elastic.extract(backbone, elastic.sizes[0]).model) == []  # what is built anew is free of it


def test_what_is_refused() -> None:
    with pytest.raises(CapabilityError, match="VGG has no residual branches"):
        uniform_drop_path(create_backbone("vgg11", size=32).model, 0.2)
    with pytest.raises(ConfigError, match="a rate of 1 is not possible"):
        uniform_drop_path(torch.nn.Identity(), 1)
