"""The walk through the list of sub-networks."""

from __future__ import annotations

from collections import Counter

import pytest

from unlabeled.ssl.backbones.elastic import ElasticConfig, SubSize
from unlabeled.ssl.backbones.elastic.sampler import SizeSampler
from unlabeled.ssl.backbones.elastic.sizes import candidates, multiplicities
from unlabeled.ssl.core.errors import ConfigError

VIT = candidates(ElasticConfig(width=384, depth=12), SubSize(1024, (24,)), 64)
SWIN = candidates(ElasticConfig(width=96, width_step=16, depth=(2, 2, 6, 2)), SubSize(128, (2, 2, 18, 2)), 16)
RESNET = candidates(ElasticConfig(width=64, depth=(3, 4, 6, 3)), SubSize(128, (3, 8, 36, 3)), 32)
TINY = candidates(ElasticConfig(width=8, depth=2), SubSize(24, (4,)), 8)


@pytest.mark.parametrize(
    ("sizes", "scale", "by_width", "length"),
    [(VIT, 3.0, True, 572), (SWIN, 2.0, True, 88), (SWIN, 3.0, True, 156), (RESNET, 2.0, False, 698)],
    ids=["vit", "swin", "swin of the paper", "resnet"],
)
def test_each_pass_holds_each_size_as_often_as_published_and_the_whole_network_never(
    sizes: list[SubSize], scale: float, by_width: bool, length: int
) -> None:
    sampler = SizeSampler(sizes, seed=0, scale=scale, by_width=by_width)
    assert len(sampler.entries) == length
    times = Counter(dict(zip(sizes, multiplicities(sizes, scale, by_width=by_width), strict=True)))
    del times[sizes[-1]]
    walks = [[sampler.at(walk * length + position) for position in range(length)] for walk in range(2)]
    assert Counter(walks[0]) == Counter(walks[1]) == times
    assert walks[0] != walks[1]
    assert all(walk != sampler.entries for walk in walks)


def test_the_smallest_published_vit_is_drawn_nine_times_of_572() -> None:
    sampler = SizeSampler(VIT, seed=0)
    drawn = Counter(sampler.at(step) for step in range(572))
    assert drawn[SubSize(384, (12,))] == 9
    assert drawn[SubSize(768, (12,))] == 5


def test_frequencies_are_the_papers_probabilities_up_to_rounding() -> None:
    """p(i, j) ~ ((S - 1)(N - i) / N + 1)((S - 1)(M - j) / M + 1) of the paper, without the whole network."""
    drawn = Counter(SizeSampler(VIT, seed=0, scale=3.0).entries)
    weights = {
        SubSize(384 + 64 * i, (12 + j,)): (2 * (10 - i) / 10 + 1) * (2 * (12 - j) / 12 + 1)
        for i in range(11)
        for j in range(13)
        if (i, j) != (10, 12)
    }
    assert drawn.keys() == weights.keys()
    assert sum(weights.values()) == pytest.approx(571)
    for size, weight in weights.items():
        assert abs(drawn[size] - weight) <= 0.5 + 1e-9
        assert drawn[size] / 572 == pytest.approx(weight / 571, abs=(0.5 + weight / 571) / 572 + 1e-9)


def test_any_step_at_once_is_the_walk() -> None:
    walking, jumping = SizeSampler(TINY, seed=3), SizeSampler(TINY, seed=3)
    steps = range(5 * len(walking.entries) + 2)
    walked = [walking.at(step) for step in steps]
    assert [jumping.at(step) for step in reversed(steps)] == walked[::-1]
    assert SizeSampler(TINY, seed=3).at(steps[-1]) == walked[-1]
    assert [SizeSampler(TINY, seed=4).at(step) for step in steps] != walked


def test_ranks_walk_together_or_each_by_itself() -> None:
    steps = range(100)
    together = SizeSampler(VIT, seed=0)
    assert [together.at(step, 0) for step in steps] == [together.at(step, 5) for step in steps]
    apart = SizeSampler(VIT, seed=0, shared=False)
    walks = [[apart.at(step, rank) for step in steps] for rank in range(3)]
    assert len({tuple(walk) for walk in walks}) == 3
    both = [(apart.at(step, 0), apart.at(step, 1)) for step in steps]  # ranks of one process in turn
    assert both == list(zip(walks[0], walks[1], strict=True))


def test_a_network_of_one_size_has_nothing_to_draw() -> None:
    with pytest.raises(ConfigError, match="no size but the whole network's; give a smaller width or depth"):
        SizeSampler(TINY[-1:], seed=0)
