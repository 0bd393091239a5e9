"""Weights on disk: ours read by timm, others' read by us."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone, load_weights
from unlabeled.ssl.core.errors import CheckpointError

MODELS = {
    "vit": ("test_vit", {"size": (32, 48), "patch_size": 8}),
    "resnet": ("test_resnet", {"size": 64}),
    "nin": ("nin_cifar", {"num_blocks": 3}),
}


@pytest.fixture(params=sorted(MODELS))
def backbone(request) -> Backbone:
    name, arguments = MODELS[request.param]
    made = create_backbone(name, **arguments)
    for buffer in (tensor for tensor_name, tensor in made.model.named_buffers() if "running" in tensor_name):
        nn.init.uniform_(buffer, 0.5, 1.5)
    return made.eval()


@torch.no_grad()
def _same(first: nn.Module, second: nn.Module, size: tuple[int, int]) -> bool:
    images = torch.randn(2, 3, *size)
    return torch.equal(first.eval()(images), second.eval()(images))


def test_timm_alone_loads_an_export(backbone, tmp_path):
    path = export_backbone(backbone, tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["backbone.json", "backbone.safetensors"]
    description = json.loads((path.parent / "backbone.json").read_text())
    assert set(description) == {"name", "kwargs", "size", "mean", "std", "embed_dim", "versions"}
    model = timm.create_model(description["name"], checkpoint_path=str(path), **description["kwargs"])
    assert _same(model, backbone, backbone.input_size)
    assert load_file(path).keys() == model.state_dict().keys()


def test_export_round_trip(backbone, tmp_path):
    backbone.set_statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    export_backbone(backbone, tmp_path)
    again = load_backbone(tmp_path)
    assert _same(again, backbone, backbone.input_size)
    assert (again.name, again.kwargs, again.input_size) == (backbone.name, backbone.kwargs, backbone.input_size)
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(again.normalize(images), backbone.normalize(images))


def test_export_replaces_an_older_one_completely(tmp_path, monkeypatch):
    old, new = create_backbone("nin_cifar"), create_backbone("nin_cifar")
    export_backbone(old, tmp_path)

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unlabeled.ssl.backbones.weights.save_file", full)
    with pytest.raises(CheckpointError, match=r"the backbone cannot be written .No space left on device"):
        export_backbone(new, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]
    assert _same(load_backbone(tmp_path), old, (32, 32))


def test_arguments_that_json_cannot_hold(tmp_path):
    backbone = create_backbone("test_vit", size=32, norm_layer=nn.LayerNorm)
    file = export_backbone(backbone, tmp_path)
    description = json.loads((tmp_path / "backbone.json").read_text())
    assert description["kwargs"]["norm_layer"] == "python:torch.nn.modules.normalization:LayerNorm"
    assert "unlabeled.load_weights(module, 'backbone.safetensors')" in description["load"]
    with pytest.raises(CheckpointError, match=r"kwargs.norm_layer is a Python object, which a file cannot hold; bu"):
        load_backbone(tmp_path)
    again = create_backbone("test_vit", size=32, norm_layer=nn.LayerNorm)
    assert load_weights(again, file).missing == []
    assert _same(again, backbone, (32, 32))


def test_a_bare_module_is_filled_too(tmp_path):
    trained, model = create_backbone("test_resnet", size=32), timm.create_model("test_resnet", num_classes=3)
    report = load_weights(model, export_backbone(trained, tmp_path))
    assert report.missing == ["fc.weight", "fc.bias"]
    assert torch.equal(model.conv1[0].weight, trained.model.conv1[0].weight)


def test_load_weights_reports_every_tensor(tmp_path):
    source, target = create_backbone("test_resnet", size=32), create_backbone("test_resnet", size=32)
    state = source.model.state_dict()
    del state["conv1.0.weight"]
    save_file(state | {"fc.weight": torch.zeros(5, 96), "fc.bias": torch.zeros(5)}, tmp_path / "w.safetensors")
    report = load_weights(target, tmp_path / "w.safetensors")
    assert report.missing == ["conv1.0.weight"]
    assert report.unexpected == ["fc.bias", "fc.weight"]
    assert report.reshaped == []
    assert report.loaded == list(state)
    assert torch.equal(target.model.layer1[0].conv1.weight, source.model.layer1[0].conv1.weight)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.backbone.", "backbone.model."])
@pytest.mark.parametrize("container", [None, "model", "state_dict", "teacher"])
def test_load_weights_unwraps(prefix, container, tmp_path):
    source, target = create_backbone("nin_cifar", num_blocks=3), create_backbone("nin_cifar", num_blocks=3)
    state = {prefix + name: tensor for name, tensor in source.model.state_dict().items()} | {"mask": torch.ones(2)}
    settings = argparse.Namespace(lr=0.1)
    torch.save({container: state, "epoch": 3, "args": settings} if container else state, tmp_path / "w.pth")
    report = load_weights(target, tmp_path / "w.pth")
    assert (report.missing, report.unexpected) == ([], ["mask"])
    assert _same(source, target, (32, 32))


def test_positions_are_resampled(tmp_path):
    source, target = create_backbone("test_vit", size=64), create_backbone("test_vit", size=(32, 48))
    state = source.model.state_dict() | {"mask_token": torch.zeros(1, 1, 64), "decoder.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "w.bin")
    report = load_weights(target, tmp_path / "w.bin")
    assert report.reshaped == ["pos_embed"]
    assert (report.missing, report.unexpected) == ([], ["mask_token", "decoder.weight"])
    assert torch.equal(target.model.pos_embed[:, :1], source.model.pos_embed[:, :1])
    assert torch.equal(target.model.blocks[0].mlp.fc1.weight, source.model.blocks[0].mlp.fc1.weight)


def test_timm_converts_foreign_layouts(tmp_path):
    """ConvNeXt's authors number what timm names."""
    source, target = create_backbone("test_convnext", size=64), create_backbone("test_convnext", size=64)
    state = {
        name.replace("stem.", "downsample_layers.0.")
        .replace("stages.0.blocks", "stages.0")
        .replace("stages.1.blocks", "stages.1")
        .replace("stages.2.blocks", "stages.2")
        .replace("stages.3.blocks", "stages.3")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc", "pwconv")
        .replace("head.norm", "norm"): tensor
        for name, tensor in source.model.state_dict().items()
    }
    for stage in (1, 2, 3):
        state = {
            name.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}"): t for name, t in state.items()
        }
    save_file(state, tmp_path / "w.safetensors")
    report = load_weights(target, tmp_path / "w.safetensors")
    assert (report.missing, report.unexpected) == ([], [])
    assert _same(source, target, (64, 64))


def test_a_classifier_for_other_classes_is_dropped_and_named(tmp_path):
    source, target = create_backbone("test_resnet", num_classes=7), create_backbone("test_resnet", num_classes=3)
    save_file(source.model.state_dict(), tmp_path / "w.safetensors")
    report = load_weights(target, tmp_path / "w.safetensors")
    assert sorted(report.unexpected) == sorted(report.missing) == ["fc.bias", "fc.weight"]


def test_weights_computed_from_the_old_ones_are_forgotten(tmp_path):
    source, target = create_backbone("levit_128s", size=64).eval(), create_backbone("levit_128s", size=64).eval()
    for name, parameter in source.named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        target(torch.randn(1, 3, 64, 64))
    load_weights(target, export_backbone(source, tmp_path))
    assert not target.training
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(target(images), source(images))


def test_files_that_cannot_be_read(tmp_path):
    backbone = create_backbone("nin_cifar", num_blocks=3)
    with pytest.raises(CheckpointError, match=r"nothing.pth: there is no such file; give a file of weights"):
        load_weights(backbone, tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match=r"backbone.safetensors: there is no such file"):
        load_weights(backbone, tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"bad.safetensors: not a file of tensors, or damaged"):
        load_weights(backbone, tmp_path / "bad.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"bad.pth: not a file of tensors, or damaged"):
        load_weights(backbone, tmp_path / "bad.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty.pth: holds no named tensors"):
        load_weights(backbone, tmp_path / "empty.pth")


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth: not a file of tensors") as caught:
        load_weights(create_backbone("nin_cifar", num_blocks=3), tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_weights_of_another_architecture(tmp_path):
    export_backbone(create_backbone("test_vit", size=32), tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"no tensor \(.*\) belongs to nin_cifar; check backbone.name"):
        load_weights(create_backbone("nin_cifar"), tmp_path / "vit")
    save_file(create_backbone("test_vit", patch_size=8, embed_dim=32).model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"cls_token has shape \[1, 1, 32\], test_vit needs \[1, 1, 64\]; check"):
        load_weights(create_backbone("test_vit"), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor \(.*\) belongs to Linear; build it as it was$"):
        load_weights(nn.Linear(2, 2), tmp_path / "vit")
    with pytest.raises(
        CheckpointError, match=r"cls_token has shape .*, VisionTransformer needs .*; build it as it was$"
    ):
        load_weights(create_backbone("test_vit").model, tmp_path / "w.safetensors")


def test_folders_that_are_not_exports(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no backbone.json; give a run folder"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not a description of a backbone \(JSONDecodeError"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text('{"name": "nin_cifar"}')
    with pytest.raises(CheckpointError, match=r"not a description of a backbone \(KeyError: 'kwargs'\)"):
        load_backbone(tmp_path)
    export_backbone(create_backbone("nin_cifar", num_blocks=3), tmp_path)
    export_backbone(create_backbone("nin_cifar", num_blocks=4), tmp_path / "four")
    (tmp_path / "four" / "backbone.json").replace(tmp_path / "backbone.json")
    with pytest.raises(CheckpointError, match=r"does not fit backbone.json in \d+ tensors: blocks.3"):
        load_backbone(tmp_path)
    changed = json.loads((tmp_path / "backbone.json").read_text()) | {"name": "nin_cipher"}
    (tmp_path / "backbone.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt: backbone.name: 'nin_cipher'"):
        load_backbone(tmp_path)
