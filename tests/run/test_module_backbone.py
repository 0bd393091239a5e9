"""A network of a user's own, given from Python: pretrained, resumed exactly, evaluated, fine-tuned and exported."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from own_networks import Scaled, TinyConv, Uncopyable
from safetensors.torch import load_file
from torch import nn

import unlabeled
from unlabeled import Backbone, CapabilityError, CheckpointError, ConfigError

COMMON: dict[str, Any] = {
    "batch_size": 32,
    "engine": {"workers": 0, "device": "cpu", "keep": 9},
    "log": {"progress": False, "tensorboard": False, "every": 1},
}
PRETRAIN: dict[str, Any] = {
    "task": "rotation", "data": {"name": "digits", "limit": 128}, "epochs": 2,
    "evaluate": {"limit": 64, "linear": {"epochs": 1}, "maps": 0, "embedding": None}, **COMMON,
}  # fmt: skip
FINETUNE: dict[str, Any] = {"data": {"name": "digits", "limit": 160}, "epochs": 1, "augment": None, **COMMON}
SMALL = {"workers": 0, "evaluate": PRETRAIN["evaluate"]}
TIMED = ("images_per_s", "data_wait", "memory_gb")


def network(seed: int = 0, wide: int = 8) -> TinyConv:
    torch.manual_seed(seed)
    return TinyConv(wide)


def given(seed: int = 0, wide: int = 8) -> Backbone:
    return Backbone(network(seed, wide), size=(16, 16), mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def module() -> Backbone:
    return given()


@pytest.fixture(scope="module")
def result(module: Backbone, tmp_path_factory: pytest.TempPathFactory) -> unlabeled.PretrainResult:
    return unlabeled.pretrain(backbone=module, out=tmp_path_factory.mktemp("own") / "run", **PRETRAIN)


def test_it_is_trained_from_its_own_weights_in_a_copy(module: Backbone, result: unlabeled.PretrainResult) -> None:
    fresh = given().model.state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in module.model.state_dict().items())
    trained = result.backbone.model.state_dict()
    assert not torch.equal(trained["stem.weight"], fresh["stem.weight"])
    assert torch.allclose(trained["stem.weight"], fresh["stem.weight"], atol=0.2), "it started there"


def test_the_folder_says_how_to_load_it(result: unlabeled.PretrainResult) -> None:
    said = json.loads((result.out / "backbone.json").read_text())
    assert said["name"] == "custom"
    assert said["module"] == "own_networks:TinyConv"
    assert (said["size"], said["embed_dim"]) == ([16, 16], 16)
    assert said["mean"] == pytest.approx([0.3] * 3)
    assert said["load"] == (
        "build a own_networks:TinyConv as it was, as `module`; unlabeled.load_weights(module, 'backbone.safetensors')"
    )
    config = yaml.safe_load((result.out / "config.yaml").read_text())["backbone"]
    assert (config["name"], config["module"], config["size"]) == ("custom", "own_networks:TinyConv", [16, 16])
    module = network(seed=5)
    assert unlabeled.load_weights(module, result.out).missing == []
    assert torch.equal(module.stem.weight, result.backbone.model.state_dict()["stem.weight"])
    loaded = unlabeled.load_backbone(result.out, network(seed=5))
    assert loaded.input_size == (16, 16)
    assert loaded.mean == pytest.approx((0.3,) * 3)
    with pytest.raises(CheckpointError, match=r"a module of your own \(own_networks:TinyConv\); build it as it was"):
        unlabeled.load_backbone(result.out)


def test_random_weights_come_from_its_layers(result: unlabeled.PretrainResult) -> None:
    assert result.results is not None
    assert list(result.results.encoders) == ["backbone", "pixels", "random"]
    assert "drawn by the layers' own reset_parameters" in result.results.encoders["random"].notes[0]


def test_it_goes_on_exactly_when_it_is_given_again(result: unlabeled.PretrainResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(result.out, out)
    newest, before = sorted((out / "checkpoints").glob("step_*"))[::-1][:2]
    shutil.rmtree(newest)
    (out / "checkpoints" / "last").write_text(before.name)
    again = unlabeled.pretrain(backbone=given(seed=3), out=out, **PRETRAIN)  # its weights come from the checkpoint
    first, second = (load_file(one.weights) for one in (result, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(out) == rows(result.out)


def test_what_does_not_fit_the_folder_is_one_line(result: unlabeled.PretrainResult) -> None:
    out = result.out
    cases: list[tuple[Any, str]] = [
        ("resnet18", r"holds a run of own_networks:TinyConv, a model that was passed from Python; pass it again"),
        (given(wide=4), r"holds a run of a own_networks:TinyConv with other tensors, size, mean or std"),
        (network(), r"with other tensors, size, mean or std"),
        (Backbone(Scaled(), size=16), r"holds a run of own_networks:TinyConv, not of own_networks:Scaled"),
        ({"name": "custom", "module": "own_networks:TinyConv"}, r"with other tensors"),
    ]
    for backbone, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            unlabeled.pretrain(backbone=backbone, out=out, **PRETRAIN)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"backbone.module: a:B is a model that was passed from Python; pass it"):
        unlabeled.pretrain(backbone={"module": "a:B"}, out=out.parent / "words", **PRETRAIN)


def test_a_run_is_evaluated_with_the_module(result: unlabeled.PretrainResult) -> None:
    results = unlabeled.evaluate(result.out, backbone=network(seed=7), data=PRETRAIN["data"], **SMALL)
    assert result.results is not None
    assert results.encoders["backbone"].dimension == 16
    assert (result.out / "report" / "report.html").is_file()
    with pytest.raises(CheckpointError, match="a module of your own"):
        unlabeled.evaluate(result.out, **SMALL)
    with pytest.raises(CheckpointError, match=r"stem.weight has shape \[8, 3, 3, 3\], TinyConv needs \[4, 3, 3, 3\]"):
        unlabeled.evaluate(result.out, backbone=network(wide=4), **SMALL)


def test_a_module_is_evaluated_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Backbone(Scaled(), size=16)
    results = unlabeled.evaluate(module, "digits", **SMALL)
    assert list(results.encoders) == ["backbone", "pixels"]
    assert "no reset_parameters() of its layers draws scale" in results.encoders["backbone"].notes[0]
    document = unlabeled.read_report(Path("reports/Scaled/report.json"))
    assert document["run"]["title"] == "Scaled"
    first = results.encoders["backbone"].metrics
    module.model.forward_head = lambda features, pre_logits=False: features.amax(
        (2, 3)
    )  # same weights, another network
    assert unlabeled.evaluate(module, "digits", **SMALL).encoders["backbone"].metrics != first, "not from the cache"


def test_it_becomes_a_classifier(result: unlabeled.PretrainResult, tmp_path: Path) -> None:
    found = unlabeled.finetune(result.out, backbone=network(), out=tmp_path / "run", **FINETUNE)
    assert found.baseline is not None
    assert found.accuracy is not None
    said = json.loads(found.weights.with_suffix(".json").read_text())
    assert (said["name"], said["module"], len(said["classes"])) == ("custom", "own_networks:TinyConv", 10)
    assert "unlabeled.create_classifier(module, classes=10)" in said["load"]
    classifier = unlabeled.create_classifier(given(), classes=10)
    assert unlabeled.load_weights(classifier, found.weights).missing == []
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(classifier.model.eval()(x), found.network.model.eval()(x))
    again = unlabeled.finetune(found.weights, backbone=given(), out=tmp_path / "again", baseline=False, **FINETUNE)
    assert again.accuracy is not None, "a classifier is fine-tuned further"
    same = unlabeled.finetune(result.out, backbone=network(seed=2), out=tmp_path / "run", **FINETUNE)
    assert same.accuracy is not None
    assert same.accuracy.values == found.accuracy.values, "nothing was left to do"


def test_a_module_is_finetuned_by_itself(tmp_path: Path) -> None:
    module = Backbone(Scaled(), size=16)
    found = unlabeled.finetune(module, out=tmp_path / "run", **FINETUNE)
    assert found.baseline is None, "no layer draws its scale"
    assert torch.equal(module.model.scale, torch.ones(16))
    with pytest.raises(ConfigError, match="no reset_parameters"):
        unlabeled.finetune(module, out=tmp_path / "scratch", scratch=True, **FINETUNE)
    with pytest.raises(CheckpointError, match=r"holds a run of own_networks:Scaled, a model .*from Python"):
        unlabeled.finetune("resnet18", out=tmp_path / "run", pretrained=False, **FINETUNE)


def test_a_run_is_exported_with_the_module(result: unlabeled.PretrainResult, tmp_path: Path) -> None:
    (exported,) = unlabeled.export(result.out, tmp_path / "x.safetensors", backbone=network(seed=4))
    assert exported.line.startswith("import unlabeled; unlabeled.load_weights(module, ")
    first, second = load_file(result.weights), load_file(exported.file)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert unlabeled.load_backbone(tmp_path / "x.safetensors", network()).mean == pytest.approx((0.3,) * 3)


def test_a_backbone_of_timm_keeps_its_name_and_its_present_weights(tmp_path: Path) -> None:
    torch.manual_seed(9)
    timms = unlabeled.create_backbone("test_vit", size=32, patch_size=8)
    weights = copy.deepcopy(timms.model.state_dict())
    settings: dict[str, Any] = {**PRETRAIN, "task": {"name": "mae", "decoder": {"dim": 16, "depth": 1, "heads": 2}}}
    settings["evaluate"] = {"final": False}
    result = unlabeled.pretrain(backbone=timms, out=tmp_path / "run", optim__lr=1e-9, **settings)
    said = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert said["name"] == "test_vit"
    loaded = timm.create_model("test_vit", checkpoint_path=str(result.weights), **said["kwargs"]).state_dict()
    for name, tensor in weights.items():
        assert torch.allclose(loaded[name], tensor, atol=1e-5), f"{name} was drawn anew"
    assert result.backbone.trained, "so that MAE draws nothing anew"


class NoHead(nn.Module):
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("backbone", "error", "message"),
    [
        (lambda: [network()], ConfigError, r"backbone: \[TinyConv\( .* is not possible; give a timm name, a mapping"),
        (lambda: TinyConv, ConfigError, r"backbone: TinyConv is not possible; build it: TinyConv\(\.\.\.\)"),
        (lambda: 5, ConfigError, r"backbone: 5 is not possible; give a timm name"),
        (lambda: {"name": network()}, ConfigError, r"backbone.name: TinyConv\(.*is not possible; give a valid string"),
        (NoHead, CapabilityError, r"backbone: NoHead has no forward_head; a backbone needs forward_features"),
        (lambda: nn.Linear(2, 2), CapabilityError, r"backbone: Linear has no forward_features"),
        (lambda: Uncopyable(), CapabilityError, r"backbone: Uncopyable cannot be copied \(cannot pickle 'generator'"),
        (lambda: network().to("meta"), CapabilityError, r"TinyConv has no values for stem.weight \(device meta\)"),
        (lambda: network().double(), CapabilityError, r"TinyConv's stem.weight is torch.float64; call .float\(\)"),
        (lambda: nn.LazyConv2d(3, 3), CapabilityError, r"LazyConv2d has no shape for weight yet"),
    ],
)  # fmt: skip
def test_what_is_no_backbone_is_one_line(backbone: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        unlabeled.pretrain(backbone=backbone(), out=tmp_path / "run", **PRETRAIN)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_settings_beside_a_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone.size: has no effect on a module; give unlabeled.Backbone\(module"):
        unlabeled.pretrain(backbone=network(), backbone__size=16, out=tmp_path / "run", **PRETRAIN)
    with pytest.raises(ConfigError, match="backbone: has no effect if the target is itself a model"):
        unlabeled.evaluate(network(), "digits", backbone=network())
    with pytest.raises(ConfigError, match=r"target: 5 is not possible; give a run folder, a timm name"):
        unlabeled.evaluate(5, "digits")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data: 5 is not possible; give a path"):
        unlabeled.evaluate(network(), 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"is not a run folder, weights file or timm model"):
        unlabeled.evaluate("x" * 5000, "digits")
