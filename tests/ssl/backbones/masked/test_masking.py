"""Masks: counts by each method's rule, exactness, independence, patterns, and the ways to give one."""

from __future__ import annotations

import pytest
import torch

from unlabeled.ssl.backbones.masked.masking import count_keep, mask_noise, masking_of, random_masking
from unlabeled.ssl.core.errors import ConfigError

PATTERNS = ["random", "grid", "block"]


@pytest.mark.parametrize(
    ("method", "cells", "ratio", "exact", "reference"),
    [("mae", 196, 0.75, 49, 49), ("mae", 256, 0.75, 64, 64), ("fcmae", 49, 0.6, 19, 19), ("mae", 64, 0.75, 16, 16),
     ("mae", 100, 0.8, 20, 19), ("convmae", 100, 0.9, 10, 9), ("mae", 25, 0.7, 7, 7), ("mae", 2, 0.75, 0, 0),
     ("simmim", 36, 0.6, 14, 14), ("simmim", 49, 0.6, 19, 19), ("simmim", 25, 0.6, 10, 10), ("simmim", 16, 0.6, 6, 6),
     ("simmim", 100, 0.55, 45, 44),  # 100 * 0.55 is slightly above 55 in double precision
     ("spark", 49, 0.6, 20, 20), ("spark", 144, 0.75, 36, 36), ("spark", 5, 0.5, 2, 2), ("spark", 9, 0.6, 4, 4),
     ("spark", 15, 0.9, 2, 1)],  # 15 * 0.1 = 1.5, and slightly under it in double precision
)  # fmt: skip
def test_count_of_kept_cells(method, cells, ratio, exact, reference):
    assert count_keep(cells, ratio, method) == exact
    assert count_keep(cells, ratio, method, "official") == reference


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_exact_independent_and_invertible(pattern):
    torch.manual_seed(0)
    noise = mask_noise(pattern, 64, (4, 9))
    assert noise.shape == (64, 36)
    assert noise.min() >= 0
    assert noise.max() < 1
    masking = random_masking(noise, 9, (4, 9))
    assert masking.grid == (4, 9)
    assert masking.ids_keep.shape == (64, 9)
    assert masking.ids_masked.shape == (64, 27)
    assert torch.equal(masking.visible.flatten(1).sum(1), torch.full((64,), 9))
    assert len({tuple(row) for row in masking.visible.flatten(1).tolist()}) > (4 if pattern == "grid" else 60)
    everyone = torch.cat([masking.ids_keep, masking.ids_masked], 1)
    assert torch.equal(everyone.sort(1).values, torch.arange(36).expand(64, -1))
    # An image's mask hangs on its own noise only, and keeps its smallest values.
    assert torch.equal(random_masking(noise[5:6], 9, (4, 9)).visible, masking.visible[5:6])
    visible = masking.visible[3].flatten()
    assert noise[3, visible].max() < noise[3, ~visible].min()


def test_restore_puts_tokens_where_they_came_from():
    masking = random_masking(torch.rand(4, 10), 3, (2, 5))
    indices = torch.cat([masking.ids_keep, masking.ids_masked], 1)[..., None]  # each token carries its own place
    assert torch.equal(masking.restore(indices)[..., 0], torch.arange(10).expand(4, -1))


def test_enlarging_repeats_cells_in_blocks():
    masking = random_masking(torch.rand(2, 6), 2, (2, 3))
    enlarged = masking.enlarged((4, 2))
    assert enlarged.shape == (2, 8, 6)
    for row in range(2):
        for column in range(3):
            block = enlarged[:, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2]
            assert torch.equal(block, masking.visible[:, row, column, None, None].expand(-1, 4, 2))


def test_a_quarter_of_the_grid_pattern_is_a_regular_grid():
    torch.manual_seed(1)
    visible = random_masking(mask_noise("grid", 32, (6, 8)), 12, (6, 8)).visible
    phases = {(row, column): visible[:, row::2, column::2].flatten(1) for row in (0, 1) for column in (0, 1)}
    complete = torch.stack([cells.all(1) for cells in phases.values()], 1)
    assert torch.equal(complete.sum(1), torch.ones(32, dtype=torch.long))  # all of one phase, so none of another
    assert complete.any(0).all()  # each phase for some image


def test_block_pattern_hides_rectangles():
    torch.manual_seed(1)

    def borders(pattern: str) -> float:
        visible = random_masking(mask_noise(pattern, 64, (14, 14)), 118, (14, 14)).visible
        return float((visible[:, 1:] != visible[:, :-1]).float().mean())

    assert borders("block") < 0.5 * borders("random")


def test_masking_of_a_given_map():
    visible = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]], dtype=torch.bool)
    masking = masking_of(visible)
    assert torch.equal(masking.visible, visible)
    assert masking.ids_keep.tolist() == [[0, 4], [2, 5]]
    assert masking.ids_masked.tolist() == [[1, 2, 3, 5], [0, 1, 3, 4]]
    uneven = visible.clone()
    uneven[1, 0, 2] = False
    with pytest.raises(ConfigError, match=r"visible: images keep \[1, 2\] of 6 cells; give each the same"):
        masking_of(uneven)
