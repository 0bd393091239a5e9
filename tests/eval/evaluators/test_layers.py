"""Similarity of layers, within a backbone and between backbones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_helpers import MemorySource, plain_values, tiny_vit

from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading
from unlabeled.eval.evaluators.layers import LayersConfig, LayersEvaluator, cka_between, layer_features, layer_names
from unlabeled.eval.metrics import linear_cka
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import DataError

CONFIG = LayersConfig(images=24)


def dataset(backbone: Backbone, seed: int = 0) -> EncodedDataset:
    sources = MemorySource(40, corrupt=(3,)), MemorySource(6, split="test")
    rows = np.delete(np.arange(40), 3)
    split = FeatureSplit(np.zeros((39, 2), np.float32), rows % 3, rows)
    return EncodedDataset(FeatureSet(split, split, ("a", "b", "c")), backbone, sources, Loading(batch_size=16), seed)


def deep_vit(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return create_backbone("vit_tiny_patch16_224", size=32, embed_dim=16, depth=3, num_heads=2, patch_size=8)


def test_maps_have_the_layers_and_are_symmetric_with_ones() -> None:
    found = plain_values(LayersEvaluator(CONFIG).run(dataset(deep_vit())))
    assert found["names"].tolist() == ["blocks.0", "blocks.1", "blocks.2", "pooled"]
    np.testing.assert_allclose(np.diag(found["cka"]), 1)
    np.testing.assert_allclose(found["cka"], found["cka"].T, atol=1e-12)
    assert found["cka_random"].shape == (4, 4)
    assert found["cka_random"].max() < 0.9999
    assert found["random"] == found["cka_random"][-1, -1]
    again, other = (plain_values(LayersEvaluator(CONFIG).run(dataset(deep_vit(), seed))) for seed in (0, 1))
    np.testing.assert_array_equal(found["cka_random"], again["cka_random"])
    assert not np.allclose(found["cka_random"], other["cka_random"])


def test_layers_are_the_means_of_the_maps_and_the_pooled_features() -> None:
    backbone = create_backbone("resnet10t", size=32)
    source = MemorySource(6)
    found = layer_features(backbone, source, np.array([4, 1, 5, 0]), Loading(batch_size=3))
    assert list(found) == ["act1", "layer1", "layer2", "layer3", "layer4", "pooled"]
    images = backbone.normalize(torch.stack([source.read(index) for index in (4, 1, 5, 0)]))
    with torch.inference_mode():
        maps = backbone.eval().maps(images, range(5))
        pooled = backbone.pooled(images)
    for name, expected in zip(found, [*(one.mean(dim=(2, 3)) for one in maps), pooled], strict=True):
        torch.testing.assert_close(torch.from_numpy(found[name]), expected, atol=1e-5, rtol=1e-4)


def test_two_architectures_are_compared_on_the_same_images() -> None:
    first, second, source = deep_vit(), create_backbone("resnet10t", size=32), MemorySource(30)
    found = cka_between(first, second, source, images=20, seed=1)
    assert found.values.shape == (4, 6)
    assert (found.first, found.second) == (layer_names(first), layer_names(second))
    same = cka_between(first, first, source, images=30)
    np.testing.assert_allclose(np.diag(same.values), 1)
    rows = np.arange(30)
    features = [layer_features(one, source, rows, Loading()) for one in (first, second)]
    expected = linear_cka(features[0]["blocks.1"], features[1]["layer3"], debiased=True)
    assert cka_between(first, second, source, images=99).values[1, 4 - 1] == pytest.approx(expected)


def test_a_module_of_ones_own_is_compared_with_itself_alone() -> None:
    backbone = Backbone(tiny_vit().model, size=(32, 32))
    found = plain_values(LayersEvaluator(CONFIG).run(dataset(backbone)))
    assert "cka_random" not in found
    assert found["note"].startswith("not compared with random weights")
    assert found["cka"].shape == (2, 2)


def test_a_network_without_maps_says_so() -> None:
    backbone = tiny_vit()
    backbone.stages = []
    found = plain_values(LayersEvaluator(CONFIG).run(dataset(backbone)))
    assert list(found) == ["note"]
    with pytest.raises(DataError, match="has no feature maps"):
        cka_between(backbone, tiny_vit(), MemorySource(9))


def test_too_few_images_and_broken_weights_are_refused() -> None:
    with pytest.raises(DataError, match="debiased CKA needs four images, and there are 3"):
        cka_between(tiny_vit(), tiny_vit(), MemorySource(3))
    broken = tiny_vit()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="24 of 24 features are NaN or infinite"):
        plain_values(LayersEvaluator(CONFIG).run(dataset(broken)))
