"""Every size of an elastic run, measured: what is kept, what is computed once, and what the report says of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import MemorySource

from unlabeled.cli import main
from unlabeled.eval.size_curve import SizeCurve, SizeResult, load_curve, read_curve
from unlabeled.report.document import read_report
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone
from unlabeled.ssl.config.schema import EvaluateRun
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.workflows import elastic_sizes as sizes
from unlabeled.workflows import evaluate as command
from unlabeled.workflows.evaluate import evaluate_target

FAST = {"knn": {"k": [5]}, "linear": {"epochs": 2, "lr": [0.1], "weight_decay": [0.0]}}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
CONFIG = ElasticConfig(width=16, depth=2)
RESNET = {"layers": (1, 1, 2, 1), "channels": (16, 16, 16, 16), "base_width": 128, "output_stride": 16}


@pytest.fixture(autouse=True)
def _images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        command, "open_source", lambda config, split="train": MemorySource(30 if split == "train" else 9, split=split)
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    export_backbone(create_backbone("vit_tiny_patch16_224", size=32, **VIT), tmp_path / "run", elastic=CONFIG)
    return tmp_path / "run"


def evaluate(run: Path, **settings: Any) -> SizeCurve | None:
    evaluate_target(
        EvaluateRun.model_validate(
            {
                "target": str(run), "data": {"name": "shapes"}, "device": "cpu", "workers": 0,
                **settings, "evaluate": FAST | settings.get("evaluate", {}),
            }
        )
    )  # fmt: skip
    return load_curve(run)


def test_a_size_is_measured_as_its_export_is(run: Path, tmp_path: Path) -> None:
    curve = evaluate(run, sizes=[[16, 2], [32, 3]])
    assert curve is not None
    assert [result.title for result in curve.results] == ["16x2", "32x3"]
    whole = load_backbone(run)
    elastic = Elastic(whole, CONFIG)
    export_backbone(elastic.extract(whole, elastic.sizes[0]), tmp_path / "small")
    for folder, title in ((tmp_path / "small", "16x2"), (run, "32x3")):
        evaluate(folder)
        encoders = read_report(folder / "report" / "report.json")["results"]["encoders"]
        result = curve.find("extracted", title)
        assert result is not None
        assert {name: encoders["backbone"]["metrics"][name] for name in result.metrics} == result.metrics
        assert {name: encoders["random"]["metrics"][name] for name in result.random} == result.random
        assert {name: encoders["pixels"]["metrics"][name] for name in curve.pixels} == curve.pixels
        assert result.parameters == sum(parameter.numel() for parameter in load_backbone(folder).parameters())
    assert set(curve.pixels) == set(curve.results[0].metrics) == set(curve.results[0].random)


def test_what_was_measured_is_kept_and_the_rest_added(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[str] = []
    measure = sizes._measure

    def counted(network: Any, *arguments: Any, **options: Any) -> SizeResult:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(network.title)
        return measure(network, *arguments, **options)

    monkeypatch.setattr(sizes, "_measure", counted)
    with caplog.at_level(logging.INFO, logger="unlabeled"):
        first = evaluate(run, sizes=[[16, 2]])
    assert "16x2 (1 of 1): kNN, k = 5 " in caplog.text
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, sizes="all")
    monkeypatch.setattr(
        sizes, "_measure", lambda network, *a, **o: measured.append(network.title) or measure(network, *a, **o)
    )
    curve = evaluate(run, sizes="all")
    assert measured == ["16x2", "16x3", "24x2", "24x3", "32x2", "32x3"]
    assert first is not None
    assert curve is not None
    assert [result.title for result in curve.results] == measured
    assert curve.results[0] == first.results[0]
    assert curve.sizes == 6


def test_other_settings_and_other_weights_are_not_mixed(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(run, sizes=[[16, 2]])
    before = (run / "sizes.json").read_bytes()
    with pytest.raises(ConfigError, match=r"evaluate.limit: .*sizes.json has 1 sizes measured with None, here it is 9"):
        evaluate(run, sizes=[[16, 3]], evaluate={"limit": 9})
    assert read_curve(run) is not None
    export_backbone(create_backbone("vit_tiny_patch16_224", size=32, **VIT), run, elastic=CONFIG)
    with pytest.raises(ConfigError, match=r"^weights: .* with other weights; use the same value, or move that file"):
        evaluate(run, sizes=[[16, 3]])
    assert (run / "sizes.json").read_bytes() == before
    assert read_curve(run) is None
    assert "was measured with other weights than the run has now" in caplog.text
    evaluate(run)
    assert read_report(run / "report" / "report.json")["sizes"] is None
    (run / "sizes.json").write_text("{}")
    with pytest.raises(DataError, match=r"sizes.json: cannot be read \(.*\); remove it to measure again"):
        evaluate(run)


def test_runs_that_were_trained_alone_are_listed_too(run: Path, tmp_path: Path) -> None:
    small = VIT | {"embed_dim": 16, "depth": 2}
    export_backbone(create_backbone("vit_tiny_patch16_224", size=32, **small), tmp_path / "alone")
    curve = evaluate(run, sizes=[[16, 2]], versus=[str(tmp_path / "alone")])
    assert curve is not None
    alone, extracted = curve.find("alone", "alone"), curve.find("extracted", "16x2")
    assert alone is not None
    assert extracted is not None
    assert (alone.width, alone.depths, alone.random) == (16, (2,), {})
    assert (alone.parameters, alone.macs) == (extracted.parameters, extracted.macs)
    assert curve.front("knn/k5") == [extracted]
    export_backbone(create_backbone("nin_cifar", num_blocks=3), tmp_path / "nin")
    with pytest.raises(ConfigError, match=r"versus: nin is of the family \w+, the sizes are of VisionTransformer"):
        evaluate(run, sizes=[[16, 2]], versus=[str(tmp_path / "nin")])
    with pytest.raises(ConfigError, match=r"versus: .*nowhere is not a folder"):
        evaluate(run, sizes=[[16, 2]], versus=[str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="versus: has no effect without sizes"):
        evaluate(run, versus=[str(tmp_path / "alone")])


def test_batch_norms_are_estimated_for_each_size(tmp_path: Path) -> None:
    config = ElasticConfig(candidates=((16, (1, 1, 2, 1)),))
    export_backbone(create_backbone("resnet50", size=32, **RESNET), tmp_path, elastic=config)
    curve = evaluate(tmp_path, sizes="all", evaluate={"recalibrate_images": 20, "baselines": False})
    assert curve is not None
    assert [result.recalibrated for result in curve.results] == [20, 20]
    assert [result.random for result in curve.results] == [{}, {}]
    assert curve.pixels == {}
    text = (tmp_path / "report" / "report.md").read_text()
    assert "recomputed for each size on 20 unlabeled training images, which adds 51 %" in text


def test_only_an_elastic_run_has_sizes(tmp_path: Path) -> None:
    export_backbone(create_backbone("vit_tiny_patch16_224", size=32, **VIT), tmp_path)
    with pytest.raises(ConfigError, match="the run is not elastic and has a single size"):
        evaluate(tmp_path, sizes="all")
    with pytest.raises(ConfigError, match=r"sizes: vit_tiny_patch16_224 is not a run folder"):
        evaluate(Path("vit_tiny_patch16_224"), sizes="all", pretrained=False)


def test_the_terminal_lists_what_was_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = evaluate(run, sizes=[[24, 3]])
    assert curve is not None
    capsys.readouterr()
    assert main(["sizes", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = next(line.split() for line in lines if line.split()[:2] == ["24", "3"])
    result = curve.results[0]
    expected = [100 * values[metric] for metric in curve.headline for values in (result.metrics, result.random)]
    assert measured[4:] == [f"{value:.1f}" for value in expected]
    assert next(line.split() for line in lines if line.split()[:2] == ["16", "2"])[4:] == []
    assert lines[-1].startswith("raw pixels: kNN, k = 5 ")


def result(title: str, parameters: int, knn: float, kind: str = "extracted") -> SizeResult:
    return SizeResult(
        kind=kind, title=title, width=8, depths=(2,), parameters=parameters, macs=parameters * 50,
        metrics={"knn/k20": knn, "linear/top1": 1 - knn}, random={"knn/k20": 0.1, "linear/top1": 0.1}, weights="",
    )  # fmt: skip


def curve_of(*results: SizeResult) -> SizeCurve:
    curve = SizeCurve(
        settings={}, headline=("knn/k20", "linear/top1"), train_images=900, test_images=100, sizes=50,
        pixels={"knn/k20": 0.3, "linear/top1": 0.25},
    )  # fmt: skip
    for one in results:
        curve = curve.adding(one)
    return curve


def test_the_front_holds_what_no_smaller_size_matches() -> None:
    curve = curve_of(
        result("c", 30, 0.5), result("a", 10, 0.4), result("b", 20, 0.4), result("d", 30, 0.6), result("e", 40, 0.6),
        result("x", 15, 0.9, "alone"),
    )  # fmt: skip
    assert [one.title for one in curve.results] == ["a", "x", "b", "c", "d", "e"]
    assert [one.title for one in curve.front("knn/k20")] == ["a", "d"]
    assert [one.title for one in curve.front("linear/top1")] == ["a"]
    assert curve.adding(result("a", 10, 0.1)).find("extracted", "a") == result("a", 10, 0.1)


def test_the_report_of_an_elastic_run_has_its_sizes(run: Path) -> None:
    evaluate(run, sizes=[[16, 2], [32, 3]])
    evaluate(run)  # and keeps them
    document = read_report(run / "report" / "report.json")["sizes"]
    assert (document["stored"], document["measured"]) == (6, 2)
    assert [row["title"] for row in document["rows"]] == ["16x2", "32x3"]
    value = document["rows"][0]["values"]["knn/k5"]
    assert value["low"] < value["value"] <= value["high"]
    html = (run / "report" / "report.html").read_text()
    assert "2 of the 6 sizes of this elastic model" in html
    assert html.count("of each size against its number of parameters") == 2
    assert "All 2 measured models" not in html
    text = (run / "report" / "report.md").read_text()
    assert "| 16x2 |" in text
    assert json.loads((run / "sizes.json").read_text())["headline"] == ["knn/k5", "linear/top1"]


def test_a_page_of_many_sizes_shows_the_best_first(tmp_path: Path) -> None:
    from report_helpers import RUN, results

    from unlabeled.report.page import render_report

    many = curve_of(*(result(f"8x{n}", 10 * n, 0.3 + 0.01 * (n // 2)) for n in range(1, 40)))
    render_report(tmp_path, RUN, results(), [], None, sizes=many)
    html = (tmp_path / "report.html").read_text()
    shown, folded = html[html.index("Every size") :].split("All 39 measured models")
    assert shown.count('<th scope="row">8x') == 20
    assert folded.count('<th scope="row">8x') == 39
