"""LiDAR and alignment over augmented views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, plain_values, tiny_vit

from unlabeled.eval.base import Estimate, FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.eval.evaluators.invariance import InvarianceConfig, InvarianceEvaluator, ViewSource, augmentation
from unlabeled.eval.metrics import alignment, lidar
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import DataError

CONFIG = InvarianceConfig(images=12, views=3)


def dataset(backbone: Backbone, *, count: int = 30, seed: int = 0, **loading: object) -> EncodedDataset:
    train, test = MemorySource(count, corrupt=(0, 5)), MemorySource(6, split="test")
    rows = np.array([index for index in range(count) if index not in (0, 5)])
    splits = (
        FeatureSplit(np.zeros((len(rows), 2), np.float32), rows % 3, rows),
        FeatureSplit(np.zeros((6, 2)), rows[:6]),
    )
    return EncodedDataset(FeatureSet(*splits, ("a", "b", "c")), backbone, (train, test), Loading(**loading), seed)


def test_values_are_those_of_the_views_features_and_repeat() -> None:
    state = torch.get_rng_state()
    one, again, other = (
        plain_values(InvarianceEvaluator(CONFIG).run(dataset(tiny_vit(), seed=seed))) for seed in (0, 0, 1)
    )
    torch.manual_seed(5)
    apart = plain_values(InvarianceEvaluator(CONFIG).run(dataset(tiny_vit(), batch_size=7)))
    assert isinstance(one["alignment"], Estimate)
    assert one["alignment"].low < one["alignment"].value < one["alignment"].high
    assert one["alignment"].value == pytest.approx(one["distances"].mean())
    assert one["lidar"] == again["lidar"]
    assert one["lidar"] == pytest.approx(apart["lidar"], rel=1e-3), "neither the batch nor the global state matters"
    assert one["lidar"] != other["lidar"]
    assert (one["images"], one["views"]) == (12, 3)
    assert 1 <= one["lidar"] <= 11.001
    torch.set_rng_state(state)


def test_a_view_is_a_function_of_seed_image_and_number() -> None:
    source, augment = MemorySource(9, shape=(40, 48)), augmentation((32, 32), 0.2)
    views, alone = ViewSource(source, [4, 7], 3, augment, 0), ViewSource(source, [7], 3, augment, 0)
    state = torch.get_rng_state()
    assert len(views) == 6
    assert views.read(4).shape == (3, 32, 32)
    assert views.read(4).dtype == torch.uint8
    assert torch.equal(views.read(4), alone.read(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(views.read(4), views.read(5))
    assert not torch.equal(views.read(4), ViewSource(source, [4, 7], 3, augment, 1).read(4))
    assert views.describe(4).startswith("train-7.png, view 1 of seed 0")


def test_features_of_views_come_image_after_image() -> None:
    """Features are the mean color: the views of an image are near each other, the classes far apart."""
    found = dataset(tiny_vit())
    source = ViewSource(found.require_sources()[0], [1, 2, 3], 4, augmentation((32, 32), 0.2), 0)
    colors = found.encode(source, lambda _, images: images.mean(dim=(2, 3)), named="colors")
    views = colors.features.reshape(3, 4, 3)
    assert alignment(views) < 0.6 * alignment(views.transpose(1, 0, 2))
    assert lidar(views) < 3


def test_too_few_images_and_broken_features_are_refused() -> None:
    with pytest.raises(DataError, match="1 images are too few"):
        plain_values(InvarianceEvaluator(CONFIG).run(dataset(tiny_vit(), count=2)))
    broken = tiny_vit()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="12 of 12 features are NaN or infinite"):
        plain_values(InvarianceEvaluator(CONFIG).run(dataset(broken)))
