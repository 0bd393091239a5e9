"""What a gauntlet consists of: its rows, its data sets and its cells, each with the hash of all that it depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch

from unlabeled._version import __version__
from unlabeled.eval.base import Evaluator
from unlabeled.eval.encoded_dataset import random_twin
from unlabeled.eval.features.cache import cache_key, data_identity, weights_identity
from unlabeled.eval.features.recalibrate import recalibration_images
from unlabeled.eval.registry import build_evaluators, evaluator_config, evaluator_origin, measure_of, settle
from unlabeled.report.summary import count_parameters, name_backbone
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.schema import BackboneConfig, EvaluateConfig, EvaluateRun
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource, limited
from unlabeled.workflows.evaluate import Target, resolve_target, saw_masked_images_only
from unlabeled.workflows.gauntlet.settings import GauntletBackbone, GauntletData, GauntletRun

Kind = Literal["given", "random", "pixels"]
Sources = tuple[ImageSource, ImageSource]
"""Training and test split."""


@dataclass(frozen=True)
class Entrant:
    """One row of the table."""

    label: str
    kind: Kind
    build: Callable[[int], Backbone] | None
    """Seed of random weights → the network; None: raw pixels."""
    weights: str = "pixels"
    """Hash of the weights, of the network and of the size of its images; random weights also have their seed."""
    network: str = ""
    """timm name, with what was changed of it."""
    parameters: int = 0
    recalibrate: int = 0
    """Training images on which batch-norm statistics are estimated anew; 0: they stay."""


@dataclass(frozen=True)
class LabeledData:
    """One data set."""

    label: str
    sources: Sources
    identity: str
    majority: float
    """Part of the test images that are of the commonest training class."""

    @property
    def images(self) -> tuple[int, int]:
        """Training and test images, unreadable ones counted."""
        return len(self.sources[0]), len(self.sources[1])


@dataclass(frozen=True)
class GauntletCell:
    """One evaluator on one encoder's features of one data set, under one seed."""

    entrant: str
    data: str
    evaluator: str
    seed: int
    key: str
    """Hash of everything that the result depends on."""


@dataclass(frozen=True)
class Group:
    """Cells that share their features."""

    entrant: Entrant
    data: LabeledData
    init: int
    """Seed of random weights; without effect on others."""
    cells: tuple[GauntletCell, ...]


@dataclass(frozen=True)
class GauntletPlan:
    """Everything that is to be measured."""

    entrants: tuple[Entrant, ...]
    data: tuple[LabeledData, ...]
    evaluators: dict[str, Evaluator]
    groups: tuple[Group, ...]

    def cells(self) -> Iterator[GauntletCell]:
        for group in self.groups:
            yield from group.cells


def make_plan(run: GauntletRun) -> GauntletPlan:
    """Opens everything that `run` names, so that what cannot work is said before anything is computed.

    Raises ConfigError, CheckpointError or DataError, in one line, as `resolve_target` and `open_source` do, and for two
    rows or data sets of one label.
    """
    evaluators = {one.name: one for one in build_evaluators(settled(run))}
    for metric in run.measures:
        if not _may_be_measured(metric, evaluators):
            known = ", ".join(f"{name}/..." for name in evaluators)
            raise ConfigError(f"measures: {metric!r} is not measured; give measures of {known} such as knn/k20")
    data = tuple(_labeled(entry, run.limit) for entry in run.data)
    entrants = (*_given(run), Entrant("raw pixels", "pixels", None))
    for field, labels in (("backbones", [one.label for one in entrants]), ("data", [one.label for one in data])):
        label, count = Counter(labels).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"{field}: {label!r} stands for {count} entries; give each a label of its own")
    groups = [
        _group(run, entrant, labeled, init, evaluators)
        for entrant in entrants
        for init in (run.seeds if entrant.kind == "random" else run.seeds[:1])
        for labeled in data
    ]
    return GauntletPlan(entrants, data, evaluators, tuple(groups))


def settled(run: GauntletRun) -> EvaluateConfig:
    """The settings of all its evaluators. Raises ConfigError, in one line, for what cannot work or has no effect."""
    chosen = run.evaluate.model_copy(update={"evaluators": run.evaluators})
    return settle(chosen, field="evaluators")


def _may_be_measured(metric: str, evaluators: Mapping[str, Evaluator]) -> bool:
    """Of a word of the user; which keys an evaluator of another package has is known once it has run."""
    name = metric.partition("/")[0]
    return name in evaluators and (measure_of(metric) is not None or evaluator_origin(name) != "built in")


def _labeled(entry: GauntletData, limit: int | None) -> LabeledData:
    train, test = limited(open_source(entry, "train"), limit), limited(open_source(entry, "test"), limit)
    settings = entry.model_extra or {}
    position = Path(settings["path"]).name if settings.get("path") else entry.name
    label = str(entry.label or settings.get("dataset") or position)
    names: list[list[str]] = []
    for source in (train, test):
        labels = source.labels()
        if labels is None or source.classes is None:
            raise DataError(f"data: {label} has no labels, and every evaluator needs them; set its label_column")
        names.append([source.classes[position] if position >= 0 else "" for position in labels.tolist()])
    commonest = Counter(names[0]).most_common(1)[0][0]
    majority = float(np.mean([name == commonest for name in names[1]]))
    return LabeledData(label, (train, test), cache_key(parts=[data_identity(train), data_identity(test)]), majority)


def _given(run: GauntletRun) -> list[Entrant]:
    """The backbones of `run`, and after them random weights for each of their architectures."""
    given: list[Entrant] = []
    twins: dict[str, Entrant] = {}
    for entry in run.backbones:
        target = _resolve(entry)
        backbone = target.backbone
        masked = run.evaluate.recalibrate == "auto" and saw_masked_images_only(target)
        facts: dict[str, Any] = {
            "network": name_backbone(backbone),
            "parameters": count_parameters(backbone),
            "recalibrate": recalibration_images(run.evaluate, backbone, masked),
        }
        architecture = _architecture(backbone, facts["recalibrate"])
        fresh = not entry.pretrained and not Path(entry.target).expanduser().exists()
        if fresh or architecture not in twins:
            label = (entry.label if fresh else None) or f"random weights, {backbone.name}"
            twins[architecture] = Entrant(label, "random", _fresh_weights(entry), architecture, **facts)
        if not fresh:
            weights = cache_key(weights=weights_identity(backbone), size=backbone.input_size)
            given.append(Entrant(entry.label or target.title, "given", _weights_of(entry), weights, **facts))
    return given + _told_apart(list(twins.values()))


def _resolve(entry: GauntletBackbone) -> Target:
    changed = bool(entry.size or entry.kwargs or entry.name)
    config = BackboneConfig(name=entry.name or entry.target, size=entry.size, kwargs=entry.kwargs) if changed else None
    target = resolve_target(EvaluateRun(target=entry.target, backbone=config, pretrained=entry.pretrained))
    if changed and target.folder is not None:
        raise ConfigError(f"backbones: {entry.target} brings its own network; remove name, size and kwargs")
    return target


def _weights_of(entry: GauntletBackbone) -> Callable[[int], Backbone]:
    return lambda _: _resolve(entry).backbone


def _fresh_weights(entry: GauntletBackbone) -> Callable[[int], Backbone]:
    return lambda seed: random_twin(_resolve(entry).backbone, seed)


def _architecture(backbone: Backbone, recalibrate: int) -> str:
    """Hash of all that random weights and their features depend on, beside the seed."""
    return cache_key(
        name=backbone.name,
        kwargs={name: list(value) if isinstance(value, tuple) else value for name, value in backbone.kwargs.items()},
        size=list(backbone.input_size),
        statistics=[list(backbone.mean), list(backbone.std)],
        recalibrate=recalibrate,
        versions=[torch.__version__, timm.__version__],
    )


def _told_apart(twins: Sequence[Entrant]) -> list[Entrant]:
    """With numbers behind labels that stand for several architectures of one name."""
    seen: Counter[str] = Counter()
    found = []
    for twin in twins:
        seen[twin.label] += 1
        found.append(replace(twin, label=f"{twin.label} ({seen[twin.label]})") if seen[twin.label] > 1 else twin)
    return found


def _group(run: GauntletRun, entrant: Entrant, data: LabeledData, init: int, evaluators: dict[str, Evaluator]) -> Group:
    seeds = (init,) if entrant.kind == "random" else run.seeds
    cells = [
        GauntletCell(entrant.label, data.label, name, seed, _key(run, entrant, data, name, seed))
        for seed in seeds
        for name, evaluator in evaluators.items()
        if entrant.build is not None or evaluator.needs != "backbone"
    ]
    return Group(entrant, data, init, tuple(cells))


def _key(run: GauntletRun, entrant: Entrant, data: LabeledData, evaluator: str, seed: int) -> str:
    """The seed is that of the evaluator and, for random weights, of the weights."""
    return cache_key(
        weights=entrant.weights,
        data=data.identity,
        evaluator=evaluator,
        settings=evaluator_config(run.evaluate, evaluator).model_dump(mode="json"),
        prefixes=run.evaluate.prefixes,
        recalibrate=entrant.recalibrate,
        seed=seed,
        version=__version__,
    )
