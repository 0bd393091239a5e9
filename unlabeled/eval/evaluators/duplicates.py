"""Near duplicates: test images that also occur in the training split, and duplicates within the training split.

Test images with a copy in the training split inflate every accuracy: 3 % of CIFAR-10's test images have one, and 10 %
of CIFAR-100's (Barz and Denzler 2020, 1902.00423).

No fixed cosine separates copies from ordinary neighbors: with one backbone all images have cosines above .99, with
another copies have .9. So features are first centered on the training mean, and distances are compared with their
surroundings: a near duplicate is nearer than t times the distance r of the 10th nearest training image. If images are
spread evenly around the query in m dimensions, each of the 9 images within r is nearer than t r with probability t^m,
so the nearest one is with probability 1 - (1 - t^m)^9; t is set so that this is `chance`. The dimension m follows from
the same distances: half of the 9 lie within the 5th, so the median of (r5 / r10)^m is 1/2 (estimator of Farahmand,
Szepesvari and Audibert, ICML 2007). Up to four copies of an image do not disturb it.

Shapes: N queries, k neighbors, D features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from unlabeled.eval.base import (
    Evaluator,
    EvaluatorConfig,
    FeatureSplit,
    FloatArray,
    IntArray,
    Measure,
    Value,
    check_features,
)
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import nearest_neighbors
from unlabeled.eval.gallery import shrunk
from unlabeled.eval.neighbors.search import normalized
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import ImageSource

_NEIGHBORS = 10
_LOOSEST = 0.7
"""Largest t: in any dimension, pairs almost as far apart as ordinary neighbors are not duplicates."""
_SAME = 1e-4
"""Unit vectors up to this distance count as equal: one image encoded in two batches differs by rounding."""
_COLLAPSED = 1e-5
"""Features count as the same for all images if they deviate by less than this fraction of the mean."""
_PIXELS = 112
_GAP = 2
_WHITE = 255


_MEASURES = {
    "share": Measure("test images with a near duplicate in training", "percent", None),
    "pairs": Measure("near-duplicate pairs of test and training images", "number", None),
    "exact": Measure("identical pairs of test and training images (all pixels equal)", "number", None),
    "train_share": Measure("training images with a near duplicate in training", "percent", None),
    "train_pairs": Measure("near-duplicate pairs of training images", "number", None),
    "train_exact": Measure("identical pairs of training images (all pixels equal)", "number", None),
}


class DuplicatesConfig(EvaluatorConfig):
    """Finds test images that also occur in the training split, exactly or nearly."""

    chance: float = Field(1e-3, gt=0, lt=1)
    """Expected fraction of unrelated images that are mistaken for near duplicates; it sets the threshold. [fraction]"""
    queries: int = Field(10_000, ge=1)
    """Use at most this many training images, drawn at random, to look for duplicates within the training split.
    [images]"""
    shown: int = Field(8, ge=1)
    """Closest pairs to show in the report. [pairs]"""


class DuplicatesEvaluator(Evaluator):
    """Near duplicates between the test and the training split, and within the training split.

    Yields ``share``, the fraction of test images with a near duplicate in the training split, and ``pairs``, their
    number of pairs; ``train_share`` and ``train_pairs``, the same within the training split (for at most `queries`
    images); and ``ratio``, the t below which a pair counts. If images are available, also ``exact`` and
    ``train_exact``, the pairs with equal pixels, and an image ``closest``: the pairs of smallest relative distance,
    whether they count as duplicates or not, with test images above their nearest training images. Only the ten nearest
    neighbors of an image are considered. Equal features always count. If the features of all images are the same, it
    yields only a ``note``.
    """

    name: ClassVar = "duplicates"
    title: ClassVar = "Near duplicates"
    needs: ClassVar = "images"
    captions: ClassVar = {"closest": "top: test images; bottom: the nearest training image of each"}
    Config: ClassVar = DuplicatesConfig

    def __init__(self, config: DuplicatesConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data, sources = dataset.features, dataset.sources
        check_features(data)
        center = data.train.features.mean(axis=0, dtype=np.float64).astype(np.float32)
        train, test = data.train.features - center, data.test.features - center
        if np.median(np.abs(train).max(axis=1)) <= _COLLAPSED * np.abs(center).max():
            yield "note", "nearly all images have the same features, so duplicates cannot be detected"
            return
        # test images in the training split
        leaks = find_pairs(train, test, self.config.chance)
        if leaks.ratio == 0:
            yield "note", f"{len(train)} training images are too few to compare distances; only equal features count"
        yield "share", _MEASURES["share"].of(leaks.found.any(axis=1).mean().item())
        yield "pairs", _MEASURES["pairs"].of(int(leaks.found.sum()))
        yield "ratio", leaks.ratio
        # duplicates within the training split
        drawn = np.arange(len(train))
        if self.config.queries < len(train):
            order = np.random.default_rng(derive(dataset.seed, "duplicates")).permutation(len(train))
            drawn = np.sort(order[: self.config.queries])
        inside = find_pairs(train, train[drawn], self.config.chance, own=drawn)
        yield "train_share", _MEASURES["train_share"].of(inside.found.any(axis=1).mean().item())
        yield "train_pairs", _MEASURES["train_pairs"].of(len(_unordered(drawn, inside)))
        if sources is not None:
            images = [_Images(source, split) for source, split in zip(sources, (data.train, data.test), strict=True)]
            yield from self._from_images(images[0], images[1], leaks, _unordered(drawn, inside))

    def _from_images(
        self, train: _Images, test: _Images, leaks: DuplicatePairs, inside: list[tuple[int, int]]
    ) -> Iterator[tuple[str, Value]]:
        """The values that need the images: identical pairs, a note with names, and the closest pairs to see."""
        queries, columns = np.nonzero(leaks.found)
        pairs = zip(queries.tolist(), leaks.rows[queries, columns].tolist(), strict=True)
        yield "exact", _MEASURES["exact"].of(sum(test.digest(query) == train.digest(row) for query, row in pairs))
        identical = sum(train.digest(one) == train.digest(two) for one, two in inside)
        yield "train_exact", _MEASURES["train_exact"].of(identical)
        closest = leaks.closest().tolist()
        partner = leaks.rows[:, 0].tolist()
        for row in [row for row in closest if leaks.found[row, 0]][:1]:
            count = int(leaks.found.any(axis=1).sum())
            names = f"{test.name(row)} and {train.name(partner[row])}"
            yield "note", f"{count} test images have a near duplicate in training; the closest pair is {names}"
        shown = closest[: self.config.shown]
        yield (
            "closest",
            side_by_side([test.image(row) for row in shown], [train.image(partner[row]) for row in shown]),
        )


@dataclass(frozen=True)
class DuplicatePairs:
    """The nearest neighbors of each query, and which of them are near duplicates."""

    rows: IntArray
    """int64 (N, k): rows of the base, nearest first."""
    distances: npt.NDArray[np.float64]
    """float64 (N, k): Euclidean distances between unit vectors, 0..2, ascending."""
    found: npt.NDArray[np.bool_]
    """(N, k): whether the pair is a near duplicate."""
    ratio: float
    """A pair counts below this fraction of the distance of the last neighbor; 0: only equal features count."""

    def closest(self) -> IntArray:
        """All queries, int64 (N,), sorted by the distance of the nearest neighbor relative to that of the last."""
        scale = np.maximum(self.distances[:, -1], _SAME)
        order: IntArray = np.lexsort((self.distances[:, 0], self.distances[:, 0] / scale))
        return order


def find_pairs(base: FloatArray, queries: FloatArray, chance: float, *, own: IntArray | None = None) -> DuplicatePairs:
    """Near duplicates of centered `queries` (N, D) among centered `base` (M, D).

    `own` int64 (N,): the row of `base` that is the query itself, if queries are a subset of the base; it is excluded.
    """
    wanted = min(_NEIGHBORS + (own is not None), len(base))  # one more, since a query finds itself
    base, queries = normalized(base), normalized(queries)
    rows, _ = nearest_neighbors(base, queries, wanted)
    distances = np.stack([_distances(queries, base, column) for column in rows.T], axis=1)
    if own is not None:
        distances[rows == own[:, None]] = np.inf
    # sort again: these distances are more exact than the search, and the query itself must come last
    order = np.argsort(distances, axis=1, kind="stable")[:, : wanted - (own is not None)]
    rows, distances = np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)
    ratio = threshold(distances, chance) if distances.shape[1] == _NEIGHBORS else 0.0
    found = (distances <= _SAME) | (distances < ratio * distances[:, -1:])
    return DuplicatePairs(rows, distances, found, ratio)


def threshold(distances: npt.NDArray[np.float64], chance: float) -> float:
    """The threshold t of the module's docstring, from ascending distances (N, 10); 0 if all distances are 0."""
    inside = _NEIGHBORS - 1
    middle, last = distances[:, inside // 2], distances[:, -1]
    apart = middle > _SAME  # with five or more copies, the 5th neighbor is one of them and gives no scale
    if not apart.any():
        return 0.0
    halving = float(np.median(np.log(last[apart] / middle[apart])))
    if halving <= 0:  # all neighbors equally far: an infinite dimension
        return _LOOSEST
    dimension = math.log(2) / halving  # (r5 / r10)^m = 1/2
    # t^m = 1 - (1 - chance)^(1/9), without canceling digits for small chances
    return min(_LOOSEST, math.pow(-math.expm1(math.log1p(-chance) / inside), 1 / dimension))


def side_by_side(above: list[Tensor], below: list[Tensor]) -> Tensor:
    """Two rows of thumbnails on white, uint8 (3, h, w), from images uint8 (3, H, W) of any size."""
    small = [[shrunk(image, _PIXELS) for image in row] for row in (above, below)]
    height, width = (max(image.shape[axis] for row in small for image in row) for axis in (1, 2))
    canvas = torch.full((3, 2 * height + _GAP, len(above) * (width + _GAP) - _GAP), _WHITE, dtype=torch.uint8)
    for number, row in enumerate(small):
        for column, image in enumerate(row):
            top, left = number * (height + _GAP), column * (width + _GAP)
            canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


class _Images:
    """The images of a split by row of its features, with digests that are computed on demand and kept."""

    def __init__(self, source: ImageSource, split: FeatureSplit) -> None:
        self.source, self.indices = source, split.indices
        self._digests: dict[int, bytes] = {}

    def _index(self, row: int) -> int:
        return row if self.indices is None else int(self.indices[row])

    def image(self, row: int) -> Tensor:
        return self.source.read(self._index(row))

    def name(self, row: int) -> str:
        return self.source.describe(self._index(row))

    def digest(self, row: int) -> bytes:
        if row not in self._digests:
            image = self.image(row)
            digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
            digest.update(image.contiguous().numpy().tobytes())
            self._digests[row] = digest.digest()
        return self._digests[row]


def _distances(queries: FloatArray, base: FloatArray, rows: IntArray) -> npt.NDArray[np.float64]:
    """Distance of query i to ``base[rows[i]]``, float64 (N,)."""
    # differences, not 2 - 2 cosine, which rounds distances of copies to about 1e-4; in chunks to bound memory
    chunks = np.array_split(np.arange(len(queries)), max(1, len(queries) // 4096))
    return np.concatenate(
        [np.linalg.norm(queries[chunk].astype(np.float64) - base[rows[chunk]], axis=1) for chunk in chunks]
    )


def _unordered(drawn: IntArray, pairs: DuplicatePairs) -> list[tuple[int, int]]:
    """Near-duplicate pairs of training rows, sorted; a pair found from both sides appears once."""
    queries, columns = np.nonzero(pairs.found)
    both = np.stack([drawn[queries], pairs.rows[queries, columns]], axis=1)
    return [(one, two) for one, two in np.unique(np.sort(both, axis=1), axis=0).tolist()]
