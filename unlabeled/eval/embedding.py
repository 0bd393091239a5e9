"""Features of test images as points in a plane: a view of their neighborhoods, not a measurement."""

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
"""With fewer images, t-SNE and UMAP have too few neighborhoods to work with."""
_COMPONENTS = 50
"""Principal components passed to t-SNE and UMAP, as is common practice."""


@dataclass(frozen=True)
class Embedding:
    """Two-dimensional points of a sample of test images, and how to read them."""

    points: FloatArray
    """float32 (n, 2)."""
    labels: IntArray
    """int64 (n,)."""
    method: str
    """The method and its settings, as a sentence."""
    caution: str
    """One sentence on how to read the points."""


def check_method(method: str | None) -> None:
    """Raises ConfigError for an unknown method, and for umap if umap-learn is not installed."""
    if method is not None and method not in METHODS:
        raise ConfigError(f"evaluate.embedding: {method!r} is not an embedding method; {nearest(method, METHODS)}")
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError("evaluate.embedding: umap needs umap-learn; pip install 'unlabeled[umap]', or use tsne")


def embed(split: FeatureSplit, method: str, *, images: int = 1000, seed: int = 0) -> Embedding:
    """Projects a random sample of at most `images` of `split` into two dimensions; `seed` fixes the result.

    Features are L2-normalized, as for kNN, and reduced to 50 principal components. `method` is ``tsne`` (van der Maaten
    and Hinton 2008; scikit-learn, initialized with the first two components), ``umap`` (McInnes et al. 2018,
    1802.03426; umap-learn) or ``pca``. With fewer than 50 images, or equal features for all images, it is always the
    first two components. Raises DataError for features that are not finite.
    """
    if not np.isfinite(split.features).all():
        raise DataError("evaluate.embedding: features are NaN or infinite; the backbone's weights have diverged")
    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:images])
    components = _principal(normalized(split.features[rows]), _COMPONENTS)
    spread = float(np.ptp(components, axis=0).max(initial=0))
    if len(rows) < _FEWEST or spread == 0:
        method = "pca"
    state = derive("embedding", seed) % 2**32  # scikit-learn and umap-learn accept 32 bits
    sample = f"of {len(rows):,} test images drawn at random, on L2-normalized features, seed {seed}"
    if method == "tsne":
        perplexity = min(30, (len(rows) - 1) // 3)  # scikit-learn requires fewer than the images
        points, text = _tsne(components, perplexity, state), f"t-SNE (perplexity {perplexity}) {sample}"
    elif method == "umap":
        points, text = _umap(components, state), f"UMAP (15 neighbors, minimum distance 0.1) {sample}"
    else:
        points, text = components[:, :2], f"The first two principal components {sample}"
    caution = (
        "Only two of many directions: images far apart here differ, but images that overlap need not be similar."
        if method == "pca"
        else "Only neighborhoods are meaningful: distances between groups, their sizes and their density mean little, "
        "and another seed gives another layout."
    )
    return Embedding(np.ascontiguousarray(points, np.float32), split.labels[rows], text, caution)


def _principal(features: FloatArray, count: int) -> FloatArray:
    """Scores (N, at least 2) of the first `count` principal components, padded with zeros if there are fewer."""
    centered = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, values, right = np.linalg.svd(centered, full_matrices=False)
    # the sign of a component is arbitrary: make the largest loading positive, so that every machine draws the same
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    scores = np.zeros((len(features), max(2, min(count, len(values)))), np.float32)
    scores[:, : len(values)] = (left * values * signs)[:, : scores.shape[1]]
    return scores


def _tsne(components: FloatArray, perplexity: int, state: int) -> FloatArray:
    from sklearn.manifold import TSNE  # slow to import, and most runs do not need it

    # one thread: the order of sums, and so the layout, would depend on the number of cores
    found: FloatArray = TSNE(perplexity=perplexity, init="pca", random_state=state, n_jobs=1).fit_transform(components)
    return found


def _umap(components: FloatArray, state: int) -> FloatArray:
    import umap  # optional dependency

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns that a fixed seed disables its threads
        found: FloatArray = umap.UMAP(n_neighbors=15, min_dist=0.1, random_state=state, n_jobs=1).fit_transform(
            components
        )
    return found
