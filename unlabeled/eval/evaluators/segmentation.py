"""Semantic segmentation from single places of the frozen feature map: what dense tasks can read off it directly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unlabeled.eval.base import Evaluator, EvaluatorConfig, Measure, Value
from unlabeled.eval.dense.dense_features import (
    IGNORE,
    DenseFeatures,
    MaskedBatch,
    drawn,
    masked_batches,
    position_labels,
    with_masks,
)
from unlabeled.eval.dense.miou import Overlap, class_iou, estimates, joined, overlap
from unlabeled.eval.dense.probes import LabeledFeatures, LinearSegmenter, NearestSegmenter
from unlabeled.eval.dense.tiles import class_colors, tiled
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import ImageSource

_FLOATS = 2**26
"""Scores at full size that are held at a time."""


_MEASURES = {
    "probe_miou": Measure("mIoU, linear probe of places", "percent"),
    "knn_miou": Measure("mIoU, nearest places", "percent"),
    "probe_accuracy": Measure("pixel accuracy, linear probe of places", "percent"),
    "knn_accuracy": Measure("pixel accuracy, nearest places", "percent"),
}


class SegmentationConfig(EvaluatorConfig):
    """Semantic segmentation from frozen dense features, by a linear probe and by nearest neighbors."""

    level: int | None = None
    """Feature map to use, by number; null: the deepest one that is fine enough (14 patches along a side of 224
    pixels)."""
    bank: int = Field(20_000, ge=2)
    """Largest number of training patches, the same for each image, for the probe and the neighbors. [patches]"""
    k: int = Field(30, ge=1)
    """Neighbors of each patch. [neighbors]"""
    temperature: float = Field(0.02, gt=0)
    """Temperature of the weights of neighbors."""
    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1)
    """Learning rates to try, for SGD with momentum on standardized features; held-out training images choose one."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of the linear probe."""
    epochs: int = Field(20, ge=1)
    """Passes over the training patches. [epochs]"""
    batch_size: int = Field(256, ge=1)
    """Patches per training step. [patches]"""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images that is held out to choose the learning rate. [fraction]"""
    examples: int = Field(6, ge=1)
    """Test images to show in the report. [images]"""


class SegmentationEvaluator(Evaluator):
    """Mean IoU over the background and all classes, of a linear probe and of nearest places.

    Images are resized whole to the network's size and their masks with them; scores of places are enlarged to that
    size (bilinear) and the best class of each pixel counts. Pixels of value 255 count nowhere, a class that neither
    truth nor prediction has is left out of the mean. Intervals are of the choice of test images (bootstrap).

    Yields ``probe_miou``, ``knn_miou``, ``probe_accuracy``, ``knn_accuracy`` (of pixels) as fractions, ``probe_iou``
    and ``knn_iou`` float64 (K,) with NaN for absent classes, ``lr``, ``holdout_miou``, ``diverged``, ``positions`` (how
    many were trained on), an image ``examples`` (image, truth, probe, kNN in a row), and ``note``.
    """

    name: ClassVar = "segmentation"
    title: ClassVar = "Segmentation"
    needs: ClassVar = "images"
    captions: ClassVar = {"examples": "image, mask, linear probe, nearest places"}
    Config: ClassVar = SegmentationConfig

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def check_sources(self, train: ImageSource, test: ImageSource) -> None:
        for source in (train, test):
            with_masks(source)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        train, test = (with_masks(source) for source in dataset.require_sources())
        positions = DenseFeatures(dataset, self.name, self.config.level)
        classes = len(dataset.features.classes) + 1
        bank = self._bank(positions, train, dataset, classes)
        probe = LinearSegmenter(bank, self.config, dataset.seed)
        nearest = NearestSegmenter(bank, self.config.k, self.config.temperature)
        evaluators: dict[str, LinearSegmenter | NearestSegmenter] = {"probe": probe, "knn": nearest}
        shown = set(drawn(len(test), self.config.examples, derive("segmentation examples", dataset.seed)))
        counts: dict[str, list[Overlap]] = {classifier: [] for classifier in evaluators}
        examples: list[list[Tensor]] = []
        for batch in masked_batches(test, positions.size, range(len(test)), dataset):
            maps = positions(batch.images)
            guesses = {
                classifier: best_classes(model.scores(rows_of(maps)), maps, positions.size)
                for classifier, model in evaluators.items()
            }
            for classifier, guess in guesses.items():
                counts[classifier].append(overlap(batch.masks, guess, classes, IGNORE))
            examples.extend(_examples(batch, list(guesses.values()), shown))
        if not sum(int(part.truth.sum()) for part in counts["probe"]):
            raise DataError("evaluate.data: no test image has a mask that says anything; give data with masks")
        for classifier, parts in counts.items():
            whole = joined(parts)
            miou, accuracy = estimates(whole, derive("bootstrap", dataset.seed))
            yield f"{classifier}_miou", _MEASURES[f"{classifier}_miou"].of(miou)
            yield f"{classifier}_accuracy", _MEASURES[f"{classifier}_accuracy"].of(accuracy)
            yield f"{classifier}_iou", class_iou(Overlap(*(one.sum(axis=0) for one in whole)))
        yield "lr", probe.lr
        yield "holdout_miou", probe.holdout_miou
        yield "diverged", probe.diverged
        yield "positions", len(bank.shares)
        yield "examples", tiled(examples)
        if nearest.k < self.config.k:
            yield "note", f"k was cut to {nearest.k}, the number of training places"
        if len(set(self.config.lr)) > 2 and probe.lr in (min(self.config.lr), max(self.config.lr)):
            yield (
                "note",
                f"the chosen lr {probe.lr:g} is at the edge of the grid; evaluate.segmentation.lr may be too narrow",
            )
        if positions.note is not None:
            yield "note", positions.note

    def _bank(
        self, positions: DenseFeatures, train: ImageSource, dataset: EncodedDataset, classes: int
    ) -> LabeledFeatures:
        """At most ``bank`` labeled places, as many of each image, drawn by the seed."""
        seed = dataset.seed
        # "pictures" is part of the seed: renaming it would draw other images than before
        images = drawn(len(train), self.config.bank, derive("segmentation pictures", seed))
        each = -(-self.config.bank // len(images))
        found: list[LabeledFeatures] = []
        for batch in masked_batches(train, positions.size, images, dataset):
            maps = positions(batch.images)
            shares, known = position_labels(batch.masks, (maps.shape[2], maps.shape[3]), classes)
            for number, index in enumerate(batch.indices):
                labeled = known[number].flatten().nonzero()[:, 0].numpy()
                random = np.random.default_rng(derive("segmentation places", seed, index))
                rows = torch.from_numpy(np.sort(random.permutation(labeled)[:each]))
                found.append(
                    LabeledFeatures(
                        rows_of(maps[number : number + 1])[rows.to(maps.device)],
                        shares[number].flatten(0, 1)[rows].to(maps.device),
                        known[number].flatten()[rows].to(maps.device),
                        torch.full((len(rows),), index, device=maps.device),
                    )
                )
        fields = ("features", "shares", "known", "images")
        bank = LabeledFeatures(*(torch.cat([getattr(one, name) for one in found]) for name in fields))
        if int((bank.shares.sum(dim=0) > 0).sum()) < 2:
            raise DataError(
                "evaluate.data: the training masks show a single class; give masks with two, or background and one"
            )
        kept = drawn(len(bank.shares), self.config.bank, derive("segmentation bank", seed))
        return bank.part(torch.tensor(kept, device=bank.shares.device))


def rows_of(maps: Tensor) -> Tensor:
    """Maps (B, C, gh, gw) → one row for each place, (B gh gw, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def best_classes(scores: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel, int64 (B, h, w) on the host, from scores (B gh gw, K) of the places of `maps`."""
    batch, _, rows, columns = maps.shape
    planes = scores.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
    at_once = max(1, _FLOATS // (planes.shape[1] * size[0] * size[1]))
    parts = [
        F.interpolate(part, size, mode="bilinear", align_corners=False).argmax(dim=1).cpu()
        for part in torch.split(planes, at_once)
    ]
    return torch.cat(parts)


def _examples(batch: MaskedBatch, guesses: list[Tensor], shown: set[int]) -> list[list[Tensor]]:
    """For each image of the batch that is shown: itself, the truth and the guesses, as uint8 (3, h, w)."""
    return [
        [batch.images[number], *(class_colors(one[number], batch.images[number]) for one in (batch.masks, *guesses))]
        for number, index in enumerate(batch.indices)
        if index in shown
    ]
