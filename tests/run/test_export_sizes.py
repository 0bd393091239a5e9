"""``unlabeled export`` and ``unlabeled sizes``: what is written is the sub-network, and loads with timm alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from unlabeled.cli import main
from unlabeled.pretext.predictive.rotation import Rotation
from unlabeled.pretext.registry import TASKS
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig
from unlabeled.ssl.backbones.elastic.sizes import find
from unlabeled.ssl.backbones.weights import describe, export_backbone, load_backbone
from unlabeled.workflows import export as subnetworks
from unlabeled.workflows.export import load_elastic

VIT = ("test_vit", {"patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3, "init_values": 1e-5})
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, str]]] = {
    "vit": (*VIT, {"width": 32, "depth": 6}, (64, "7")),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 32, "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "window_size": 4},
        {"depth": (2, 2, 2, 2)},
        (16, "[2,2,3,2]"),
    ),
    "resnet": (
        "resnet50",
        {
            "layers": (2, 3, 4, 2),
            "channels": (32, 32, 32, 32),
            "norm_layer": "groupnorm",
            "base_width": 128,
            "output_stride": 16,  # a last map of more than one place, which group norms need
        },
        {"width": 32, "depth": (2, 2, 2, 2)},
        (32, "[2,2,3,2]"),
    ),
    "convnext": (
        "convnext_atto",
        {"dims": (16, 32, 64, 128), "depths": (1, 1, 4, 1)},
        {"depth": (1, 1, 2, 1)},
        (8, "6"),
    ),
}


def whole(name: str, arguments: dict[str, Any], size: int = 32) -> Backbone:
    torch.manual_seed(3)
    backbone = create_backbone(name, size=size, **arguments)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)  # so that gates, biases and norms matter
    return backbone.eval()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "run"
    export_backbone(whole(*VIT), folder, elastic=ElasticConfig(width=32, depth=6))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unlabeled")]
    assert len(lines) == 1, lines
    return lines[0]


def loaded(line: str) -> nn.Module:
    """The model that a printed line makes."""
    names: dict[str, Any] = {}
    exec(line, names)
    model: nn.Module = names["model"]
    return model.eval()


@torch.no_grad()
def features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_an_exported_size_is_the_sub_network_in_place(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments, sizes, (width, depth) = NETWORKS[network]
    backbone = whole(name, arguments)
    export_backbone(backbone, tmp_path / "run", elastic=ElasticConfig(**sizes))
    file = tmp_path / "small.safetensors"
    assert main(["export", str(tmp_path / "run"), f"width={width}", f"depth={depth}", f"out={file}"]) == 0
    line = capsys.readouterr().out.strip()
    elastic = Elastic(backbone, ElasticConfig(**sizes))
    taken = elastic.take(backbone, find(elastic.sizes, width, json.loads(depth)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = taken.pooled(x)
    torch.testing.assert_close(features(loaded(line), x), expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.json", "small.safetensors"]
    again = load_backbone(file).eval()
    torch.testing.assert_close(features(again.model, x), expected, rtol=1e-5, atol=1e-5)


def test_the_description_builds_it_with_timm_and_knows_no_other_size(vit: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    assert main(["export", str(vit), "width=64", "depth=6", f"out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["backbone.json", "backbone.safetensors"]
    found = json.loads((out / "backbone.json").read_text())
    model = timm.create_model(found["name"], checkpoint_path=str(out / "backbone.safetensors"), **found["kwargs"])
    assert (model.embed_dim, len(model.blocks)) == (64, 6)
    assert describe(out).elastic is None
    assert describe(vit).elastic == ElasticConfig(width=32, depth=6)


def test_like_writes_a_file_for_that_model(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "like.safetensors"
    assert main(["export", str(vit), "like=test_vit", f"out={file}"]) == 0
    line = capsys.readouterr().out.strip()
    assert all(
        word in line for word in ("'test_vit'", "num_classes=0", "init_values=1e-05", "patch_size=8", "img_size=")
    )
    assert "embed_dim" not in line
    backbone, elastic = load_elastic(vit)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = elastic.take(backbone.eval(), find(elastic.sizes, 64, 6)).pooled(x)
    torch.testing.assert_close(features(loaded(line), x), expected, rtol=1e-5, atol=1e-5)


def test_several_sizes_go_into_a_folder(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(vit), "sizes=[[32,7],[64,6]]", f"out={tmp_path / 'two'}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    files = ["32x7.json", "32x7.safetensors", "64x6.json", "64x6.safetensors"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    assert main(["export", str(vit), "sizes=all", f"out={tmp_path / 'all'}"]) == 0
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == 3 * 3
    full = load_file(tmp_path / "all" / "96x8.safetensors")
    assert all(torch.equal(tensor, full[name]) for name, tensor in load_file(vit / "backbone.safetensors").items())


def test_any_run_is_exported_whole(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_backbone(create_backbone("nin_cifar", num_blocks=3), tmp_path / "plain")
    for run in (vit, tmp_path / "plain"):
        file = tmp_path / f"{run.name}.safetensors"
        assert main(["export", str(run), f"out={file}"]) == 0
        model = loaded(capsys.readouterr().out.strip())
        assert model.state_dict().keys() == load_file(run / "backbone.safetensors").keys()
    assert describe(tmp_path / "run.safetensors").elastic == ElasticConfig(width=32, depth=6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["width=48", "depth=6"], "width: 48 is not among the sizes; choose from 32, 64, 96"),
        (["width=64", "depth=9"], "depth: 9 is not among the sizes of width 64; choose from 6, 7, 8"),
        (["width=64"], "depth: not given, but needed with width; `unlabeled sizes"),
        (["width=64", "depth=6", "sizes=all"], "sizes: conflicts with width; give width and depth, or"),
        (["like=resnet18"], "like: resnet18 cannot be built with the arguments of the run's backbone"),
        (["like=test_vit9"], "like: 'test_vit9' is not a timm model; did you mean 'test_vit"),
        (["like=vit_tiny_patch16_224"], "like: vit_tiny_patch16_224 is 192x12, which the run does not have (width"),
        (["like=test_vit2"], "like: reg_token has shape [1, 1, 64] in test_vit2 and none in the run; give the size by"),
        (["sizes=[[32,6]]"], "is a single file, but sizes are several files; give a folder"),
        (["wdth=64"], "wdth: there is no such setting; did you mean 'width'"),
        (["sizes=5"], "sizes: 5 is not possible; give all, or a list of [width, depth] such as [["),
        (["sizes=some"], "sizes: some is not possible; give all, or a list of [width, depth] such as [["),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert main(["export", str(vit), *overrides, f"out={tmp_path / 'x.safetensors'}"]) == 2
    assert message in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_taken_and_forms_that_are_not_written(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (vit / "backbone.safetensors").read_bytes()
    assert main(["export", str(vit), "width=64", "depth=6", f"out={vit}"]) == 2
    assert "would overwrite the backbone of a run; choose another" in said(capsys)
    assert (vit / "backbone.safetensors").read_bytes() == before
    assert main(["export", str(vit), f"out={tmp_path / 'x.pth'}"]) == 2
    assert "give a name that ends in .safetensors, or a folder" in said(capsys)
    assert main(["export", str(vit)]) == 2
    assert "out: not given; set out=..." in said(capsys)


def test_a_run_of_one_size_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_backbone(create_backbone("nin_cifar", num_blocks=3), tmp_path / "plain")
    for command in (["export", "width=64", "depth=6", f"out={tmp_path / 'x'}"], ["sizes"]):
        assert main([command[0], str(tmp_path / "plain"), *command[1:]]) == 2
        assert "the run is not elastic and has a single size" in said(capsys)
    assert main(["sizes", str(tmp_path / "nowhere")]) == 2
    assert "there is no backbone.json; give a run folder" in said(capsys)


def test_like_of_the_same_shapes_that_computes_something_else(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subnetworks, "create_backbone", partial(create_backbone, act_layer="relu"))
    assert main(["export", str(vit), "like=test_vit", f"out={tmp_path / 'x'}"]) == 2
    assert "like: test_vit has tensors of the same shapes but computes different features" in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_published_swin_blocks_are_no_timm_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = NETWORKS["swin"][1] | {"window_size": 2}
    config = ElasticConfig(depth=(2, 2, 2, 2), block_order="published")
    export_backbone(whole("swin_tiny_patch4_window7_224", arguments, size=64), tmp_path / "run", elastic=config)
    out = f"out={tmp_path / 'small'}"
    assert main(["export", str(tmp_path / "run"), "width=16", "depth=[2,2,3,2]", out]) == 2
    assert "elastic.block_order: published keeps blocks for 16x2-2-3-2 whose windows do not alternate" in said(capsys)
    assert main(["export", str(tmp_path / "run"), "width=32", "depth=[2,2,6,2]", out]) == 0


def test_batch_norms_get_statistics_of_their_own_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"layers": (2, 2, 3, 2), "channels": (16, 16, 16, 16), "base_width": 128}
    config = ElasticConfig(width=16, depth=(2, 2, 2, 2))
    export_backbone(whole("resnet50", arguments), tmp_path / "run", elastic=config)
    overrides = ["export", str(tmp_path / "run"), "width=16", "depth=8", "device=cpu", "workers=0"]
    assert main([*overrides, f"out={tmp_path / 'a'}"]) == 2
    assert "data: not given; resnet50 has batch norms with statistics that depend on the size" in said(capsys)
    assert main([*overrides, f"out={tmp_path / 'a'}", "data=shapes", "data.count=64", "recalibrate_images=16"]) == 0
    assert main([*overrides, f"out={tmp_path / 'b'}", "recalibrate=false"]) == 0
    with_own, without = (load_file(tmp_path / name / "backbone.safetensors") for name in ("a", "b"))
    assert torch.equal(without["layer1.0.bn2.running_var"], torch.ones(16))
    assert not torch.equal(with_own["layer1.0.bn2.running_var"], torch.ones(16))
    assert torch.equal(with_own["layer1.0.conv2.weight"], without["layer1.0.conv2.weight"])
    assert "keeps batch-norm statistics that are not valid for this size" in caplog.text


def test_the_sizes_of_a_run_are_listed_with_their_cost(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sizes", str(vit)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0] == ["parameters"]
    assert rows[1] == ["width", "blocks", "(million)", "GMACs"]
    assert len(rows) == 2 + 3 * 3
    assert [row[:2] for row in rows[2:4]] == [["32", "6"], ["32", "7"]]
    count = sum(parameter.numel() for parameter in load_backbone(vit).parameters())
    assert rows[-1][:3] == ["96", "8", f"{count / 1e6:.2f}"]


class ElasticRotation(Rotation):
    """Rotation that claims to have trained sizes."""

    def elastic(self) -> ElasticConfig:
        return ElasticConfig(width=16, depth=2)


def test_a_run_of_an_elastic_task_knows_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "rotation", f"{__name__}:ElasticRotation")
    overrides = [
        "task=rotation", "backbone=vit_tiny_patch16_224", "backbone.size=32",
        "backbone.kwargs={patch_size:8,embed_dim:32,depth:3,num_heads:2}", "data=shapes", "data.count=32", "epochs=1",
        "batch_size=16", "schedule.warmup_epochs=0", "engine.workers=0", "engine.device=cpu", "log.tensorboard=false",
        "evaluate.final=false",
    ]  # fmt: skip
    assert main(["pretrain", *overrides, f"out={tmp_path / 'run'}"]) == 0
    assert describe(tmp_path / "run").elastic == ElasticConfig(width=16, depth=2)
    assert main(["export", str(tmp_path / "run"), "width=16", "depth=2", f"out={tmp_path / 's.safetensors'}"]) == 0
    assert load_backbone(tmp_path / "s.safetensors").embed_dim == 16
