"""SimMIM's settings: the published recipe, masks that fit an image, what is refused, and networks of all kinds."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.masked_image.simmim import SimMIM, SimMIMConfig
from unlabeled.pretext.registry import create_task, task_config
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.schema import PretrainConfig
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.train.schedule import peak_learning_rate
from unlabeled.workflows.settings import compose_settings

ARCHITECTURES = json.loads(
    resources.files("unlabeled.workflows.compatibility").joinpath("architectures.json").read_text()
)
"""One small model of each of timm's architecture modules; all of them pass, the quick ones are tested here."""
SAMPLE = {
    "byobnet": "pixel", "convnext": "token", "deepseek_vit": "token", "efficientnet": "pixel", "efficientvim": "pixel",
    "fasternet": "token", "inception_next": "token", "maxxvit": "pixel", "mlp_mixer": "token", "mobilenetv3": "pixel",
    "nfnet": "pixel", "vision_transformer": "token", "vision_transformer_relpos": "token",
}  # fmt: skip

VIT = ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2})
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
)
RESNET = ("test_resnet", {})


def backbone_of(which: tuple[str, dict] = VIT, size: object = 32, **kwargs: object) -> Backbone:
    return create_backbone(which[0], size=size, **{**which[1], **kwargs})


def tiny_task(which: tuple[str, dict] | Backbone = VIT, size: object = 32, **settings: object) -> SimMIM:
    backbone = which if isinstance(which, Backbone) else backbone_of(which, size)
    task = create_task({"name": "simmim", **settings}, backbone)
    assert isinstance(task, SimMIM)
    return task


@pytest.mark.parametrize("module", SAMPLE)
def test_networks_of_all_kinds(module):
    """A step reaches every trainable parameter, and masked pixels reach no feature."""
    made = ARCHITECTURES[module]
    backbone = create_backbone(made["name"], size=made["size"], **made.get("kwargs", {}))
    task = tiny_task(backbone, mask_unit=14 if module == "deepseek_vit" else None).train()
    assert task.mask_entry == SAMPLE[module]
    images = torch.randn(2, 3, *backbone.input_size)
    loss = task({"image": images}).loss
    loss.backward()
    assert loss.isfinite()
    wrong = [name for name, p in task.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert not wrong
    task.eval()
    masking = task.mask(images)
    with torch.no_grad():
        other = torch.where(task.masked_pixels(masking), torch.randn_like(images), images)
        assert torch.equal(task.encode(images, masking), task.encode(other, masking))


def test_hiera_has_no_norm_over_its_last_map():
    assert not tiny_task(create_backbone("hiera_tiny_224", size=64, stages=(1, 1, 1, 1))).last_map.normed
    assert tiny_task(VIT).last_map.normed


def test_published_recipe():
    config = compose_settings("pretrain", ["task=simmim"], PretrainConfig)
    assert peak_learning_rate(config.optim, 2048) == pytest.approx(8e-4)
    assert peak_learning_rate(config.optim, 512) == pytest.approx(2e-4)
    assert config.engine.clip == 5.0
    assert config.optim.betas == (0.9, 0.999)
    assert config.schedule.start_factor * 2e-4 == pytest.approx(1e-6)
    assert config.schedule.min_factor * 2e-4 == pytest.approx(1e-5)
    assert SimMIMConfig() == SimMIMConfig(mask_ratio=0.6, crop_scale=(0.67, 1.0), mask_unit=None)
    assert SimMIM.interpolation.value == "bilinear"


@pytest.mark.parametrize(
    ("which", "size", "asked", "unit"),
    [
        (VIT, 256, None, 32),
        (VIT, 128, None, 32),
        (VIT, 96, None, 24),
        (VIT, 32, None, 8),
        (VIT, (32, 48), None, 8),
        (SWIN, 32, 16, 16),
        (RESNET, 90, None, 18),
        (RESNET, 90, 45, 45),
    ],
)
def test_mask_units(which, size, asked, unit):
    assert tiny_task(which, size, mask_unit=asked).cell == (unit, unit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mask_unit": 6},
            "task.mask_unit: 6 does not fit vit_tiny_.* of 32x32 pixels and patches of 4x4; .* 4, 8, 16$",
        ),
        ({"mask_unit": 12}, "task.mask_unit: 12 does not fit .*; choose one of 4, 8, 16$"),
        ({"mask_unit": 32}, "task.mask_unit: 32 does not fit"),
        ({"mask_unit": 16, "mask_ratio": 0.9}, "task.mask_ratio: 0.9 leaves 0 of 2x2 cells visible"),
    ],
)
def test_masks_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_task(**settings)
    assert "\n" not in str(caught.value)


def test_sizes_that_leave_no_choice():
    with pytest.raises(ConfigError, match=r"task.mask_unit: none of 4 to 32 .* 16x16; set task.mask_unit=16 to do"):
        tiny_task(backbone_of(VIT, 32, patch_size=16))
    assert tiny_task(backbone_of(VIT, 32, patch_size=16), mask_unit=16).cell == (16, 16)
    with pytest.raises(ConfigError, match=r"backbone.size: no cells of a mask fit .* 16x16 .* larger multiple of 16"):
        tiny_task(backbone_of(VIT, 16, patch_size=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_unit": 0}, "task.mask_unit: 0 is not possible"),
        ({"mask_units": 8}, "task.mask_units: there is no such setting in task; did you mean 'mask_unit'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        task_config({"name": "simmim", **settings})


def test_a_network_without_maps_is_refused():
    class Flat(torch.nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x

    with pytest.raises(CapabilityError, match="cannot do SimMIM: it lacks dense_map"):
        tiny_task(Backbone(Flat(), size=(32, 32)))


@pytest.mark.parametrize("recipe", ["cifar10/simmim_swin"])
def test_recipes_build(recipe):
    config = compose_settings("pretrain", [f"recipe={recipe}", "data.path=cifar10"], PretrainConfig)
    task = create_task(config.task, backbone_of((config.backbone.name, config.backbone.kwargs), config.backbone.size))
    assert task.grid_of((32, 32)) == (4, 4)
    assert task.cell == (task.stride, task.stride)  # as the paper's Swin: a cell is one position of the last map
    assert task.mask_entry == "token"
