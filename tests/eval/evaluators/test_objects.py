"""TokenCut on graphs whose cut is known, keys against a hook on the projection, and boxes in pixels of the image."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from dense_helpers import BlockSource, dataset, small_vit
from eval_helpers import plain_pairs
from torchvision.ops import box_iou, masks_to_boxes

from unlabeled.eval.dense.attention import class_attention, key_map
from unlabeled.eval.dense.tokencut import component_boxes, cut, intersection_over_union, second_eigenvector
from unlabeled.eval.evaluators.objects import ObjectsConfig, ObjectsEvaluator, true_boxes
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.source import limited


def two_clusters(inside, *, noise=0.05, seed=0):
    """Features (8, gh, gw) near one direction inside of a boolean map and near another outside."""
    random = np.random.default_rng(seed)
    centers = np.linalg.qr(random.normal(size=(8, 2)))[0].T
    return np.moveaxis(centers[inside.astype(int)] + noise * random.normal(size=(*inside.shape, 8)), 2, 0)


def block(grid, top, left, bottom, right):
    inside = np.zeros(grid, dtype=bool)
    inside[top:bottom, left:right] = True
    return inside


def test_a_block_on_a_grid_that_is_not_square_is_recovered():
    inside = block((6, 11), 1, 6, 4, 10)
    found = cut(two_clusters(inside))
    assert found.box == (6, 1, 10, 4)  # left, top, right, bottom
    np.testing.assert_array_equal(found.object, inside)
    assert 0 < found.value < 1e-3


def test_the_sign_of_features_and_of_the_vector_does_not_matter():
    inside = block((7, 5), 2, 1, 6, 4)
    features = two_clusters(inside)
    assert cut(features).box == cut(-features).box == (1, 2, 4, 6)
    assert cut(features * 1e4).box == (1, 2, 4, 6)
    assert cut(np.roll(features, 3, axis=0)).box == (1, 2, 4, 6)


def test_transposed_maps_give_transposed_boxes():
    features = two_clusters(block((9, 6), 1, 2, 3, 6))
    left, top, right, bottom = cut(features).box
    assert cut(features.transpose(0, 2, 1)).box == (top, left, bottom, right)


def test_only_what_is_connected_to_the_seed_is_the_object():
    inside = block((8, 8), 1, 1, 4, 4) | block((8, 8), 6, 6, 8, 8) | block((8, 8), 4, 4, 5, 5)
    found = cut(two_clusters(inside, noise=0))
    assert found.object.sum() in (9, 4, 1)  # (4, 4) touches (3, 3) at a corner only


def test_the_vector_solves_the_generalized_problem():
    random = np.random.default_rng(0)
    weights = np.where(random.random((30, 30)) > 0.6, 1.0, 1e-5)
    weights = np.maximum(weights, weights.T)
    degrees = np.diag(weights.sum(1))
    values, vectors = scipy.linalg.eigh(degrees - weights, degrees)
    vector, value = second_eigenvector(weights)
    assert value == pytest.approx(values[1])
    np.testing.assert_allclose(vector * np.sign(vector[0]), vectors[:, 1] * np.sign(vectors[0, 1]), atol=1e-8)
    assert vector @ degrees @ vector == pytest.approx(1)


def test_the_threshold_decides_what_is_alike():
    """Two directions of cosine 0.5 are one group at tau 0.2 and two at tau 0.7."""
    inside = block((4, 6), 0, 0, 2, 3)
    features = np.where(inside, 1.0, 0.5) * np.array([1.0, 0.0])[:, None, None]
    features = features + np.where(inside, 0.0, np.sqrt(0.75)) * np.array([0.0, 1.0])[:, None, None]
    assert cut(features, tau=0.2).box == (0, 0, 6, 4)
    assert cut(features, tau=0.7).box == (0, 0, 3, 2)


@pytest.mark.parametrize("features", [np.ones((3, 4, 5)), np.zeros((3, 4, 5)), np.ones((3, 1, 1))])
def test_where_all_places_are_alike_the_object_is_the_whole_image(features):
    found = cut(features)
    assert found.box == (0, 0, features.shape[2], features.shape[1])
    assert found.object.all()
    assert not found.vector.any()


def test_iou_is_that_of_torchvision():
    random = np.random.default_rng(0)
    corners = random.uniform(0, 50, (12, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 40, (12, 2))], axis=1).astype(np.float32)
    expected = box_iou(torch.from_numpy(boxes[:1]), torch.from_numpy(boxes))[0]
    np.testing.assert_allclose(intersection_over_union(boxes[0], boxes), expected, rtol=1e-5)
    apart = np.array([[90.0, 90, 95, 95], [0, 0, 0, 0]], dtype=np.float32)
    assert intersection_over_union(boxes[0], apart).tolist() == [0, 0]


def test_boxes_of_masks_are_around_the_components_of_each_class():
    mask = np.zeros((20, 30), np.uint8)
    parts = [(1, 2, 3, 5, 9), (1, 10, 20, 14, 22), (2, 5, 9, 8, 12), (3, 15, 0, 20, 1)]
    for value, top, left, bottom, right in parts:
        mask[top:bottom, left:right] = value
    mask[0, 20:] = 255
    expected = [
        (
            masks_to_boxes(torch.from_numpy(block((20, 30), top, left, bottom, right))[None])[0]
            + torch.tensor([0, 0, 1, 1])
        )
        for _, top, left, bottom, right in parts
    ]
    np.testing.assert_array_equal(component_boxes(mask), torch.stack(expected))
    assert component_boxes(np.zeros((4, 4), np.uint8)).shape == (0, 4)


def hooked_keys(backbone, images):
    """What the projection of the last block gives, by a hook on itself."""
    seen = []
    attention = backbone.model.blocks[-1].attn
    joint = getattr(attention, "qkv", None)
    handle = (joint if joint is not None else attention.k_proj).register_forward_hook(
        lambda *args: seen.append(args[2])
    )
    backbone.map(images)
    handle.remove()
    return seen[0].chunk(3, dim=2)[1] if joint is not None else seen[0]


@pytest.mark.parametrize(
    ("name", "settings", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True}, 4),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
        ("eva02_tiny_patch14_224", {"qkv_fused": False}, 1),
    ],
)
@torch.no_grad()
def test_keys_are_those_of_the_last_block_without_class_token_and_registers(name, settings, prefix):
    backbone = small_vit((32, 48), name, **settings).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    found = key_map(backbone, lambda: backbone.map(images))
    expected = hooked_keys(backbone, images)
    assert expected.shape[1] == prefix + 24
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, prefix:])
    assert found.shape == (2, 32, 4, 6)
    assert not backbone.model.blocks[-1].attn._forward_pre_hooks


@torch.no_grad()
def test_attention_of_the_class_token_is_the_softmax_of_its_query():
    backbone = small_vit((32, 48), reg_tokens=2).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    attention = backbone.model.blocks[-1].attn
    seen = []
    handle = attention.qkv.register_forward_hook(lambda *args: seen.append(args[2]))
    before = backbone.map(images)
    handle.remove()
    query, key, _ = seen[0].view(2, 27, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = (query[:, :, :1] @ key.transpose(2, 3) / 4).softmax(-1)[:, :, 0, 3:].mean(1).view(2, 4, 6)
    fused = attention.fused_attn
    torch.testing.assert_close(class_attention(backbone, lambda: backbone.map(images)), expected)
    assert attention.fused_attn == fused
    torch.testing.assert_close(backbone.map(images), before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet10t", {"size": 64}),
        ("swin_tiny_patch4_window7_224", {"size": 56, "depths": (1, 1, 1, 1), "embed_dim": 12}),
    ],
)
@torch.no_grad()
def test_networks_without_such_a_block_have_neither(name, settings):
    backbone = create_backbone(name, **settings).eval()
    images = torch.zeros(1, 3, *backbone.input_size)
    assert key_map(backbone, lambda: backbone.map(images)) is None
    assert class_attention(backbone, lambda: backbone.map(images)) is None


@torch.no_grad()
def test_registers_are_no_class_token():
    gap = small_vit((32, 48), class_token=False, reg_tokens=2, global_pool="avg").eval()
    assert class_attention(gap, lambda: gap.map(torch.zeros(1, 3, 32, 48))) is None


def scenes(count, grid, *, side=8, seed=0, **settings):
    """One block of class 1 or 2 in each image; returns the source and the blocks as boxes in pixels."""
    random = np.random.default_rng(seed)
    values, boxes = torch.zeros(count, *grid), []
    for index in range(count):
        height, width = random.integers(2, grid[0] - 1), random.integers(2, grid[1] - 1)
        top, left = random.integers(grid[0] - height), random.integers(grid[1] - width)
        values[index, top : top + height, left : left + width] = 1 + index % 2
        boxes.append([side * x for x in (left, top, left + width, top + height)])
    return BlockSource(values, side, **settings), np.array(boxes, np.float32)


def run(evaluated, **settings):
    return plain_pairs(ObjectsEvaluator(ObjectsConfig(**settings)).run(evaluated))


def test_plain_blocks_are_found_in_pixels_of_the_image():
    """Images of 96 x 144 pixels are encoded at 32 x 48, and boxes are in pixels of the image."""
    backbone = small_vit((32, 48))
    source, boxes = scenes(12, (4, 6), side=24)
    np.testing.assert_array_equal(np.concatenate([true_boxes(source, index) for index in range(12)]), boxes)
    found = dict(run(dataset(source, source, backbone, pixels=True)))
    assert found["corloc"].value == 1
    assert found["iou"].value > 0.95
    assert found["images"] == 12
    assert found["examples"].dtype == torch.uint8
    assert found["corloc"].low == pytest.approx(0.757, abs=0.01)  # Wilson, 12 of 12


def test_annotated_boxes_come_first_also_in_a_part_of_the_data():
    backbone = small_vit((32, 48))
    far = [torch.tensor([[0.0, 0.0, 2.0, 2.0]]) for _ in range(8)]
    source, _ = scenes(8, (4, 6), boxes=far)
    assert dict(run(dataset(source, limited(source, 6), backbone, pixels=True)))["corloc"].value == 0
    found = dict(run(dataset(source, source, backbone, pixels=True), images=5))
    assert found["images"] == 5


def test_images_without_objects_are_left_out_and_said():
    backbone = small_vit((32, 48))
    source, _ = scenes(6, (4, 6), corrupt=2)
    source.masks[4] = 0
    found = run(dataset(source, source, backbone, pixels=True))
    assert dict(found)["images"] == 4
    assert ("note", "2 of 6 test images have no true box or cannot be decoded") in found
    source.masks[:] = 0
    with pytest.raises(DataError, match="no test image has a box or a mask with an object"):
        run(dataset(source, source, backbone, pixels=True))


def test_native_images_are_padded_and_boxes_cut_to_them():
    """60 x 84 pixels become 64 x 88; without padding the positions would be shifted."""
    backbone = small_vit((32, 48), dynamic_img_size=True)
    source, boxes = scenes(6, (8, 11))
    source.images, source.masks = source.images[:, :, :60, :84].contiguous(), source.masks[:, :60, :84]
    boxes = np.minimum(boxes, [84, 60, 84, 60])
    found = dict(run(dataset(source, source, backbone, pixels=True), native=True))
    assert found["corloc"].value == 1
    assert found["iou"].value > 0.9
    keys = run(dataset(source, source, backbone), native=True)
    assert ("note", "features are the keys of the last attention block") in keys
    fixed = small_vit((32, 48))
    with pytest.raises(ConfigError, match=r"evaluate\.objects\.native: .* cannot take 64x88"):
        run(dataset(source, source, fixed), native=True)


def test_maps_of_networks_without_keys_are_centered():
    """After a ReLU, all positions are alike by the threshold; the box would always be the entire image."""
    torch.manual_seed(0)
    backbone = create_backbone("resnet10t", size=64)
    source, _ = scenes(6, (8, 8))
    found = run(dataset(source, source, backbone))
    values = dict(found)
    assert values["whole"] < 1
    assert values["iou"].value > 0.3
    assert any("features are those of map" in value for key, value in found if key == "note")
    assert {key: value for key, value in run(dataset(source, source, backbone)) if key == "corloc"} == {
        "corloc": values["corloc"]
    }
