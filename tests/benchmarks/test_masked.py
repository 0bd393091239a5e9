"""The original executions give our losses and gradients, and the harness measures what it says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.masked import AGREEMENT, agreement, main, set_up, training_step
from benchmarks.models import MODELS
from benchmarks.tables import RESULTS, add_result, result_file, write_tables
from benchmarks.timing import gigaflops, paired_times, quartiles, relative_difference
from unlabeled.pretext.registry import task_names

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_original_execution(name: str) -> None:
    found = agreement(set_up(MODELS[name].small(), CPU), CPU)
    assert found["loss"] > 0.1
    assert found["loss_difference"] < 1e-5
    assert found["gradient_difference"] < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision_nothing_but_rounding_is_left(name: str) -> None:
    duel = set_up(MODELS[name].small(), CPU)
    for task in (duel.ours, duel.theirs):
        task.double()
    duel.images = duel.images.double()
    training_step(duel.ours, duel.our_loss, "fp32", CPU)
    training_step(duel.theirs, duel.original_loss, "fp32", CPU)
    assert relative_difference(*duel.gradients()) < 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_loss_changes_with_every_trained_parameter_on_both_sides(name: str) -> None:
    duel = set_up(MODELS[name].small(), CPU)
    training_step(duel.ours, duel.our_loss, "fp32", CPU)
    training_step(duel.theirs, duel.original_loss, "fp32", CPU)
    trained = {name for name, parameter in duel.ours.named_parameters() if parameter.requires_grad}
    for task in (duel.ours, duel.theirs):
        assert {name for name, parameter in task.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_run_in_bfloat16(name: str) -> None:
    duel = set_up(MODELS[name].small(), CPU)
    ours = training_step(duel.ours, duel.our_loss, "bf16", CPU)
    theirs = training_step(duel.theirs, duel.original_loss, "bf16", CPU)
    assert float(ours) == pytest.approx(float(theirs), rel=0.05)


def test_nothing_is_measured_when_the_losses_disagree() -> None:
    duel = set_up(MODELS["mae_vit_b"].small(), CPU)
    with torch.no_grad():
        duel.theirs.decoder.pred.weight.mul_(1 + 100 * AGREEMENT)
    with pytest.raises(AssertionError, match=r"MAE, ViT-B/16: losses .* differ"):
        agreement(duel, CPU)


def test_every_model_is_one_of_a_registered_task() -> None:
    assert {model.task["name"] for model in MODELS.values()} <= set(task_names())


def test_sides_take_turns_and_each_turn_begins_with_the_other() -> None:
    calls: list[str] = []

    def ours() -> None:
        calls.append("a")

    def original() -> None:
        calls.append("b")
        time.sleep(0.01)

    fast, slow = paired_times(ours, original, pairs=3, warmup=1, repeat=2, device=CPU)
    assert "".join(calls) == "ab" + "aabb" + "bbaa" + "aabb"
    assert len(fast) == len(slow) == 3
    assert all(0.01 <= seconds < 1 for seconds in slow)
    assert all(seconds < 0.01 for seconds in fast)


def test_quartiles_operations_and_differences() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert quartiles([2.0]) == {"low": 2.0, "median": 2.0, "high": 2.0}
    layer, x = nn.Linear(32, 64), torch.randn(8, 32)
    assert gigaflops(lambda: layer(x)) == pytest.approx(2 * 8 * 32 * 64 / 1e9)
    q = torch.randn(1, 2, 16, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert gigaflops(lambda: attention(q, q, q)) == pytest.approx(2 * 2 * 2 * 16 * 16 * 8 / 1e9), "fused ones count too"
    for convolution in (
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
    ):
        image = torch.randn(2, 8, 6, 6, requires_grad=True)
        forward = gigaflops(lambda: convolution(image))  # noqa: B023
        assert gigaflops(lambda: convolution(image).sum().backward()) == pytest.approx(3 * forward)  # noqa: B023
    assert forward == pytest.approx(2 * 2 * 36 * 8 * 4 * 16 / 1e9)
    assert relative_difference([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])]) == pytest.approx(0.1)


def test_the_command_measures_a_toy_and_keeps_other_results(tmp_path: Path) -> None:
    words = ["--models", "mae_vit_b", "--toy", "--pairs", "2", "--device", "cpu", "--results", str(tmp_path)]
    file = main([*words, "--dtype", "fp32", "mixed"])
    main([*words, "--dtype", "bf16"])
    rows = json.loads(file.read_text())
    assert file.parent == tmp_path
    assert list(rows) == ["mae_vit_b bf16 toy", "mae_vit_b fp32 toy", "mae_vit_b mixed toy"]
    row = rows["mae_vit_b mixed toy"]
    assert row["precision"] == {"ours": "bf16", "original": "fp32"}
    assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert 0 < row["gigaflop"]["ours"] < row["gigaflop"]["original"]
    assert row["images_per_s"]["ours"] == pytest.approx(2 / row["seconds"]["ours"]["median"])
    assert {"device", "torch", "timm", "threads", "commit"} <= row["machine"].keys()


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    side = {"ours": 1.0, "original": 2.0}
    spread = {"low": 1.5, "median": 1.75, "high": 2.25}
    row = {
        "title": "MAE", "precision": {"ours": "bf16", "original": "fp32"}, "batch": 8, "speedup": spread,
        "seconds": {"ours": spread, "original": spread}, "images_per_s": side,
        "gigaflop": {"ours": 7.0, "original": 14.0},
        "matrix_rate": {"bf16": 8.0, "fp32": 16.0}, "peak_gb": {"ours": None, "original": None},
        "loss_difference": 2e-7, "gradient_difference": 3e-6,
        "machine": {"device": "Some GPU (X)", "torch": "2", "timm": "1", "threads": "4", "commit": "abc"},
    }  # fmt: skip
    file = result_file(tmp_path, "Some GPU (X)")
    assert file.name == "masked_some_gpu_x.json"
    add_result(file, "mae fp32 toy", row | {"title": "a toy"})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    write_tables(page, tmp_path)
    assert "Nothing has been measured" in page.read_text()
    add_result(file, "mae mixed", row)
    write_tables(page, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n\n### Some GPU (X)")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in text
    assert "toy" not in text
    assert (
        "| MAE | bf16 / fp32 | 8 | **1.75** (1.50 to 2.25) | 1 / 2 | 7 / 14 | 50% / 50% | – | 2e-07 | 3e-06 |" in text
    )


def test_the_page_shows_the_results_of_the_repository(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "results" / "benchmarks.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    write_tables(copy, RESULTS)
    assert copy.read_text() == page.read_text(), "run `python -m benchmarks.tables` after results were added by hand"
