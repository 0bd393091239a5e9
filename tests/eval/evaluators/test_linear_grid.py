"""The grid over inputs and the augmented protocol: equal to probing one by one, repeatable, blind to the test split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, plain_values

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.eval.evaluators import linear
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator
from unlabeled.eval.probe.batches import AugmentedImages, Course, augmented_batches
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import ConfigError, DataError

FAST: dict[str, Any] = {"epochs": 8, "batch_size": 16, "lr": (0.01, 0.1), "weight_decay": (0.0, 1e-3)}


def vit() -> Backbone:
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", size=32, embed_dim=16, depth=4, num_heads=2, patch_size=8)


def encode_dataset(backbone: Backbone | None, *, corrupt: tuple[int, ...] = (), seed: int = 0) -> EncodedDataset:
    train, test = MemorySource(60, corrupt=corrupt), MemorySource(24, seed=1, split="test")
    dataset = EncodedDataset(
        FeatureSet(*_empty(), ("red", "green", "blue")), vit(), (train, test), Loading(batch_size=32)
    )
    features = FeatureSet(dataset.encode(train), dataset.encode(test), ("red", "green", "blue"))
    return replace(dataset, features=features, backbone=backbone, seed=seed)


def _empty() -> tuple[FeatureSplit, FeatureSplit]:
    split = FeatureSplit(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
    return split, split


@pytest.fixture(scope="module")
def dataset() -> EncodedDataset:
    return encode_dataset(vit())


def run(dataset: EncodedDataset, **settings: Any) -> dict[str, Any]:
    return plain_values(LinearEvaluator(LinearConfig(**FAST | settings)).run(dataset))


def test_a_grid_over_inputs_finds_the_best_of_probing_each_alone(dataset: EncodedDataset) -> None:
    axes = [(blocks, pooling) for pooling in ("cls", "avg", "cls+avg") for blocks in (1, 3)]
    for init in (0.0, 0.1):
        together = run(dataset, blocks=(1, 3), pooling=("cls", "avg", "cls+avg"), init=init)
        alone = [run(dataset, blocks=(blocks,), pooling=(pooling,), init=init) for blocks, pooling in axes]
        best = max(alone, key=lambda found: found["holdout_top1"])
        assert together["holdout_top1"] == best["holdout_top1"]
        same = [one for one in alone if one["note"].split(" (")[0] == together["note"].split(" (")[0]]
        assert len(same) == 1
        for key in ("top1", "holdout_top1", "lr", "weight_decay", "blocks"):
            assert same[0][key] == together[key], key
        np.testing.assert_array_equal(same[0]["predictions"], together["predictions"])
    assert "(6 inputs were tried)" in together["note"]


def test_one_block_of_a_class_token_is_the_pooled_features(dataset: EncodedDataset) -> None:
    pooled, block = run(dataset), run(dataset, blocks=(1,))
    np.testing.assert_array_equal(pooled["predictions"], block["predictions"])
    assert block["note"] == "the selected head reads the class token of the last block (1 inputs were tried)"
    assert "blocks" not in pooled


def test_the_grid_of_dinov2_trains_its_52_heads(dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    class Counted(linear.GroupedSgd):
        def __init__(self, width: int, classes: int, grid: list[linear.Setting], **options: Any) -> None:
            built.append(len(grid))
            super().__init__(width, classes, grid, **options)
            assert 0.005 < float(self.weights.std()) < 0.015
            assert options["lr_scale"] == 16 / 256

    monkeypatch.setattr(linear, "GroupedSgd", Counted)
    evaluator = LinearEvaluator(LinearConfig(grid="dinov2", epochs=2, batch_size=16))
    assert (min(evaluator.config.lr), max(evaluator.config.lr)) == (1e-5, 0.1)
    found = plain_values(evaluator.run(dataset))
    assert built == [13, 13, 13, 13, 1]
    assert found["weight_decay"] == 0
    assert found["blocks"] in (1, 4)


def test_prefixes_are_those_of_probing_each_alone_and_never_the_headline(dataset: EncodedDataset) -> None:
    plain, found = run(dataset), run(dataset, prefixes=(4, 9, 16))
    for key, value in plain.items():
        np.testing.assert_array_equal(found[key], value)
    for length in (4, 9):
        alone = run(dataset.first(length))
        assert found[f"top1@{length}"] == alone["top1"]
    assert set(found) - set(plain) == {"top1@4", "top1@9"}


def test_the_suite_keeps_prefixes_of_both_kinds_apart() -> None:
    config = EvaluateConfig.model_validate(
        {"evaluators": ["linear"], "prefixes": [8], "linear": FAST | {"prefixes": [4]}, "baselines": False}
    )
    results = evaluate_backbone(vit(), MemorySource(60), MemorySource(24, seed=1, split="test"), config)
    assert results is not None
    metrics = [name for name in results.encoders["backbone"].metrics if name.startswith("linear/top1")]
    assert metrics == ["linear/top1", "linear/top1@4", "linear/top1@8", "linear/top1@pca8"]


def test_raw_pixels_are_probed_as_they_are(dataset: EncodedDataset) -> None:
    bare = replace(dataset, backbone=None)
    found, plain = run(bare, blocks=(1, 4), augment=True), run(bare)
    np.testing.assert_array_equal(found["predictions"], plain["predictions"])
    assert found["note"].startswith("trained on cached features, since there is no backbone")


def test_rows_are_those_of_the_images_that_were_read() -> None:
    """An image that cannot be decoded, and a dataset with a subset of the images in another order."""
    full = encode_dataset(vit(), corrupt=(0, 7))
    split = full.features.train
    assert split.indices is not None
    order = np.random.default_rng(0).permutation(len(split))[:40]
    subset = FeatureSplit(split.features[order], split.labels[order], split.indices[order])
    dataset = replace(full, features=replace(full.features, train=subset))
    pooled, block = run(dataset), run(dataset, blocks=(1,))
    np.testing.assert_array_equal(pooled["predictions"], block["predictions"])


@pytest.mark.parametrize("settings", [{"blocks": (1, 3)}, {"augment": True, "augment_epochs": 2}])
def test_the_test_split_never_chooses(dataset: EncodedDataset, settings: dict[str, Any]) -> None:
    test = dataset.features.test
    rolled = replace(dataset.features, test=FeatureSplit(test.features, np.roll(test.labels, 1), test.indices))
    one, two = run(dataset, **settings), run(replace(dataset, features=rolled), **settings)
    assert one["top1"] != two["top1"]
    for key in ("holdout_top1", "lr", "weight_decay", "diverged"):
        assert one[key] == two[key]
    np.testing.assert_array_equal(one["predictions"], two["predictions"])


def test_augmented_images_belong_to_seed_epoch_and_image() -> None:
    source = MemorySource(5, shape=(40, 48))
    state = torch.get_rng_state()
    images = AugmentedImages(source, (32, 24), seed=3)
    assert images.read(2).shape == (3, 32, 24)
    assert images.read(2).dtype == torch.uint8
    assert torch.equal(images.read(7), AugmentedImages(source, (32, 24), seed=3).read(7))
    assert not torch.equal(images.read(2), images.read(7)), "the same image in the next epoch"
    assert not torch.equal(images.read(2), AugmentedImages(source, (32, 24), seed=4).read(2))
    assert images.describe(7) == source.describe(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_batches_have_the_labels_of_their_images_and_leave_the_network_alone() -> None:
    backbone = create_backbone("resnet10t", size=32).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    dataset = replace(encode_dataset(None, corrupt=(3,)), backbone=backbone)
    numbers = dataset.features.train.indices
    assert numbers is not None
    labels = torch.from_numpy(dataset.features.train.labels)
    course = Course(torch.arange(40), batch=16, epochs=2, seed=0)
    source = AugmentedImages(dataset.require_sources()[0], (32, 32), seed=0)
    zero, one = torch.zeros(backbone.embed_dim), torch.ones(backbone.embed_dim)
    batches = list(augmented_batches(dataset, None, zero, one, labels, course))
    assert len(batches) == course.steps == 4
    for step, (features, found) in enumerate(batches):
        rows = list(course.orders())[step // 2][step % 2 * 16 :][:16]
        assert torch.equal(found, labels[rows])
        images = torch.stack([source.read(step // 2 * len(source) + int(numbers[row])) for row in rows])
        with torch.inference_mode():
            expected = backbone.eval()(backbone.normalize(images))
            backbone.train()
        torch.testing.assert_close(features, expected)
    assert all(part.training for part in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_augmented_probe_learns_and_repeats(dataset: EncodedDataset) -> None:
    settings = {"augment": True, "augment_epochs": 6, "blocks": (1, 4), "pooling": ("cls+avg",)}
    one, two = run(dataset, **settings), run(dataset, **settings)
    assert one["top1"] > 0.6
    assert one["note"] == "trained on random crops and flips of the images for 6 epochs"
    np.testing.assert_array_equal(one["predictions"], two["predictions"])
    assert one["holdout_top1"] == two["holdout_top1"]


def test_broken_intermediate_features_are_refused(dataset: EncodedDataset) -> None:
    backbone = vit()
    network: Any = backbone.model
    network.blocks[1].register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(DataError, match="60 of 60 training features are NaN or infinite"):
        run(replace(dataset, backbone=backbone), blocks=(4,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": ("avg",)}, "pooling: has no effect without blocks; give evaluate.linear.blocks too"),
        ({"blocks": (1,), "prefixes": (4,)}, "prefixes: apply to the pooled features; remove blocks and grid"),
        ({"grid": "dinov2", "prefixes": (4,)}, "prefixes: apply to the pooled features"),
        ({"grid": "dinov2", "lr": (0.1,)}, "lr: grid=dinov2 sets its own; remove one of the two"),
        ({"grid": "dinov2", "blocks": (2,)}, "blocks: grid=dinov2 sets its own"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^evaluate.linear.{message}"):
        LinearEvaluator(LinearConfig(**settings))
