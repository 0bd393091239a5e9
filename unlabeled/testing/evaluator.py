"""The contract of an evaluator as checks that run anywhere: on a few generated images, in seconds on a CPU.

>>> from unlabeled.testing import check_evaluator
>>> check_evaluator("knn")
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from unlabeled.eval.base import (
    Direction,
    Evaluator,
    EvaluatorConfig,
    FeatureSet,
    FeatureSplit,
    Measure,
    Measured,
    Unit,
    Value,
)
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading, random_twin
from unlabeled.eval.registry import evaluator_class
from unlabeled.eval.runner import encode_dataset
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.core.errors import ConfigError, UnlabeledError
from unlabeled.ssl.data.loader import seeded
from unlabeled.testing.case import ContractError, checked_class, listed, require
from unlabeled.testing.surface import require_documented

_CELL = 8
"""Side of a patch of the backbone, and of the blocks that the images are drawn from, in pixels."""
_TRAIN, _TEST = 42, 24
_PIXELS = 32
_CLASSES = ("red", "green", "blue")

Pairs = list[tuple[str, Value]]


class MadeUpImages:
    """Noise with one rectangle in the color of the class, with its mask and box."""

    classes: Sequence[str] | None = _CLASSES

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        cells = _PIXELS // _CELL
        self._images = torch.randint(0, 90, (count, 3, _PIXELS, _PIXELS), generator=generator, dtype=torch.uint8)
        self._masks = torch.zeros(count, _PIXELS, _PIXELS, dtype=torch.uint8)
        self._boxes = torch.zeros(count, 4)
        for index, label in enumerate(self.labels().tolist()):
            top, left = (_CELL * torch.randint(0, cells - 1, (2,), generator=generator)).tolist()
            high, wide = (_CELL * torch.randint(1, 3, (2,), generator=generator)).tolist()
            self._images[index, label, top : top + high, left : left + wide] += 150
            self._masks[index, top : top + high, left : left + wide] = label + 1
            self._boxes[index] = torch.tensor([left, top, left + wide, top + high]).clamp(max=_PIXELS)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Tensor:
        return self._images[index]

    def labels(self) -> Tensor:
        return torch.arange(len(self)) % len(_CLASSES)

    def mask(self, index: int) -> Tensor:
        return self._masks[index]

    def boxes(self, index: int) -> Tensor:
        return self._boxes[index : index + 1]

    def describe(self, index: int) -> str:
        return f"image {index} of {len(self)}"


@dataclass(frozen=True)
class EvaluatorCase:
    """An evaluator class, its settings, and the data it is checked on."""

    name: str
    cls: type[Evaluator]
    config: EvaluatorConfig
    encoded: EncodedDataset
    """Generated images, encoded by a tiny backbone."""

    @classmethod
    def of(cls, evaluator: str | type[Evaluator], settings: Mapping[str, Any] | None = None) -> EvaluatorCase:
        """Raises ContractError for invalid settings, and ConfigError for a name that is not registered."""
        found = evaluator_class(evaluator) if isinstance(evaluator, str) else checked_class(evaluator, "an evaluator")
        name = evaluator if isinstance(evaluator, str) else found.__name__
        try:
            config = found.Config.model_validate(dict(settings or {}))
            found(config)
        except ValidationError as error:
            raise ContractError(f"{name}: settings: {explain(error, found.Config)}") from None
        except ConfigError as error:
            raise ContractError(f"{name}: settings: {error}") from None
        return cls(name, found, config, made_up(tiny_backbone()))

    def run(self, dataset: EncodedDataset | None = None) -> Pairs:
        """What a new evaluator yields for `dataset`; None: for all generated data."""
        return list(self.cls(self.config).run(self.encoded if dataset is None else dataset))

    def run_or_refuse(self, dataset: EncodedDataset) -> Pairs | str:
        """As `run`, or the one-line reason why `dataset` cannot be evaluated."""
        try:
            return self.run(dataset)
        except UnlabeledError as error:
            lines = str(error).splitlines()
            require(
                len(lines) == 1, f"the error {str(error)!r} is not one line", "name field, value and remedy in one line"
            )
            return str(error)


def tiny_backbone(seed: int = 0) -> Backbone:
    """A transformer for 32 x 32 images with 16 positions and 32 features."""
    with seeded(seed):
        return create_backbone(
            "vit_tiny_patch16_224", size=_PIXELS, patch_size=_CELL, embed_dim=32, depth=2, num_heads=2
        )


def made_up(backbone: Backbone | None) -> EncodedDataset:
    """Generated images of three classes, encoded by `backbone`; None: as raw pixels."""
    sources = MadeUpImages(_TRAIN, 1), MadeUpImages(_TEST, 2)
    dataset = encode_dataset(backbone, sources, Loading(batch_size=32))
    return dataset if backbone is not None else replace(dataset, size_like=tiny_backbone())


def class_and_settings_are_documented(case: EvaluatorCase) -> None:
    """The class sets name, title and needs; it, its settings and every field have a docstring."""
    cls = case.cls
    require(issubclass(cls, Evaluator), f"{cls.__name__} is not an Evaluator", "inherit from unlabeled.Evaluator")
    for member in ("name", "title"):
        text = getattr(cls, member, "")
        require(isinstance(text, str) and bool(text), f"{member} is not given", f'write {member} = "..." in the class')
    require(
        cls.name.isidentifier(),
        f"name is {cls.name!r}",
        "choose letters, digits and _: it is also the name of its settings",
    )
    require(cls.needs in ("features", "images", "backbone"), f"needs is {cls.needs!r}", "see Evaluator.needs")
    own = issubclass(cls.Config, EvaluatorConfig)
    require(own, f"Config is {cls.Config!r}", "inherit it from unlabeled.EvaluatorConfig")
    require_documented(cls, cls.Config, "say what it measures, and which values it yields")


def settings_go_through_json(case: EvaluatorCase) -> None:
    """The settings survive a round trip through a file, and unknown ones are refused."""
    stored = json.loads(json.dumps(case.config.model_dump(mode="json")))
    again = type(case.config).model_validate(stored)
    require(again == case.config, "the settings differ after model_dump(mode='json')", "use plain types")
    try:
        type(case.config).model_validate({"no_such_setting": 1})
    except ValidationError:
        return
    require(False, "an unknown setting is accepted silently", 'keep extra="forbid"')


def values_have_the_types_of_the_contract(case: EvaluatorCase) -> None:
    """Each key is a word and comes once; values have the types of `Value`; numbers for tables are finite."""
    found = case.run()
    keys = [key for key, value in found if not isinstance(value, str)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"the key {twice and twice[0]!r} comes twice", "give each value a key of its own")
    require(bool(keys), "nothing was yielded", "yield at least one value")
    for key, value in found:
        _check_key(key, value)
        _check_value(key, value)


def measures_say_what_values_are(case: EvaluatorCase) -> None:
    """Every value for a table has its own label, a unit and a direction; images have captions."""
    labels: dict[str, str] = {}
    for key, value in case.run():
        if isinstance(value, Measured):
            measure = value.measure
            require(bool(measure.label.strip()), f"{key} has no label", "say what a table calls it")
            require(
                measure.unit in get_args(Unit), f"{key} has unit {measure.unit!r}", f"choose one of {get_args(Unit)}"
            )
            ways = (*get_args(Direction), None)
            require(measure.better in ways, f"{key}: better is {measure.better!r}", f"choose one of {ways}")
            taken = labels.setdefault(measure.text, key) == key
            require(taken, f"{key} and {labels[measure.text]} are both {measure.text!r}", "give each its own label")
            known = case.cls.measure(key)
            same = known is None or known.text == measure.text
            require(same, f"measure({key!r}) says {known and known.text!r}", f"run says {measure.text!r}; say the same")
        elif isinstance(value, Tensor):
            require(key in case.cls.captions, f"the image {key!r} has no caption", "add it to captions")


def the_same_seed_gives_the_same_values(case: EvaluatorCase) -> None:
    """All randomness comes from the seed of the data, none from the global generators of torch, numpy and random."""
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        runs.append(case.run())
    differing = [key for (key, one), (_, two) in zip(*runs, strict=True) if not same(one, two)]
    remedy = "draw from your own generator, seeded with dataset.seed"
    require(not differing, f"the same seed gives a different {listed(differing)}", remedy)


def what_was_encoded_stays_as_it_was(case: EvaluatorCase) -> None:
    """Features, labels and weights are left unchanged, since other evaluators read them too."""
    data = case.encoded.features
    before = [array.copy() for split in (data.train, data.test) for array in (split.features, split.labels)]
    backbone = case.encoded.require_backbone()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    case.run()
    after = [array for split in (data.train, data.test) for array in (split.features, split.labels)]
    kept = all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    require(kept, "features or labels were changed in place", "work on a copy")
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, weights[name])]
    require(not moved, f"{listed(moved)} of the backbone changed", "leave the backbone unchanged")


def needs_are_true(case: EvaluatorCase) -> None:
    """It runs with what `needs` declares; if a backbone or images are missing, it refuses in one line."""
    features = replace(case.encoded, backbone=None, sources=None)
    if case.cls.needs == "features":
        alone = case.run_or_refuse(features)
        values, full = {} if isinstance(alone, str) else dict(alone), dict(case.run())
        require(bool(values), f"features alone: {alone}", 'set needs = "images" or "backbone"')
        others = [key for key, value in values.items() if key not in full or not same(value, full[key])]
        require(
            not others, f"features alone give a different {listed(others)}", "use the pooled features that are given"
        )
        return
    case.run_or_refuse(features)
    case.run_or_refuse(made_up(None))


def what_cannot_be_judged_is_said(case: EvaluatorCase) -> None:
    """A single class, one image, no labels, NaN features: a one-line error, or values that are still finite."""
    for what, dataset in degenerate(case.encoded).items():
        try:
            found = case.run_or_refuse(dataset)
        except ContractError as error:
            raise ContractError(f"{what}: {error}") from None
        except Exception as error:
            remedy = "raise DataError in one line, or yield a note; check_features(dataset.features) does most of it"
            require(False, f"{what} ends in {type(error).__name__}: {error}", remedy)
        for key, value in found if isinstance(found, list) else ():
            measured = value.value if isinstance(value, Measured) else 0.0
            require(
                math.isfinite(measured),
                f"{what} makes {key} {measured}",
                "raise DataError, or yield a note instead",
            )


def other_weights_are_measured_too(case: EvaluatorCase) -> None:
    """A backbone with new random weights, the baseline of every report, gives the same keys."""
    twin = made_up(random_twin(case.encoded.require_backbone(), 5))
    own, other = (
        {key for key, value in found if isinstance(value, Measured)} for found in (case.run(), case.run(twin))
    )
    require(
        own == other, f"random weights give no {listed(sorted(own - other))}", "yield the same keys for every backbone"
    )


EVALUATOR_CHECKS: tuple[Callable[[EvaluatorCase], None], ...] = (
    class_and_settings_are_documented,
    settings_go_through_json,
    values_have_the_types_of_the_contract,
    measures_say_what_values_are,
    the_same_seed_gives_the_same_values,
    what_was_encoded_stays_as_it_was,
    needs_are_true,
    what_cannot_be_judged_is_said,
    other_weights_are_measured_too,
)
"""Every rule of the contract of an evaluator. Later rules assume that earlier ones hold."""


def degenerate(dataset: EncodedDataset) -> dict[str, EncodedDataset]:
    """Description → encoded data that an evaluator may refuse but must not crash on."""
    data = dataset.features

    def of(change: Callable[[FeatureSplit], FeatureSplit], *, test_too: bool = True) -> EncodedDataset:
        test = change(data.test) if test_too else data.test
        return replace(dataset, features=FeatureSet(change(data.train), test, data.classes))

    def first(split: FeatureSplit) -> FeatureSplit:
        indices = np.zeros(1, dtype=np.int64) if split.indices is None else split.indices[:1]
        return FeatureSplit(split.features[:1], split.labels[:1], indices)

    def broken(split: FeatureSplit) -> FeatureSplit:
        features = split.features.copy()
        features[0, 0] = np.nan
        return replace(split, features=features)

    return {
        "a single class": of(lambda split: replace(split, labels=np.zeros_like(split.labels))),
        "test images of one class": replace(
            dataset, features=replace(data, test=replace(data.test, labels=np.zeros_like(data.test.labels)))
        ),
        "one image": of(first),
        "no labels": of(lambda split: replace(split, labels=np.full_like(split.labels, -1))),
        "NaN among the features": of(broken),
        "equal features": of(lambda split: replace(split, features=np.ones_like(split.features))),
    }


def same(one: Value, two: Value) -> bool:
    """Whether two values are bit-equal; NaN equals NaN."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return repr(np.asarray(one).tolist()) == repr(np.asarray(two).tolist())
    return repr(one) == repr(two)  # repr, because NaN != NaN


def _check_key(key: str, value: Value) -> None:
    require(bool(key) and "/" not in key and not key.isspace(), f"a key is {key!r}", "choose a word without a slash")
    cut = value.measure.cut if isinstance(value, Measured) else None
    suffix = key.partition("@")[2]
    require(
        suffix == ("" if cut is None else str(cut)),
        f"the key {key!r} has an @",
        "use Measure(cut=...) for a part of the features",
    )


def _check_value(key: str, value: Value) -> None:
    if isinstance(value, Measured):
        require(isinstance(value.measure, Measure), f"{key} has no Measure", "yield Measure(...).of(value)")
        require(
            math.isfinite(value.value), f"{key} is {value.value}", "yield a note instead of a value that is not defined"
        )
        ends = math.isnan(value.low) and math.isnan(value.high)
        inside = value.low <= value.value <= value.high
        require(ends or inside, f"{key} lies outside {value.low} to {value.high}", "give its own interval, or none")
        fraction = value.measure.unit != "accuracy" or 0 <= value.value <= 1
        require(fraction, f"{key} is {value.value}", 'an accuracy is a fraction of 1; set unit="number" for others')
    elif isinstance(value, str):
        require(
            bool(value.strip()) and "\n" not in value, f"the note {value!r} is not one sentence", "make it one line"
        )
    elif isinstance(value, Tensor):
        shape = tuple(value.shape)
        image = value.dtype == torch.uint8 and value.ndim == 3 and shape[0] == 3
        require(image, f"{key} is a tensor {value.dtype} {shape}", "images are uint8 (3, H, W); else give an array")
    elif isinstance(value, np.ndarray):
        require(value.dtype.kind in "biufU", f"{key} is an array of {value.dtype}", "use numbers or text")
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number, f"{key} is a {type(value).__name__}", "see unlabeled.eval.base.Value for what may be yielded")
