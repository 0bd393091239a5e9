"""Robustness: accuracy on corrupted test images, with a classifier trained on clean features.

After ImageNet-C (Hendrycks & Dietterich 2019, 1903.12261). Its mCE divides by the errors of an AlexNet, which does not
exist for arbitrary data; the mean accuracy under corruption divided by the clean accuracy is reported instead.
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
from unlabeled.eval.evaluators.spectrum import sample_rows
from unlabeled.eval.features.extract import EvalTransform, ImageTransform, Resize, pixel_size, raw_pixels
from unlabeled.eval.intervals import wilson

_K = 20
_SHOWN = 96
"""Smaller images are enlarged to at least this side in the report. [pixels]"""
_Z95 = 1.96

Hits = npt.NDArray[np.bool_]


_MEASURES = {
    "clean": Measure("accuracy on the same images without corruption", "percent"),
    "mean": Measure("mean accuracy under corruption", "percent"),
    "kept": Measure("accuracy retained under corruption (mean / clean)", "percent"),
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
    """Accuracy on clean and on corrupted test images, with one classifier trained on clean features.

    The classifier is kNN with k = 20, or the linear probe with its default grid. Images are corrupted at the input size
    of the backbone (raw pixels: at their own size), with the strengths of `unlabeled.eval.corruptions`. At most
    ``images`` test images are used, drawn with the seed.

    Yields ``clean``, ``mean`` (over corruptions and severities), ``kept`` (mean divided by clean; a ``note`` if clean
    is 0) and the mean of each corruption, with 95 % intervals over images; ``gaussian_noise_s3`` and so on for each
    severity; ``accuracies`` float64 (corruptions, severities) with their ``names`` and ``severities``; ``images``, the
    number of images; and ``examples``, one image under all corruptions.
    """

    name: ClassVar = "corruption"
    title: ClassVar = "Corrupted images"
    needs: ClassVar = "images"
    captions: ClassVar = {"examples": "one row per corruption: the clean image, then each severity"}
    Config: ClassVar = CorruptionConfig

    def __init__(self, config: CorruptionConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _under(key) if key in get_args(CorruptionName) else _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        config, test = self.config, dataset.features.test
        rows = sample_rows(len(test), config.images, "corruption", dataset.seed)
        indices = rows if test.indices is None else test.indices[rows]
        # encode the same images under every corruption
        pairs = [(name, severity) for name in config.corruptions for severity in config.severities]
        sources = [_corrupted(dataset, indices, name, severity) for name, severity in pairs]
        features = [test.features[rows], *(_encoded(dataset, source) for source in sources)]
        # classify them
        hits = self._hits(dataset, features, test.labels[rows])
        by_pair = hits[1:].reshape(len(config.corruptions), len(config.severities), -1)  # (names, severities, N)
        yield from _accuracies(hits[0], by_pair.mean(axis=(0, 1)))
        for name, by_severity in zip(config.corruptions, by_pair, strict=True):
            yield name, _under(name).of(_mean(by_severity.mean(axis=0)))
        for (name, severity), hit in zip(pairs, hits[1:], strict=True):
            yield f"{name}_s{severity}", float(hit.mean())
        yield "accuracies", by_pair.mean(axis=2)
        yield "names", np.array(config.corruptions)
        yield "severities", np.array(config.severities)
        yield "images", len(rows)
        yield "examples", _examples(sources, len(config.corruptions))

    def _hits(self, dataset: EncodedDataset, features: list[FloatArray], labels: IntArray) -> Hits:
        """Whether the class of each image is predicted correctly, (sets, N), for several sets of features (N, D)."""
        # all sets form one test split, so that the classifier is fitted once
        sets = len(features)
        test = replace(dataset.features.test, features=np.concatenate(features), labels=np.tile(labels, sets))
        evaluated = replace(dataset, features=replace(dataset.features, test=replace(test, indices=None)))
        knn = self.config.classifier == "knn"
        classifier = KnnEvaluator(KnnConfig(k=(_K,))) if knn else LinearEvaluator(LinearConfig())
        predicted = dict(classifier.run(evaluated))["predictions"]
        assert isinstance(predicted, np.ndarray)
        return np.asarray(predicted.reshape(sets, -1) == labels)


def _under(corruption: str) -> Measure:
    return Measure(f"accuracy under {corruption.replace('_', ' ')}", "percent")


def _corrupted(dataset: EncodedDataset, indices: IntArray, name: CorruptionName, severity: int) -> CorruptedSource:
    """The test images `indices` under one corruption, at the size that the encoder receives."""
    source = dataset.require_sources()[1]
    prepare: ImageTransform
    if dataset.backbone is None:
        prepare = Resize(pixel_size(source))
    else:
        prepare = EvalTransform(dataset.backbone.input_size)
    return CorruptedSource(source, indices.tolist(), prepare, name, severity, dataset.seed)


def _encoded(dataset: EncodedDataset, source: CorruptedSource) -> FloatArray:
    load = dataset.loading
    if dataset.backbone is None:
        return raw_pixels(source, batch_size=load.batch_size, workers=load.workers).features
    return dataset.encode(source).features


def _accuracies(clean: Hits, corrupted: FloatArray) -> Iterator[tuple[str, Value]]:
    """Clean accuracy, mean accuracy under corruption, and their ratio, from hits (N,) and fractions of hits (N,)."""
    count, accuracy = len(clean), float(clean.mean())
    yield "clean", _MEASURES["clean"].of(Estimate(accuracy, *wilson(accuracy, count)))
    yield "mean", _MEASURES["mean"].of(_mean(corrupted))
    if accuracy == 0:
        yield "note", "no clean image is predicted correctly, so the retained accuracy is undefined"
        return
    kept = float(corrupted.mean()) / accuracy
    # interval of a ratio of two means of the same images, by the delta method
    half = _Z95 * float((corrupted - kept * clean).std()) / accuracy / count**0.5
    yield "kept", _MEASURES["kept"].of(Estimate(kept, max(0.0, kept - half), kept + half))


def _mean(fractions: FloatArray) -> Estimate:
    """Mean over images of the fractions of correct predictions (N,), with a normal 95 % interval."""
    mean, half = float(fractions.mean()), _Z95 * float(fractions.std()) / len(fractions) ** 0.5
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def _examples(sources: list[CorruptedSource], kinds: int) -> Tensor:
    """The first image under all corruptions, uint8 (3, H, W): one row per corruption, clean and then each severity."""
    clean = sources[0].prepare(sources[0].source.read(int(sources[0].indices[0])))
    images = [source.read(0) for source in sources]
    each = len(images) // kinds
    rows = [torch.cat([clean, *images[kind * each : (kind + 1) * each]], dim=2) for kind in range(kinds)]
    factor = max(1, _SHOWN // min(clean.shape[1:]))
    return torch.cat(rows, dim=1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
