"""Nearest rows of every kind of search against sorting all cosines."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors

from unlabeled.eval.neighbors import reduced, topk
from unlabeled.eval.neighbors import search as module
from unlabeled.eval.neighbors.search import SearchSettings, mapped_features, normalized, recall, search
from unlabeled.ssl.core.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and rows, the last ones cut, and 8-bit products also on processors without them."""
    for one in (topk, reduced, module):
        monkeypatch.setattr(one, "QUERIES", 32)
        monkeypatch.setattr(one, "COLUMNS", 128)
    monkeypatch.setattr(module, "integers_are_fast", lambda: True)


def features(count: int, *, seed: int, width: int = 24, groups: int = 12) -> np.ndarray:
    """Clouds that share a mean, as the features of a backbone do."""
    centers = np.random.default_rng(5).normal(size=(groups, width)) + 2
    generator = np.random.default_rng(seed)
    rows = centers[generator.integers(groups, size=count)] + 0.7 * generator.normal(size=(count, width))
    return rows.astype(np.float32)


def all_sorted(train: np.ndarray, test: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    cosines = normalized(test).astype(np.float64) @ normalized(train).astype(np.float64).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("kind", ["exact", "reduced"])
@pytest.mark.parametrize(("count", "k"), [(900, 1), (900, 20), (129, 129), (7, 50)])
def test_neighbors_are_those_of_sorting_all_cosines(kind: str, count: int, k: int) -> None:
    train, test = features(count, seed=1), features(75, seed=2)
    indices, cosines = search(train, test, k, SearchSettings(kind=kind))
    expected, values = all_sorted(train, test, k)
    assert indices.dtype == np.int64
    assert cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, values, atol=1e-6)
    apart = (np.abs(np.diff(values, axis=1)) > 1e-6).all(axis=1)
    assert apart.mean() > 0.8
    np.testing.assert_array_equal(indices[apart], expected[apart])


def test_scikit_learn_finds_the_same() -> None:
    train, test = features(500, seed=3), features(40, seed=4)
    distances, expected = (
        NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(train).kneighbors(test)
    )
    indices, cosines = search(train, test, 10)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(1 - cosines, distances, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "reduced"])
def test_equal_cosines_come_in_order_of_the_rows(kind: str) -> None:
    train = features(40, seed=6)[np.arange(700) % 40]  # each row 17 or 18 times, over all blocks
    indices, cosines = search(train, features(50, seed=7), 30, SearchSettings(kind=kind))
    first = indices[:, 0]
    np.testing.assert_array_equal(indices[:, :17], first[:, None] + 40 * np.arange(17))
    assert (first < 40).all()
    assert (cosines[:, :17] == cosines[:, :1]).all()


@pytest.mark.parametrize("kind", ["exact", "reduced"])
def test_constant_and_zero_rows(kind: str) -> None:
    settings = SearchSettings(kind=kind)
    indices, cosines = search(np.ones((600, 8), np.float32), np.ones((3, 8), np.float32), 5, settings)
    np.testing.assert_array_equal(indices, np.tile(np.arange(5), (3, 1)))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    indices, cosines = search(np.zeros((600, 8), np.float32), -features(3, seed=0, width=8), 5, settings)
    np.testing.assert_array_equal(indices, np.tile(np.arange(5), (3, 1)))
    assert (cosines == 0).all()


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_reduced_equals_exact_where_neighbors_differ_by_less_than_eight_bits_hold(spread: float) -> None:
    near = features(1, seed=8) + spread * np.random.default_rng(9).normal(size=(400, 24))
    train = np.concatenate([features(800, seed=10), near.astype(np.float32)])
    test = np.concatenate([features(40, seed=11), near[:20].astype(np.float32)])
    exact, fast = (search(train, test, 25, SearchSettings(kind=kind)) for kind in ("exact", "reduced"))
    np.testing.assert_array_equal(fast[0], exact[0])
    np.testing.assert_array_equal(fast[1], exact[1])


def test_what_eight_bits_cannot_prove_is_left_to_the_exact_search() -> None:
    rows = normalized(features(900, seed=12))
    proven, keys = rows[:64], topk.empty_keys(64, 5)
    assert len(reduced.reduced_search(keys, proven, rows, 0)) == 0
    np.testing.assert_array_equal(topk.decoded(keys[:, ::-1])[0], search(rows, proven, 5)[0])
    crowded = normalized(features(1, seed=12) + 1e-5 * np.random.default_rng(0).normal(size=(900, 24)))
    keys = topk.empty_keys(64, 5)
    np.testing.assert_array_equal(reduced.reduced_search(keys, crowded[:64], crowded, 0), np.arange(64))
    assert (keys == topk.EMPTY).all()


def test_the_bounds_are_above_the_cosines_and_near() -> None:
    train, test = normalized(features(500, seed=13)), normalized(features(60, seed=14))
    train[3], test[4] = 0, 0
    bounds = reduced._Bounds(test, train)
    upper = bounds.block(slice(0, 60), slice(0, 500)).numpy() + bounds.of_query.numpy()[:, None]
    excess = upper - test.astype(np.float64) @ train.astype(np.float64).T
    assert excess.min() > 0
    assert np.median(excess) < 0.02


@pytest.mark.parametrize("kind", ["exact", "reduced"])
def test_parts_on_disk_give_what_the_whole_gives(tmp_path: Path, kind: str) -> None:
    train, test = features(1500, seed=15), features(70, seed=16)
    train[1400] = train[3]
    save_file({"labels": np.arange(5), "features": train}, tmp_path / "split.safetensors")
    stored = mapped_features(tmp_path / "split.safetensors")
    np.testing.assert_array_equal(stored, train)
    expected = search(train, test, 20, SearchSettings(kind=kind))
    for gigabytes in (1e-9, 256 * 24 * 5 / 1e9):  # one and two blocks of rows at a time
        found = search(stored, test, 20, SearchSettings(kind=kind, memory_gb=gigabytes))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_memory_does_not_grow_with_the_rows_on_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(60_000, 32)).astype(np.float32))
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    tracemalloc.start()
    search(stored, features(20, seed=1, width=32), 5, SearchSettings(memory_gb=0.0005))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        peak < 1.5e6 + 4096 * 32 * 8
    )  # bytes: a part and the block that is normalized in float64; the rows have 7.7e6


def test_a_file_without_such_a_matrix_is_refused(tmp_path: Path) -> None:
    save_file({"features": np.zeros((3, 2), np.float16)}, tmp_path / "half.safetensors")
    with pytest.raises(DataError, match="contains no float32 matrix called 'features'"):
        mapped_features(tmp_path / "half.safetensors")


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_is_the_counted_part_of_the_true_neighbors(kind: str) -> None:
    train, test = features(3000, seed=17, groups=40), features(90, seed=18, groups=40)
    settings = SearchSettings(kind=kind, effort=1)
    indices, cosines = search(train, test, 30, settings)
    true, _ = all_sorted(train, test, 30)
    counted = np.mean([row in right for rows, right in zip(indices, true, strict=True) for row in rows])
    assert recall(train, test, indices, settings) == pytest.approx(counted, abs=1e-3)
    assert counted > 0.2
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert all(len(set(row)) == 30 for row in indices.tolist())
    if kind == "ivf":
        assert counted < 0.99
        wide, _ = search(train, test, 30, SearchSettings(kind=kind, effort=1000))
        assert recall(train, test, wide, settings) == pytest.approx(1, abs=1e-3)


def test_recall_of_known_answers() -> None:
    train = features(600, seed=19)
    true, _ = search(train, train[:9], 4)
    assert recall(train, train[:9], true, SearchSettings()) == 1
    half = true.copy()
    half[:, 2:] = [[598, 599]]
    assert recall(train, train[:9], half, SearchSettings()) == 0.5


def test_queries_with_too_few_answers_of_an_index_are_searched_exactly() -> None:
    train, test = features(2000, seed=20), features(30, seed=21)
    indices, _ = search(train, test, 500, SearchSettings(kind="ivf", effort=1))  # no list is so long
    assert indices.min() >= 0
    np.testing.assert_array_equal(np.sort(indices), np.sort(search(train, test, 500)[0]))


def test_an_index_beyond_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.knn\.search: hnsw needs about .* GB of memory for 900 images"):
        search(features(900, seed=0), features(3, seed=1), 5, SearchSettings(kind="hnsw", memory_gb=1e-4))


def test_features_of_two_widths_are_refused() -> None:
    with pytest.raises(DataError, match="24 training features but 8 test features"):
        search(features(9, seed=0), features(3, seed=1, width=8), 2)


def test_keys_keep_scores_and_indices_and_their_order() -> None:
    scores = np.array([[-1, -0.0, 0, 1e-40, 0.5, np.float32(0.5) + np.float32(1e-7), 3e38]], np.float32)
    indices = np.array([[0, 2**32 - 1, 7, 3, 4, 5, 6]])
    keys = topk.encoded(scores, indices)
    found = topk.decoded(keys)
    np.testing.assert_array_equal(found[0], indices)
    np.testing.assert_array_equal(found[1], scores)
    np.testing.assert_array_equal(np.argsort(keys[0]), np.arange(7))  # of the two zeros the lower index is the better
    assert (topk.decoded(topk.empty_keys(1, 2))[0] == -1).all()


def test_two_threads_find_what_one_finds() -> None:
    train, test = features(900, seed=22), features(75, seed=23)
    expected = search(train, test, 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = search(train, test, 20)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(found[0], expected[0])
