"""Labeled images: parts of the labels, numbering of classes, and what is done to training images."""

from __future__ import annotations

import pytest
import torch
from eval_helpers import MemorySource
from PIL import Image

from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.loader import seeded
from unlabeled.workflows.finetune import data
from unlabeled.workflows.finetune.config import AugmentConfig, FinetuneConfig
from unlabeled.workflows.finetune.data import TrainTransform, open_labeled, stratified

NAMES = ("a", "b", "c")


def config(**settings: object) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"target": "resnet18", **settings})


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, MemorySource]:
    found = {"train": MemorySource(30), "test": MemorySource(9, split="test")}
    monkeypatch.setattr(data, "open_source", lambda _, split: found[split])
    return found


def test_a_part_of_the_labels_is_the_same_part_of_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    rows = stratified(labels, NAMES, 0.1, seed=3)
    assert torch.bincount(labels[rows]).tolist() == [10, 5, 1]
    assert torch.equal(rows, stratified(labels, NAMES, 0.1, seed=3))
    assert not torch.equal(rows, stratified(labels, NAMES, 0.1, seed=4))
    assert set(rows.tolist()) <= set(stratified(labels, NAMES, 0.5, seed=3).tolist()), "smaller ones lie in larger ones"
    assert torch.equal(stratified(labels, NAMES, 1.0, seed=3), torch.arange(160))
    with pytest.raises(DataError, match=r"label_fraction: 0.01 leaves none of the 50 .* 'b'; give 0.02 or more"):
        stratified(torch.tensor([0] * 100 + [1] * 50), NAMES, 0.01, seed=3)


def test_the_fraction_is_what_training_sees_and_testing_does_not(sources: dict[str, MemorySource]) -> None:
    train, test = open_labeled(config(label_fraction=0.3))
    assert (len(train), len(test)) == (9, 9)
    for index in range(9):
        assert train.source.describe(index).startswith("train")
    expected = [sources["train"].describe(i) for i in range(30)]
    for index, label in enumerate(train.labels.tolist()):
        assert expected.index(train.source.describe(index)) % 3 == label


def test_test_classes_are_renumbered_by_name(sources: dict[str, MemorySource]) -> None:
    sources["test"].classes = ("blue", "red")
    sources["test"]._labels = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0])
    _, test = open_labeled(config())
    assert test.labels.tolist() == [2, 0, 2, 0, 0, 0, 2, 2, 2]
    sources["test"].classes = ("blue", "violet")
    with pytest.raises(DataError, match="test class 'violet' is not among the 3 training classes"):
        open_labeled(config())


def test_images_without_a_label_are_left_out(sources: dict[str, MemorySource]) -> None:
    sources["train"]._labels = torch.tensor([-1, 0, 1] * 10)
    train, _ = open_labeled(config())
    assert len(train) == 20
    assert train.labels.tolist() == [0, 1] * 10
    assert train.source.describe(0) == "train-1.png"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 30, "all training images are of class 'green'"),
        ([-1] * 30, "no image of the training split has a label"),
        ([0, 1, 3] * 10, "training label 3 is not among the 3 classes"),
    ],
)
def test_labels_that_teach_nothing(sources: dict[str, MemorySource], labels: list[int], message: str) -> None:
    sources["train"]._labels = torch.tensor(labels)
    with pytest.raises(DataError, match=message):
        open_labeled(config())


def test_no_labels_at_all(sources: dict[str, MemorySource]) -> None:
    sources["train"].classes = None
    with pytest.raises(DataError, match="the training split has no labels"):
        open_labeled(config())


def test_strong_policies_never_fail_and_depend_on_the_seed_alone() -> None:
    policy = TrainTransform(AugmentConfig(auto="rand-m10-n5-inc1"), (16, 16), (0.5, 0.5, 0.5))
    image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    for seed in range(40):  # among five of fifteen operations at full strength is posterize, down to no bits
        with seeded(seed):
            first = policy(image)["image"]
        with seeded(seed):
            assert torch.equal(first, policy(image)["image"])


def test_no_bits_are_black() -> None:
    white = Image.new("RGB", (2, 2), "white")
    assert data._posterize(white, 0).getextrema() == ((0, 0),) * 3
    assert data._posterize(white, 1).getextrema() == ((128, 128),) * 3
    assert data._posterize(white, 8).getextrema() == ((255, 255),) * 3


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment.auto: 'randm9' is not a policy of timm"):
        TrainTransform(AugmentConfig(auto="randm9"), (16, 16), (0.5, 0.5, 0.5))
