"""Label-free measures against closed forms, slow references and degenerate features."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import pdist, squareform

from unlabeled.eval.metrics import (
    Spectrum,
    alignment,
    alpha_req,
    centered_gram,
    cka_map,
    clid,
    cluster_learnability,
    effective_rank,
    lidar,
    linear_cka,
    rankme,
    two_nn,
    uniformity,
)
from unlabeled.ssl.core.errors import DataError


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (8, 50), (20, 20)])
def test_singular_values_are_those_of_the_decomposition(count: int, width: int) -> None:
    features = normal(count, width) * np.logspace(0, -3, width) + 3
    found = Spectrum.of(features)
    np.testing.assert_allclose(found.uncentered, np.linalg.svd(features, compute_uv=False), rtol=1e-6)
    expected = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    expected = np.where(expected > 1e-6 * expected[0], expected, 0)  # the mean takes one direction from N <= D
    np.testing.assert_allclose(found.centered, expected, rtol=1e-6, atol=1e-9)


def test_more_images_than_fit_into_a_block_give_the_same_values() -> None:
    features = normal(2500, 4)
    np.testing.assert_allclose(Spectrum.of(features).uncentered, np.linalg.svd(features, compute_uv=False), rtol=1e-9)


def test_rankme_is_the_papers_formula_on_uncentered_singular_values() -> None:
    features = normal(200, 12) * np.linspace(1, 5, 12) + 0.5
    values = np.linalg.svd(features, compute_uv=False)
    fractions = values / values.sum() + 1e-7
    assert rankme(Spectrum.of(features)) == pytest.approx(np.exp(-(fractions * np.log(fractions)).sum()), rel=1e-9)


def test_ranks_of_an_isotropic_cloud_and_of_one_far_from_the_origin() -> None:
    cloud = normal(4000, 64)
    near, far = Spectrum.of(cloud), Spectrum.of(cloud + 50)
    assert 63 < rankme(near) <= 64.001
    assert rankme(far) < 20, "the mean swallows the spectrum"
    assert effective_rank(far) == pytest.approx(effective_rank(near))
    eigenvalues = np.linalg.svd(cloud * np.linspace(1, 9, 64), compute_uv=False) ** 2
    squared = np.exp(-(eigenvalues / eigenvalues.sum() * np.log(eigenvalues / eigenvalues.sum())).sum())
    assert rankme(Spectrum.of(cloud * np.linspace(1, 9, 64))) > squared + 5, "of σ, not of its square"


def test_ranks_of_collapsed_features_are_finite() -> None:
    constant = Spectrum.of(np.full((30, 5), 0.1, np.float32))
    assert rankme(constant) == pytest.approx(1, abs=1e-4)
    assert effective_rank(constant) == 0
    assert rankme(Spectrum.of(np.zeros((30, 5)))) == 0
    line = Spectrum.of(np.outer(normal(30), np.ones(5)).astype(np.float32))
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


def power_law(exponent: float, count: int, width: int) -> np.ndarray:
    """Features whose covariance has eigenvalues i^-exponent exactly."""
    basis = linalg.qr(normal(count, width) - normal(count, width).mean(axis=0), mode="economic")[0]
    basis = linalg.qr(basis - basis.mean(axis=0), mode="economic")[0]
    return basis * np.arange(1, width + 1) ** (-exponent / 2)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("width", [20, 150])
def test_alpha_is_the_exponent_whatever_the_width(exponent: float, width: int) -> None:
    assert alpha_req(Spectrum.of(power_law(exponent, 300, width) + 7)) == pytest.approx(exponent, rel=1e-4)


def test_alpha_is_a_weighted_fit_of_the_named_range_and_repeats() -> None:
    spectrum = Spectrum.of(normal(400, 130) * np.logspace(0, -1, 130))
    index = np.arange(5, 101)
    fitted = np.polyfit(np.log(index), 2 * np.log(spectrum.centered[4:100]), 1, w=np.sqrt(1 / index))
    assert alpha_req(spectrum) == pytest.approx(-fitted[0])
    assert alpha_req(spectrum) == alpha_req(spectrum)


def test_alpha_leaves_out_directions_without_variance() -> None:
    embedded = np.concatenate([power_law(1.5, 200, 30), np.zeros((200, 40))], axis=1)
    assert alpha_req(Spectrum.of(embedded.astype(np.float32))) == pytest.approx(1.5, rel=1e-3)
    with pytest.raises(DataError, match="needs 7 directions in which the features vary, and there are 6"):
        alpha_req(Spectrum.of(normal(50, 6)))


def slow_two_nn(points: np.ndarray) -> float:
    near = np.sort(squareform(pdist(points)), axis=1)
    ratios = np.sort(near[:, 2] / near[:, 1])
    kept = int(len(points) * 0.9)
    x, y = np.log(ratios[:kept]), -np.log(1 - np.arange(1, kept + 1) / len(points))
    return float(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])


def test_two_nn_is_brute_force_and_finds_five_dimensions_among_forty() -> None:
    few = normal(300, 6)
    assert two_nn(few) == pytest.approx(slow_two_nn(few), rel=1e-9)
    plane = normal(3000, 5) @ linalg.qr(normal(40, 5, seed=1), mode="economic")[0].T
    assert two_nn(plane) == pytest.approx(4.84, abs=0.35)
    assert two_nn(normal(3000, 1)) == pytest.approx(1, abs=0.1)


def test_two_nn_survives_duplicates_offsets_and_scales() -> None:
    points = normal(200, 4)
    value = two_nn(points)
    assert two_nn(np.concatenate([points, points[:50], points[:1] * 1])) == pytest.approx(value)
    assert two_nn(points * 1e-12) == pytest.approx(value)
    assert two_nn(points + 1e6) == pytest.approx(value, rel=1e-4)
    near = np.concatenate([points, points + 1e-9])
    assert 0 < two_nn(near) < np.inf


def test_two_nn_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(DataError, match="three distinct feature vectors, and there are 2"):
        two_nn(np.array([[0.0], [-0.0], [1.0]]))
    with pytest.raises(DataError, match="every point is equally far from its two neighbors"):
        two_nn(np.eye(12))


def test_cluster_learnability_of_clusters_and_of_noise() -> None:
    centers = 20 * np.eye(10)
    apart = centers[np.arange(100) % 10] + 0.01 * normal(100, 10)
    assert cluster_learnability(apart, seed=0) == 1
    noise = normal(400, 50)
    assert 0.02 < cluster_learnability(noise, seed=0) < 0.7
    assert cluster_learnability(noise, seed=0) == cluster_learnability(noise, seed=0)
    assert cluster_learnability(noise, seed=0) != cluster_learnability(noise, seed=1)
    np.testing.assert_allclose(cluster_learnability(7 * noise, seed=0), cluster_learnability(noise, seed=0), atol=0.05)
    with pytest.raises(DataError, match="fall into one cluster"):
        cluster_learnability(np.ones((50, 3)), seed=0)
    with pytest.raises(DataError, match="needs four images, and there are 3"):
        cluster_learnability(normal(3, 3), seed=0)


def test_clid_is_a_sum_of_standardized_parts() -> None:
    found = clid([0.5, 0.7, 0.9], [10, 10, 40])
    np.testing.assert_allclose(found, np.array([-1, 0, 1]) * math.sqrt(1.5) + np.array([-1, -1, 2]) / math.sqrt(2))
    np.testing.assert_array_equal(clid([0.5], [3]), [0])


def test_alignment_is_the_mean_over_all_pairs_of_views() -> None:
    views = normal(7, 4, 5)
    views[2, 1] = 0
    lengths = np.linalg.norm(views, axis=2, keepdims=True)
    unit = views / np.where(lengths > 0, lengths, 1)
    assert alignment(views) == pytest.approx(np.mean([(pdist(one) ** 2).mean() for one in unit]))
    same = np.repeat(normal(6, 1, 5), 3, axis=1)
    assert alignment(same * np.array([1, 2, 3])[:, None]) == pytest.approx(0, abs=1e-12)
    assert alignment(np.stack([same[:, 0], -same[:, 0]], axis=1)) == pytest.approx(4)
    with pytest.raises(DataError, match="two views of each image"):
        alignment(normal(5, 1, 3))


def test_uniformity_is_brute_force_over_distinct_pairs_and_minus_four_on_a_sphere() -> None:
    features = normal(1300, 6)  # more than one block
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert uniformity(features) == pytest.approx(math.log(np.exp(-2 * pdist(unit) ** 2).mean()))
    assert uniformity(normal(1500, 256)) == pytest.approx(-3.97, abs=0.03)
    assert uniformity(np.ones((9, 4)) * np.arange(1, 10)[:, None]) == pytest.approx(0, abs=1e-12)
    assert uniformity(np.array([[1.0, 0], [-3, 0]])) == pytest.approx(-8)
    assert uniformity(np.zeros((5, 3))) == 0


def test_lidar_is_the_entropy_of_the_generalized_eigenvalues() -> None:
    views = normal(60, 5, 7) @ normal(7, 7, seed=1) + normal(60, 1, 7, seed=2) * 2
    means = views.mean(axis=1)
    between = np.cov(means.T, bias=True)
    rest = (views - means[:, None]).reshape(-1, 7)
    values = linalg.eigh(between, rest.T @ rest / len(rest) + 1e-4 * np.eye(7), eigvals_only=True)
    fractions = values / values.sum() + 1e-8
    assert lidar(views) == pytest.approx(np.exp(-(fractions * np.log(fractions)).sum()), rel=1e-6)


def test_lidar_counts_what_tells_images_apart_and_rankme_what_varies() -> None:
    width, signal = 20, 5
    views = normal(400, 8, width)  # noise of views in all directions, images differ in five of them
    views[..., :signal] += 30 * normal(400, 1, signal, seed=1)
    assert signal - 0.3 < lidar(views) < signal + 2
    isotropic = views / np.r_[np.full(signal, 30), np.ones(width - signal)]
    assert rankme(Spectrum.of(isotropic.reshape(-1, width))) > width - 0.1
    assert lidar(normal(400, 8, width)) == pytest.approx(width, abs=1), "noise alone: all directions alike"


def test_lidar_of_views_that_are_equal_and_of_images_that_are_equal() -> None:
    equal_views = np.repeat(normal(2000, 1, 6), 3, axis=1)
    assert lidar(equal_views) == pytest.approx(6, abs=0.05)
    assert lidar(np.ones((10, 3, 6))) == 0
    assert lidar(np.repeat(normal(4, 1, 50), 2, axis=1)) <= 3.001, "at most N - 1"


def song(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC as Song et al. 2012 write it."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    cross = (k @ m).sum()
    return (np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 * cross / (n - 2)) / n / (n - 3)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_offset_and_scale_but_single_stretched_axes(debiased: bool) -> None:
    x, y = normal(60, 8), normal(60, 5, seed=1) + normal(60, 8) @ normal(8, 5, seed=2)
    turn = linalg.qr(normal(8, 8, seed=3))[0]
    value = linear_cka(x, y, debiased=debiased)
    assert 0 < value < 1
    assert linear_cka(3 * x @ turn + 5, y, debiased=debiased) == pytest.approx(value)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(value)
    assert linear_cka(x, 2 * x @ turn, debiased=debiased) == pytest.approx(1)
    assert abs(linear_cka(x * np.linspace(0.1, 5, 8), y, debiased=debiased) - value) > 0.01


def test_cka_forms_agree_and_the_debiased_one_is_songs() -> None:
    x, y = normal(40, 10), normal(40, 10, seed=1) + normal(40, 10)
    grams = [centered_gram(one, debiased=False) for one in (x, y)]
    assert linear_cka(x, y) == pytest.approx(float((grams[0] * grams[1]).sum()))
    expected = song(x, y) / math.sqrt(song(x, x) * song(y, y))
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected)
    found = cka_map([x, y], [y, x, 2 * x])
    np.testing.assert_allclose(found, [[expected, 1, 1], [1, expected, expected]])


def test_cka_of_unrelated_features_is_biased_where_they_are_wide() -> None:
    x, y = normal(30, 300), normal(30, 300, seed=1)
    assert linear_cka(x, y, debiased=False) > 0.8
    assert abs(linear_cka(x, y)) < 0.1, "debiased by itself where D >= N"


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_features_that_do_not_vary_is_zero(debiased: bool) -> None:
    assert linear_cka(np.full((20, 3), 0.1), normal(20, 3), debiased=debiased) == 0
    if debiased:  # a single image that differs leaves nothing off the diagonal
        assert linear_cka(np.eye(20)[:, :1], normal(20, 3), debiased=True) == 0


def test_cka_refuses_other_images_and_too_few() -> None:
    with pytest.raises(DataError, match="same images, and there are 5 and 6"):
        linear_cka(normal(5, 2), normal(6, 2))
    with pytest.raises(DataError, match="debiased CKA needs four images, and there are 3"):
        linear_cka(normal(3, 2), normal(3, 2), debiased=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_features_are_refused_everywhere(value: float) -> None:
    features = normal(12, 3)
    features[4, 1] = value
    views = np.stack([features, features], axis=1)
    for measure in (
        lambda: Spectrum.of(features),
        lambda: two_nn(features),
        lambda: cluster_learnability(features, seed=0),
        lambda: uniformity(features),
        lambda: linear_cka(features, features),
        lambda: alignment(views),
        lambda: lidar(views),
    ):
        with pytest.raises(DataError, match="1 of 12 features are NaN or infinite"):
            measure()
    with pytest.raises(DataError, match="1 images are too few"):
        uniformity(features[:1])
