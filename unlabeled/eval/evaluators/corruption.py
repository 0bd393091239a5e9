"""How much of the accuracy is left on corrupted test images, under one classifier fitted to clean training features.

After ImageNet-C (Hendrycks & Dietterich 2019, 1903.12261); its mCE divides by the errors of an AlexNet, which is not at
hand for any data. The accuracy kept, mean accuracy under corruption over clean accuracy, stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from unlabeled.eval.base import Estimate, Evaluator, EvaluatorConfig, FloatArray, IntArray, Measure, Value
from unlabeled.eval.corruptions import CorruptedSource, CorruptionName
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.knn import KnnConfig, KnnEvaluator
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator
from unlabeled.eval.evaluators.spectrum import chosen
from unlabeled.eval.features.extract import EvalTransform, ImageTransform, Resize, pixel_size, raw_pixels
from unlabeled.eval.intervals import wilson

_K = 20
_SHOWN = 96
"""Pixels to which images in the report are enlarged at least."""
_Z95 = 1.96

Hits = npt.NDArray[np.bool_]


_MEASURES = {
    "clean": Measure("accuracy on the same images, clean", "percent"),
    "mean": Measure("mean accuracy under corruption", "percent"),
    "kept": Measure("accuracy kept under corruption (mean / clean)", "percent"),
}


class CorruptionConfig(EvaluatorConfig):
    """Accuracy on corrupted test images of a classifier trained on clean features, after ImageNet-C."""

    corruptions: tuple[CorruptionName, ...] = Field(
        ("gaussian_noise", "gaussian_blur", "jpeg", "brightness"), min_length=1
    )
    """Corruptions to apply, by name."""
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((1, 3, 5), min_length=1)
    """Severities to apply, from 1 (weak) to 5 (strong)."""
    images: int = Field(1000, ge=1)
    """Test images to use, drawn with the seed. [images]"""
    classifier: Literal["knn", "linear"] = "knn"
    """knn: kNN with k = 20. linear: a linear probe with the default settings of evaluate.linear."""


class CorruptionEvaluator(Evaluator):
    """Accuracy on clean and corrupted test images of one classifier fitted to the clean training features.

    kNN with k = 20, or the linear probe with its usual grid. Images are corrupted at the size at which the network
    sees them (`unlabeled.eval.corruptions` says how strongly), raw pixels at theirs; at most ``images`` of the test
    split, drawn by the seed.

    Yields ``clean``, ``mean`` (over corruptions and severities), ``kept`` (mean over clean; a ``note`` where nothing
    clean is right) and each corruption's mean, with 95 % intervals over images; for each severity
    ``gaussian_noise_s3``; ``accuracies`` float64 (corruptions, severities), ``names`` and ``severities`` beside it;
    ``images``, their number; ``examples``, one image in all its corruptions.
    """

    name: ClassVar = "corruption"
    title: ClassVar = "Corrupted images"
    needs: ClassVar = "images"
    captions: ClassVar = {"examples": "a row for each corruption: clean, then each severity"}
    Config: ClassVar = CorruptionConfig

    def __init__(self, config: CorruptionConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _under(key) if key in get_args(CorruptionName) else _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        config, test = self.config, dataset.features.test
        rows = chosen(len(test), config.images, "corruption", dataset.seed)
        numbers = rows if test.indices is None else test.indices[rows]
        cells = [(name, severity) for name in config.corruptions for severity in config.severities]
        sources = [_corrupted(dataset, numbers, name, severity) for name, severity in cells]
        features = [test.features[rows], *(_encoded(dataset, source) for source in sources)]
        hits = self._hits(dataset, features, test.labels[rows])
        by_cell = hits[1:].reshape(len(config.corruptions), len(config.severities), -1)
        yield from _accuracies(hits[0], by_cell.mean(axis=(0, 1)))
        for name, part in zip(config.corruptions, by_cell, strict=True):
            yield name, _under(name).of(_mean(part.mean(axis=0)))
        for (name, severity), part in zip(cells, hits[1:], strict=True):
            yield f"{name}_s{severity}", float(part.mean())
        yield "accuracies", by_cell.mean(axis=2)
        yield "names", np.array(config.corruptions)
        yield "severities", np.array(config.severities)
        yield "images", len(rows)
        yield "examples", _examples(sources, len(config.corruptions))

    def _hits(self, dataset: EncodedDataset, features: list[FloatArray], labels: IntArray) -> Hits:
        """Whether each image's class is told rightly, (sets, N): all sets meet the same fitted classifier."""
        sets = len(features)
        asked = replace(dataset.features.test, features=np.concatenate(features), labels=np.tile(labels, sets))
        evaluated = replace(dataset, features=replace(dataset.features, test=replace(asked, indices=None)))
        knn = self.config.classifier == "knn"
        classifier = KnnEvaluator(KnnConfig(k=(_K,))) if knn else LinearEvaluator(LinearConfig())
        predicted = dict(classifier.run(evaluated))["predictions"]
        assert isinstance(predicted, np.ndarray)
        return np.asarray(predicted.reshape(sets, -1) == labels)


def _under(corruption: str) -> Measure:
    return Measure(f"accuracy under {corruption.replace('_', ' ')}", "percent")


def _corrupted(dataset: EncodedDataset, numbers: IntArray, name: CorruptionName, severity: int) -> CorruptedSource:
    source = dataset.require_sources()[1]
    prepare: ImageTransform
    if dataset.backbone is None:
        prepare = Resize(pixel_size(source))
    else:
        prepare = EvalTransform(dataset.backbone.input_size)
    return CorruptedSource(source, numbers.tolist(), prepare, name, severity, dataset.seed)


def _encoded(dataset: EncodedDataset, source: CorruptedSource) -> FloatArray:
    load = dataset.loading
    if dataset.backbone is None:
        return raw_pixels(source, batch_size=load.batch_size, workers=load.workers).features
    return dataset.encode(source).features


def _accuracies(clean: Hits, corrupted: FloatArray) -> Iterator[tuple[str, Value]]:
    """Clean and mean accuracy, and their ratio with the interval of a ratio of means (delta method)."""
    count, accuracy = len(clean), float(clean.mean())
    yield "clean", _MEASURES["clean"].of(Estimate(accuracy, *wilson(accuracy, count)))
    yield "mean", _MEASURES["mean"].of(_mean(corrupted))
    if accuracy == 0:
        yield "note", "no clean image is told rightly, so that nothing can be kept under corruption"
        return
    kept = float(corrupted.mean()) / accuracy
    half = _Z95 * float((corrupted - kept * clean).std()) / accuracy / count**0.5
    yield "kept", _MEASURES["kept"].of(Estimate(kept, max(0.0, kept - half), kept + half))


def _mean(parts: FloatArray) -> Estimate:
    """Mean of the images' shares of right answers, (N,), with the normal interval over images."""
    mean, half = float(parts.mean()), _Z95 * float(parts.std()) / len(parts) ** 0.5
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def _examples(sources: list[CorruptedSource], kinds: int) -> Tensor:
    """The first image: a row a corruption; clean, then each severity. uint8 (3, H, W), small ones in blocks."""
    clean = sources[0].prepare(sources[0].source.read(int(sources[0].indices[0])))
    images = [source.read(0) for source in sources]
    each = len(images) // kinds
    lines = [torch.cat([clean, *images[row * each : (row + 1) * each]], dim=2) for row in range(kinds)]
    factor = max(1, _SHOWN // min(clean.shape[1:]))
    return torch.cat(lines, dim=1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
