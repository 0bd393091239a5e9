"""Linear probe: linear classifiers on features of a frozen backbone, with settings chosen without the test split.

All heads of the grid are trained at once, as in DINOv2's evaluation (Oquab et al. 2023, 2304.07193): they receive the
same batches, and heads with the same input share their matrix products.

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
from unlabeled.eval.notes import edge_of_grid
from unlabeled.eval.probe.batches import Batches, Course, augmented_batches, cached_batches
from unlabeled.eval.probe.heads import GroupedSgd, Setting, hold_out
from unlabeled.eval.probe.inputs import BlockFeatures, Input, block_inputs, pooled_inputs
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive

_LR_BATCH = 256
"""Batch size that the learning rates in the settings refer to."""
_ROWS = 256
"""Rows per chunk, so that float64 copies fit into a CPU's caches."""
_DINOV2 = {
    "lr": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    "weight_decay": (0.0,),
    "blocks": (1, 4),
    "pooling": ("cls", "cls+avg"),
    "init": 0.01,
}
"""The grid of the authors' ``eval/linear.py``. Departures: features are standardized, and the hold-out selects the
head instead of the test split."""


@dataclass(frozen=True)
class Head:
    """One linear classifier of the grid: an input and its training settings."""

    input: Input
    setting: Setting

    @property
    def selection(self) -> Input | None:
        """Heads with an equal value compete: those of one prefix with each other, all others together."""
        return self.input if self.input.prefix else None


@dataclass(frozen=True)
class Choice:
    """A head with its accuracy on the hold-out."""

    head: Head
    accuracy: float


@dataclass(frozen=True)
class _ProbeData:
    """Training data of the heads: features of all inputs, and what it takes to encode augmented images."""

    dataset: EncodedDataset
    config: LinearConfig
    data: FeatureSet
    """Features of all inputs, not standardized."""
    outputs: BlockFeatures | None
    """Computes the features of all inputs; None: pooled features."""
    mean: FloatArray
    """(F,), of the training split."""
    deviation: FloatArray
    """(F,)."""
    features: Tensor
    """float32 (N, F), standardized, on the device."""
    labels: Tensor
    """int64 (N,)."""

    @property
    def augmented(self) -> bool:
        return self.config.augment and self.dataset.backbone is not None

    def course(self, rows: Tensor) -> Course:
        """The order in which `rows` of the training split are used."""
        epochs = self.config.augment_epochs if self.augmented else self.config.epochs
        return Course(rows, min(self.config.batch_size, len(rows)), epochs, self.dataset.seed)

    def batches(self, course: Course) -> Batches:
        """Standardized features and labels, from the cache or from augmented images."""
        if not self.augmented:
            return cached_batches(self.features, self.labels, course)
        mean, deviation = (torch.from_numpy(one).to(self.features.device) for one in (self.mean, self.deviation))
        return augmented_batches(self.dataset, self.outputs, mean, deviation, self.labels, course)


class LinearConfig(EvaluatorConfig):
    """Trains linear probes on frozen features with a grid of settings, of which a hold-out selects the best."""

    grid: Literal["dinov2"] | None = None
    """dinov2: use DINOv2's grid of 52 heads (arXiv 2304.07193) in place of lr, weight_decay, blocks, pooling and init:
    13 learning rates, class tokens of the last 1 and 4 blocks, with and without the average of the patches."""
    lr: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates to try, for SGD with momentum on standardized features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    """Weight decays to try, each with each learning rate."""
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of final blocks (in backbones with stages: stages) to read features from; each is added to the grid.
    Empty: only the pooled features. [blocks]"""
    pooling: tuple[Literal["cls", "avg", "cls+avg"], ...] = ()
    """What to read from these blocks. cls: their class tokens. avg: the averages of their patches. cls+avg: the class
    tokens and the average of the last block's patches. Empty: cls if the backbone has a class token, else avg."""
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
    """Train on random crops and flips, which the backbone encodes in each epoch, in place of cached features. The
    hold-out and raw pixels are not augmented."""
    augment_epochs: int = Field(10, ge=1)
    """Epochs with `augment`, in place of `epochs`. Each is a pass of the backbone over the training set, and there are
    two trainings: one to select the head and one for the result. [epochs]"""


class LinearEvaluator(Evaluator):
    """Accuracy of a linear classifier on standardized features, with settings chosen on a hold-out.

    One head for every (input, lr, weight decay) of the grid is trained on the training split minus a stratified
    hold-out. The hold-out selects one of them (ties: lower loss), which is then trained again on the entire training
    split and evaluated once on the test split. Features are standardized with the mean and standard deviation of the
    training split.

    Yields ``top1``, ``top5`` (with more than five classes) and ``holdout_top1`` as fractions; ``lr`` and
    ``weight_decay`` of the selected head; ``diverged``, the number of heads with a non-finite weight; ``predictions``
    int64 (N,); ``confusion`` int64 (C, C), true by predicted class; ``top1@m`` and ``top5@m`` for each prefix in the
    settings, with a selection of its own; ``blocks``, the number of blocks that the selected head reads, with a
    ``note`` that names its input; and a ``note`` if the selected lr is at the edge of the grid.
    """

    name: ClassVar = "linear"
    title: ClassVar = "Linear probe"
    needs: ClassVar = "features"
    Config: ClassVar = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        self.config = _with_grid(config)
        self.grid = [Setting(lr, decay) for decay in self.config.weight_decay for lr in self.config.lr]

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        check_features(dataset.features)
        probe, inputs = self._data(dataset)
        heads = [Head(one, setting) for one in inputs for setting in self.grid]
        # select on the hold-out, then train the selected heads on the entire training split
        best, diverged = self._choose(probe, heads)
        finals = self._fit(probe, [one.head for one in best], torch.arange(len(probe.labels)))
        chosen, test = best[0], probe.data.test  # the first selection is the one without a prefix
        # evaluate them on the test split
        for choice, final in zip(best, finals, strict=True):
            source = choice.head.input
            scores = final.scores(_standardized(source, test.features, probe)).softmax(dim=1)[0].T
            guesses = best_classes(scores.cpu().numpy(), 5)
            cut = Cut(source.stop) if source.prefix else None
            yield from _accuracies(guesses, test.labels, len(probe.data.classes), cut)
            if choice is chosen:
                predictions = guesses[:, 0]
        yield "holdout_top1", chosen.accuracy
        yield "lr", chosen.head.setting.lr
        yield "weight_decay", chosen.head.setting.weight_decay
        yield "diverged", diverged
        yield "predictions", predictions
        yield "confusion", confusion_matrix(test.labels, predictions, len(probe.data.classes))
        yield from self._notes(chosen.head, inputs, dataset)

    def _data(self, dataset: EncodedDataset) -> tuple[_ProbeData, list[Input]]:
        """The features of all inputs, and the columns of each input."""
        data, outputs = dataset.features, None
        inputs = pooled_inputs(data.train.features.shape[1], self.config.prefixes)
        if self.config.blocks and dataset.backbone is not None:
            outputs, inputs = block_inputs(
                dataset.backbone, self.config.blocks, self.config.pooling, fall_back=self.config.grid is not None
            )
            named = f"class tokens of {outputs.classes} blocks, averages of {outputs.averages}"  # identifies the cache
            train, test = (
                _aligned(split, dataset.encode(source, outputs, named=named))
                for split, source in zip((data.train, data.test), dataset.require_sources(), strict=True)
            )
            data = replace(data, train=train, test=test)
            check_features(data)
        mean, deviation = statistics(data.train.features)
        rows = np.subtract(data.train.features, mean)
        rows /= deviation  # in place: the features of all inputs may be large
        features, labels = (torch.from_numpy(one).to(dataset.device) for one in (rows, data.train.labels))
        return _ProbeData(dataset, self.config, data, outputs, mean, deviation, features, labels), inputs

    def _choose(self, probe: _ProbeData, heads: list[Head]) -> tuple[list[Choice], int]:
        """The best head among full inputs, then the best of each prefix; and the number of heads that diverged."""
        kept, held_out = stratified_split(probe.data.train.labels, self.config.holdout, probe.dataset.seed)
        groups = self._fit(probe, heads, torch.from_numpy(kept))
        # score all heads on the hold-out
        rows = torch.from_numpy(held_out).to(probe.features.device)
        features, labels = probe.features[rows], probe.labels[rows]
        finite: list[Choice] = []
        losses: dict[Head, float] = {}
        for one, group in zip(_by_input(heads), groups, strict=True):
            of_input = [head for head in heads if head.input == one]
            accuracies, loss = hold_out(group, one.of(features), labels)
            losses |= zip(of_input, loss.nan_to_num(nan=math.inf).tolist(), strict=True)  # NaN has no order
            scored = zip(of_input, accuracies.tolist(), group.finite().tolist(), strict=True)
            finite += [Choice(head, accuracy) for head, accuracy, usable in scored if usable]
        # the best of each selection
        best = []
        for selection in dict.fromkeys(head.selection for head in heads):
            competing = [choice for choice in finite if choice.head.selection == selection]
            if not competing:
                count = sum(head.selection == selection for head in heads)
                remedy = f"add smaller values than {min(self.config.lr):g}"
                raise DataError(f"evaluate.linear.lr: all {count} heads diverged; {remedy}")
            best.append(max(competing, key=lambda choice: (choice.accuracy, -losses[choice.head])))
        return best, len(heads) - len(finite)

    def _fit(self, probe: _ProbeData, heads: list[Head], rows: Tensor) -> list[GroupedSgd]:
        """Trains `heads` on `rows` of the training split; returns one group per input, in the order of the heads."""
        course = probe.course(rows)
        classes, seed = len(probe.data.classes), probe.dataset.seed
        groups = {
            one: GroupedSgd(
                one.stop - one.start,
                classes,
                [head.setting for head in heads if head.input == one],
                device=probe.features.device,
                lr_scale=course.batch / _LR_BATCH,  # linear scaling rule
                start=_start(one, classes, self.config.init, seed),
            )
            for one in _by_input(heads)
        }
        for step, (features, labels) in enumerate(probe.batches(course)):
            lr_factor = (1 + math.cos(math.pi * step / course.steps)) / 2  # cosine schedule
            for one, group in groups.items():
                group.step(one.of(features), labels, lr_factor=lr_factor)
        return list(groups.values())

    def _notes(self, chosen: Head, inputs: list[Input], dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        if chosen.input.blocks:
            yield "blocks", chosen.input.blocks
            yield "note", f"the selected head reads the {chosen.input.title} ({len(inputs)} inputs were tried)"
        if self.config.augment and dataset.backbone is not None:
            yield "note", f"trained on random crops and flips of the images for {self.config.augment_epochs} epochs"
        elif self.config.augment:
            yield "note", "trained on cached features, since there is no backbone to encode augmented images"
        if (note := edge_of_grid(chosen.setting.lr, self.config.lr, "evaluate.linear.lr")) is not None:
            yield "note", note


def _with_grid(config: LinearConfig) -> LinearConfig:
    """The settings with the values of a named grid filled in. Raises ConfigError for invalid combinations."""
    for field, values, least in (("lr", config.lr, math.ulp(0.0)), ("weight_decay", config.weight_decay, 0.0)):
        if not values or not all(math.isfinite(value) and value >= least for value in values):
            rule = "positive numbers" if field == "lr" else "numbers of at least 0"
            raise ConfigError(f"evaluate.linear.{field}: {list(values)} is not possible; give {rule}")
    if config.grid is not None:
        defaults = LinearConfig()
        for field in _DINOV2:
            if getattr(config, field) != getattr(defaults, field):
                raise ConfigError(f"evaluate.linear.{field}: grid={config.grid} sets its own; remove one of the two")
        config = config.model_copy(update=_DINOV2)
    elif config.pooling and not config.blocks:
        raise ConfigError("evaluate.linear.pooling: has no effect without blocks; give evaluate.linear.blocks too")
    if config.prefixes and config.blocks:
        raise ConfigError("evaluate.linear.prefixes: apply to the pooled features; remove blocks and grid")
    return config


def _by_input(heads: Sequence[Head]) -> list[Input]:
    """The inputs of `heads`, each once, in order."""
    return list(dict.fromkeys(head.input for head in heads))


def _start(source: Input, classes: int, deviation: float, seed: int) -> Tensor | None:
    """Initial weights (C, D), the same for all heads of an input, so that they differ only by the grid; None: zero."""
    if not deviation:
        return None
    generator = torch.Generator().manual_seed(derive("linear probe", seed, source.title))
    return torch.randn(classes, source.stop - source.start, generator=generator) * deviation


def _standardized(source: Input, features: FloatArray, probe: _ProbeData) -> Tensor:
    """The columns of one input of `features` (N, F), standardized, on the device."""
    columns = slice(source.start, source.stop)
    rows = (features[:, columns] - probe.mean[columns]) / probe.deviation[columns]
    return torch.from_numpy(rows).to(probe.features.device)


def _aligned(split: FeatureSplit, encoded: FeatureSplit) -> FeatureSplit:
    """`split` with the features of `encoded`, which may contain more images, matched by index."""
    wanted = np.arange(len(split)) if split.indices is None else split.indices
    available = np.arange(len(encoded)) if encoded.indices is None else encoded.indices  # ascending
    return replace(split, features=encoded.features[np.searchsorted(available, wanted)])


_MEASURES = {"top1": Measure("linear probe"), "top5": Measure("linear probe, top 5", guesses=5)}


def _accuracies(guesses: IntArray, labels: IntArray, classes: int, cut: Cut | None) -> Iterator[tuple[str, Value]]:
    """Top-1 and, with more than five classes, top-5 accuracy of all features, or of the prefix `cut`."""
    hits = guesses == labels[:, None]
    found = {"top1": float(hits[:, 0].mean())} | ({"top5": float(hits.any(axis=1).mean())} if classes > 5 else {})
    for key, accuracy in found.items():
        yield f"{key}@{cut}" if cut else key, replace(_MEASURES[key], cut=cut).of(accuracy)


def statistics(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of each feature, float32 (D,) each; constant features get a deviation of 1."""
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(features), _ROWS):
        squares += np.square(features[start : start + _ROWS] - mean).sum(axis=0)
    deviation = np.sqrt(squares / len(features))
    # rounding gives a constant feature a tiny deviation, which would blow it up
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return mean.astype(np.float32), np.where(constant, 1, deviation).astype(np.float32)


def stratified_split(labels: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Splits images into (kept, held out), ascending indices, with about `fraction` of each class held out.

    At least one image of each class is kept and, if it has two, one is held out. Raises DataError if every class has
    only one image.
    """
    generator = np.random.default_rng(seed)
    held_out: list[IntArray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(members[:count])
    chosen = np.sort(np.concatenate(held_out))
    if len(chosen) == 0:
        raise DataError(
            f"evaluate.data: {len(labels)} training images, one per class, are too few for a linear probe; give at "
            "least two images of a class"
        )
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def confusion_matrix(truth: IntArray, predicted: IntArray, classes: int) -> npt.NDArray[np.int64]:
    """Confusion matrix, int64 (C, C): number of images by true class (row) and predicted class (column)."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)
