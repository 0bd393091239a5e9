"""The kit names the rule that an evaluator breaks, what was seen, and how to mend it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ConfigDict

from unlabeled.eval.base import Evaluator, EvaluatorConfig, Measure, Value, check_features
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.testing import ContractError, check_evaluator, check_source, check_task

WIDTH = Measure("mean width", "number", None)


class Sound(Evaluator):
    """Breaks no rule."""

    name: ClassVar = "sound"
    title: ClassVar = "Sound"

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        check_features(dataset.features)
        yield "width", WIDTH.of(dataset.features.train.features.shape[1])
        yield from self.more(dataset)

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "note", "nothing else"


class BareConfig(EvaluatorConfig):
    """With a field that nobody explains."""

    strength: int = 3


class OpenConfig(EvaluatorConfig):
    """Takes anything."""

    model_config = ConfigDict(extra="allow")


class Bare(Sound):
    """Has settings without a word."""

    Config: ClassVar = BareConfig


class Open(Sound):
    """Takes every setting."""

    Config: ClassVar = OpenConfig


class Nameless(Sound):
    """Has no title."""

    title: ClassVar = ""


class Twice(Sound):
    """Yields a key twice."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "width", 3


class Slash(Sound):
    """Yields what looks like a metric of another."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "knn/k20", 3


class Infinite(Sound):
    """Has no value."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "ratio", Measure("ratio", "number").of(math.inf)


class Percent(Sound):
    """Counts an accuracy in percent."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "top1", Measure("accuracy").of(71.2)


class Untyped(Sound):
    """Yields a list."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Any]]:
        yield "values", [1, 2]


class Floats(Sound):
    """Draws an image of floats."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "map", torch.zeros(3, 8, 8)


class Captionless(Sound):
    """Draws an image and does not say of what."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "map", torch.zeros(3, 8, 8, dtype=torch.uint8)


class SameLabel(Sound):
    """Has two values that a table cannot tell apart."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "height", WIDTH.of(3)


class Drawn(Sound):
    """Draws from the global generator."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "chance", Measure("chance", "number").of(random.random())


class InPlace(Sound):
    """Centers the features that all evaluators share."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        dataset.features.train.features[:] -= 1
        yield "moved", 1


class Images(Sound):
    """Looks at images and does not say so."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "count", len(dataset.require_sources()[0])


class Careless(Sound):
    """Does not look at what it is given."""

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        largest = int(np.bincount(dataset.features.train.labels).argmax())
        yield "largest", Measure("largest class", "number", None).of(largest)


class Nan(Sound):
    """Hands NaN on."""

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        yield "mean", Measure("mean", "number", None).of(float(dataset.features.train.features.mean()))


class Lucky(Sound):
    """Yields what not every network has."""

    def more(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        if dataset.features.train.features.mean() > self.threshold(dataset):
            yield "luck", Measure("luck", "number").of(1)

    def threshold(self, dataset: EncodedDataset) -> float:
        known.append(float(dataset.features.train.features.mean()))
        return known[0] - 1e-9 if known[-1] == known[0] else math.inf


known: list[float] = []


def test_a_sound_one_passes() -> None:
    check_evaluator(Sound)
    check_evaluator("few_shot", settings={"episodes": 5, "ways": 2})


class Picky(Sound):
    """Refuses its settings."""

    def __init__(self, config: EvaluatorConfig) -> None:
        raise ConfigError("evaluate.picky.width: 0 is not possible; give 1")


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (Bare, r"Bare breaks 'class and settings are documented': no docstring under strength"),
        (Nameless, r"title is not given; write title = "),
        (Open, r"'settings go through json': an unknown setting is accepted silently"),
        (Twice, r"'values have the types of the contract': the key 'width' comes twice"),
        (Slash, r"a key is 'knn/k20'; choose a word without a slash"),
        (Infinite, r"ratio is inf; yield a note instead of a value that is not defined"),
        (Percent, r"top1 is 71\.2; an accuracy is a fraction of 1"),
        (Untyped, r"values is a list; see unlabeled\.eval\.base\.Value"),
        (Floats, r"map is a tensor torch\.float32 \(3, 8, 8\); images are uint8"),
        (Captionless, r"'measures say what values are': the image 'map' has no caption"),
        (SameLabel, r"height and width are both 'mean width'"),
        (Drawn, r"'the same seed gives the same values': .* different chance; draw from your own generator"),
        (InPlace, r"'what was encoded stays as it was': features or labels were changed in place"),
        (Images, r"'needs are true': features alone: evaluate: this evaluator needs images"),
        (Careless, r"'what cannot be judged is said': no labels ends in ValueError: .* raise DataError in one line"),
        (Nan, r"'what cannot be judged is said': NaN among the features makes mean nan; raise DataError"),
        (Lucky, r"'other weights are measured too': random weights give no luck"),
    ],
)
def test_a_broken_rule_is_named(evaluator: type[Evaluator], message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        check_evaluator(evaluator)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_are_said() -> None:
    with pytest.raises(ContractError, match=r"knn: settings: kk: there is no such setting; did you mean 'k'\?"):
        check_evaluator("knn", settings={"kk": 3})
    with pytest.raises(ContractError, match=r"^Picky: settings: evaluate.picky.width: 0 is not possible; give 1$"):
        check_evaluator(Picky)


@pytest.mark.parametrize("check", [check_evaluator, check_source, check_task])
def test_what_is_no_class_with_settings_is_said(check: Callable[[Any], None]) -> None:
    with pytest.raises(
        ContractError, match=r"^JSONDecoder is not a class with a Config; give the class of an? \w+, or its"
    ):
        check(json.JSONDecoder)
    with pytest.raises(ContractError, match=r"^3 is not a class with a Config"):
        check(3)
