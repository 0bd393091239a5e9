"""Features of test images as points of a plane: an image of their neighborhoods, not a measurement."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np

from unlabeled.eval.base import FeatureSplit, FloatArray, IntArray
from unlabeled.eval.neighbors.search import normalized
from unlabeled.ssl.core.errors import ConfigError, DataError, nearest
from unlabeled.ssl.core.seeds import derive

METHODS = ("tsne", "umap", "pca")

_FEWEST = 50
"""Images below which neighborhoods are too few for t-SNE and UMAP."""
_COMPONENTS = 50
"""Principal components that t-SNE and UMAP receive, as is usual."""


@dataclass(frozen=True)
class Embedding:
    """Points of some test images."""

    points: FloatArray
    """float32 (n, 2)."""
    labels: IntArray
    """int64 (n,)."""
    method: str
    """What made the points, in words, with its settings."""
    caution: str
    """How to read them, one sentence."""


def check_method(method: str | None) -> None:
    """Raises ConfigError for an unknown method, and for one whose library is missing."""
    if method is not None and method not in METHODS:
        raise ConfigError(f"evaluate.embedding: {method!r} is not a map of the features; {nearest(method, METHODS)}")
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError("evaluate.embedding: umap needs umap-learn; pip install 'unlabeled[umap]', or take tsne")


def embed(split: FeatureSplit, method: str, *, images: int = 1000, seed: int = 0) -> Embedding:
    """At most `images` of `split`, drawn by `seed`, in two dimensions.

    Features are L2-normalized, as kNN compares them, and cut to 50 principal components. t-SNE (van der Maaten and
    Hinton 2008; scikit-learn) starts from the first two of them; UMAP (McInnes et al. 2018, 1802.03426; umap-learn).
    Fewer than 50 images, and images that all have the same features, give the first two components. Raises
    DataError for features that are not finite.
    """
    if not np.isfinite(split.features).all():
        raise DataError("evaluate.embedding: features are NaN or infinite; the backbone's weights have diverged")
    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:images])
    components = _principal(normalized(split.features[rows]), _COMPONENTS)
    spread = float(np.ptp(components, axis=0).max(initial=0))
    if len(rows) < _FEWEST or spread == 0:
        method = "pca"
    state = derive("embedding", seed) % 2**32
    words = f"of {len(rows):,} test images drawn at random, on L2-normalized features, seed {seed}"
    if method == "tsne":
        perplexity = min(30, (len(rows) - 1) // 3)
        points, words = _tsne(components, perplexity, state), f"t-SNE (perplexity {perplexity}) {words}"
    elif method == "umap":
        points, words = _umap(components, state), f"UMAP (15 neighbors, smallest distance 0.1) {words}"
    else:
        points, words = components[:, :2], f"The first two principal components {words}"
    caution = (
        "Two directions of many: images apart here are apart, those that lie on each other need not be alike."
        if method == "pca"
        else "Only who is near whom is meant: distances between groups, their sizes and their density say little, and "
        "another seed draws another map."
    )
    return Embedding(np.ascontiguousarray(points, np.float32), split.labels[rows], words, caution)


def _principal(features: FloatArray, count: int) -> FloatArray:
    """Scores of the first `count` components, at least two columns; the largest entry of a direction is positive."""
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    scores = np.zeros((len(features), max(2, min(count, len(values)))), np.float32)
    scores[:, : len(values)] = (left * values * signs)[:, : scores.shape[1]]
    return scores


def _tsne(components: FloatArray, perplexity: int, state: int) -> FloatArray:
    from sklearn.manifold import TSNE  # takes a second to import, which a run without a map is spared

    found: FloatArray = TSNE(perplexity=perplexity, init="pca", random_state=state, n_jobs=1).fit_transform(components)
    return found


def _umap(components: FloatArray, state: int) -> FloatArray:
    import umap  # an extra

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        found: FloatArray = umap.UMAP(n_neighbors=15, min_dist=0.1, random_state=state, n_jobs=1).fit_transform(
            components
        )
    return found
