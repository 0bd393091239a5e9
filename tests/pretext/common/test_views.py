"""Crops that know where they were taken."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.common.views import ColorConfig, Colors, RandomCrop, cell_centers, crop_box


def coordinates(height: int, width: int) -> Tensor:
    """An image whose red says where a pixel lies from left to right, and green from top to bottom."""
    rows = torch.linspace(0, 255, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 255, width).view(1, -1).expand(height, width)
    return torch.stack([columns, rows, torch.zeros(height, width)]).round().to(torch.uint8)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_box_says_where_the_pixels_come_from(flip: float) -> None:
    torch.manual_seed(0)
    crop = RandomCrop((64, 64), scale=(0.2, 1.0), flip=flip)
    for height, width in ((300, 400), (400, 260), (256, 256)):
        image, box = crop(coordinates(height, width))
        centers = cell_centers(box, (4, 4))
        cells = image[:2].float().unflatten(1, (4, 16)).unflatten(3, (4, 16)).mean((2, 4)) / 255
        assert (cells.flatten(1).t() - centers).abs().max() < 0.01
        assert (box[0] > box[2]) == (flip == 1.0)
        assert box[1] < box[3]


def test_boxes_are_in_units_of_each_axis() -> None:
    assert torch.equal(crop_box(0, 0, 11, 21, (11, 21)), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(crop_box(5, 10, 6, 6, (11, 21)), torch.tensor([0.5, 0.5, 0.75, 1.0]))


def test_centers_of_a_hand_made_grid() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 0.0, 0.5]])
    found = cell_centers(boxes, (1, 2))
    assert torch.allclose(found[0], torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    assert torch.allclose(found[1], torch.tensor([[0.375, 0.25], [0.125, 0.25]]))


def test_crops_follow_the_asked_area_and_shape() -> None:
    torch.manual_seed(1)
    crop = RandomCrop((8, 12), scale=(0.25, 0.5), ratio=(0.5, 2.0))
    areas = []
    for _ in range(200):
        image, box = crop(torch.zeros(3, 200, 200, dtype=torch.uint8))
        assert image.shape == (3, 8, 12)
        areas.append(float((box[2] - box[0]).abs() * (box[3] - box[1])))
    assert 0.22 < min(areas) < 0.3
    assert 0.42 < max(areas) < 0.53


def test_colors_keep_shape_and_type_and_pickle() -> None:
    torch.manual_seed(2)
    colors = pickle.loads(pickle.dumps(Colors(ColorConfig(blur=1.0, solarize=1.0, jitter=1.0))))
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    changed = colors(image)
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, image)
    same = Colors(ColorConfig(jitter=0, gray=0))(image)
    assert torch.equal(same, image)
