"""SparK and the checkpoints of its authors: with and without a decoder, of a ResNet and of a ConvNeXt."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.masked_image.spark import SparK, SparKConfig
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.weights import read_tensors
from unlabeled.ssl.core.errors import CheckpointError

RESNET = {"channels": (8, 8, 16, 24), "output_stride": 8}
CONVNEXT = {"patch_size": 1, "dims": (8, 12, 16, 32), "depths": (1, 1, 2, 1)}


def tiny_task(name: str) -> SparK:
    torch.manual_seed(0)
    backbone = create_backbone(name, size=32, **(CONVNEXT if "convnext" in name else RESNET))
    return SparK(SparKConfig.model_validate({"decoder": {"width": 16}}), backbone)


def values_of(task: SparK) -> dict[str, Tensor]:
    """Other values for each tensor of `task`, under its own names."""
    torch.manual_seed(3)
    return {
        name: torch.randn_like(value) if value.is_floating_point() else torch.tensor(7)
        for name, value in task.state_dict().items()
    }


def published(name: str) -> str:
    """The authors' name of one of our tensors, spelled out by hand."""
    rules = [
        (r"^decoder\.blocks\.(\d)\.up\.", r"dense_decoder.dec.\1.up_sample."),
        (r"^decoder\.blocks\.(\d)\.mix\.", r"dense_decoder.dec.\1.conv."),
        (r"^decoder\.proj\.", "dense_decoder.proj."),
        (r"^densify\.(norms|projs)\.", r"densify_\1."),
        (r"^densify\.mask_tokens", "mask_tokens"),
        (r"^backbone\.model\.stem\.", "sparse_encoder.sp_cnn.downsample_layers.0."),
        (r"^backbone\.model\.stages\.(\d)\.downsample\.", r"sparse_encoder.sp_cnn.downsample_layers.\1."),
        (r"^backbone\.model\.stages\.(\d)\.blocks\.(\d)\.", r"sparse_encoder.sp_cnn.stages.\1.\2."),
        (r"^backbone\.model\.head\.norm\.", "sparse_encoder.sp_cnn.norm."),
        (r"^backbone\.model\.", "sparse_encoder.sp_cnn."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc", ".pwconv"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_whole_checkpoint(name, tmp_path):
    values = values_of(tiny_task(name))
    module = {published(own): value for own, value in values.items()}
    module |= {constant: torch.zeros(1) for constant in ("imn_m", "imn_s", "norm_black")}
    file = tmp_path / "spark_style.pth"
    content = {"args": Namespace(ep=1), "arch": name, "epoch": 1, "is_pretrain": True, "module": module}
    content["module"]["config"] = {"mask_ratio": 0.6}
    torch.save(content, file)

    for state in (read_tensors(file), content):
        task = tiny_task(name)
        assert task.load_reference(state) == ([], [])
        for own, value in values.items():
            assert torch.equal(task.state_dict()[own], value), own


@pytest.mark.parametrize("timm_names", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_bare_encoder(name, timm_names):
    values = values_of(tiny_task(name))
    encoder = {own: value for own, value in values.items() if own.startswith("backbone.") and ".head." not in own}
    bare = {
        own.removeprefix("backbone.model.")
        if timm_names
        else published(own).removeprefix("sparse_encoder.sp_cnn."): value
        for own, value in encoder.items()
    }
    task = tiny_task(name)
    missing, unexpected = task.load_reference(bare | {"fc.weight": torch.zeros(2, 2)})
    assert unexpected == ["fc.weight"]
    assert {one for one in missing if not one.startswith(("norm.", "head."))} == {
        published(own) for own in values if not own.startswith("backbone.")
    }
    for own, value in encoder.items():
        assert torch.equal(task.state_dict()[own], value), own


def test_checkpoints_that_do_not_fit():
    task = tiny_task("resnet18")
    before = {name: value.clone() for name, value in task.state_dict().items()}
    module = {published(own): value for own, value in values_of(task).items()}
    with pytest.raises(CheckpointError, match=r"densify_projs.0.bias is \(3,\) in the file and \(16,\) here"):
        task.load_reference(module | {"densify_projs.0.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"it holds none of conv1\.weight, bn1\.weight"):
        task.load_reference({"sparse_encoder.blocks.0.weight": torch.zeros(1)})
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name
