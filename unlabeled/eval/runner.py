"""The evaluation runner: encodes the data with a backbone and its baselines, and runs the evaluators on each.

The baselines are raw pixels and the same architecture with random weights.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.base import Cut, Evaluator, FeatureSet, FeatureSplit, Measured, Value, check_features
from unlabeled.eval.dense.feature_maps import backbone_maps
from unlabeled.eval.embedding import embed
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading, principal, random_twin
from unlabeled.eval.environment import hardware
from unlabeled.eval.evaluators.knn import KnnEvaluator
from unlabeled.eval.features.extract import Precision, extract_features, is_main_process, raw_pixels
from unlabeled.eval.features.recalibrate import recalibrated, recalibration_images
from unlabeled.eval.gallery import GalleryRow, nearest_gallery
from unlabeled.eval.registry import build_evaluator, build_evaluators, settle
from unlabeled.eval.results import EncoderResults, EvaluatorInfo, Metric, Results
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, DataError
from unlabeled.ssl.data.source import ImageSource, limited

log = logging.getLogger(__name__)


def evaluate_backbone(
    backbone: Backbone,
    train: ImageSource,
    test: ImageSource,
    config: EvaluateConfig,
    *,
    work: Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    workers: int = 0,
    precision: Precision = "fp32",
    masked_statistics: bool = False,
) -> Results | None:
    """Evaluates `backbone`, from any source, and its baselines on labeled data.

    `work`: folder whose ``features`` subfolder caches features; None: no cache. `masked_statistics`: whether the batch
    norms of `backbone` were trained on masked images, in which case ``config.recalibrate: auto`` re-estimates them.

    Under torch.distributed, every process must call this function and shares in encoding; only the first receives the
    results, the others None. Raises DataError for data without labels or with test classes that are missing from the
    training split, and for data that an evaluator selected by name cannot use.
    """
    began = time.perf_counter()
    config = settle(config, given=())  # given=(): settings of evaluators that do not run are allowed here
    evaluators = build_evaluators(config)
    train, test = sources = limited(train, config.limit), limited(test, config.limit)
    cache = work / "features" if work is not None else None
    load = Loading(config.batch_size, workers, torch.device(device), precision, cache)
    datasets: dict[str, EncodedDataset] = {}
    seconds: dict[str, float] = {}
    notes: dict[str, str] = {}
    recalibrated = min(recalibration_images(config, backbone, masked_statistics), len(train))

    def encode(name: str, encoder: Backbone | None) -> None:
        with _timed(seconds, name):
            datasets[name] = replace(encode_dataset(encoder, sources, load, recalibrate=recalibrated), seed=seed)

    # encode the data, on all processes
    encode("backbone", backbone)
    wanted = ("pixels", "random") if config.baselines is True else config.baselines or ()
    if "pixels" in wanted:
        encode("pixels", None)
        datasets["pixels"] = replace(datasets["pixels"], size_like=backbone)
    if "random" in wanted:
        try:
            encode("random", random_twin(backbone, seed))
            if backbone.custom:
                notes["random"] = "drawn by the layers' own reset_parameters; buffers are those of the given backbone"
        except ConfigError as error:
            notes["backbone"] = f"no baseline with random weights: {error}"
    if not is_main_process():
        return None
    # run the evaluators, on the main process only
    check_features(datasets["backbone"].features)
    encoders: dict[str, EncoderResults] = {}
    for name, dataset in datasets.items():
        # a baseline that cannot be evaluated, such as one with constant features, must not lose the backbone's results
        strict = name == "backbone" and config.evaluators != "all"
        found = _run_evaluators(dataset, evaluators, config.prefixes, strict=strict, called=name, note=notes.get(name))
        encoders[name] = replace(found, seconds={"features": seconds[name], **found.seconds})
    results = _results_of(encoders, datasets["backbone"], config)
    infos = {one.name: EvaluatorInfo(one.title, dict(one.captions)) for one in evaluators}
    return replace(results, evaluators=infos, seconds=time.perf_counter() - began, recalibrated=recalibrated)


def online_knn(
    backbone: Backbone,
    train: ImageSource,
    test: ImageSource,
    config: EvaluateConfig,
    device: torch.device | str,
    *,
    workers: int = 0,
    precision: Precision = "fp32",
    masked_statistics: bool = False,
) -> dict[str, float]:
    """kNN accuracies (``knn/k20`` → fraction) of a backbone during its training, which is not disturbed.

    Every process must call it; all but the first receive {}. Features are not cached, since the weights change.
    """
    evaluator = _knn(config)
    sources = limited(train, config.limit), limited(test, config.limit)
    load = Loading(config.batch_size, workers, torch.device(device), precision)
    recalibrated = recalibration_images(config, backbone, masked_statistics)
    dataset = encode_dataset(backbone, sources, load, recalibrate=recalibrated)
    if not is_main_process():
        return {}
    found = ((key, value) for key, value in evaluator.run(dataset) if isinstance(value, Measured))
    # values with an interval of their own are means over draws (evaluate.knn.shots), which curves do not show
    return {f"knn/{key}": value.value for key, value in found if math.isnan(value.low)}


def _knn(config: EvaluateConfig) -> KnnEvaluator:
    """The kNN evaluator, which runs during training and determines the k of the headline."""
    evaluator = build_evaluator(config, "knn")
    assert isinstance(evaluator, KnnEvaluator), "another evaluator is registered as knn"
    return evaluator


def encode_dataset(
    encoder: Backbone | None, sources: tuple[ImageSource, ImageSource], load: Loading, *, recalibrate: int = 0
) -> EncodedDataset:
    """Encodes the (training, test) images of `sources` with `encoder` (None: raw pixels).

    `recalibrate`: number of training images on which to re-estimate batch-norm statistics; 0: keep them. Raises
    DataError for data without labels or with test classes that are missing from the training split.
    """
    train, test = sources
    classes = _classes(train)
    loading: dict[str, Any] = {"batch_size": load.batch_size, "workers": load.workers}
    if encoder is None:
        pixels = [raw_pixels(source, **loading, cache=load.cache) for source in sources]
        return EncodedDataset(_joined(pixels[0], pixels[1], train, test, classes), None, sources, load)
    loading["device"] = load.device
    if recalibrate:
        encoder = recalibrated(encoder, train, count=min(recalibrate, len(train)), **loading)
    data = _feature_set(train, test, classes, encoder, cache=load.cache, precision=load.precision, **loading)
    return EncodedDataset(data, encoder, sources, load)


def evaluate_features(dataset: EncodedDataset, evaluator: Evaluator, prefixes: Sequence[int] = ()) -> EncoderResults:
    """Results of one evaluator on `dataset`, also on prefixes of the features. Raises what the evaluator raises."""
    return _run_evaluators(dataset, [evaluator], prefixes, strict=True)


def _classes(train: ImageSource) -> tuple[str, ...]:
    if train.classes is None or train.labels() is None:
        raise DataError(
            "evaluate.data: the data has no labels, which evaluation needs; set data.labels=true (folders named after "
            "classes), data.label_column, or evaluate.data=..."
        )
    return tuple(train.classes)


def _feature_set(
    train: ImageSource, test: ImageSource, classes: tuple[str, ...], backbone: Backbone, **options: Any
) -> FeatureSet:
    splits = [extract_features(backbone, source, **options) for source in (train, test)]
    return _joined(splits[0], splits[1], train, test, classes)


def _joined(
    train: FeatureSplit, test: FeatureSplit, train_source: ImageSource, source: ImageSource, classes: tuple[str, ...]
) -> FeatureSet:
    """Joins both splits; test labels are renumbered to the classes of the training split."""
    names = _classes(source)
    if names == classes:
        return FeatureSet(train, test, classes)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(f"evaluate.data: test class {unknown[0]!r} is not among the {len(classes)} training classes")
    # a folder without images of some class numbers the others differently, so names decide
    mapping = np.array([classes.index(name) for name in names], dtype=np.int64)
    labels = np.where(test.labels < 0, -1, mapping[test.labels])
    return FeatureSet(train, replace(test, labels=labels), classes)


def _run_evaluators(
    dataset: EncodedDataset,
    evaluators: Sequence[Evaluator],
    prefixes: Sequence[int],
    *,
    strict: bool,
    called: str | None = None,
    note: str | None = None,
) -> EncoderResults:
    """Runs the evaluators. An evaluator that cannot use `dataset` raises if `strict`, else it leaves a note.

    `called`: name of the encoder in the log, which reports each finished evaluator; None: no log. `note`: a note to
    add to the results.
    """
    found = EncoderResults({}, dimension=dataset.features.train.features.shape[1])
    notes = [note] if note else []
    components = functools.cache(functools.partial(principal, dataset))  # one decomposition for all evaluators
    for evaluator in evaluators:
        if dataset.backbone is None and evaluator.needs == "backbone":  # raw pixels
            continue
        with _timed(found.seconds, evaluator.name):
            try:
                for key, value in evaluator.run(dataset):
                    _take(found, notes, evaluator, key, value)
                if evaluator.needs == "features":
                    _evaluate_prefixes(found, evaluator, dataset, components, prefixes)
            except (DataError, CapabilityError) as error:
                if strict:
                    raise
                notes.append(f"{evaluator.name}: {error}")
        if called:
            log.info("%s, %s: %.1f s", called, evaluator.title, found.seconds[evaluator.name])
    return replace(found, notes=tuple(notes))


def _take(found: EncoderResults, notes: list[str], evaluator: Evaluator, key: str, value: Value) -> None:
    """Stores one value of an evaluator, by its type."""
    metric = f"{evaluator.name}/{key}"
    if isinstance(value, str):
        notes.append(f"{evaluator.name}: {value}")
    elif isinstance(value, Tensor):
        found.images[metric] = value
    elif isinstance(value, np.ndarray):
        found.arrays[metric] = value
    elif isinstance(value, Measured):
        found.metrics[metric] = value.value
        found.measures[metric] = Metric(evaluator.name, key, value.measure)
        if not math.isnan(value.low):
            found.intervals[metric] = (value.low, value.high)
    else:
        found.metrics[metric] = float(value)


def _evaluate_prefixes(
    found: EncoderResults,
    evaluator: Evaluator,
    dataset: EncodedDataset,
    components: Callable[[int], EncodedDataset],
    prefixes: Sequence[int],
) -> None:
    """``knn/k20@64`` for the first 64 features, ``knn/k20@pca64`` for as many principal components."""
    metrics = [metric for metric in found.measures.values() if metric.evaluator == evaluator.name]
    keys = {metric.key for metric in metrics if metric.measure.cut is None}
    lengths = sorted({length for length in prefixes if length < found.dimension})
    for length in lengths:
        projected = components(lengths[-1]).first(length)
        for cut, subset in ((Cut(length), dataset.first(length)), (Cut(length, principal=True), projected)):
            for key, value in evaluator.run(subset):
                if key in keys and isinstance(value, Measured):  # a subset may yield other keys, such as a smaller k
                    metric = f"{evaluator.name}/{key}@{cut}"
                    found.metrics[metric] = value.value
                    found.measures[metric] = Metric(evaluator.name, key, replace(value.measure, cut=cut))


def _results_of(encoders: dict[str, EncoderResults], dataset: EncodedDataset, config: EvaluateConfig) -> Results:
    data, sources, arrays = dataset.features, dataset.require_sources(), encoders["backbone"].arrays
    most_common = np.bincount(data.train.labels, minlength=len(data.classes)).argmax()
    gallery: tuple[GalleryRow, ...] = ()
    if "knn/neighbors" in arrays:
        gallery = nearest_gallery(data, arrays["knn/neighbors"], arrays["knn/similarities"], sources, seed=dataset.seed)
    return Results(
        encoders=encoders,
        headline=_headline(encoders["backbone"].measures, _knn(config).headline_k(len(data.train))),
        classes=data.classes,
        test_labels=data.test.labels,
        train_images=len(data.train),
        test_images=len(data.test),
        majority=float((data.test.labels == most_common).mean()),
        skipped={"train": data.train.skipped, "test": data.test.skipped},
        seeds={"random weights": dataset.seed, "linear probe": dataset.seed},
        hardware=hardware(dataset.device),
        gallery=gallery,
        embedding=embed(data.test, config.embedding, seed=dataset.seed) if config.embedding is not None else None,
        maps=backbone_maps(dataset, config.maps),
    )


def _headline(measures: Mapping[str, Metric], k: int) -> tuple[str, ...]:
    """The metrics to quote: kNN and linear probe, or without both the first accuracy that was measured."""
    # fixed in advance: choosing the best metric afterwards would flatter the backbone
    fixed = tuple(name for name in (f"knn/k{k}", "linear/top1") if name in measures)
    on_all_features = {name: metric.measure for name, metric in measures.items() if metric.measure.cut is None}
    return fixed or tuple(name for name, measure in on_all_features.items() if measure.unit == "accuracy")[:1]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the wall-clock time of the block to ``seconds[name]``."""
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
