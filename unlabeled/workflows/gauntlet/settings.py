"""Settings of ``unlabeled gauntlet``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import composed, parse, validate
from unlabeled.ssl.config.schema import DataConfig, EvaluateConfig, Size
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.registry import Sources, filled, labeled

_SHARED = {"batch_size", "prefixes", "recalibrate", "recalibrate_images"}
"""Settings of ``evaluate`` that have an effect here, in addition to the sections of the evaluators."""


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _entries(field: str) -> BeforeValidator:
    """Accepts one entry or a list; a plain string is short for a mapping with `field`."""
    return BeforeValidator(lambda value: [{field: one} if isinstance(one, str) else one for one in _as_list(value)])


class GauntletBackbone(Section):
    """One backbone; a bare name is its `target`."""

    target: str
    """A run folder, the name of a timm model, or a weights file (which also needs `name`)."""
    label: str | None = None
    """Name in the table; null: derived from the target."""
    pretrained: bool = True
    """For a timm name: load its published weights; false: random weights."""
    name: str | None = None
    """For a weights file: the timm model that the weights belong to."""
    size: Size | None = None
    """Side of the images that the network receives, one number or [height, width]; null: the model's own, or the run's.
    [pixels]"""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model."""


class GauntletData(DataConfig):
    """One labeled dataset; a bare name is its `name`."""

    label: str | None = None
    """Name in the table; null: the dataset's name or path."""


class GauntletRun(Section):
    """Evaluates many backbones on many datasets, in one job that you can stop and resume."""

    backbones: Annotated[tuple[GauntletBackbone, ...], _entries("target"), Field(min_length=1)]
    """Run folders, timm names or weights files: a list of names, or of mappings such as {target: resnet18, label:
    ResNet}."""
    data: Annotated[tuple[GauntletData, ...], _entries("name"), Field(min_length=1)]
    """Labeled datasets: a list of source names, or of mappings such as {name: parquet, path: FILE}."""
    evaluators: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = ("knn", "linear")
    """Evaluators to run, by name; all: every one."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Settings of the evaluators, such as evaluate.knn.k. Of the others, batch_size, prefixes and recalibrate apply."""
    measures: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Columns of the table, such as knn/k20; empty: one for each evaluator. The result files hold all of them."""
    seeds: Annotated[tuple[int, ...], BeforeValidator(_as_list), Field(min_length=1)] = (0,)
    """Seeds to repeat everything with: what evaluators draw, and random weights."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many images per split, chosen by a fixed shuffle; null: all. [images]"""
    out: Path = Path("runs/gauntlet")
    """Folder for the results, the cached features and the table."""
    retry_failed: bool = False
    """Try again what failed in an earlier job."""
    device: Literal["auto", "cpu"] = "auto"
    """Where networks run. auto: on the GPU if there is one."""
    workers: int = Field(0, ge=0)
    """Processes that load images; 0 loads them in the main process. [processes]"""

    @property
    def compute(self) -> torch.device:
        """Where networks run."""
        return torch.device("cuda" if self.device == "auto" and torch.cuda.is_available() else "cpu")

    @model_validator(mode="before")
    @classmethod
    def _one_evaluator_is_a_list(cls, values: Any) -> Any:
        # not a BeforeValidator as for the other lists: "all" has to stay a string
        if isinstance(values, dict) and isinstance(values.get("evaluators"), str) and values["evaluators"] != "all":
            return values | {"evaluators": [values["evaluators"]]}
        return values

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> GauntletRun:
        for name in sorted(self.evaluate.model_fields_set & EvaluateConfig.model_fields.keys() - _SHARED):
            remedy = f"set {name}=... instead" if name in type(self).model_fields else "remove it"
            raise ValueError(f"evaluate.{name} has no effect in a gauntlet; {remedy}")
        for name in ("seeds", "measures"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: {list(getattr(self, name))} has duplicates; give each once")
        return self


def gauntlet_config(overrides: Sequence[str]) -> GauntletRun:
    """Returns the validated settings of ``unlabeled gauntlet``. Raises ConfigError."""
    overrides = [_with_quoted_paths(override) for override in overrides]
    # hydra would read data=[...] as a list of group choices, so such an override is taken out and merged by hand
    data = [override for override in overrides if override.startswith("data=")]
    listed = _list_in(data[-1]) if data else None
    others = [one for one in overrides if one not in data or (listed is None and _list_in(one) is None)]
    # `composed`, not `compose_settings`: data has to be inserted between composition and validation
    composition = composed("gauntlet", others, choices={"data": Sources()})
    if listed is not None:
        if inside := next((override for override in others if override.startswith("data.")), None):
            raise ConfigError(f"{inside}: data is a list; set this inside one of its mappings")
        composition["data"] = listed
    run = validate(composition, GauntletRun)
    entries = [
        filled(labeled(entry, f"data.{position}"), f"data.{position}") for position, entry in enumerate(run.data)
    ]
    return run.model_copy(update={"data": tuple(entries)})


_QUOTED_OR_EQUALS = re.compile(r""""[^"]*"|'[^']*'|([^][{},:"'\s]+=[^][{},:"'\s]*)""")
"""Quoted text, or (as a group) an entry of a list that contains an equals sign."""


def _with_quoted_paths(override: str) -> str:
    """``backbones=[...]`` with quotes around paths such as ``runs/sweep/task=mae``, which hydra's grammar refuses."""
    if not override.startswith("backbones=["):
        return override

    def quoted(found: re.Match[str]) -> str:
        path = found[1]
        if path is None:
            return found[0]
        if not Path(path).expanduser().exists():  # mistyped, or the first half of a path with a comma
            raise ConfigError(
                f'backbones: the path {path} contains "="; quote it inside the list: \'backbones=["{path}"]\''
            )
        return f'"{path}"'

    name, _, value = override.partition("=")
    return f"{name}={_QUOTED_OR_EQUALS.sub(quoted, value)}"


def _list_in(override: str) -> list[Any] | None:
    """The list in ``data=[...]``; None for another value."""
    value = parse([override])[0].value()
    return value if isinstance(value, list) else None
