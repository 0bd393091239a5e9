"""Retrieval: each test image is a query for the other test images of its class, ranked by cosine similarity.

Metrics: average precision over the entire ranking, as in image retrieval; recall@k, as in metric learning (Song et al.
2016, 1511.06452); R-precision and MAP@R (Musgrave et al. 2020, 2003.08505), where R is the number of relevant images.

Shapes: N test images, Q queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import Estimate, Evaluator, EvaluatorConfig, Measure, Point, Value, check_features
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.intervals import wilson
from unlabeled.eval.neighbors.search import normalized
from unlabeled.eval.notes import cut_k
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive

_CELLS = 2**22
"""(query, image) pairs ranked at a time, about 100 MB: memory grows with N, not with N^2."""


_RANKINGS = {
    "map": Measure("mAP", "percent"),
    "map_at_r": Measure("MAP@R", "percent"),
    "r_precision": Measure("R-precision", "percent"),
}


class RetrievalConfig(EvaluatorConfig):
    """Ranks the other test images for each test image and checks whether those of its class come first."""

    k: tuple[int, ...] = (1, 5, 10)
    """Numbers of neighbors for recall@k, one result for each. [neighbors]"""


class RetrievalEvaluator(Evaluator):
    """How well the other test images of the same class are ranked before those of other classes.

    Images that are the only one of their class are not queries (a ``note`` reports their number), but remain among the
    ranked images. Images of equal similarity are ranked at random, so uninformative features score at chance level.

    Yields ``map`` (mean average precision over all ranks), ``map_at_r``, ``r_precision`` and, for each k of the
    settings, ``recall1`` and so on: the fraction of queries with an image of their class among the first k, with
    Wilson's interval for the number of queries. Raises DataError if no class has two images, or if there is one class.
    """

    name: ClassVar = "retrieval"
    title: ClassVar = "Retrieval"
    needs: ClassVar = "features"
    Config: ClassVar = RetrievalConfig

    def __init__(self, config: RetrievalConfig) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(
                f"evaluate.retrieval.k: {list(config.k)} is not possible; give integers of at least 1, such as [1, 5]"
            )
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        k = key.removeprefix("recall")
        return _recall(int(k)) if k != key and k.isdigit() else _RANKINGS.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data = dataset.features
        check_features(data)
        counts = np.bincount(data.test.labels)
        alone, total = int((counts == 1).sum()), len(data.test)
        if alone == total or counts.max() == total:
            reason = "no test class has two images" if alone == total else "all test images are of one class"
            raise DataError(f"evaluate.retrieval: {reason}; give test data of several classes with several images each")
        if alone:
            yield "note", f"{alone} test images are the only one of their class and were not used as queries"
        wanted = list(dict.fromkeys(min(k, total - 1) for k in self.config.k))
        if (note := cut_k(self.config.k, total - 1, "other test images")) is not None:
            yield "note", note
        # a stable sort ranks equal similarities by row, which the shuffle makes random
        order = np.random.default_rng(derive(dataset.seed, "retrieval")).permutation(total)
        features = torch.from_numpy(normalized(data.test.features[order])).to(dataset.device)
        labels = torch.from_numpy(data.test.labels[order]).to(dataset.device)
        found = retrieval_scores(features, labels, wanted)
        for key, measure in _RANKINGS.items():
            yield key, measure.of(float(found[key].mean()))
        for k in wanted:
            recall = float(found[f"recall{k}"].mean())
            yield f"recall{k}", _recall(k).of(Estimate(recall, *wilson(recall, total - alone)))


def _recall(k: int) -> Measure:
    return Measure(f"recall@{k}", point=Point("recall", "k", k))


def retrieval_scores(features: Tensor, labels: Tensor, ks: list[int], *, cells: int = _CELLS) -> dict[str, Tensor]:
    """Scores of every query, each ranked against all other images: name → float64 (queries,), on the CPU.

    `features` float32 (N, D) of unit length, `labels` int64 (N,), every k below N. Queries are the images whose class
    has others. Names: ``map``, ``map_at_r``, ``r_precision``, and ``recall{k}`` (1 if one of the first k images is of
    the class, else 0). `cells`: (query, image) pairs ranked at a time.
    """
    total = len(labels)
    queries = torch.nonzero(torch.bincount(labels)[labels] > 1).flatten()
    chunks: dict[str, list[Tensor]] = {}
    ranks = torch.arange(1, total, device=labels.device)
    for rows in torch.split(queries, max(1, cells // total)):
        similarities = features[rows] @ features.T  # (Q, N)
        # rank all images; the query itself is last and dropped
        similarities.scatter_(1, rows[:, None], -torch.inf)
        order = similarities.argsort(dim=1, descending=True, stable=True)[:, :-1]
        relevant = labels[order] == labels[rows, None]
        found = relevant.cumsum(dim=1)  # (Q, N - 1): relevant images up to each rank
        total_relevant = found[:, -1:]  # R
        precision = torch.where(relevant, found / ranks, 0.0)  # at the rank of each relevant image
        first = ranks <= total_relevant
        scores = {"map": precision.sum(dim=1, keepdim=True), "map_at_r": (precision * first).sum(dim=1, keepdim=True)}
        scores["r_precision"] = (relevant & first).sum(dim=1, keepdim=True)
        values = {name: (score / total_relevant)[:, 0] for name, score in scores.items()}
        values |= {f"recall{k}": found[:, k - 1] > 0 for k in ks}
        for name, value in values.items():
            chunks.setdefault(name, []).append(value.cpu().double())
    return {name: torch.cat(values) for name, values in chunks.items()}
