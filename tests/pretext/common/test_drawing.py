"""Tiles of `visualize`: sizes, colors and positions, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from unlabeled.pretext.common.drawing import RIGHT, WRONG, displayed, enlarged, enlargement, framed, tiled
from unlabeled.ssl.backbones.backbone import create_backbone


@pytest.mark.parametrize(
    ("size", "factor"), [((32, 32), 3), ((32, 80), 3), ((50, 40), 2), ((96, 96), 1), ((224, 160), 1)]
)
def test_small_tiles_are_enlarged_to_about_96_pixels(size, factor):
    assert enlargement(size) == factor
    tiles = torch.rand(2, 5, 3, *size)
    shown = enlarged(tiles)
    assert shown.shape == (2, 5, 3, size[0] * factor, size[1] * factor)
    for row in range(factor):
        for column in range(factor):  # each pixel a square
            assert torch.equal(shown[..., row::factor, column::factor], tiles)


def test_a_factor_can_be_given():
    assert torch.equal(enlarged(torch.tensor([[1, 2]]), 2), torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]]))


@pytest.mark.parametrize("color", [RIGHT, WRONG])
def test_a_frame_lies_around_the_tile(color):
    tile = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    shown = framed(tile, 2, color)
    assert shown.shape == (3, 8, 10)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown[:, 2:-2, 2:-2], tile)
    outside = torch.ones(8, 10, dtype=torch.bool)
    outside[2:-2, 2:-2] = False
    assert torch.equal(shown[:, outside], torch.tensor(color, dtype=torch.uint8)[:, None].expand(3, 80 - 24))


@pytest.mark.parametrize(("gap", "background"), [(2, 255), (3, 0)])
def test_tiles_stand_row_by_row_on_a_background(gap, background):
    tiles = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    sheet = tiled(tiles, 3, gap=gap, background=background)
    assert sheet.shape == (3, 2 * (4 + gap) + gap, 3 * (5 + gap) + gap)
    free = torch.ones(sheet.shape[1:], dtype=torch.bool)
    for number, tile in enumerate(tiles):
        top, left = gap + number // 3 * (4 + gap), gap + number % 3 * (5 + gap)
        assert torch.equal(sheet[:, top : top + 4, left : left + 5], tile)
        free[top : top + 4, left : left + 5] = False
    assert (sheet[:, free] == background).all()
    assert torch.equal(tiled(list(tiles), 3, gap=gap, background=background), sheet)


def test_displayed_is_the_inverse_of_normalize():
    backbone = create_backbone("resnet10t")
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(displayed(backbone.normalize(images), backbone), images)
    assert displayed(torch.tensor([-99.0, 99.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), backbone).unique().tolist() == [
        0,
        255,
    ]
