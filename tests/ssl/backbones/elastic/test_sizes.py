"""Sizes, kept blocks and how often each size is drawn, against the published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize
from unlabeled.ssl.backbones.elastic.sizes import alternating, evenly, find, multiplicities
from unlabeled.ssl.core.errors import ConfigError


@pytest.mark.parametrize(("kept", "blocks", "numbers"), [
    (12, 24, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)),
    (16, 24, (0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 23)),
    (6, 18, (0, 3, 6, 10, 13, 17)),
    (6, 36, (0, 7, 14, 21, 28, 35)),
    (4, 8, (0, 2, 4, 7)),
])  # fmt: skip
def test_published_block_numbers(kept: int, blocks: int, numbers: tuple[int, ...]) -> None:
    assert evenly(kept, blocks) == numbers


def test_first_and_last_are_always_kept_and_none_twice() -> None:
    for blocks in range(2, 40):
        for kept in range(2, blocks + 1):
            numbers = evenly(kept, blocks)
            assert (numbers[0], numbers[-1], len(set(numbers))) == (0, blocks - 1, kept)


def test_alternating_blocks_keep_their_parity() -> None:
    for blocks in range(2, 40):
        for kept in range(1, blocks + 1):
            numbers = alternating(kept, blocks)
            assert len(numbers) == kept
            assert list(numbers) == sorted(set(numbers))
            assert all(number % 2 == j % 2 for j, number in enumerate(numbers))
            assert 0 <= numbers[0] <= numbers[-1] < blocks
            assert all(abs(a - b) <= 1 for a, b in zip(numbers, evenly(kept, blocks), strict=True))


def elastic_of(name: str, arguments: dict[str, Any], **config: Any) -> Elastic:
    """Sizes of a model on the meta device: values do not matter here, and take long to draw."""
    with torch.device("meta"):
        return Elastic(create_backbone(name, **arguments), ElasticConfig(**config))


@pytest.fixture(scope="module")
def vit_large() -> Elastic:
    return elastic_of("vit_large_patch16_224", {"size": 32}, width=384, depth=12)


def test_the_published_vit_holds_143_sizes_and_draws_572(vit_large: Elastic) -> None:
    assert len(vit_large.sizes) == 143
    times = dict(zip(vit_large.sizes, multiplicities(vit_large.sizes, 3), strict=True))
    assert sum(times.values()) == 573
    assert vit_large.sizes[-1] == vit_large.full == SubSize(1024, (24,))
    named = (SubSize(384, (12,)), SubSize(768, (12,)), SubSize(1024, (24,)))
    assert [times[size] for size in named] == [9, 5, 1]


def test_the_published_swin_holds_39_sizes() -> None:
    heads = {"num_heads": (8, 16, 32, 64)}
    elastic = elastic_of("swin_base_patch4_window7_224", heads, width=96, depth=(2, 2, 6, 2))
    assert len(elastic.sizes) == 39
    assert [sum(multiplicities(elastic.sizes, scale)) for scale in (2, 3)] == [89, 157]
    assert elastic.sizes[0] == SubSize(96, (2, 2, 6, 2))


def test_the_published_resnet_holds_465_sizes() -> None:
    wide = {"size": 32, "base_width": 128, "norm_layer": "groupnorm"}
    elastic = elastic_of("resnet152", wide, width=64, depth=(3, 4, 6, 3))
    assert len(elastic.sizes) == 465
    assert [sum(multiplicities(elastic.sizes, scale, by_width=False)) for scale in (2, 3)] == [699, 930]


def test_sizes_are_found_by_total_depth_or_by_that_of_each_stage(vit_large: Elastic) -> None:
    assert find(vit_large.sizes, 384, 12) == find(vit_large.sizes, 384, [12]) == SubSize(384, (12,))
    sizes = [SubSize(64, (3, 4, 7, 3)), SubSize(64, (3, 5, 6, 3)), SubSize(64, (3, 4, 6, 3))]
    assert find(sizes, 64, 16) == sizes[2]
    with pytest.raises(ConfigError, match="17 blocks can be spread in 2 ways"):
        find(sizes, 64, 17)
    with pytest.raises(ConfigError, match=r"width: 400 is not among the sizes; choose from 384, 448 \.\. 1024"):
        find(vit_large.sizes, 400, 12)
    with pytest.raises(ConfigError, match=r"depth: 11 is not among the sizes of width 384; choose from 12, 13 \.\. 24"):
        find(vit_large.sizes, 384, 11)
