"""Label-free measures of a representation: pure functions of features, computed in double precision.

All except alignment, uniformity and CKA depend on the number of images N: compare values for equal N only, and RankMe
only within one family of backbones and methods (Garrido et al., 2023). Values also depend on the layer.

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
"""Images per chunk; bounds the memory of copies in double precision."""
_CANDIDATES = 10
"""Nearest neighbors found in single precision, among which double precision selects two."""


@dataclass(frozen=True)
class Spectrum:
    """The min(N, D) singular values of features, largest first; values within rounding error are set to 0."""

    uncentered: Array
    """Singular values of the features."""
    centered: Array
    """Singular values of the features minus their mean; squares divided by N are eigenvalues of the covariance."""
    count: int
    """Number of images N."""

    @classmethod
    def of(cls, features: Features) -> Spectrum:
        """Computes the spectrum of features (N, D).

        Raises DataError for NaN or infinite features and for fewer than two images.
        """
        # eigenvalues of the smaller of the D x D and N x N products are squared singular values: cheaper than an SVD
        mean = _checked(features).mean(axis=0, dtype=np.float64)
        count, width = features.shape
        if width < count:
            scatter = np.zeros((width, width))
            for rows in _blocks(features):
                rows = rows - mean
                scatter += rows.T @ rows
            # adding the mean's outer product is exact; subtracting it from the raw product would cancel digits
            return cls(_roots(scatter + count * np.outer(mean, mean), count), _roots(scatter, count), count)
        wide = features.astype(np.float64)
        centered = wide - mean
        return cls(_roots(wide @ wide.T, width), _roots(centered @ centered.T, width), count)


def rankme(spectrum: Spectrum) -> float:
    """RankMe: exp of the entropy of the uncentered singular values, from 1 to min(N, D); 0 if all features are 0.

    Garrido et al. 2023, 2210.02885, eq. 1: p = σ / Σσ + 1e-7; the paper uses 25,600 training images. Features are not
    centered, so a mean that is large relative to the spread lowers the value.
    """
    return _entropy_rank(spectrum.uncentered, 1e-7)


def effective_rank(spectrum: Spectrum) -> float:
    """Effective rank: exp of the entropy of the centered singular values (Roy & Vetterli 2007).

    From 1 to min(N - 1, D); 0 for constant features.
    """
    return _entropy_rank(spectrum.centered, 0.0)


def alpha_req(spectrum: Spectrum, *, first: int = 5, last: int = 100) -> float:
    """α-ReQ: the exponent α of a power law λ_i ∝ i^-α fitted to the covariance eigenvalues; best near 1.

    Agrawal et al., NeurIPS 2022: least squares of log λ_i on log i for i = `first` .. `last`, weighted by 1 / i. The
    paper does not give the range; here it ends before the first eigenvalue that is 0. Raises DataError if fewer than
    three eigenvalues are left.
    """
    positive = spectrum.centered[spectrum.centered > 0]
    index = np.arange(first, min(last, len(positive)) + 1)
    if len(index) < 3:
        raise DataError(
            f"evaluate: α-ReQ needs {first + 2} directions in which the features vary, and there are {len(positive)}"
        )
    x, y, weight = np.log(index), 2 * np.log(positive[index - 1]), 1 / index  # eigenvalues: squared singular values
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    return float(-(weight * x) @ y / ((weight * x) @ x))


def two_nn(features: Features, *, discard: float = 0.1) -> float:
    """TwoNN intrinsic dimension of features (N, D); duplicates are removed first.

    Facco et al. 2017, Scientific Reports 7:12140: for μ = r2 / r1, the ratio of the distances to the two nearest
    neighbors, and its empirical distribution F, the slope through the origin of -log(1 - F) on log μ, without the
    fraction `discard` of largest ratios. It grows with N if the data has structure at small distances. Raises DataError
    for fewer than three distinct points, and if every point is equally far from both neighbors, as on a grid.
    """
    points = _distinct(_checked(features))  # a duplicate has r1 = 0
    if len(points) < 3:
        raise DataError(f"evaluate: TwoNN needs three distinct feature vectors, and there are {len(points)}")
    nearest = _two_nearest(points)
    ratios = np.sort(np.log(nearest[:, 1] / nearest[:, 0]))
    x = ratios[: int(len(ratios) * (1 - discard))]
    y = -np.log1p(-np.arange(1, len(x) + 1) / len(ratios))
    if not x.any():
        raise DataError("evaluate: TwoNN is undefined because every point is equally far from its two neighbors")
    return float(x @ y / (x @ x))


def cluster_learnability(features: Features, *, seed: int) -> float:
    """Accuracy, 0 to 1, with which the nearest neighbor by cosine predicts an image's k-means cluster.

    Part of CLID (Lu et al. 2022, 2206.01251): k-means with round(√N) clusters on the normalized features; one random
    half of the images predicts the other. Few distinct clusters are easy to predict, so 1 can be a sign of collapse.
    Raises DataError for fewer than four images, and if all fall into one cluster.
    """
    import faiss  # here, since it loads an OpenMP runtime of its own that most runs do not need

    points = np.ascontiguousarray(_unit(_checked(features)), dtype=np.float32)
    if len(points) < 4:
        raise DataError(f"evaluate: cluster learnability needs four images, and there are {len(points)}")
    clusters = round(math.sqrt(len(points)))
    with faiss_threads():
        kmeans = faiss.Kmeans(
            points.shape[1], clusters, niter=20, seed=derive("clid", seed) % 2**31, spherical=True,
            # by default, faiss warns below 39 points per centroid and subsamples above 256
            min_points_per_centroid=1, max_points_per_centroid=len(points),
        )  # fmt: skip
        kmeans.train(points)
        labels = kmeans.index.search(points, 1)[1][:, 0]
    if len(np.unique(labels)) < 2:
        raise DataError("evaluate: all features fall into one cluster; there is nothing to learn")
    order = np.random.default_rng(derive("clid halves", seed)).permutation(len(points))
    known, queries = order[: len(order) // 2], order[len(order) // 2 :]
    neighbors, _ = nearest_neighbors(points[known], points[queries], 1)
    return float((labels[known][neighbors[:, 0]] == labels[queries]).mean())


def clid(learnability: Sequence[float], dimension: Sequence[float]) -> Array:
    """CLID of M encoders, (M,): cluster learnability plus intrinsic dimension, each standardized over the encoders.

    It only ranks encoders (Lu et al. 2022, 2206.01251); the value of a single encoder is always 0.
    """

    def standardized(values: Sequence[float]) -> Array:
        array = np.asarray(values, dtype=np.float64)
        varies = len(set(values)) > 1
        scores: Array = (array - array.mean()) / array.std() if varies else np.zeros_like(array)
        return scores

    return standardized(learnability) + standardized(dimension)


def alignment(views: Features) -> float:
    """Mean squared distance between two views of an image, for features (N, Q, D): 0 (identical) to 4.

    Features are scaled to unit length. Wang & Isola 2020, 2005.10242, with α = 2, over all pairs of the Q views.
    """
    return float(pair_distances(views).mean())


def pair_distances(views: Features) -> Array:
    """`alignment` for each image separately, (N,). Raises DataError for fewer than two views and for NaN."""
    _checked(views.reshape(len(views), -1))
    if views.shape[1] < 2:
        raise DataError("evaluate: alignment needs two views of each image")
    unit, count = _unit(views), views.shape[1]
    # over all ordered pairs, Σ |x - y|² = 2 Q Σ |x|² - 2 |Σ x|², without a (Q, Q) matrix for each image
    total = 2 * count * (unit**2).sum(axis=(1, 2)) - 2 * (unit.sum(axis=1) ** 2).sum(axis=1)
    distances: Array = np.maximum(total, 0) / (count * (count - 1))
    return distances


def uniformity(features: Features, *, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|²) over all pairs of images, for features (N, D) scaled to unit length.

    Wang & Isola 2020, 2005.10242: 0 if all features are equal, about -4 (for t = 2) if they are spread evenly over a
    sphere of many dimensions. Raises DataError for fewer than two images and for NaN.
    """
    unit = _unit(_checked(features))
    squares = (unit**2).sum(axis=1)
    total, count = 0.0, len(unit)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squares[rows, None] + squares[None, start:] - 2 * unit[rows] @ unit[start:].T
        # the block starts on the diagonal: k=1 counts each pair once, and no image with itself
        total += float(np.triu(np.exp(-t * np.maximum(distances, 0)), k=1).sum())
    return math.log(total / (count * (count - 1) / 2))


def lidar(views: Features, *, delta: float = 1e-4) -> float:
    """LiDAR of features (N, Q, D) of Q views of N images: from 1 to min(N - 1, D); 0 if all images are alike.

    Thilak et al. 2023, 2312.04000: exp of the entropy of p = λ / Σλ + 1e-8, λ the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½,
    Σ_b the covariance of the images' means, and Σ_w the mean covariance of an image's views plus `delta` I, so the
    value depends on the scale of the features. The paper uses N = 1000, Q = 50 and the views of the pretext task. LiDAR
    counts the directions that distinguish images about equally well, not how well they do: views of pure noise give D.
    """
    _checked(views.reshape(len(views), -1))
    count, each, width = views.shape
    if each < 2:
        raise DataError("evaluate: LiDAR needs two views of each image")
    means = views.mean(axis=1, dtype=np.float64)
    # Σ_w, a chunk of images at a time
    within = np.eye(width) * delta
    for start in range(0, count, max(1, _ROWS // each)):
        chunk = slice(start, start + max(1, _ROWS // each))
        rows = (views[chunk] - means[chunk, None]).reshape(-1, width)
        within += rows.T @ rows / (count * each)
    values, vectors = np.linalg.eigh(within)
    # Σ_w has no eigenvalue below delta, except by rounding
    whitened = (means - means.mean(axis=0)) @ (vectors / np.sqrt(np.maximum(values, delta))) @ vectors.T
    product = whitened.T @ whitened if width < count else whitened @ whitened.T
    return _entropy_rank(_roots(product, max(count, width)) ** 2, 1e-8)


def linear_cka(first: Features, second: Features, *, debiased: bool | None = None) -> float:
    """Linear CKA of two representations (N, D1), (N, D2) of the same images; 1 if they are equivalent.

    Kornblith et al. 2019, 1905.00414. It is invariant to rotations, offsets and a common scale. The plain estimate is
    biased upwards unless N is much larger than D; `debiased` uses the unbiased HSIC (Song et al. 2012; Nguyen et al.
    2021, 2010.15327), with mean 0 for unrelated features. None: debiased if D1 or D2 is at least N. The value is 0 if
    one representation is constant. Raises DataError for NaN, for different N, and, if debiased, for N < 4.
    """
    if len(first) != len(second):
        raise DataError(f"evaluate: CKA compares the same images, and there are {len(first)} and {len(second)}")
    width, count = max(first.shape[1], second.shape[1]), len(first)
    debiased = width >= count if debiased is None else debiased
    if debiased or width >= count:  # N x N Gram matrices; below, D1 x D2 products, which are smaller
        return float((centered_gram(first, debiased=debiased) * centered_gram(second, debiased=debiased)).sum())
    x, y = _centered(first), _centered(second)
    norms = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(np.linalg.norm(y.T @ x) ** 2 / norms) if norms > 0 else 0.0


def centered_gram(features: Features, *, debiased: bool) -> Array:
    """Centered Gram matrix (N, N) of features (N, D), of unit norm: the inner product of two of them is their CKA.

    All 0 for constant features. Debiased, the diagonal is 0 and each row sums to 0 (U-centering: Székely & Rizzo 2014),
    so that inner products are N(N - 3) times Song's unbiased HSIC, before scaling to unit norm.
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
    if norm <= 1e-10 * before:  # only rounding is left, for instance if a single image differs from the others
        return np.zeros_like(gram)
    gram /= norm
    return gram


def cka_map(first: Sequence[Features], second: Sequence[Features], *, debiased: bool = True) -> Array:
    """Linear CKA of each of L1 representations with each of L2, (L1, L2); needs memory for L1 + 1 matrices N x N."""
    grams = [centered_gram(features, debiased=debiased) for features in first]
    columns = (centered_gram(features, debiased=debiased) for features in second)  # lazily: one at a time
    values: Array = np.array([[float(np.vdot(one, other)) for one in grams] for other in columns]).T
    return values


def _entropy_rank(values: Array, epsilon: float) -> float:
    """exp of the entropy of the values' fractions of their sum; 0 if the sum is 0."""
    total = values.sum()
    if total <= 0:
        return 0.0
    fractions = values / total + epsilon
    fractions = fractions[fractions > 0]  # 0 log 0 counts as 0
    return float(np.exp(-(fractions * np.log(fractions)).sum()))


def _roots(product: Array, terms: int) -> Array:
    """Square roots of the eigenvalues of `product`, largest first; those within rounding error are 0.

    `terms`: number of summands in each entry of `product`, which bounds that error.
    """
    values = np.linalg.eigvalsh(product)[::-1]
    floor = values[0] * max(terms, len(values)) * np.finfo(np.float64).eps
    return np.sqrt(np.where(values > max(floor, 0), values, 0))


def _checked(features: Features) -> Features:
    """`features`, after a check that there are at least two images and that all values are finite."""
    if len(features) < 2:
        raise DataError(f"evaluate: {len(features)} images are too few to measure anything; give at least two")
    broken = sum(int((~np.isfinite(rows).all(axis=1)).sum()) for rows in _blocks(features, wide=False))
    if broken:
        raise DataError(
            f"evaluate: {broken} of {len(features)} features are NaN or infinite; the backbone's weights have "
            "diverged, go back to an earlier checkpoint or lower optim.lr"
        )
    return features


def _blocks(features: Features, *, wide: bool = True) -> list[Features]:
    """Chunks of rows, as float64 copies if `wide`."""
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
    """(N, D) minus its mean, in double precision; exactly 0 if only rounding errors are left."""
    wide = _checked(features).astype(np.float64)
    centered = wide - wide.mean(axis=0)
    varies = np.linalg.norm(centered) > 1e-10 * np.linalg.norm(wide)
    return centered if varies else np.zeros_like(centered)


def _distinct(features: Features) -> Features:
    """The rows of `features` in order, the first of equal ones only."""
    # digests, since np.unique would sort N rows of D numbers; adding 0.0 turns -0.0 into 0.0
    digests = [hashlib.blake2b((row + 0.0).tobytes(), digest_size=16).digest() for row in features]
    return features[sorted({digest: row for row, digest in reversed(list(enumerate(digests)))}.values())]


def _two_nearest(points: Features) -> Array:
    """Distances of each row to the two nearest other rows, ascending, (N, 2)."""
    import faiss  # here, as in cluster_learnability

    # candidates in single precision
    wide = points.astype(np.float64)
    wide -= wide.mean(axis=0)  # float32 resolves smaller differences near 0
    wide /= np.abs(wide).max()
    narrow = np.ascontiguousarray(wide, dtype=np.float32)
    index = faiss.IndexFlatL2(narrow.shape[1])
    with faiss_threads():
        index.add(narrow)
        _, found = index.search(narrow, min(len(narrow), _CANDIDATES + 1))
    # the two nearest of them in double precision
    nearest = np.empty((len(wide), 2))
    step = _ROWS // 8
    for start in range(0, len(wide), step):
        rows = np.arange(start, min(start + step, len(wide)))
        distances = np.linalg.norm(wide[found[rows]] - wide[rows, None], axis=2)
        distances[found[rows] == rows[:, None]] = np.inf  # the row itself
        nearest[rows] = np.partition(distances, 1, axis=1)[:, :2]
    return nearest
