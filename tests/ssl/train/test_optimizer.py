import pytest
import torch

from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig
from unlabeled.ssl.config.schema import OptimConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.train.optimizer import create_optimizer, parameter_groups, set_learning_rates

HEAD = {"prototypes": 4, "hidden": 4, "bottleneck": 4}


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
    set_learning_rates(optimizer, lr=1.0, weight_decay=0.1)
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


def test_the_patch_embedding_has_a_rate_of_its_own_on_top_of_layer_decay(mae) -> None:
    plain, slow = (
        {name: group["lr_scale"] for group in parameter_groups(mae, config) for name in group["names"]}
        for config in (OptimConfig(layer_decay=0.5), OptimConfig(layer_decay=0.5, patch_embed_lr=0.2))
    )
    slower = {name: 0.2 * plain[name] for name in plain if slow[name] != plain[name]}
    prefix = "backbone.model.patch_embed.proj"
    assert slower == {name: slow[name] for name in (f"{prefix}.weight", f"{prefix}.bias")}
    assert slow["backbone.model.cls_token"] == 0.5**4  # of the same layer, and not of the embedding


def test_the_norm_of_an_embedding_belongs_to_it_and_a_convolution_of_a_stem_does_not(caplog) -> None:
    config = OptimConfig(patch_embed_lr=0.2)
    swin = create_backbone("swin_tiny_patch4_window7_224", size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2))
    groups = parameter_groups(create_task({"name": "rotation"}, swin), config)
    slow = {name for group in groups for name in group["names"] if group["lr_scale"] == 0.2}
    parts = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    assert slow == {f"backbone.model.patch_embed.{part}" for part in parts}
    assert not caplog.messages
    resnet = create_task({"name": "rotation"}, create_backbone("resnet18", size=32, channels=(8, 8, 8, 8)))
    assert {group["lr_scale"] for group in parameter_groups(resnet, config)} == {1.0}
    assert caplog.messages == ["optim.patch_embed_lr: resnet18 has no patch_embed, so this has no effect"]


def test_groups_do_not_depend_on_the_sub_network_in_use() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2)
    task = create_task({"name": "rotation"}, backbone)
    config = OptimConfig(layer_decay=0.5, patch_embed_lr=0.2)

    def labels() -> dict[str, tuple[float, bool]]:
        groups = parameter_groups(task, config)
        return {name: (group["lr_scale"], group["decays"]) for group in groups for name in group["names"]}

    before, elastic = labels(), Elastic(backbone, ElasticConfig(width=8, depth=2))
    sub = elastic.take(backbone, elastic.sizes[0])
    sub.pooled(torch.zeros(1, 3, 32, 32)).sum().backward()
    assert sub.depth == 2
    assert labels() == before
    assert before["backbone.model.blocks.3.mlp.fc1.weight"][0] == 0.5  # by the whole network's depth


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1e-5}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}),
        ("eva02_tiny_patch14_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1e-5, "patch_size": 8}),
    ],
)
def test_what_decays_is_what_decays_in_poa(name: str, kwargs: dict) -> None:
    """alipay/POA, ``get_params_groups_with_decay``: names with norm or gamma and biases do not; tokens, positions and
    tables of relative positions do."""
    task = create_task(
        {"name": "dino", "locals": 0, "first_colors": {"blur": 0}, "second_colors": {"blur": 0}, "head": HEAD},
        create_backbone(name, size=32, **kwargs),
    )
    groups = parameter_groups(task, OptimConfig())
    ours = {name for group in groups if group["decays"] for name in group["names"] if name.startswith("backbone.")}
    names = [name for group in groups for name in group["names"] if name.startswith("backbone.")]
    published = {name for name in names if not (name.endswith(".bias") or "norm" in name or "gamma" in name)}
    one_dimensional = {name for name in published if task.get_parameter(name).dim() == 1}
    assert {name.rsplit(".", 1)[1] for name in one_dimensional} <= {"q_bias", "v_bias"}  # biases by another name
    assert ours == published - one_dimensional
    assert any("gamma" in name for name in names) or name.startswith("swin")
