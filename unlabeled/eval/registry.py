"""The evaluators by name, as ``evaluate.evaluators`` lists them; each has a section of its name in ``evaluate``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from unlabeled.eval.base import Evaluator, Measure
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import ConfigError, nearest

EVALUATORS: dict[str, str] = {
    "knn": "unlabeled.eval.evaluators.knn:KnnEvaluator",
    "linear": "unlabeled.eval.evaluators.linear:LinearEvaluator",
    "logistic": "unlabeled.eval.evaluators.logistic:LogisticEvaluator",
    "few_shot": "unlabeled.eval.evaluators.few_shot:FewShotEvaluator",
    "low_label": "unlabeled.eval.evaluators.low_label:LowLabelEvaluator",
    "cluster": "unlabeled.eval.evaluators.cluster:ClusterEvaluator",
    "retrieval": "unlabeled.eval.evaluators.retrieval:RetrievalEvaluator",
    "duplicates": "unlabeled.eval.evaluators.duplicates:DuplicatesEvaluator",
    "segmentation": "unlabeled.eval.evaluators.segmentation:SegmentationEvaluator",
    "objects": "unlabeled.eval.evaluators.objects:ObjectsEvaluator",
    "spectrum": "unlabeled.eval.evaluators.spectrum:SpectrumEvaluator",
    "invariance": "unlabeled.eval.evaluators.invariance:InvarianceEvaluator",
    "layers": "unlabeled.eval.evaluators.layers:LayersEvaluator",
    "corruption": "unlabeled.eval.evaluators.corruption:CorruptionEvaluator",
}
"""In the order of the report."""


def evaluator_class(name: str) -> type[Any]:
    """The class behind a name. Raises ConfigError for an unknown one."""
    if name not in EVALUATORS:
        raise ConfigError(f"evaluate.evaluators: {name!r} does not exist; {nearest(name, EVALUATORS)}")
    module, _, attribute = EVALUATORS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def build_evaluators(config: EvaluateConfig) -> list[Evaluator]:
    """Those that `config` asks for, with their settings, in the order of the report."""
    wanted: Iterable[str] = EVALUATORS if config.evaluators == "all" else config.evaluators
    classes = {name: evaluator_class(name) for name in wanted}
    return [classes[name](getattr(config, name)) for name in EVALUATORS if name in classes]


def measure_of(metric: str) -> Measure | None:
    """What ``evaluator/key`` is, such as ``knn/k20``, ``knn/k20@64`` (first 64 features) or ``knn/k20@pca64``.

    None for values that no table shows and for unknown evaluators.
    """
    name, _, key = metric.partition("/")
    key, _, cut = key.partition("@")
    if name not in EVALUATORS:
        return None
    found: Measure | None = evaluator_class(name).measure(key)
    if found is None or not cut:
        return found
    part = f"{cut[3:]} principal components" if cut.startswith("pca") else f"first {cut} features"
    return Measure(f"{found.label}, {part}", found.unit, found.better)
