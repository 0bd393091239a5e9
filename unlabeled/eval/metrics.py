"""Label-free measures of a representation: pure functions of features, computed in double precision.

All but alignment, uniformity and CKA change with the number of images N: compare values of equal N only, and RankMe
within one family of networks and methods only (Garrido et al., 2023). Which layer the features are of matters as well.

Shapes: N images, D features, Q views of an image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unlabeled.eval.evaluators.knn import nearest_neighbors
from unlabeled.eval.neighbors.faiss_threads import faiss_threads
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive

Features = npt.NDArray[np.floating[Any]]
Array = npt.NDArray[np.float64]

_ROWS = 1024
"""Images taken at a time; bounds the memory of copies in double precision."""
_CANDIDATES = 10
"""Neighbors that single precision proposes, of which double precision finds the nearest two."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of features, largest first, min(N, D) of them; those that are rounding alone are 0."""

    uncentered: Array
    """Of the features as they are."""
    centered: Array
    """Of the features less their mean; squared and divided by N: the eigenvalues of their covariance."""
    count: int
    """N."""

    @classmethod
    def of(cls, features: Features) -> Spectrum:
        """From features (N, D), through the smaller of the D x D and N x N products, whose eigenvalues are squares.

        Raises DataError for NaN or infinite features and for fewer than two images.
        """
        mean = _checked(features).mean(axis=0, dtype=np.float64)
        count, width = features.shape
        if width < count:
            scatter = np.zeros((width, width))
            for rows in _blocks(features):
                rows = rows - mean
                scatter += rows.T @ rows
            # a sum loses nothing, while taking the mean's part away from the raw product would
            return cls(_roots(scatter + count * np.outer(mean, mean), count), _roots(scatter, count), count)
        wide = features.astype(np.float64)
        centered = wide - mean
        return cls(_roots(wide @ wide.T, width), _roots(centered @ centered.T, width), count)


def rankme(spectrum: Spectrum) -> float:
    """RankMe: exp of the entropy of the uncentered singular values, from 1 to min(N, D); 0 for features that are all 0.

    Garrido et al. 2023, 2210.02885, eq. 1: p = σ / Σσ + 1e-7; the paper takes 25,600 training images. A mean that is
    large beside the spread makes it small.
    """
    return _entropy_rank(spectrum.uncentered, 1e-7)


def effective_rank(spectrum: Spectrum) -> float:
    """exp of the entropy of the centered singular values (Roy & Vetterli 2007), from 1 to min(N - 1, D).

    0 for features that do not vary.
    """
    return _entropy_rank(spectrum.centered, 0.0)


def alpha_req(spectrum: Spectrum, *, first: int = 5, last: int = 100) -> float:
    """α-ReQ: the exponent of the power law that the covariance eigenvalues λ_i ∝ i^-α follow; best near 1.

    Agrawal et al., NeurIPS 2022: least squares of log λ_i on log i for i = `first` .. `last`, weighted with 1 / i.
    The range is not in the paper; it ends before the first eigenvalue that is 0. Raises DataError when it holds fewer
    than three.
    """
    positive = spectrum.centered[spectrum.centered > 0]
    index = np.arange(first, min(last, len(positive)) + 1)
    if len(index) < 3:
        raise DataError(
            f"evaluate: α-ReQ needs {first + 2} directions in which the features vary, and there are {len(positive)}"
        )
    x, y, weight = np.log(index), 2 * np.log(positive[index - 1]), 1 / index
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    return float(-(weight * x) @ y / ((weight * x) @ x))


def two_nn(features: Features, *, discard: float = 0.1) -> float:
    """TwoNN intrinsic dimension of features (N, D), without their duplicates.

    Facco et al. 2017, Scientific Reports 7:12140: with μ = r2 / r1 of the distances to the two nearest neighbors and
    its empirical distribution F, the slope through the origin of -log(1 - F) on log μ, less the largest `discard` of
    the points. It grows with N where the data has structure at small distances. Raises DataError for fewer than three
    distinct points, and where each point is as far from its second neighbor as from its first, as on a grid.
    """
    points = _distinct(_checked(features))
    if len(points) < 3:
        raise DataError(f"evaluate: TwoNN needs three distinct feature vectors, and there are {len(points)}")
    nearest = _two_nearest(points)
    ratios = np.sort(np.log(nearest[:, 1] / nearest[:, 0]))
    x = ratios[: int(len(ratios) * (1 - discard))]
    y = -np.log1p(-np.arange(1, len(x) + 1) / len(ratios))
    if not x.any():
        raise DataError("evaluate: TwoNN has no value where all points are as far from two neighbors as from one")
    return float(x @ y / (x @ x))


def cluster_learnability(features: Features, *, seed: int) -> float:
    """How well the nearest neighbor (cosine) tells the cluster of an image: accuracy from 0 to 1.

    Of CLID (Lu et al. 2022, 2206.01251): round(√N) clusters by k-means of the normalized features; one random half of
    the images is told by the other. A single cluster is told perfectly, so 1 can be the sign of a collapse. Raises
    DataError for fewer than four images and when all end in one cluster.
    """
    import faiss  # loads its own OpenMP runtime, which most runs do not need

    points = np.ascontiguousarray(_unit(_checked(features)), dtype=np.float32)
    if len(points) < 4:
        raise DataError(f"evaluate: cluster learnability needs four images, and there are {len(points)}")
    clusters = round(math.sqrt(len(points)))
    with faiss_threads():
        kmeans = faiss.Kmeans(
            points.shape[1], clusters, niter=20, seed=derive("clid", seed) % 2**31, spherical=True,
            min_points_per_centroid=1, max_points_per_centroid=len(points),
        )  # fmt: skip
        kmeans.train(points)
        labels = kmeans.index.search(points, 1)[1][:, 0]
    if len(np.unique(labels)) < 2:
        raise DataError("evaluate: all features fall into one cluster; there is nothing to learn")
    order = np.random.default_rng(derive("clid halves", seed)).permutation(len(points))
    known, asked = order[: len(order) // 2], order[len(order) // 2 :]
    neighbors, _ = nearest_neighbors(points[known], points[asked], 1)
    return float((labels[known][neighbors[:, 0]] == labels[asked]).mean())


def clid(learnability: Sequence[float], dimension: Sequence[float]) -> Array:
    """CLID of each of M encoders: cluster learnability plus intrinsic dimension, each standardized over the M.

    A single encoder has none: what it gives then is 0 (Lu et al. 2022, 2206.01251).
    """

    def standardized(values: Sequence[float]) -> Array:
        array = np.asarray(values, dtype=np.float64)
        varies = len(set(values)) > 1
        scores: Array = (array - array.mean()) / array.std() if varies else np.zeros_like(array)
        return scores

    return standardized(learnability) + standardized(dimension)


def alignment(views: Features) -> float:
    """Mean squared distance of two views of an image, (N, Q, D), features of unit length: 0 (equal) to 4.

    Wang & Isola 2020, 2005.10242, with α = 2, over all pairs of the Q views.
    """
    return float(pair_distances(views).mean())


def pair_distances(views: Features) -> Array:
    """`alignment` of each image, (N,). Raises DataError for fewer than two views and for NaN."""
    _checked(views.reshape(len(views), -1))
    if views.shape[1] < 2:
        raise DataError("evaluate: alignment needs two views of each image")
    unit, count = _unit(views), views.shape[1]
    # all ordered pairs: Σ |x - y|² = 2 Q Σ |x|² - 2 |Σ x|²
    total = 2 * count * (unit**2).sum(axis=(1, 2)) - 2 * (unit.sum(axis=1) ** 2).sum(axis=1)
    distances: Array = np.maximum(total, 0) / (count * (count - 1))
    return distances


def uniformity(features: Features, *, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|²) over all pairs of distinct images, features (N, D) of unit length.

    Wang & Isola 2020, 2005.10242: 0 when all are equal, about -4 (for t = 2) when they are spread over a sphere of many
    dimensions. Raises DataError for fewer than two images and for NaN.
    """
    unit = _unit(_checked(features))
    squares = (unit**2).sum(axis=1)
    total, count = 0.0, len(unit)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squares[rows, None] + squares[None, start:] - 2 * unit[rows] @ unit[start:].T
        total += float(np.triu(np.exp(-t * np.maximum(distances, 0)), k=1).sum())
    return math.log(total / (count * (count - 1) / 2))


def lidar(views: Features, *, delta: float = 1e-4) -> float:
    """LiDAR of Q views of each of N images, (N, Q, D): from 1 to min(N - 1, D); 0 when all images are alike.

    Thilak et al. 2023, 2312.04000: exp of the entropy of p = λ / Σλ + 1e-8, λ the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½,
    Σ_b the covariance of the images' means and Σ_w the mean covariance of an image's views plus `delta` I, so that
    it depends on the features' scale. The paper takes N = 1000, Q = 50 and the views of the pretext task. It says how
    many directions tell images apart, alike, and not how well: views of pure noise give D.
    """
    _checked(views.reshape(len(views), -1))
    count, each, width = views.shape
    if each < 2:
        raise DataError("evaluate: LiDAR needs two views of each image")
    means = views.mean(axis=1, dtype=np.float64)
    within = np.eye(width) * delta
    for start in range(0, count, max(1, _ROWS // each)):
        part = slice(start, start + max(1, _ROWS // each))
        rows = (views[part] - means[part, None]).reshape(-1, width)
        within += rows.T @ rows / (count * each)
    values, vectors = np.linalg.eigh(within)
    # Σ_w is at least delta; an eigenvalue below it is rounding
    whitened = (means - means.mean(axis=0)) @ (vectors / np.sqrt(np.maximum(values, delta))) @ vectors.T
    product = whitened.T @ whitened if width < count else whitened @ whitened.T
    return _entropy_rank(_roots(product, max(count, width)) ** 2, 1e-8)


def linear_cka(first: Features, second: Features, *, debiased: bool | None = None) -> float:
    """Linear CKA of two representations (N, D1), (N, D2) of the same images; 1 when they are the same.

    Kornblith et al. 2019, 1905.00414. Rotations, offsets and a common scale change nothing. The plain form is biased
    upwards where N is not far above D; `debiased` takes the unbiased HSIC (Song et al. 2012; Nguyen et al. 2021,
    2010.15327), whose mean is 0 for unrelated features; None: where D1 or D2 is N or more. 0 where one of them does not
    vary. Raises DataError for NaN, for unlike N, and for fewer than four images where debiased.
    """
    if len(first) != len(second):
        raise DataError(f"evaluate: CKA compares the same images, and there are {len(first)} and {len(second)}")
    width, count = max(first.shape[1], second.shape[1]), len(first)
    debiased = width >= count if debiased is None else debiased
    if debiased or width >= count:
        return float((centered_gram(first, debiased=debiased) * centered_gram(second, debiased=debiased)).sum())
    x, y = _centered(first), _centered(second)
    norms = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(np.linalg.norm(y.T @ x) ** 2 / norms) if norms > 0 else 0.0


def centered_gram(features: Features, *, debiased: bool) -> Array:
    """Similarities (N, N) of features (N, D), centered, of unit norm: the sum of products of two of them is their CKA.

    All 0 for features that do not vary. Debiased ones are centered so that rows sum to 0 without the diagonal, which is
    0 (Székely & Rizzo 2014); their products are N(N - 3) times Song's unbiased HSIC.
    """
    centered = _centered(features)
    gram: Array = centered @ centered.T
    before, count = float(np.linalg.norm(gram)), len(gram)
    if debiased:
        if count < 4:
            raise DataError(f"evaluate: debiased CKA needs four images, and there are {count}")
        np.fill_diagonal(gram, 0)
        sums = gram.sum(axis=1) / (count - 2)
        gram -= sums[:, None] + sums[None, :] - sums.sum() / (count - 1)
        np.fill_diagonal(gram, 0)
    norm = float(np.linalg.norm(gram))
    if norm <= 1e-10 * before:  # rounding alone, as when a single image differs from the others
        return np.zeros_like(gram)
    gram /= norm
    return gram


def cka_map(first: Sequence[Features], second: Sequence[Features], *, debiased: bool = True) -> Array:
    """Linear CKA of each of L1 representations with each of L2, (L1, L2); memory is that of L1 matrices N x N."""
    kept = [centered_gram(features, debiased=debiased) for features in first]
    columns = (centered_gram(features, debiased=debiased) for features in second)
    values: Array = np.array([[float(np.vdot(one, other)) for one in kept] for other in columns]).T
    return values


def _entropy_rank(values: Array, epsilon: float) -> float:
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total + epsilon
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _roots(product: Array, terms: int) -> Array:
    """Square roots of the eigenvalues of a product of sums of `terms`, largest first, 0 for what is rounding."""
    values = np.linalg.eigvalsh(product)[::-1]
    floor = values[0] * max(terms, len(values)) * np.finfo(np.float64).eps
    return np.sqrt(np.where(values > max(floor, 0), values, 0))


def _checked(features: Features) -> Features:
    if len(features) < 2:
        raise DataError(f"evaluate: {len(features)} images are too few; nothing can be measured")
    broken = sum(int((~np.isfinite(rows).all(axis=1)).sum()) for rows in _blocks(features, wide=False))
    if broken:
        raise DataError(
            f"evaluate: {broken} of {len(features)} features are NaN or infinite; the backbone's weights have "
            "diverged, go back to an earlier checkpoint or lower optim.lr"
        )
    return features


def _blocks(features: Features, *, wide: bool = True) -> list[Features]:
    return [
        features[start : start + _ROWS].astype(np.float64) if wide else features[start : start + _ROWS]
        for start in range(0, len(features), _ROWS)
    ]


def _unit(features: Features) -> Array:
    """Rows of unit length in double precision; zero rows stay zero."""
    wide = features.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, 1)


def _centered(features: Features) -> Array:
    """(N, D) less its mean; exactly 0 where nothing but rounding is left."""
    wide = _checked(features).astype(np.float64)
    centered = wide - wide.mean(axis=0)
    varies = np.linalg.norm(centered) > 1e-10 * np.linalg.norm(wide)
    return centered if varies else np.zeros_like(centered)


def _distinct(features: Features) -> Features:
    """The rows of `features` without repetitions, in order."""
    digests = [hashlib.blake2b((row + 0.0).tobytes(), digest_size=16).digest() for row in features]  # -0.0 is 0.0
    return features[sorted({digest: row for row, digest in reversed(list(enumerate(digests)))}.values())]


def _two_nearest(points: Features) -> Array:
    """Distances of each row to the two nearest other rows, ascending, (N, 2)."""
    import faiss  # as above

    wide = points.astype(np.float64)
    wide -= wide.mean(axis=0)  # the nearer to 0, the more of a difference single precision can tell
    wide /= np.abs(wide).max()
    narrow = np.ascontiguousarray(wide, dtype=np.float32)
    index = faiss.IndexFlatL2(narrow.shape[1])
    with faiss_threads():
        index.add(narrow)
        _, found = index.search(narrow, min(len(narrow), _CANDIDATES + 1))
    nearest = np.empty((len(wide), 2))
    step = _ROWS // 8
    for start in range(0, len(wide), step):
        rows = np.arange(start, min(start + step, len(wide)))
        distances = np.linalg.norm(wide[found[rows]] - wide[rows, None], axis=2)
        distances[found[rows] == rows[:, None]] = np.inf
        nearest[rows] = np.partition(distances, 1, axis=1)[:, :2]
    return nearest
