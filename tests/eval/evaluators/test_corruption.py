"""Accuracy under corruption: one classifier, fitted to clean features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, plain_values, tiny_vit

from unlabeled.eval.base import Estimate, FeatureSet
from unlabeled.eval.corruptions import corrupt
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.eval.evaluators.corruption import CorruptionConfig, CorruptionEvaluator
from unlabeled.eval.evaluators.knn import KnnConfig, KnnEvaluator
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator
from unlabeled.eval.features.extract import Resize, extract_features, raw_pixels
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive

CONFIG = CorruptionConfig(corruptions=("gaussian_noise", "contrast"), severities=(1, 5))


def dataset(backbone: Backbone | None, *, seed: int = 0, shape: tuple[int, int] = (32, 32)) -> EncodedDataset:
    sources = MemorySource(60, shape=shape), MemorySource(24, seed=1, split="test", corrupt=(4,), shape=shape)
    splits = [raw_pixels(one) if backbone is None else extract_features(backbone, one) for one in sources]
    return EncodedDataset(
        FeatureSet(splits[0], splits[1], ("red", "green", "blue")), backbone, sources, Loading(), seed
    )


def test_accuracies_are_those_of_knn_on_corrupted_images() -> None:
    evaluated = dataset(tiny_vit())
    found = plain_values(CorruptionEvaluator(CONFIG).run(evaluated))
    assert found["accuracies"].shape == (2, 2)
    assert (found["names"].tolist(), found["severities"].tolist()) == (["gaussian_noise", "contrast"], [1, 5])
    assert found["images"] == 23
    source = evaluated.require_sources()[1]
    changed = MemorySource(24, seed=1, split="test", corrupt=(4,))
    for index in range(24):
        if index != 4:
            drawn = derive("corruption", 0, "contrast", index)
            changed._images[index] = corrupt(source.read(index), "contrast", 5, drawn)
    test = extract_features(tiny_vit(), changed)
    expected = plain_values(
        KnnEvaluator(KnnConfig(k=(20,))).run(
            EncodedDataset(FeatureSet(evaluated.features.train, test, ("a", "b", "c")))
        )
    )
    assert found["contrast_s5"] == found["accuracies"][1, 1] == pytest.approx(expected["k20"])
    assert found["gaussian_noise"].value == pytest.approx(found["accuracies"][0].mean())
    assert found["mean"].value == pytest.approx(found["accuracies"].mean())
    assert found["kept"].value == pytest.approx(found["mean"].value / found["clean"].value)
    for key in ("clean", "mean", "kept", "contrast"):
        estimate = found[key]
        assert isinstance(estimate, Estimate)
        assert estimate.low <= estimate.value <= estimate.high


def test_clean_accuracy_is_that_of_the_usual_evaluation_and_values_repeat() -> None:
    evaluated = dataset(tiny_vit())
    usual = plain_values(KnnEvaluator(KnnConfig(k=(20,))).run(evaluated))
    one, again, other = (plain_values(CorruptionEvaluator(CONFIG).run(dataset(tiny_vit(), seed=s))) for s in (0, 0, 1))
    assert one["clean"].value == pytest.approx(usual["k20"])
    np.testing.assert_array_equal(one["accuracies"], again["accuracies"])
    assert not torch.equal(one["examples"], other["examples"])


def test_raw_pixels_meet_the_linear_probe_fitted_to_clean_ones() -> None:
    evaluated = dataset(None, shape=(40, 36))
    evaluated.features.train.labels[:] = np.arange(60) // 3 % 3  # colors do not reveal them: accuracies near chance
    found = plain_values(CorruptionEvaluator(CONFIG.model_copy(update={"classifier": "linear"})).run(evaluated))
    assert found["examples"].dtype == torch.uint8
    assert found["examples"].shape == (3, 3 * 64, 3 * 96)
    source = evaluated.require_sources()[1]
    for row, name in enumerate(CONFIG.corruptions):
        for column, severity in enumerate(CONFIG.severities):
            changed = MemorySource(24, seed=1, split="test", corrupt=(4,), shape=(32, 32))
            for index in set(range(24)) - {4}:
                small = Resize((32, 32))(source.read(index))
                changed._images[index] = corrupt(small, name, severity, derive("corruption", 0, name, index))
            data = FeatureSet(evaluated.features.train, raw_pixels(changed), ("a", "b", "c"))
            expected = plain_values(LinearEvaluator(LinearConfig()).run(EncodedDataset(data)))["top1"]
            assert found["accuracies"][row, column] == pytest.approx(expected)


def test_a_classifier_that_is_always_wrong_keeps_nothing() -> None:
    evaluated = dataset(tiny_vit())
    evaluated.features.test.labels[:] = 1
    evaluated.features.train.labels[:] = np.arange(60) % 2 * 2
    found = plain_values(CorruptionEvaluator(CONFIG).run(evaluated))
    assert found["clean"].value == 0
    assert "kept" not in found
    assert found["note"].startswith("no clean image is predicted correctly")


def test_broken_features_and_a_single_class_are_refused() -> None:
    evaluated = dataset(tiny_vit())
    evaluated.features.train.labels[:] = 0
    with pytest.raises(DataError, match="all training images are of class 'red'"):
        plain_values(CorruptionEvaluator(CONFIG).run(evaluated))
    broken = dataset(tiny_vit())
    broken.features.test.features[:] = np.nan
    with pytest.raises(DataError, match="test features are NaN or infinite"):
        plain_values(CorruptionEvaluator(CONFIG).run(broken))


@pytest.mark.parametrize(
    "wrong", [{"severities": (0,)}, {"severities": (6,)}, {"severities": ()}, {"corruptions": ("fog",)}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CorruptionConfig(**wrong)


def test_measures_name_corruptions_and_hide_single_severities() -> None:
    shown = CorruptionEvaluator.measure("gaussian_noise")
    assert shown is not None
    assert shown.label == "accuracy under gaussian noise"
    assert CorruptionEvaluator.measure("gaussian_noise_s3") is None
    assert CorruptionEvaluator.measure("kept") is not None


def test_the_suite_runs_all_four_with_their_baselines(tmp_path: Path) -> None:
    config = EvaluateConfig(
        evaluators=("spectrum", "invariance", "layers", "corruption"),
        corruption=CONFIG, invariance={"images": 8, "views": 2}, layers={"images": 16},
    )  # fmt: skip
    sources = MemorySource(48), MemorySource(21, seed=1, split="test")
    first, second = (evaluate_backbone(tiny_vit(), *sources, config, work=tmp_path) for _ in range(2))
    assert first is not None
    assert second is not None
    assert {name: one.metrics for name, one in first.encoders.items()} == {
        name: one.metrics for name, one in second.encoders.items()
    }
    backbone, pixels, random = (first.encoders[name] for name in ("backbone", "pixels", "random"))
    assert {"spectrum/rankme", "invariance/lidar", "layers/random", "corruption/kept"} <= set(backbone.metrics)
    assert not {"invariance/lidar", "layers/random"} & set(pixels.metrics)
    assert {"spectrum/rankme", "corruption/kept"} <= set(pixels.metrics)
    assert set(random.metrics) == set(backbone.metrics)
    assert "invariance/alignment" in backbone.intervals
    assert "corruption/examples" in backbone.images
