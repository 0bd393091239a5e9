"""OBoW's pieces: distances, codes and bags; the queue of words; the head that turns words into weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.pretext.obow.task import bow_logits, bow_loss
from unlabeled.pretext.obow.vocabulary import (
    Distances,
    QueueUpdate,
    Vocabulary,
    WordHead,
    information,
    inner_map,
    perplexity,
    pick_words,
    seed_words,
    squared_distances,
    window_of,
)


def update(rows: Tensor, nearest: float = 1.0, seeds: Tensor | None = None) -> QueueUpdate:
    return QueueUpdate(rows, torch.tensor([nearest]), seeds)


def queue(words: int, channels: int = 1, **settings) -> Vocabulary:
    return Vocabulary(words, channels, **({"fill": False, "signed": False, "decay": 0.99} | settings))


# --- distances, codes, bags ------------------------------------------------------------------------------------------


def naive_bags(cells: Tensor, words: Tensor, sharpness: float | None, pool: str) -> Tensor:
    rows = []
    for image in cells:
        codes = []
        for cell in image:
            distance = ((words - cell) ** 2).sum(1)
            one_hot = F.one_hot(distance.argmin(), len(words)).to(words.dtype)
            codes.append(one_hot if sharpness is None else torch.softmax(-sharpness * distance, 0))
        z = torch.stack(codes).amax(0) if pool == "max" else torch.stack(codes).mean(0)
        rows.append(z / z.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("sharpness", [0.3, 40.0, None])
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_bags_made_in_chunks_equal_the_definition(sharpness, pool, memory):
    cells, words = torch.rand(5, 6, 4).double(), torch.rand(7, 4).double()
    distances = Distances(cells, words, memory)
    assert len(distances.chunks) == (5 if memory == 1 else 1)
    bags = distances.bags(None if sharpness is None else torch.tensor([sharpness]), pool)
    assert torch.allclose(bags, naive_bags(cells, words, sharpness, pool), atol=1e-12)
    assert torch.allclose(bags.sum(1), torch.ones(5).double())


def test_chunks_hold_as_many_images_as_fit():
    chunks = Distances(torch.rand(5, 6, 4), torch.rand(7, 4), memory=2 * 6 * 7 * 4).chunks
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]


def test_maximum_is_taken_of_codes_and_not_of_scores():
    codes = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    bags = Distances(torch.zeros(1, 2, 1), torch.zeros(3, 1), 1 << 20)
    bags._kept = -codes.log()[None]  # distances that give these codes at sharpness 1
    found = bags.bags(torch.ones(1), "max")[0]
    assert torch.allclose(found, torch.tensor([0.6, 0.3, 0.8]) / 1.7)
    assert torch.allclose(bags.bags(torch.ones(1), "mean")[0], codes.mean(0))


def test_mean_distance_is_that_of_squared_distances():
    cells, words = torch.rand(4, 9, 6) * 3, torch.rand(11, 6)
    expected = torch.cdist(cells.flatten(0, 1), words).square()
    assert torch.allclose(squared_distances(cells, words).flatten(0, 1), expected, atol=1e-4)
    for memory in (1, 1 << 30):
        found = Distances(cells, words, memory).mean_nearest()
        assert found.item() == pytest.approx(expected.amin(1).mean().item(), rel=1e-5)


def test_distances_stay_in_float32_under_autocast():
    cells, words = 100 + torch.rand(1, 4, 64), 100 + torch.rand(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = squared_distances(cells.bfloat16(), words)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.cdist(cells.bfloat16().float(), words).square(), atol=0.6)


def test_far_words_give_no_nan():
    bags = Distances(torch.zeros(2, 3, 2), torch.tensor([[0.0, 0.0], [1e4, 1e4]]), 1 << 20).bags(torch.ones(1), "max")
    assert torch.equal(bags, torch.tensor([[1.0, 0.0]] * 2))
    assert bow_loss(torch.tensor([[[1e3, 0.0]]] * 2), bags).item() == 0


def test_perplexity_and_information():
    alike, apart = torch.full((4, 8), 1 / 8), torch.eye(4, 8)
    assert perplexity(alike.mean(0)).item() == pytest.approx(8, rel=1e-3)
    assert perplexity(apart).tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    assert information(alike).item() == pytest.approx(0, abs=1e-6)
    assert information(apart[:1].expand(4, -1)).item() == pytest.approx(0, abs=1e-6)
    assert information(apart).item() == pytest.approx(math.log(4) / math.log(8))


# --- maps and words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "inner", "window"),
    [(14, 12, 3), (7, 5, 3), (5, 3, 3), (4, 4, 3), (3, 3, 3), (2, 2, 1), (1, 1, 1)],
)
def test_small_maps_keep_their_border_and_tiny_ones_their_cells(size, inner, window):
    found = inner_map(torch.rand(1, 2, size, size))
    assert found.shape[-2:] == (inner, inner)
    assert window_of(found, "local") == (window, window)
    assert window_of(found, "cell") == (1, 1)
    assert window_of(found, "map") == (inner, inner)


@pytest.mark.parametrize("source", ["local", "cell", "map"])
def test_a_word_is_the_average_at_the_drawn_place(source):
    maps = torch.rand(6, 5, 4, 7)
    window = window_of(maps, source)
    averages = F.avg_pool2d(maps, window, stride=1).flatten(2)
    count = averages.shape[-1]
    assert count == {"local": 10, "cell": 28, "map": 1}[source]
    position = torch.arange(6) * 5 % count
    found = pick_words(maps, (position + 0.5) / count, window)
    assert torch.allclose(found, averages[torch.arange(6), :, position], atol=1e-6)
    last = pick_words(maps, torch.full((6,), 1 - 2**-24), window)
    assert torch.allclose(last, averages[..., -1], atol=1e-6)


def test_the_queue_wraps_around():
    vocabulary = queue(5)
    vocabulary.words.zero_()
    vocabulary.store([update(torch.tensor([[1.0], [2.0], [3.0]]))])
    vocabulary.store([update(torch.tensor([[4.0], [5.0], [6.0]]))])
    assert vocabulary.words.flatten().tolist() == [6, 2, 3, 4, 5]
    assert vocabulary.pointer.tolist() == [1]
    vocabulary.store([update(torch.arange(10.0, 17.0)[:, None])])  # more than there is room for: the newest stay
    assert vocabulary.words.flatten().tolist() == [14, 15, 16, 12, 13]
    assert vocabulary.pointer.tolist() == [3]
    assert vocabulary.batches.tolist() == [3]


def test_micro_steps_are_stored_in_their_order_as_one_batch():
    vocabulary = queue(5)
    vocabulary.store([update(torch.tensor([[1.0]]), 2.0), update(torch.tensor([[2.0]]), 4.0)])
    assert vocabulary.words[:2].flatten().tolist() == [1, 2]
    assert vocabulary.distance.item() == pytest.approx(0.99 * 0.5 + 0.01 * 3)
    assert vocabulary.batches.tolist() == [1]


def test_the_running_mean_distance():
    assert queue(2).moved_distance(torch.tensor([4900.0])).item() == pytest.approx(49.495)
    assert queue(2, fill=True).moved_distance(torch.tensor([4900.0])).item() == 4900


def test_words_begin_cut_off_at_zero_where_maps_are_not_negative():
    assert queue(500).words.min() == 0
    assert queue(500, signed=True).words.min() < -1
    assert (queue(500).words == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_seeds_take_equally_many_positions_of_each_image():
    maps = torch.arange(2 * 16.0).view(2, 1, 4, 4)
    seeds = seed_words(maps, torch.tensor([0.0, 0.5]), (1, 1), 4).flatten().tolist()
    assert seeds == [0, 4, 8, 12, 24, 28, 16, 20]
    repeated = seed_words(maps, torch.zeros(2), (3, 3), 8)  # of four positions
    assert torch.equal(repeated[0::2], repeated[1::2])


# --- head and loss ---------------------------------------------------------------------------------------------------


def test_logits_scale_with_the_features_and_have_their_bound():
    weights = WordHead(4, 6)(torch.rand(9, 4)).detach()
    assert torch.allclose(weights.norm(dim=1), torch.ones(9))
    features = torch.randn(3, 2, 6)
    logits = bow_logits(features, weights, torch.tensor(8.0))
    assert logits.shape == (3, 2, 9)
    assert torch.allclose(bow_logits(3 * features, weights, torch.tensor(8.0)), 3 * logits, atol=1e-4)
    assert (logits.abs().amax(-1) <= 8 * features.norm(dim=-1) + 1e-4).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bow_logits(features, weights, torch.tensor(8.0)), logits)


def test_head_sees_directions_of_words_only():
    head, words = WordHead(4, 6), torch.rand(9, 4)
    assert torch.allclose(head(words), head(words * torch.rand(9, 1).add(0.5)), atol=1e-6)


def test_loss_is_the_divergence_in_mean_over_views_of_the_right_image():
    bags = torch.eye(3, 5)
    right = 50 * bags[:, None].expand(3, 2, 5)
    assert bow_loss(right, bags).item() == pytest.approx(0, abs=1e-6)
    tiled = right.reshape(6, 5)[[0, 2, 4, 1, 3, 5]].view(3, 2, 5)
    assert bow_loss(tiled.roll(1, 0), bags) > 10
    logits, soft = torch.randn(3, 2, 5), torch.rand(3, 5).softmax(1)
    rows = soft.repeat_interleave(2, 0)
    expected = F.kl_div(logits.flatten(0, 1).log_softmax(1), rows, reduction="batchmean")
    assert bow_loss(logits, soft).item() == pytest.approx(expected.item(), rel=1e-5)
