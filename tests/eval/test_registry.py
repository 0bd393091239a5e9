"""Evaluators by name: their settings, their order, and one from elsewhere from its class to the page."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, tiny_vit

from unlabeled.eval.base import Estimate, Evaluator, EvaluatorConfig, Measure, Point, Value
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import KnnConfig
from unlabeled.eval.registry import (
    REGISTRY,
    build_evaluators,
    evaluator_class,
    evaluator_config,
    evaluator_names,
    evaluator_origin,
    register_evaluator,
    settle,
)
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.report.page import render_report
from unlabeled.report.summary import RunSummary
from unlabeled.ssl.config.composition import set_within
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import ConfigError


class HalvesConfig(EvaluatorConfig):
    """Settings of the evaluator below."""

    parts: tuple[int, ...] = (2, 4)


class Halves(Evaluator):
    """Yields a value of every kind."""

    name: ClassVar = "halves"
    title: ClassVar = "Halves & quarters"
    captions: ClassVar = {"gray": "a gray square"}
    Config: ClassVar = HalvesConfig

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        for part in self.config.parts:
            yield f"part{part}", Measure(f"one of {part}", "percent", point=Point("one", "parts", part)).of(1 / part)
        width = dataset.features.train.features.shape[1]
        yield "width", Measure("width", "number", None).of(Estimate(width, width - 1, width + 1))
        yield "hidden", 3
        yield "note", f"measured on {width} features"
        yield "predictions", np.zeros(4)
        yield "gray", torch.full((3, 8, 8), 128, dtype=torch.uint8)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers it as a module of another package would, until the test is over."""
    module = types.ModuleType("halves")
    module.Halves = Halves  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "halves", module)
    monkeypatch.setattr(REGISTRY, "targets", dict(REGISTRY.targets))
    register_evaluator("halves", "halves:Halves")


@pytest.mark.usefixtures("halves")
def test_one_from_elsewhere_is_measured_and_shown(tmp_path: Path) -> None:
    config = EvaluateConfig.model_validate(
        {"evaluators": ["halves"], "halves": {"parts": [2, 8]}, "prefixes": [4], "embedding": None, "maps": 0}
    )
    results = evaluate_backbone(tiny_vit(), MemorySource(24), MemorySource(12, split="test"), config)
    assert results is not None
    found = results.encoders["backbone"]
    assert found.metrics["halves/part8"] == 0.125
    assert found.intervals["halves/width"] == (31, 33)
    assert found.measures["halves/width@pca4"].measure.text == "width, 4 principal components"
    assert "halves/hidden" in found.metrics
    assert "halves/hidden" not in found.measures
    run = RunSummary("a run", "vit", "memory", 1, "cpu", 0)
    html = render_report(tmp_path, run, results, None, None).read_text()
    for part in ("Halves &amp; quarters", "one of 8", "a gray square", "measured on 32 features", "quarters by parts"):
        assert part in html, part


@pytest.mark.usefixtures("halves")
def test_names_and_their_owners() -> None:
    assert evaluator_names()[:2] == ["knn", "linear"]
    assert evaluator_names().index("halves") >= 14
    assert (evaluator_origin("knn"), evaluator_origin("halves")) == ("built in", "halves")
    register_evaluator("halves", "halves:Halves")
    with pytest.raises(ConfigError, match=r"evaluate\.evaluators: 'halves' is already halves:Halves; give x:Y another"):
        register_evaluator("halves", "x:Y")
    with pytest.raises(ConfigError, match=r"evaluate\.evaluators: 'limit' is a setting of evaluate; give x:Y another"):
        register_evaluator("limit", "x:Y")
    with pytest.raises(ConfigError, match=r"evaluate\.evaluators: 'halfs' is not an evaluator; did you mean 'halves'"):
        evaluator_class("halfs")


@pytest.mark.usefixtures("halves")
def test_the_order_is_that_of_the_report() -> None:
    chosen = build_evaluators(EvaluateConfig(evaluators=("halves", "cluster", "knn")))
    assert [one.name for one in chosen] == ["knn", "cluster", "halves"]
    every = [one.name for one in build_evaluators(EvaluateConfig(evaluators="all"))]
    assert every == evaluator_names()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Halves, rf"'quarters' cannot be <class '{__name__}\.Halves'>; give text: '{__name__}:Halves'$"),
        ("halves.Halves", "'quarters' cannot be 'halves.Halves'; give text: 'module:Class'$"),
    ],
)
def test_only_module_and_class_can_be_registered(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^evaluate.evaluators: {message}"):
        register_evaluator("quarters", target)
    assert "quarters" not in evaluator_names()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such:Class", r"cannot be imported \(.*\); register what can be imported, not 'no_such:Class'$"),
        ("json:JSONDecoder", "is json:JSONDecoder, no class with a Config; name the class of an evaluator$"),
        (
            "unlabeled.eval.evaluators.knn:KnnEvaluator",
            "is the class KnnEvaluator, whose name is 'knn'; give both one name$",
        ),
    ],
)
def test_what_is_no_evaluator_of_that_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.setattr(REGISTRY, "targets", {**REGISTRY.targets, "quarters": target})
    with pytest.raises(ConfigError, match=f"^evaluate.evaluators: 'quarters' {message}"):
        evaluator_class("quarters")


def test_settings_are_the_evaluators_own() -> None:
    assert evaluator_config(EvaluateConfig(), "knn") == KnnConfig()
    given = EvaluateConfig.model_validate({"knn": {"k": [3]}})
    assert evaluator_config(given, "knn") == KnnConfig(k=(3,))
    assert evaluator_config(EvaluateConfig.model_validate({"knn": KnnConfig(k=(3,))}), "knn") == KnnConfig(k=(3,))
    stored = settle(given, given={"knn"}).model_dump(mode="json")
    assert stored["knn"] == KnnConfig(k=(3,)).model_dump(mode="json")
    assert stored["linear"]["epochs"] == 50
    assert settle(EvaluateConfig.model_validate(stored)) == settle(given)
    with pytest.raises(ConfigError, match=r"^evaluate\.knn\.k\.0: 'x' is not possible; give a valid integer"):
        settle(EvaluateConfig.model_validate({"knn": {"k": ["x"]}}))
    with pytest.raises(ConfigError, match=r"^evaluate\.knn: 3 is not possible; give a mapping of settings"):
        settle(EvaluateConfig.model_validate({"knn": 3}))
    with pytest.raises(ConfigError, match=r"^evaluate\.knn\.k: 3 is not possible; give a list$"):
        settle(EvaluateConfig.model_validate({"knn": {"k": 3}}))


def test_what_was_set_is_told_from_words_and_values() -> None:
    words = ["evaluate.knn.k=[3]", "+evaluate.linear={epochs: 3}", "evaluate={cluster: {restarts: 2}}", "epochs=3"]
    values = {"evaluate__few_shot__ways": 3, "evaluate": {"layers": {}}, "optim": {"lr": 1}}
    assert set_within("evaluate", words, values) == {"knn", "linear", "cluster", "few_shot", "layers"}
    assert set_within("evaluate", ["~evaluate.knn"]) == {"knn"}
