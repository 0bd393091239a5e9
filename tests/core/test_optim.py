import pytest
import torch

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbone import create_backbone
from unlabeled.ssl.errors import ConfigError
from unlabeled.ssl.optim import create_optimizer, parameter_groups, set_rates
from unlabeled.ssl.schema import OptimConfig


@pytest.fixture(scope="module")
def mae() -> torch.nn.Module:
    backbone = create_backbone("vit_tiny_patch16_224", size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)
    return create_task({"name": "mae", "decoder": {"dim": 16, "depth": 1, "heads": 2}}, backbone)


def test_groups_hold_every_trainable_parameter_once_and_decay_as_published(mae) -> None:
    groups = parameter_groups(mae, OptimConfig())
    assert {(group["lr_scale"], group["decays"]) for group in groups} == {(1.0, True), (1.0, False)}
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in mae.named_parameters() if p.requires_grad)
    decayed = next(set(group["names"]) for group in groups if group["decays"])
    assert {"backbone.model.cls_token", "decoder.mask_token"} <= decayed  # the rule of timm 0.3.2
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed)


def test_layer_decay_falls_from_the_head_to_the_stem(mae) -> None:
    groups = parameter_groups(mae, OptimConfig(layer_decay=0.5))
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["backbone.model.patch_embed.proj.weight"] == 0.5**4
    assert scale["backbone.model.blocks.0.mlp.fc1.weight"] == 0.5**3
    assert scale["backbone.model.blocks.2.mlp.fc1.weight"] == 0.5
    assert scale["backbone.model.norm.weight"] == scale["decoder.pred.weight"] == 1.0


def test_rates_reach_every_group(mae) -> None:
    optimizer = create_optimizer(mae, OptimConfig(layer_decay=0.5))
    set_rates(optimizer, lr=1.0, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["decays"] else 0.0)


def test_sgd_is_the_optimizer_of_the_rotation_paper(mae) -> None:
    optimizer = create_optimizer(mae, OptimConfig(name="sgd", momentum=0.9))
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_lamb_leaves_clipping_to_the_engine(mae) -> None:
    assert create_optimizer(mae, OptimConfig(name="lamb")).defaults["max_grad_norm"] is None
    assert create_optimizer(mae, OptimConfig(name="lamb", kwargs={"max_grad_norm": 2})).defaults["max_grad_norm"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamm"}, r"optim.name: 'adamm' is not an optimizer; did you mean"),
        ({"kwargs": {"nothing": 1}}, r"optim: adamw does not take these settings .*nothing.*see optim.kwargs"),
    ],
)
def test_faults(mae, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_optimizer(mae, OptimConfig(**settings))
