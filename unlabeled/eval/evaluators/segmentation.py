"""Semantic segmentation from frozen dense features, one position at a time, without a decoder."""

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
    masked_batches,
    position_labels,
    sample_indices,
    with_masks,
)
from unlabeled.eval.dense.miou import Overlap, class_iou, estimates, joined, overlap
from unlabeled.eval.dense.probes import LabeledFeatures, LinearSegmenter, NearestSegmenter
from unlabeled.eval.dense.tiles import class_colors, tiled
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.notes import cut_k, edge_of_grid
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import ImageSource

_FLOATS = 2**26
"""Scores at full size that are computed at a time; bounds memory."""


_MEASURES = {
    "probe_miou": Measure("mIoU, linear probe", "percent"),
    "knn_miou": Measure("mIoU, nearest neighbors", "percent"),
    "probe_accuracy": Measure("pixel accuracy, linear probe", "percent"),
    "knn_accuracy": Measure("pixel accuracy, nearest neighbors", "percent"),
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
    """Mean IoU of semantic segmentation from dense features, by a linear probe and by nearest neighbors.

    Images and masks are resized to the backbone's input size. Each position is classified by itself, its scores are
    upsampled to that size (bilinear), and each pixel gets its best class. The mean is over the background and all
    classes that occur in truth or prediction; pixels with mask value 255 are ignored. Intervals are over the choice of
    test images (bootstrap).

    Yields ``probe_miou``, ``knn_miou``, ``probe_accuracy`` and ``knn_accuracy`` (of pixels) as fractions;
    ``probe_iou`` and ``knn_iou`` float64 (K,), with NaN for absent classes; ``lr`` and ``holdout_miou`` of the selected
    probe; ``diverged``, the number of learning rates that diverged; ``positions``, the number of training positions; an
    image ``examples``; and notes.
    """

    name: ClassVar = "segmentation"
    title: ClassVar = "Segmentation"
    needs: ClassVar = "images"
    captions: ClassVar = {"examples": "from left to right: image, mask, linear probe, nearest neighbors"}
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
        dense = DenseFeatures(dataset, self.name, self.config.level)
        classes = len(dataset.features.classes) + 1  # and the background
        # train on a bank of labeled positions
        bank = self._bank(dense, train, dataset, classes)
        probe = LinearSegmenter(bank, self.config, dataset.seed)
        nearest = NearestSegmenter(bank, self.config.k, self.config.temperature)
        # segment the test images
        segmenters: dict[str, LinearSegmenter | NearestSegmenter] = {"probe": probe, "knn": nearest}
        shown = set(sample_indices(len(test), self.config.examples, derive("segmentation examples", dataset.seed)))
        counts: dict[str, list[Overlap]] = {name: [] for name in segmenters}
        examples: list[list[Tensor]] = []
        for batch in masked_batches(test, dense.size, range(len(test)), dataset):
            maps = dense(batch.images)
            guesses = {
                name: best_classes(segmenter.scores(per_position(maps)), maps, dense.size)
                for name, segmenter in segmenters.items()
            }
            for name, guess in guesses.items():
                counts[name].append(overlap(batch.masks, guess, classes, IGNORE))
            examples.extend(_examples(batch, list(guesses.values()), shown))
        if not sum(int(batch_counts.truth.sum()) for batch_counts in counts["probe"]):
            raise DataError("evaluate.data: no test image has a labeled pixel; give data with masks")
        for name, batches in counts.items():
            by_image = joined(batches)
            miou, accuracy = estimates(by_image, derive("bootstrap", dataset.seed))
            yield f"{name}_miou", _MEASURES[f"{name}_miou"].of(miou)
            yield f"{name}_accuracy", _MEASURES[f"{name}_accuracy"].of(accuracy)
            yield f"{name}_iou", class_iou(Overlap(*(one.sum(axis=0) for one in by_image)))
        yield "lr", probe.lr
        yield "holdout_miou", probe.holdout_miou
        yield "diverged", probe.diverged
        yield "positions", len(bank.fractions)
        yield "examples", tiled(examples)
        for note in (
            cut_k([self.config.k], nearest.k, "training positions"),
            edge_of_grid(probe.lr, self.config.lr, "evaluate.segmentation.lr"),
        ):
            if note is not None:
                yield "note", note
        if dense.note is not None:
            yield "note", dense.note

    def _bank(self, dense: DenseFeatures, train: ImageSource, dataset: EncodedDataset, classes: int) -> LabeledFeatures:
        """At most ``bank`` labeled training positions, drawn with the seed and spread evenly over the images."""
        seed = dataset.seed
        # "pictures" and "places" below are part of the seeds: other words would draw other positions
        images = sample_indices(len(train), self.config.bank, derive("segmentation pictures", seed))
        each = -(-self.config.bank // len(images))  # rounded up: the surplus is dropped at the end
        found: list[LabeledFeatures] = []
        for batch in masked_batches(train, dense.size, images, dataset):
            maps = dense(batch.images)
            fractions, labeled = position_labels(batch.masks, (maps.shape[2], maps.shape[3]), classes)
            for number, index in enumerate(batch.indices):
                candidates = labeled[number].flatten().nonzero()[:, 0].numpy()
                random = np.random.default_rng(derive("segmentation places", seed, index))
                rows = torch.from_numpy(np.sort(random.permutation(candidates)[:each]))
                found.append(
                    LabeledFeatures(
                        per_position(maps[number : number + 1])[rows.to(maps.device)],
                        fractions[number].flatten(0, 1)[rows].to(maps.device),
                        labeled[number].flatten()[rows].to(maps.device),
                        torch.full((len(rows),), index, device=maps.device),
                    )
                )
        fields = ("features", "fractions", "labeled", "images")
        bank = LabeledFeatures(*(torch.cat([getattr(one, name) for one in found]) for name in fields))
        if int((bank.fractions.sum(dim=0) > 0).sum()) < 2:
            raise DataError(
                "evaluate.data: the training masks show a single class; give masks with two, or background and one"
            )
        kept = sample_indices(len(bank.fractions), self.config.bank, derive("segmentation bank", seed))
        return bank.select(torch.tensor(kept, device=bank.fractions.device))


def per_position(maps: Tensor) -> Tensor:
    """Maps (B, C, gh, gw) → one feature vector per position, (B gh gw, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def best_classes(scores: Tensor, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel, int64 (B, h, w) on the CPU, from scores (B gh gw, K) of the positions of `maps`."""
    batch, _, rows, columns = maps.shape
    planes = scores.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
    at_once = max(1, _FLOATS // (planes.shape[1] * size[0] * size[1]))
    chunks = [
        F.interpolate(chunk, size, mode="bilinear", align_corners=False).argmax(dim=1).cpu()
        for chunk in torch.split(planes, at_once)
    ]
    return torch.cat(chunks)


def _examples(batch: MaskedBatch, guesses: list[Tensor], shown: set[int]) -> list[list[Tensor]]:
    """Rows of the example image, for the images `shown`: image, truth and guesses, each uint8 (3, h, w)."""
    return [
        [batch.images[number], *(class_colors(one[number], batch.images[number]) for one in (batch.masks, *guesses))]
        for number, index in enumerate(batch.indices)
        if index in shown
    ]
