"""The plan of a gauntlet: rows, datasets, and cells with a hash of everything that their result depends on."""

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
"""(training split, test split)."""


@dataclass(frozen=True)
class Entrant:
    """One row of the table."""

    label: str
    kind: Kind
    build: Callable[[int], Backbone] | None
    """Seed of random weights → the backbone; None: raw pixels."""
    weights: str = "pixels"
    """Hash of the weights and the input size; for random weights, of the architecture (the cell has the seed)."""
    backbone: str = ""
    """timm name, with the arguments that change it."""
    parameters: int = 0
    input_size: tuple[int, int] | None = None
    """(h, w) in pixels; None for raw pixels."""
    recalibrate: int = 0
    """Training images on which batch-norm statistics are recomputed; 0: they are kept."""


@dataclass(frozen=True)
class LabeledData:
    """One dataset."""

    label: str
    sources: Sources
    identity: str
    """Hash of both splits."""
    majority: float
    """Fraction of the test images in the most common training class."""

    @property
    def images(self) -> tuple[int, int]:
        """Number of training and test images, including unreadable ones."""
        return len(self.sources[0]), len(self.sources[1])


@dataclass(frozen=True)
class GauntletCell:
    """One evaluator on the features of one row on one dataset, with one seed."""

    entrant: str
    data: str
    evaluator: str
    seed: int
    key: str
    """Hash of everything that the result depends on."""


@dataclass(frozen=True)
class Group:
    """Cells that share their features, which are therefore computed once."""

    entrant: Entrant
    data: LabeledData
    init: int
    """Seed of random weights; ignored for other rows."""
    cells: tuple[GauntletCell, ...]


@dataclass(frozen=True)
class GauntletPlan:
    """Everything to measure."""

    entrants: tuple[Entrant, ...]
    data: tuple[LabeledData, ...]
    evaluators: dict[str, Evaluator]
    groups: tuple[Group, ...]

    def cells(self) -> Iterator[GauntletCell]:
        """All cells, in the order in which they are measured."""
        for group in self.groups:
            yield from group.cells


def make_plan(run: GauntletRun) -> GauntletPlan:
    """Opens everything that `run` refers to, so that errors surface before anything is computed.

    Raises ConfigError, CheckpointError or DataError like `resolve_target` and `open_source`, and ConfigError for two
    rows or datasets with the same label.
    """
    evaluators = {one.name: one for one in build_evaluators(settled(run))}
    for metric in run.measures:
        if not _may_be_measured(metric, evaluators):
            known = ", ".join(f"{name}/..." for name in evaluators)
            raise ConfigError(f"measures: {metric!r} is not a metric of {known}; give metrics such as knn/k20")
    data = tuple(_labeled(entry, run.limit) for entry in run.data)
    entrants = (*_given(run), Entrant("raw pixels", "pixels", None))
    for field, labels in (("backbones", [one.label for one in entrants]), ("data", [one.label for one in data])):
        label, count = Counter(labels).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"{field}: {count} entries have the label {label!r}; give each its own label")
    # all datasets of one row in sequence: its backbone is built once. Random weights have features of their own for
    # each seed, all other rows share theirs between seeds.
    groups = [
        _group(run, entrant, labeled, init, evaluators)
        for entrant in entrants
        for init in (run.seeds if entrant.kind == "random" else run.seeds[:1])
        for labeled in data
    ]
    return GauntletPlan(entrants, data, evaluators, tuple(groups))


def settled(run: GauntletRun) -> EvaluateConfig:
    """The complete settings of the evaluators of `run`. Raises ConfigError for invalid settings and those without
    effect."""
    chosen = run.evaluate.model_copy(update={"evaluators": run.evaluators})
    return settle(chosen, field="evaluators")


def _may_be_measured(metric: str, evaluators: Mapping[str, Evaluator]) -> bool:
    """Whether a requested metric can exist. The metrics of a plugin's evaluator are only known after it has run."""
    name = metric.partition("/")[0]
    return name in evaluators and (measure_of(metric) is not None or evaluator_origin(name) != "built in")


def _labeled(entry: GauntletData, limit: int | None) -> LabeledData:
    train, test = limited(open_source(entry, "train"), limit), limited(open_source(entry, "test"), limit)
    settings = entry.model_extra or {}
    name = Path(settings["path"]).name if settings.get("path") else entry.name
    label = str(entry.label or settings.get("dataset") or name)
    names: list[list[str]] = []
    for source in (train, test):
        labels = source.labels()
        if labels is None or source.classes is None:
            raise DataError(f"data: {label} has no labels, which every evaluator needs; set its label_column")
        names.append([source.classes[label] if label >= 0 else "" for label in labels.tolist()])
    # by name, because the splits may number their classes differently
    most_common = Counter(names[0]).most_common(1)[0][0]
    majority = float(np.mean([name == most_common for name in names[1]]))
    return LabeledData(label, (train, test), cache_key(parts=[data_identity(train), data_identity(test)]), majority)


def _given(run: GauntletRun) -> list[Entrant]:
    """The backbones of `run`, followed by random weights for each of their architectures."""
    given: list[Entrant] = []
    twins: dict[str, Entrant] = {}
    for entry in run.backbones:
        target = _resolve(entry)
        backbone = target.backbone
        masked = run.evaluate.recalibrate == "auto" and saw_masked_images_only(target)
        facts: dict[str, Any] = {
            "backbone": name_backbone(backbone),
            "parameters": count_parameters(backbone),
            "input_size": backbone.input_size,
            "recalibrate": recalibration_images(run.evaluate, backbone, masked),
        }
        architecture = _architecture(backbone, facts["recalibrate"])
        # an entry with random weights is itself the baseline of its architecture
        fresh = not entry.pretrained and not Path(entry.target).expanduser().exists()
        if fresh or architecture not in twins:
            label = (entry.label if fresh else None) or f"random weights, {backbone.name}"
            twins[architecture] = Entrant(label, "random", _fresh_weights(entry), architecture, **facts)
        if not fresh:
            weights = cache_key(weights=weights_identity(backbone), size=backbone.input_size)
            given.append(Entrant(entry.label or target.title, "given", _weights_of(entry), weights, **facts))
    return given + _with_unique_labels(list(twins.values()))


def _resolve(entry: GauntletBackbone) -> Target:
    changed = bool(entry.size or entry.kwargs or entry.name)
    config = BackboneConfig(name=entry.name or entry.target, size=entry.size, kwargs=entry.kwargs) if changed else None
    target = resolve_target(EvaluateRun(target=entry.target, backbone=config, pretrained=entry.pretrained))
    if changed and target.folder is not None:
        raise ConfigError(f"backbones: {entry.target} is a run with its own backbone; remove name, size and kwargs")
    return target


# Both builders below load the weights again when called: only one backbone at a time has to fit into memory.
def _weights_of(entry: GauntletBackbone) -> Callable[[int], Backbone]:
    return lambda _: _resolve(entry).backbone


def _fresh_weights(entry: GauntletBackbone) -> Callable[[int], Backbone]:
    return lambda seed: random_twin(_resolve(entry).backbone, seed)


def _architecture(backbone: Backbone, recalibrate: int) -> str:
    """Hash of everything that random weights and their features depend on, except the seed."""
    return cache_key(
        name=backbone.name,
        kwargs={name: list(value) if isinstance(value, tuple) else value for name, value in backbone.kwargs.items()},
        size=list(backbone.input_size),
        statistics=[list(backbone.mean), list(backbone.std)],
        recalibrate=recalibrate,
        # how torch and timm draw initial weights may change between versions
        versions=[torch.__version__, timm.__version__],
    )


def _with_unique_labels(twins: Sequence[Entrant]) -> list[Entrant]:
    """Adds the input size to labels of architectures that have the same name, and a number if that does not help."""
    alike = Counter(twin.label for twin in twins)
    counts: Counter[str] = Counter()
    found = []
    for twin in twins:
        label = twin.label
        if alike[label] > 1 and twin.input_size is not None:
            height, width = twin.input_size
            label += f" at {height} px" if height == width else f" at {height} x {width} px"
        counts[label] += 1
        found.append(replace(twin, label=f"{label} ({counts[label]})" if counts[label] > 1 else label))
    return found


def _group(run: GauntletRun, entrant: Entrant, data: LabeledData, init: int, evaluators: dict[str, Evaluator]) -> Group:
    seeds = (init,) if entrant.kind == "random" else run.seeds
    cells = [
        GauntletCell(entrant.label, data.label, name, seed, _key(run, entrant, data, name, seed))
        for seed in seeds
        for name, evaluator in evaluators.items()
        # raw pixels have no backbone to give such evaluators
        if entrant.build is not None or evaluator.needs != "backbone"
    ]
    return Group(entrant, data, init, tuple(cells))


def _key(run: GauntletRun, entrant: Entrant, data: LabeledData, evaluator: str, seed: int) -> str:
    """Hash that identifies a cell. `seed` is the seed of the evaluator and, for random weights, of the weights."""
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
