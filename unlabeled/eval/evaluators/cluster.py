"""Clustering: k-means on the test features, compared with the classes.

This is the protocol of deep clustering (Xie et al. 2016, 1511.06335, for the Hungarian accuracy; Hubert and Arabie 1985
for the adjusted Rand index): as many clusters as classes. Labels are used only to score the clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from unlabeled.eval.base import Evaluator, EvaluatorConfig, FloatArray, IntArray, Measure, Value, check_features
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.neighbors.faiss_threads import faiss_threads
from unlabeled.eval.neighbors.search import normalized
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive

_MEASURES = {
    "accuracy": Measure("k-means, Hungarian accuracy"),
    "nmi": Measure("k-means, NMI", "number"),
    "ari": Measure("k-means, ARI", "number"),
}


class ClusterConfig(EvaluatorConfig):
    """Clusters the test features with k-means and compares the clusters with the classes."""

    restarts: int = Field(5, ge=1)
    """Runs from different starting points; the one with the best objective counts. [runs]"""
    iterations: int = Field(50, ge=1)
    """Iterations of each run. [iterations]"""
    spherical: bool = True
    """Scale features and centroids to unit length, so that they are compared by cosine; false: compare them by
    Euclidean distance."""


class ClusterEvaluator(Evaluator):
    """Agreement between k-means clusters of the test images and their classes, with as many clusters as classes.

    Yields ``accuracy`` (each cluster predicts one class, by the one-to-one matching that is best in total), ``nmi``
    (mutual information divided by the mean of both entropies, 0..1), ``ari`` (adjusted Rand index: 0 by chance, 1 at
    best), and ``clusters`` int64 (N,), the class matched to each image's cluster. With fewer distinct features than
    classes, k is cut, and a ``note`` reports it. Raises DataError if all test images are of one class.
    """

    name: ClassVar = "cluster"
    title: ClassVar = "Clusters"
    needs: ClassVar = "features"
    Config: ClassVar = ClusterConfig

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data = dataset.features
        check_features(data)
        truth = data.test.labels
        classes = np.unique(truth)
        if len(classes) < 2:
            raise DataError(
                f"evaluate.cluster: all test images are of class {data.classes[int(classes[0])]!r}, so clusters "
                "cannot be compared with classes; give test data with at least two classes"
            )
        rows = normalized(data.test.features) if self.config.spherical else np.ascontiguousarray(data.test.features)
        distinct = len({row.tobytes() for row in rows})
        k = min(len(classes), distinct)
        if k < len(classes):
            yield (
                "note",
                f"there are only {distinct} distinct test features, fewer than the {len(classes)} classes",
            )
        found = kmeans(
            rows,
            k,
            restarts=self.config.restarts,
            iterations=self.config.iterations,
            spherical=self.config.spherical,
            seed=derive(dataset.seed, "cluster"),
        )
        counts = contingency_matrix(truth, found)  # (classes, clusters with at least one image)
        matched, columns = linear_sum_assignment(counts, maximize=True)  # the Hungarian method
        yield "accuracy", _MEASURES["accuracy"].of(float(counts[matched, columns].sum() / len(truth)))
        yield "nmi", _MEASURES["nmi"].of(float(normalized_mutual_info_score(truth, found)))
        yield "ari", _MEASURES["ari"].of(float(adjusted_rand_score(truth, found)))
        # the columns are the occupied clusters only: k-means may leave some empty
        class_of = np.zeros(k, dtype=np.int64)
        class_of[np.unique(found)[columns]] = classes[matched]
        yield "clusters", class_of[found]


def kmeans(rows: FloatArray, k: int, *, restarts: int, iterations: int, spherical: bool, seed: int) -> IntArray:
    """k-means on `rows` float32 (N, D), N >= k: the cluster of each row, int64 (N,), from the best of `restarts` runs.

    `spherical`: scale centroids to unit length and compare by cosine; `rows` must then have unit length.
    """
    import faiss  # here, since it loads an OpenMP runtime of its own that most runs do not need

    search = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=iterations,
        nredo=restarts,
        spherical=spherical,
        seed=seed % 2**31,  # a C int
        min_points_per_centroid=1,  # below 39, the default, faiss prints a warning
        max_points_per_centroid=len(rows),  # above 256, the default, faiss trains on a sample
    )
    with faiss_threads():
        search.train(rows)
        _, found = search.index.search(rows, 1)
    clusters: IntArray = found[:, 0].astype(np.int64)
    return clusters
