"""Linear probe: linear classifiers on a frozen network, their settings chosen without the test split.

All heads of a grid are trained in one pass, as in DINOv2's evaluation (Oquab et al. 2023, 2304.07193): they see the
same batches, and those that read the same features share their matrix products.

Shapes: N images, F features of all inputs together, H heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from unlabeled.eval.base import (
    Cut,
    Evaluator,
    EvaluatorConfig,
    FeatureSet,
    FeatureSplit,
    FloatArray,
    IntArray,
    Measure,
    Value,
    check_features,
)
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import best_classes
from unlabeled.eval.probe.batches import Batches, Course, augmented_batches, cached_batches
from unlabeled.eval.probe.heads import GroupedSgd, Setting, hold_out
from unlabeled.eval.probe.inputs import BlockFeatures, Input, block_inputs, pooled_inputs
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive

_LR_BATCH = 256
"""The batch for which the learning rates of the settings are meant."""
_ROWS = 256
"""Rows whose float64 copies fit a CPU's caches."""
_DINOV2 = {
    "lr": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    "weight_decay": (0.0,),
    "blocks": (1, 4),
    "pooling": ("cls", "cls+avg"),
    "init": 0.01,
}
"""The grid of the authors' ``eval/linear.py``; features are standardized here, and the test split does not choose."""


@dataclass(frozen=True)
class Head:
    """One point of the grid."""

    input: Input
    setting: Setting

    @property
    def question(self) -> Input | None:
        """What it is compared within: each prefix is judged apart, all other inputs together."""
        return self.input if self.input.prefix else None


@dataclass(frozen=True)
class Choice:
    """The best head for a question, as the hold-out sees it."""

    head: Head
    accuracy: float


@dataclass(frozen=True)
class _Probed:
    """What a probe works on: standardized features of all inputs (N, F) and what it takes to compute more of them."""

    dataset: EncodedDataset
    config: LinearConfig
    data: FeatureSet
    """With the features of all inputs."""
    outputs: BlockFeatures | None
    mean: FloatArray
    deviation: FloatArray
    features: Tensor
    labels: Tensor

    @property
    def augmented(self) -> bool:
        return self.config.augment and self.dataset.backbone is not None

    def course(self, rows: Tensor) -> Course:
        epochs = self.config.augment_epochs if self.augmented else self.config.epochs
        return Course(rows, min(self.config.batch_size, len(rows)), epochs, self.dataset.seed)

    def batches(self, course: Course) -> Batches:
        if not self.augmented:
            return cached_batches(self.features, self.labels, course)
        mean, deviation = (torch.from_numpy(one).to(self.features.device) for one in (self.mean, self.deviation))
        return augmented_batches(self.dataset, self.outputs, mean, deviation, self.labels, course)


class LinearConfig(EvaluatorConfig):
    """Trains a linear probe on frozen features, with a grid of settings of which a hold-out chooses the best."""

    grid: Literal["dinov2"] | None = None
    """dinov2: use DINOv2's grid of 52 heads (arXiv 2304.07193) in place of lr, weight_decay, blocks, pooling and init:
    13 learning rates, class tokens of the last 1 and 4 blocks, with and without the average of the patches."""
    lr: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates to try, for SGD with momentum on standardized features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    """Weight decays to try, each with each learning rate."""
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of final blocks (for networks of stages: stages) to read features from; each is added to the grid. Empty:
    only the pooled features. [blocks]"""
    pooling: tuple[Literal["cls", "avg", "cls+avg"], ...] = ()
    """What to read from these blocks. cls: their class tokens. avg: the averages of their patches. cls+avg: the class
    tokens and the average of the last block's patches. Empty: cls if the network has a class token, else avg."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also train probes on the first n pooled features, for each n in this list (Matryoshka representations).
    [features]"""
    init: float = Field(0.0, ge=0)
    """Standard deviation of the initial weights."""
    epochs: int = Field(50, ge=1)
    """Passes over the cached features. [epochs]"""
    batch_size: int = Field(256, ge=1)
    """Images per training step. [images]"""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training set that is held out to choose the probe. [fraction]"""
    augment: bool = False
    """Train on random crops and flips, which the network encodes in each epoch, in place of cached features. The
    hold-out and raw pixels are not augmented."""
    augment_epochs: int = Field(10, ge=1)
    """Epochs with `augment`, in place of `epochs`. Each is a pass of the network over the training set, and there are
    two trainings: one to choose and one for the result. [epochs]"""


class LinearEvaluator(Evaluator):
    """Accuracy of a linear classifier on standardized features.

    Every (input, lr, weight decay) of the grid is trained on the training split less a stratified hold-out; the
    hold-out chooses one of them (ties: lower loss), which is then trained anew on the whole training split and meets
    the test split once. Features are standardized with the training split's mean and deviation.

    Yields ``top1``, ``top5`` (more than five classes) and ``holdout_top1`` as fractions, ``lr``, ``weight_decay``,
    ``diverged`` (number of heads with a non-finite weight), ``predictions`` int64 (N,) and ``confusion`` int64 (C, C)
    of true class by predicted class; ``top1@m`` and ``top5@m`` for each of the settings' prefixes, which choose for
    themselves; ``blocks``, the number that the chosen head reads, with a ``note`` that names its input; and a ``note``
    when the chosen lr lies at the edge of the grid.
    """

    name: ClassVar = "linear"
    title: ClassVar = "Linear probe"
    needs: ClassVar = "features"
    Config: ClassVar = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        self.config = _whole(config)
        self.grid = [Setting(lr, decay) for decay in self.config.weight_decay for lr in self.config.lr]

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        check_features(dataset.features)
        probed, inputs = self._probed(dataset)
        heads = [Head(one, setting) for one in inputs for setting in self.grid]
        best, diverged = self._choose(probed, heads)
        finals = self._fit(probed, [one.head for one in best], torch.arange(len(probed.labels)))
        chosen, test = best[0], probed.data.test
        for choice, final in zip(best, finals, strict=True):
            of = choice.head.input
            scores = final.scores(_standardized(of, test.features, probed)).softmax(dim=1)[0].T
            guesses = best_classes(scores.cpu().numpy(), 5)
            cut = Cut(of.stop) if of.prefix else None
            yield from _accuracies(guesses, test.labels, len(probed.data.classes), cut)
            if choice is chosen:
                predictions = guesses[:, 0]
        yield "holdout_top1", chosen.accuracy
        yield "lr", chosen.head.setting.lr
        yield "weight_decay", chosen.head.setting.weight_decay
        yield "diverged", diverged
        yield "predictions", predictions
        yield "confusion", confusion_matrix(test.labels, predictions, len(probed.data.classes))
        yield from self._notes(chosen.head, inputs, dataset)

    def _probed(self, dataset: EncodedDataset) -> tuple[_Probed, list[Input]]:
        """The features of all inputs, and where each lies among them."""
        data, outputs = dataset.features, None
        inputs = pooled_inputs(data.train.features.shape[1], self.config.prefixes)
        if self.config.blocks and dataset.backbone is not None:
            outputs, inputs = block_inputs(
                dataset.backbone, self.config.blocks, self.config.pooling, fall_back=self.config.grid is not None
            )
            named = f"class tokens of {outputs.classes} blocks, averages of {outputs.averages}"
            train, test = (
                _aligned(split, dataset.encode(source, outputs, named=named))
                for split, source in zip((data.train, data.test), dataset.require_sources(), strict=True)
            )
            data = replace(data, train=train, test=test)
            check_features(data)
        mean, deviation = statistics(data.train.features)
        rows = np.subtract(data.train.features, mean)
        rows /= deviation
        features, labels = (torch.from_numpy(one).to(dataset.device) for one in (rows, data.train.labels))
        return _Probed(dataset, self.config, data, outputs, mean, deviation, features, labels), inputs

    def _choose(self, probed: _Probed, heads: list[Head]) -> tuple[list[Choice], int]:
        """The best head among whole inputs, then the best for each prefix; and the number of heads that diverged."""
        kept, held = stratified_split(probed.data.train.labels, self.config.holdout, probed.dataset.seed)
        groups = self._fit(probed, heads, torch.from_numpy(kept))
        rows = torch.from_numpy(held).to(probed.features.device)
        features, labels = probed.features[rows], probed.labels[rows]
        alive: list[Choice] = []
        losses: dict[Head, float] = {}
        for one, group in zip(_by_input(heads), groups, strict=True):
            of_input = [head for head in heads if head.input == one]
            accuracies, loss = hold_out(group, one.of(features), labels)
            losses |= zip(of_input, loss.nan_to_num(nan=math.inf).tolist(), strict=True)
            found = zip(of_input, accuracies.tolist(), group.finite().tolist(), strict=True)
            alive += [Choice(head, accuracy) for head, accuracy, finite in found if finite]
        best = []
        for question in dict.fromkeys(head.question for head in heads):
            living = [choice for choice in alive if choice.head.question == question]
            if not living:
                count = sum(head.question == question for head in heads)
                remedy = f"add smaller values than {min(self.config.lr):g}"
                raise DataError(f"evaluate.linear.lr: all {count} heads diverged; {remedy}")
            best.append(max(living, key=lambda choice: (choice.accuracy, -losses[choice.head])))
        return best, len(heads) - len(alive)

    def _fit(self, probed: _Probed, heads: list[Head], rows: Tensor) -> list[GroupedSgd]:
        """Trains `heads` on `rows` of the training split; one group for each input, in the order of the heads."""
        course = probed.course(rows)
        classes, seed = len(probed.data.classes), probed.dataset.seed
        groups = {
            one: GroupedSgd(
                one.stop - one.start,
                classes,
                [head.setting for head in heads if head.input == one],
                device=probed.features.device,
                lr_scale=course.batch / _LR_BATCH,
                start=_start(one, classes, self.config.init, seed),
            )
            for one in _by_input(heads)
        }
        for step, (features, labels) in enumerate(probed.batches(course)):
            rate = (1 + math.cos(math.pi * step / course.steps)) / 2
            for one, group in groups.items():
                group.step(one.of(features), labels, rate=rate)
        return list(groups.values())

    def _notes(self, chosen: Head, inputs: list[Input], dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        if chosen.input.blocks:
            yield "blocks", chosen.input.blocks
            yield "note", f"the chosen head reads the {chosen.input.title} ({len(inputs)} inputs were tried)"
        if self.config.augment and dataset.backbone is not None:
            yield "note", f"trained on random crops and flips of the images for {self.config.augment_epochs} epochs"
        elif self.config.augment:
            yield "note", "trained on cached features, since there is no network to encode augmented images"
        lr, rates = chosen.setting.lr, self.config.lr
        if len(set(rates)) > 2 and lr in (min(rates), max(rates)):
            yield "note", f"the chosen lr {lr:g} is at the edge of the grid; evaluate.linear.lr may be too narrow"


def _whole(config: LinearConfig) -> LinearConfig:
    """With the grid of its name. Raises ConfigError for grids that are not possible."""
    for field, values, least in (("lr", config.lr, math.ulp(0.0)), ("weight_decay", config.weight_decay, 0.0)):
        if not values or not all(math.isfinite(value) and value >= least for value in values):
            rule = "positive numbers" if field == "lr" else "numbers from 0"
            raise ConfigError(f"evaluate.linear.{field}: {list(values)} is not possible; give {rule}")
    if config.grid is not None:
        usual = LinearConfig()
        for field in _DINOV2:
            if getattr(config, field) != getattr(usual, field):
                raise ConfigError(f"evaluate.linear.{field}: grid={config.grid} has its own; leave one of both away")
        config = config.model_copy(update=_DINOV2)
    elif config.pooling and not config.blocks:
        raise ConfigError("evaluate.linear.pooling: says what is read of blocks; give evaluate.linear.blocks too")
    if config.prefixes and config.blocks:
        raise ConfigError("evaluate.linear.prefixes: are those of the pooled features; leave blocks and grid away")
    return config


def _by_input(heads: Sequence[Head]) -> list[Input]:
    return list(dict.fromkeys(head.input for head in heads))


def _start(of: Input, classes: int, deviation: float, seed: int) -> Tensor | None:
    """First weights (C, D) of all heads on an input, so that they differ in what the grid says alone."""
    if not deviation:
        return None
    generator = torch.Generator().manual_seed(derive("linear probe", seed, of.title))
    return torch.randn(classes, of.stop - of.start, generator=generator) * deviation


def _standardized(of: Input, features: FloatArray, probed: _Probed) -> Tensor:
    columns = slice(of.start, of.stop)
    rows = (features[:, columns] - probed.mean[columns]) / probed.deviation[columns]
    return torch.from_numpy(rows).to(probed.features.device)


def _aligned(split: FeatureSplit, encoded: FeatureSplit) -> FeatureSplit:
    """`split` with the features that `encoded` has of the same images."""
    numbers = np.arange(len(split)) if split.indices is None else split.indices
    have = np.arange(len(encoded)) if encoded.indices is None else encoded.indices
    return replace(split, features=encoded.features[np.searchsorted(have, numbers)])


_MEASURES = {"top1": Measure("linear probe"), "top5": Measure("linear probe, top 5", guesses=5)}


def _accuracies(guesses: IntArray, labels: IntArray, classes: int, cut: Cut | None) -> Iterator[tuple[str, Value]]:
    """Of all features, or of the prefix `cut`."""
    hits = guesses == labels[:, None]
    found = {"top1": float(hits[:, 0].mean())} | ({"top5": float(hits.any(axis=1).mean())} if classes > 5 else {})
    for key, accuracy in found.items():
        yield f"{key}@{cut}" if cut else key, replace(_MEASURES[key], cut=cut).of(accuracy)


def statistics(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of each feature, float32 (D,); 1 for a feature that never changes."""
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(features), _ROWS):
        squares += np.square(features[start : start + _ROWS] - mean).sum(axis=0)
    deviation = np.sqrt(squares / len(features))
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-6)  # what rounding leaves of zero variance
    return mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32)


def stratified_split(labels: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Ascending indices (kept, held out): about `fraction` of each class held out, and at least one kept.

    Classes with a single image are kept. Raises DataError when nothing can be held out.
    """
    generator = np.random.default_rng(seed)
    held: list[IntArray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        raise DataError(f"evaluate.data: {len(labels)} training images, one a class, are too few for a linear probe")
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def confusion_matrix(truth: IntArray, predicted: IntArray, classes: int) -> npt.NDArray[np.int64]:
    """int64 (C, C): images of each true class (row) by predicted class (column)."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)
