"""Few-shot classification: episodes of a few classes with a few labeled images each.

This is the CL2N protocol of SimpleShot (Wang et al. 2019, 1911.04623): features minus the mean of the training split,
scaled to unit length; a query gets the class of the nearest class mean in its episode. Episodes use the classes of the
test split. Training labels are not used, but unlike in few-shot benchmarks, the backbone may have been trained on
images of these classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from unlabeled.eval.base import (
    Estimate,
    Evaluator,
    EvaluatorConfig,
    FloatArray,
    IntArray,
    Measure,
    Point,
    Value,
    check_features,
)
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.neighbors.search import normalized
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive


class FewShotConfig(EvaluatorConfig):
    """Classifies by the nearest class mean in few-shot episodes (SimpleShot, CL2N)."""

    ways: int = Field(5, ge=2)
    """Classes in each episode. [classes]"""
    shots: tuple[int, ...] = (1, 5)
    """Labeled images of each class, one result for each number in the list. [images]"""
    queries: int = Field(15, ge=1)
    """Images of each class to classify. [images]"""
    episodes: int = Field(600, ge=2)
    """Episodes for each number of shots; they give the mean and its confidence interval. [episodes]"""


class FewShotEvaluator(Evaluator):
    """Mean accuracy of n-way k-shot episodes, for each number of shots.

    Yields ``5way_1shot`` and so on: the mean over the episodes, with the usual interval of 1.96 standard deviations /
    sqrt(episodes). The interval covers the draw of episodes from these test images, not the choice of test images
    (Lafargue et al. 2024, 2409.02850). With too few images or classes, first queries and then ways are cut, and a
    ``note`` reports it. Raises DataError if no two classes have enough images.
    """

    name: ClassVar = "few_shot"
    title: ClassVar = "Few-shot classification"
    needs: ClassVar = "features"
    Config: ClassVar = FewShotConfig

    def __init__(self, config: FewShotConfig) -> None:
        if not config.shots or min(config.shots) < 1:
            raise ConfigError(
                f"evaluate.few_shot.shots: {list(config.shots)} is not possible; give integers of at least 1, such as "
                "[1, 5]"
            )
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        found = re.fullmatch(r"(\d+)way_(\d+)shot", key)
        return _episodes(int(found[1]), int(found[2])) if found else None

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        data, config = dataset.features, self.config
        check_features(data)
        center = data.train.features.mean(axis=0, dtype=np.float64)  # of the training split, so episodes share it
        features = normalized((data.test.features - center).astype(np.float32))
        members = [np.flatnonzero(data.test.labels == label) for label in np.unique(data.test.labels)]
        skipped = []
        for shots in dict.fromkeys(config.shots):
            ways, queries = possible(members, config.ways, shots, config.queries)
            if ways < 2:
                skipped.append(shots)
                continue
            if (ways, queries) != (config.ways, config.queries):
                yield (
                    "note",
                    f"{shots}-shot: the test split allows only {ways} ways and {queries} queries per class instead of "
                    f"{config.ways} and {config.queries}",
                )
            seed = derive(dataset.seed, "few_shot", shots)
            found = episodes(features, members, ways, shots, queries, config.episodes, seed)
            half = 1.96 * float(found.std(ddof=1)) / math.sqrt(len(found))
            mean = float(found.mean())
            estimate = Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
            yield f"{ways}way_{shots}shot", _episodes(ways, shots).of(estimate)
        if len(skipped) == len(set(config.shots)):
            raise DataError(
                f"evaluate.few_shot: no two test classes have {min(skipped) + 1} images, one more than the shots; "
                "give more labeled test images"
            )
        if skipped:
            yield "note", f"no two test classes have enough images for {', '.join(map(str, skipped))} shots"


def _episodes(ways: int, shots: int) -> Measure:
    return Measure(f"{ways}-way {shots}-shot", "percent", point=Point(f"{ways}-way", "shot", shots))


def possible(members: list[IntArray], ways: int, shots: int, queries: int) -> tuple[int, int]:
    """The (ways, queries) that are possible, at most those given.

    `members`: the images of each class. Queries are cut before ways; 0 or 1 ways mean that no episode is possible.
    """
    spare = sorted((len(rows) - shots for rows in members if len(rows) > shots), reverse=True)[:ways]
    return len(spare), min([queries, *spare])


def episodes(
    features: FloatArray, members: list[IntArray], ways: int, shots: int, queries: int, count: int, seed: int
) -> npt.NDArray[np.float64]:
    """Accuracy of each of `count` random episodes, float64 (count,).

    `members`: the rows of `features` (N, D) of each class. Classes and images are drawn without replacement.
    """
    eligible = [rows for rows in members if len(rows) >= shots + queries]
    generator = np.random.default_rng(seed)
    truth = np.arange(ways)[:, None]
    accuracy = np.empty(count)
    for episode in range(count):
        drawn = [
            generator.choice(eligible[one], shots + queries, replace=False)
            for one in generator.permutation(len(eligible))[:ways]
        ]
        images = features[np.stack(drawn)].astype(np.float64)  # (ways, shots + queries, D)
        means = images[:, :shots].mean(axis=1)
        # squared distances without |query|^2, which is the same for all classes: (ways, queries, ways)
        distances = (means**2).sum(axis=1) - 2 * images[:, shots:] @ means.T
        accuracy[episode] = (distances.argmin(axis=2) == truth).mean()
    return accuracy
