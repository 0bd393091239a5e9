"""From a backbone to a classifier: what is kept, what is new, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from own_networks import Scaled, TinyConv
from torch import nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError
from unlabeled.workflows.finetune.classifier import classifier_parameters, create_classifier_backbone
from unlabeled.workflows.finetune.config import ModelConfig

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def vit(size: int = 16, **kwargs: object) -> Backbone:
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", size=size, **VIT, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"channels": [8, 8, 8, 8], "stem_width": 8}),
        ("convnext_atto", {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}),
        ("mobilenetv3_small_050", {}),
        ("nin_cifar", {}),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}),
    ],
)
def test_any_family_keeps_its_features_and_gets_a_fresh_classifier(name: str, kwargs: dict[str, object]) -> None:
    torch.manual_seed(0)
    target = create_backbone(name, size=32, **kwargs).eval()
    network = create_classifier_backbone(target, 7, ModelConfig()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert network.model(x).shape == (2, 7)
        assert torch.equal(network.pooled(x), target.pooled(x))
        assert network.model(x).abs().max() < 1e-2
    heads = classifier_parameters(network)
    assert heads
    assert heads.isdisjoint(target.state_dict())


def test_another_size_resamples_positions_and_another_pooling_adds_its_norm() -> None:
    target = vit()
    network = create_classifier_backbone(target, 3, ModelConfig(size=32, drop_path=0.1, kwargs={"global_pool": "avg"}))
    assert network.input_size == (32, 32)
    assert network.model.pos_embed.shape[1] == 65
    assert torch.equal(network.model.blocks[0].mlp.fc1.weight, target.model.blocks[0].mlp.fc1.weight)
    assert network.kwargs["drop_path_rate"] == 0.1
    rebuilt = create_backbone(network.name, size=network.input_size, **network.kwargs)
    assert rebuilt.model.state_dict().keys() == network.model.state_dict().keys()


def test_statistics_of_the_images_are_the_targets() -> None:
    target = vit()
    target.set_statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    network = create_classifier_backbone(target, 3, ModelConfig())
    assert (network.mean, network.std) == (target.mean, target.std)


def test_an_old_classifier_is_dropped_even_for_as_many_classes() -> None:
    target = create_backbone("resnet18", size=16, channels=[8, 8, 8, 8], stem_width=8, num_classes=5)
    network = create_classifier_backbone(target, 5, ModelConfig())
    assert network.model.fc.weight.abs().max() < 1e-3 < target.model.fc.weight.abs().max()
    assert torch.equal(network.model.conv1.weight, target.model.conv1.weight)


def test_random_weights_are_random() -> None:
    target = vit()
    network = create_classifier_backbone(target, 3, ModelConfig(), weights=False)
    assert not torch.equal(network.model.blocks[0].mlp.fc1.weight, target.model.blocks[0].mlp.fc1.weight)


def test_faults_are_told_by_the_settings_that_caused_them() -> None:
    with pytest.raises(ConfigError, match=r"^model.kwargs.dept: .* takes no such argument"):
        create_classifier_backbone(vit(), 3, ModelConfig(kwargs={"dept": 1}))
    with pytest.raises(ConfigError, match=r"^model.size: 18x18 is not a multiple of .* patch, 4"):
        create_classifier_backbone(vit(), 3, ModelConfig(size=18))
    with pytest.raises(ConfigError, match=r"^model.drop_path: nin_cifar takes no such argument"):
        create_classifier_backbone(create_backbone("nin_cifar", size=16), 3, ModelConfig(drop_path=0.1))
    with pytest.raises(CheckpointError, match=r"^target: .*has shape .* needs"):
        create_classifier_backbone(vit(), 3, ModelConfig(kwargs={"embed_dim": 24}))
    with pytest.raises(ConfigError, match=r"^model.drop_path: VisionTransformer has no timm name"):
        create_classifier_backbone(Backbone(vit().model, size=(16, 16)), 3, ModelConfig(drop_path=0.1))


def test_a_network_of_ones_own_gets_its_own_classifier_or_a_linear_layer() -> None:
    given, target = vit(), Backbone(vit().model, size=(16, 16))
    by_itself = create_classifier_backbone(target, 3, ModelConfig())
    assert type(by_itself.model) is type(target.model), "it has reset_classifier"
    before = given.model.state_dict()
    linear = create_classifier_backbone(Backbone(TinyConv(), size=(16, 16), mean=(0.1,) * 3), 3, ModelConfig())
    assert (linear.name, linear.origin, linear.mean) == ("TinyConv", "own_networks:TinyConv", (0.1,) * 3)
    assert classifier_parameters(linear) == {"model.head.weight", "model.head.bias"}
    assert linear.model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"backbone: Scaled has no timm name, and no reset_parameters.* draws scale"):
        create_classifier_backbone(Backbone(Scaled(), size=(16, 16)), 3, ModelConfig(), weights=False)


def test_a_network_without_a_classifier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = vit()
    monkeypatch.setattr(type(target.model), "get_classifier", lambda self: nn.Identity())
    with pytest.raises(CapabilityError, match=r"gives .* for an image instead of 3 classes"):
        create_classifier_backbone(target, 3, ModelConfig())
