"""Near duplicates: test images that are in the training split too, and images that it holds more than once.

Test images with a copy in the training split make every accuracy too good: 3 % of CIFAR-10's test images, 10 % of
CIFAR-100's (Barz and Denzler 2020, 1902.00423).

No fixed cosine tells copies from neighbors: in the features of one network all images have cosines above .99, in
those of another copies have .9. So features are centered on the training mean first, and a pair is close only beside
its surroundings: a near duplicate is nearer than t times the distance r of the 10th nearest training image. Where
images lie evenly around the query, in m dimensions, each of the 9 within r is nearer than t r with chance t^m, so
the nearest is with chance 1 - (1 - t^m)^9; t is set to make that `chance`. The dimension m follows from the same
distances: the middle one of 9, the 5th, has half of them inside, so (r5 / r10)^m = 1/2 in the median (the estimator of
Farahmand, Szepesvari and Audibert, ICML 2007), which up to four copies of an image do not disturb.

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

_NEIGHBOURS = 10
_LOOSEST = 0.7
"""Largest t: pairs at nearly the distance of ordinary neighbors are none, whatever the dimension."""
_SAME = 1e-4
"""Distance of unit vectors up to which they count as equal: what rounding makes of one image in two batches."""
_COLLAPSED = 1e-5
"""Largest deviation, as part of the mean, of features that are the same for all images."""
_PIXELS = 112
_GAP = 2
_WHITE = 255


_MEASURES = {
    "share": Measure("test images with a near duplicate in training", "percent", None),
    "pairs": Measure("near duplicates between test and training", "number", None),
    "exact": Measure("of these between test and training, equal pixel by pixel", "number", None),
    "train_share": Measure("training images with a near duplicate in training", "percent", None),
    "train_pairs": Measure("near duplicates within training", "number", None),
    "train_exact": Measure("of these within training, equal pixel by pixel", "number", None),
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

    Yields ``share`` of the test images with a near duplicate in training, ``pairs`` (of test and training image),
    ``train_share`` of the training images (of those looked up, see `queries`) with one among the others,
    ``train_pairs``, and the distance ``ratio`` t below which a pair counts. With the sources also ``exact`` and
    ``train_exact``, the pairs that are equal pixel by pixel, and an image ``closest``: above test images, below the
    training image nearest to each, closest pair first, whether they count as duplicates or not. At most the nearest
    ten of an image are looked at. Features that are equal count at any distance; features that are the same for all
    images tell nothing, and a ``note`` says so.
    """

    name: ClassVar = "duplicates"
    title: ClassVar = "Near duplicates"
    needs: ClassVar = "images"
    captions: ClassVar = {"closest": "above: test images; below: the nearest training image of each"}
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
            yield "note", "the features of nearly all images are the same, so duplicates cannot be told"
            return
        leaks = find_pairs(train, test, self.config.chance)
        if leaks.ratio == 0:
            yield "note", f"{len(train)} training images are too few to judge nearness; only equal features count"
        yield "share", _MEASURES["share"].of(leaks.found.any(axis=1).mean().item())
        yield "pairs", _MEASURES["pairs"].of(int(leaks.found.sum()))
        yield "ratio", leaks.ratio
        drawn = np.arange(len(train))
        if self.config.queries < len(train):
            lot = np.random.default_rng(derive(dataset.seed, "duplicates")).permutation(len(train))
            drawn = np.sort(lot[: self.config.queries])
        inside = find_pairs(train, train[drawn], self.config.chance, own=drawn)
        yield "train_share", _MEASURES["train_share"].of(inside.found.any(axis=1).mean().item())
        yield "train_pairs", _MEASURES["train_pairs"].of(len(_unordered(drawn, inside)))
        if sources is not None:
            marks = [_Marks(source, split) for source, split in zip(sources, (data.train, data.test), strict=True)]
            yield from self._seen(marks[0], marks[1], leaks, _unordered(drawn, inside))

    def _seen(
        self, train: _Marks, test: _Marks, leaks: DuplicatePairs, inside: list[tuple[int, int]]
    ) -> Iterator[tuple[str, Value]]:
        """What the images themselves add."""
        queries, positions = np.nonzero(leaks.found)
        pairs = zip(queries.tolist(), leaks.rows[queries, positions].tolist(), strict=True)
        yield "exact", _MEASURES["exact"].of(sum(test.of(query) == train.of(row) for query, row in pairs))
        yield "train_exact", _MEASURES["train_exact"].of(sum(train.of(one) == train.of(two) for one, two in inside))
        closest = leaks.closest().tolist()
        partner = leaks.rows[:, 0].tolist()
        for row in [row for row in closest if leaks.found[row, 0]][:1]:
            count = int(leaks.found.any(axis=1).sum())
            names = f"{test.name(row)} and {train.name(partner[row])}"
            yield "note", f"{count} test images have a near duplicate in training; the closest are {names}"
        shown = closest[: self.config.shown]
        yield (
            "closest",
            side_by_side([test.image(row) for row in shown], [train.image(partner[row]) for row in shown]),
        )


@dataclass(frozen=True)
class DuplicatePairs:
    """The nearest base rows of each query, and which of them are near duplicates."""

    rows: IntArray
    """int64 (N, k) rows of the base, nearest first."""
    distances: npt.NDArray[np.float64]
    """float64 (N, k) Euclidean between unit vectors, 0..2, ascending."""
    found: npt.NDArray[np.bool_]
    """(N, k): pairs that are near duplicates."""
    ratio: float
    """A pair counts below this part of the distance of the last neighbor; 0: only equal features count."""

    def closest(self) -> IntArray:
        """All queries, int64 (N,): that of the closest pair, beside its surroundings, first."""
        scale = np.maximum(self.distances[:, -1], _SAME)
        order: IntArray = np.lexsort((self.distances[:, 0], self.distances[:, 0] / scale))
        return order


def find_pairs(base: FloatArray, queries: FloatArray, chance: float, *, own: IntArray | None = None) -> DuplicatePairs:
    """Near duplicates of centered `queries` (N, D) among centered `base` (M, D).

    `own` int64 (N,): the row of `base` that each query itself is, and that it is not paired with.
    """
    wanted = min(_NEIGHBOURS + (own is not None), len(base))
    base, queries = normalized(base), normalized(queries)
    rows, _ = nearest_neighbors(base, queries, wanted)
    distances = np.stack([_distances(queries, base, column) for column in rows.T], axis=1)
    if own is not None:
        distances[rows == own[:, None]] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, : wanted - (own is not None)]
    rows, distances = np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)
    ratio = threshold(distances, chance) if distances.shape[1] == _NEIGHBOURS else 0.0
    found = (distances <= _SAME) | (distances < ratio * distances[:, -1:])
    return DuplicatePairs(rows, distances, found, ratio)


def threshold(distances: npt.NDArray[np.float64], chance: float) -> float:
    """The t of the module's text for ascending distances (N, 10) of queries; 0 where they have no scale."""
    inside = _NEIGHBOURS - 1
    middle, last = distances[:, inside // 2], distances[:, -1]
    apart = middle > _SAME
    if not apart.any():
        return 0.0
    halving = float(np.median(np.log(last[apart] / middle[apart])))
    if halving <= 0:
        return _LOOSEST
    dimension = math.log(2) / halving
    return min(_LOOSEST, math.pow(-math.expm1(math.log1p(-chance) / inside), 1 / dimension))


def side_by_side(above: list[Tensor], below: list[Tensor]) -> Tensor:
    """Images uint8 (3, H, W) of any size as two rows of thumbnails on white, uint8 (3, h, w)."""
    small = [[shrunk(image, _PIXELS) for image in row] for row in (above, below)]
    height, width = (max(image.shape[axis] for row in small for image in row) for axis in (1, 2))
    canvas = torch.full((3, 2 * height + _GAP, len(above) * (width + _GAP) - _GAP), _WHITE, dtype=torch.uint8)
    for line, row in enumerate(small):
        for column, image in enumerate(row):
            top, left = line * (height + _GAP), column * (width + _GAP)
            canvas[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


class _Marks:
    """Images behind the rows of a split, and a digest of each that is asked for."""

    def __init__(self, source: ImageSource, split: FeatureSplit) -> None:
        self.source, self.indices = source, split.indices
        self._known: dict[int, bytes] = {}

    def _index(self, row: int) -> int:
        return row if self.indices is None else int(self.indices[row])

    def image(self, row: int) -> Tensor:
        return self.source.read(self._index(row))

    def name(self, row: int) -> str:
        return self.source.describe(self._index(row))

    def of(self, row: int) -> bytes:
        if row not in self._known:
            image = self.image(row)
            digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
            digest.update(image.contiguous().numpy().tobytes())
            self._known[row] = digest.digest()
        return self._known[row]


def _distances(queries: FloatArray, base: FloatArray, rows: IntArray) -> npt.NDArray[np.float64]:
    """Of each query to its row of `base`, float64 (N,), a chunk at a time; exact near zero, unlike 2 - 2 cosine."""
    chunks = np.array_split(np.arange(len(queries)), max(1, len(queries) // 4096))
    return np.concatenate(
        [np.linalg.norm(queries[part].astype(np.float64) - base[rows[part]], axis=1) for part in chunks]
    )


def _unordered(drawn: IntArray, pairs: DuplicatePairs) -> list[tuple[int, int]]:
    """Pairs of training rows, each once, sorted."""
    queries, positions = np.nonzero(pairs.found)
    both = np.stack([drawn[queries], pairs.rows[queries, positions]], axis=1)
    return [(one, two) for one, two in np.unique(np.sort(both, axis=1), axis=0).tolist()]
