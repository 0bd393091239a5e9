"""The adapter's surface, capabilities and refusals."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from unlabeled.pretext import registry
from unlabeled.ssl.backbones.backbone import CAPABILITIES, Backbone, FeatureStage, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError
from unlabeled.ssl.task import PretextTask


class Tiny(nn.Module):
    """The minimum that a user's own model needs."""

    def __init__(self, pool: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.pool = pool

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3)) if self.pool else x


class TinyMaps(Tiny):
    """With maps, but a false statement about them."""

    feature_info = [{"num_chs": 99, "reduction": 1, "module": "conv"}]

    def forward_intermediates(self, x, indices=None, output_fmt="NCHW", intermediates_only=False):
        return [self.conv(x)]


@pytest.mark.parametrize(
    ("name", "depth", "embed_dim"),
    [
        ("resnet18", 8, 512),
        ("vit_tiny_patch16_224", 12, 192),
        ("swin_tiny_patch4_window7_224", 12, 768),
        ("convnext_atto", 12, 320),
        ("mobilenetv3_small_050", 12, 1024),
        ("vit_tiny_r_s16_p8_224", 12, 192),
    ],
)
def test_depth_and_width(name, depth, embed_dim):
    backbone = create_backbone(name, size=64)
    assert (backbone.depth, backbone.embed_dim) == (depth, embed_dim)
    assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, embed_dim)


def test_width_follows_the_pooling():
    assert create_backbone("test_resnet", global_pool="catavgmax").embed_dim == 2 * 96


def test_strides_are_measured():
    stated = timm.create_model("tresnet_m").feature_info[0]["reduction"]
    assert stated == 2
    assert create_backbone("tresnet_m", size=64).stages[0] == FeatureStage(64, 4)
    assert Backbone(TinyMaps(), size=(32, 32)).stages == [FeatureStage(6, 4)]


def test_non_square_sizes():
    backbone = create_backbone("test_vit", size=(32, 64))
    assert backbone.input_size == (32, 64)
    assert backbone.map(torch.randn(1, 3, 32, 64)).shape == (1, 64, 2, 4)
    assert create_backbone("test_resnet", size=(32, 64)).map(torch.randn(1, 3, 32, 64)).shape == (1, 96, 1, 2)


def test_size_goes_to_the_model_only_where_it_is_taken():
    assert create_backbone("test_vit", size=32).kwargs == {"num_classes": 0, "img_size": (32, 32)}
    assert create_backbone("test_resnet", size=32).kwargs == {"num_classes": 0}
    assert create_backbone("test_vit", img_size=32).input_size == (32, 32)
    dynamic = create_backbone("test_vit", dynamic_img_size=True)
    assert dynamic.map(torch.randn(1, 3, 48, 32)).shape[2:] == (3, 2)


def test_normalize_uses_the_models_statistics():
    backbone = create_backbone("test_resnet", size=32)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(backbone.normalize(images), expected)
    torch.testing.assert_close(backbone.normalize(images / 255), expected)


def test_maps_come_in_the_order_asked_for():
    backbone = create_backbone("test_resnet", size=32).eval()
    images = torch.randn(1, 3, 32, 32)
    last, first, again = backbone.maps(images, [-1, 1, -1])
    assert (last.shape[1], first.shape[1]) == (96, 32)
    assert torch.equal(last, again)
    with pytest.raises(CapabilityError, match="test_resnet has 5 feature maps; there is no number 5"):
        backbone.maps(images, [5])


def test_building_leaves_modes_and_weights_alone():
    model = timm.create_model("test_resnet", num_classes=0)
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Backbone(model)
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", {}, "backbone.name: 'resnet81' is not a timm model; did you mean .*'resnet18'"),
        ("resnet18.nonsense", {}, r"resnet18.nonsense cannot be built .*nonsense"),
        ("test_resnet", {"patch_siz": 4}, "backbone.kwargs.patch_siz: test_resnet takes no such argument"),
        ("poolformerv2_s12", {"nonsense": 4}, "backbone.kwargs.nonsense: poolformerv2_s12 takes no such argument"),
        ("test_resnet", {"img_size": 64}, "backbone.kwargs.img_size: test_resnet takes no such argument"),
        ("test_vit", {"size": 40}, "backbone.size: 40x40 is not a multiple of test_vit's patch, 16; give 32 or 48"),
        ("test_vit", {"size": 32, "patch_size": 5}, "backbone.size: 32x32 is not a multiple .* 5; give 30 or 35"),
        ("test_vit", {"size": 32, "img_size": 64}, "backbone.size: 32 and backbone.kwargs.img_size: 64x64 differ"),
        ("test_vit", {"in_chans": 1}, "backbone.kwargs.in_chans: 1 is not possible"),
        ("nin_cifar", {"num_blocks": 2}, "num_blocks: 2 is not possible; give 3, 4 or 5"),
        (
            "efficientformer_l1",
            {"size": 64},
            "backbone.size: efficientformer_l1 cannot take images of 64x64 .*; give",
        ),
    ],
)
def test_refusals_name_the_setting(name, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value)


def test_pretrained_without_network_names_the_remedy(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"no weights for test_resnet \(no route.*backbone.checkpoint=FILE"):
        create_backbone("test_resnet", pretrained=True)


def test_a_hub_that_cannot_be_reached_is_named_in_one_line(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub. " * 3)

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    message = (
        "backbone.pretrained: cannot download test_resnet (no connection to the Hugging Face Hub); give a file "
        "(backbone.checkpoint=FILE, or `unlabeled evaluate FILE backbone=test_resnet`), or set pretrained=false"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        create_backbone("test_resnet", pretrained=True)


def test_own_module_needs_timms_surface():
    backbone = Backbone(Tiny(), size=(16, 16))
    assert (backbone.embed_dim, backbone.stages, backbone.depth) == (6, [], 0)
    assert backbone.missing_reason("pooled") is None
    assert backbone.missing_reason("dense_map") == "no forward_intermediates"
    with pytest.raises(CapabilityError, match="Tiny has 0 feature maps"):
        backbone.map(torch.randn(1, 3, 16, 16))
    with pytest.raises(
        CapabilityError, match=r"Linear has no forward_features; a backbone needs forward_features\(x\)"
    ):
        Backbone(nn.Linear(3, 3))


def test_a_head_that_does_not_pool_is_found_out():
    assert Backbone(Tiny(pool=False), size=(16, 16)).missing_reason("pooled") == (
        "its head does not pool but returns (6, 4, 4) for an image"
    )
    unpooled = create_backbone("test_vit", size=32, global_pool="")
    assert unpooled.missing_reason("pooled") == "its head does not pool but returns (5, 64) for an image"


def test_unknown_capability():
    with pytest.raises(CapabilityError, match="'dense_mop' is unknown; did you mean 'dense_map'"):
        Backbone(Tiny(), size=(16, 16)).missing_reason("dense_mop")


def test_a_class_and_a_size_in_words_are_refused():
    with pytest.raises(CapabilityError, match=r"^backbone: Tiny is a class; build it: Tiny\(\.\.\.\)$"):
        Backbone(Tiny)
    with pytest.raises(ConfigError, match=r"^backbone.size: '64' is not possible; give pixels, one number or"):
        Backbone(Tiny(), size="64")


def test_capability_error_names_the_tasks_that_work(monkeypatch):
    module = ModuleType("tasks_for_this_test")
    for name, requires in (("Easy", {"pooled"}), ("Hard", {"pooled", "impossible"})):
        setattr(module, name, type(name, (PretextTask,), {"requires": frozenset(requires)}))
    module.missing_reason = lambda backbone: f"{backbone.name} is too small"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(CAPABILITIES, "impossible", f"{module.__name__}:missing_reason")
    targets = {"easy": f"{module.__name__}:Easy", "hard": f"{module.__name__}:Hard", "broken": "no_such_module:X"}
    monkeypatch.setattr(registry.REGISTRY, "targets", targets)
    expected = r"test_resnet cannot do Hard: it lacks impossible \(test_resnet is too small\); it can do: easy$"
    with pytest.raises(CapabilityError, match=expected):
        registry.create_task({"name": "hard"}, create_backbone("test_resnet", size=32))


def test_reached_by_pooled_forgets_earlier_passes():
    """LeViT caches its bias tables in eval mode; a probe that used the cached ones would call them unreachable."""
    backbone = create_backbone("levit_128s", size=64).eval()
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert backbone.reached_by_pooled() == {name for name, _ in backbone.named_parameters()}
    assert not backbone.training


def test_reached_by_pooled_leaves_out_what_is_not_used():
    model = Tiny()
    model.spare = nn.Linear(2, 2)
    assert Backbone(model, size=(16, 16)).reached_by_pooled() == {"model.conv.weight", "model.conv.bias"}


def test_reached_by_maps_ends_at_the_deepest_map():
    backbone = create_backbone("resnet18", size=32, channels=(8, 8, 8, 8))
    names = [name for name, _ in backbone.named_parameters()]
    stem = [f"model.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
    assert backbone.reached_by_maps([0]) == set(stem)
    assert backbone.reached_by_maps([0, 1]) == set(stem) | {name for name in names if "layer1" in name}
    assert backbone.reached_by_maps([-1]) == set(names)
