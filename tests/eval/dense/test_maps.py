"""Images of maps: components against SVD, and every kind of backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_helpers import small_vit

from unlabeled.eval.dense.maps import CAPTIONS, components, map_images, similarity
from unlabeled.eval.dense.tiles import class_colors, heat, tiled
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CapabilityError

TINY = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


def random_maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_components_are_those_of_all_images_together():
    maps = random_maps(3, 10, 4, 6)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 10).double().numpy()
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = components(maps).permute(0, 2, 3, 1).reshape(-1, 3)
    for number in range(3):
        correlation = np.corrcoef(found[:, number], left[:, number] * values[number])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-5)
    assert (float(found.min()), float(found.max())) == (0, 1)
    assert torch.equal(components(maps), components(maps.clone()))


def test_the_foreground_is_what_lies_inside():
    maps = 0.1 * random_maps(2, 6, 7, 9)
    maps[:, 0, 2:5, 3:6] += 5
    for sign in (1, -1):
        found = components(sign * maps, foreground=0.5)
        shown = (found > 0).any(dim=1)
        assert not shown[:, 0].any()
        assert float(shown[:, 2:5, 3:6].float().mean()) > 0.9
        assert int(shown.sum()) <= 18


def test_fewer_channels_than_three_and_constant_maps():
    assert components(random_maps(2, 2, 3, 3)).shape == (2, 3, 3, 3)
    assert not components(torch.ones(2, 5, 3, 3)).any()
    assert not components(torch.ones(2, 5, 3, 3), foreground=0.5).any()


def test_similarity_is_the_cosine_to_the_place():
    maps = random_maps(2, 5, 3, 4)
    found = similarity(maps, (1, 2))
    expected = torch.cosine_similarity(maps, maps[:, :, 1, 2, None, None], dim=1).clamp(min=0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:, 1, 2], torch.ones(2))


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("vit_tiny_patch16_224", {"size": (32, 48), **TINY}, "attention"),
        ("vit_tiny_patch16_224", {"size": 32, "reg_tokens": 2, **TINY}, "attention"),
        ("resnet10t", {"size": (64, 96)}, "pooling"),
        ("swin_tiny_patch4_window7_224", {"size": (56, 112), "depths": (1, 1, 1, 1), "embed_dim": 12}, "pooling"),
    ],
)
def test_every_kind_of_network_without_a_trace(name, settings, key):
    torch.manual_seed(0)
    backbone = create_backbone(name, **settings).train()
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    state = torch.get_rng_state()
    found = map_images(backbone, images, foreground=0.4)
    assert set(found) == {"pca", key, "similarity"}
    assert set(found) <= set(CAPTIONS)
    assert len({image.shape for image in found.values()}) == 1
    assert all(image.dtype == torch.uint8 and image.ndim == 3 for image in found.values())
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(image, map_images(backbone, images, foreground=0.4)[name]) for name, image in found.items())


def test_a_network_without_maps_is_refused():
    backbone = small_vit()
    backbone.stages = []
    with pytest.raises(CapabilityError, match="cannot do images of its feature map"):
        map_images(backbone, torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


def test_places_lie_where_they_are_in_the_image():
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    warm = heat(torch.tensor([[0.0, 0, 0], [0, 0, 1]]), image).float().sum(0)
    assert float(warm[4:, 8:].min()) > float(warm[:4].max())
    assert float(warm[4:, 8:].min()) > float(warm[:, :8].max())
    colors = class_colors(torch.tensor([[0, 1, 255]], dtype=torch.uint8), torch.zeros(3, 1, 3, dtype=torch.uint8))
    assert not colors[:, 0, 0].any()
    assert colors[:, 0, 1].any()
    assert colors[:, 0, 2].tolist() == [178, 178, 178]  # 0.7 of white
    assert tiled([[image, image], [image, image]]).shape == (3, 2 * 96 + 6, 2 * 144 + 6)
