"""The cache of features: what a second call costs, and what makes it a miss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, tiny_vit

from unlabeled.eval.features.cache import data_identity, load_split, weights_identity
from unlabeled.eval.features.extract import extract_features, raw_pixels
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.weights import export_backbone, load_backbone


def test_a_second_call_does_not_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract_features(tiny_vit(), MemorySource(5, corrupt=(2,)), cache=tmp_path)

    def touched(self: Backbone, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the backbone was used")

    monkeypatch.setattr(Backbone, "pooled", touched)
    second = extract_features(tiny_vit(), MemorySource(5, corrupt=(2,)), cache=tmp_path)
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.indices, second.indices)
    assert first.skipped == second.skipped == ("train-2.png",)
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file may stay"


def test_weights_size_precision_and_data_each_make_a_file_of_their_own(tmp_path: Path) -> None:
    backbone = create_backbone("resnet10t", size=32)
    other = create_backbone("resnet10t", size=32)
    extract_features(backbone, MemorySource(3), cache=tmp_path)
    extract_features(backbone, MemorySource(3), cache=tmp_path, size=64)
    extract_features(backbone, MemorySource(3), cache=tmp_path, precision="bf16")
    extract_features(backbone, MemorySource(4), cache=tmp_path)
    extract_features(other, MemorySource(3), cache=tmp_path)
    raw_pixels(MemorySource(3), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = raw_pixels(MemorySource(3), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"cut short")
    again = raw_pixels(MemorySource(3), cache=tmp_path)
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(first.features, again.features)
    assert load_split(file) is not None


def test_identity_of_data_sees_split_names_labels_and_pixels() -> None:
    base = data_identity(MemorySource(6))
    assert base == data_identity(MemorySource(6))
    others = [
        MemorySource(6, split="test"),
        MemorySource(6, seed=1),
        MemorySource(5),
        MemorySource(6, classes=("red", "green", "violet")),
        MemorySource(6, classes=None),
        MemorySource(6, corrupt=(3,)),
    ]
    assert len({base, *map(data_identity, others)}) == 7


def test_identity_of_weights_sees_one_changed_value_and_the_pooling() -> None:
    backbone = tiny_vit()
    base = weights_identity(backbone)
    assert base == weights_identity(tiny_vit())
    torch.manual_seed(0)
    averaged = create_backbone(
        "vit_tiny_patch16_224",
        size=32,
        embed_dim=32,
        depth=1,
        num_heads=2,
        patch_size=8,
        global_pool="avg",
        fc_norm=False,
    )
    averaged.load_state_dict(backbone.state_dict())
    assert weights_identity(averaged) != base
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-6
    assert weights_identity(backbone) != base


def test_identity_of_weights_is_that_of_the_exported_backbone(tmp_path: Path) -> None:
    """A run's settings have a list where what is read back from its export has a tuple."""
    backbone = create_backbone("resnet10t", size=32, channels=[16, 16, 32, 32])
    export_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.kwargs["channels"] == (16, 16, 32, 32)
    assert weights_identity(loaded) == weights_identity(backbone)
