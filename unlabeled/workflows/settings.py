"""Words and values of a command → its settings, with what tasks and sources bring of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unlabeled.eval.registry import settle
from unlabeled.pretext.registry import Recipes
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import compose_config, set_within
from unlabeled.ssl.config.schema import DataConfig, EvaluateConfig, RunConfig
from unlabeled.ssl.data.registry import Sources, filled, source_names
from unlabeled.ssl.data.registry import tiny as tiny_data

SectionT = TypeVar("SectionT", bound=Section)


def compose_settings(
    command: str, words: Sequence[str], model: type[SectionT], values: Mapping[str, Any] | None = None
) -> SectionT:
    """The settings of `command` as `model`: its file, then the words, then Python `values` on top.

    Sections of data are checked by their source, and hold all of its settings. Raises ConfigError, in one line, for a
    word that cannot be read, an unknown setting, or an impossible value.
    """
    choices = {"task": Recipes(), "data": Sources()}
    return with_sources(compose_config(command, words, model, values=values, choices=choices))


def with_sources(config: SectionT, field: str = "") -> SectionT:
    """`config` with `filled` in place of each section of data that was given, also within its sections."""
    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if name not in config.model_fields_set or not isinstance(section, Section):
            continue
        inner = f"{field}{name}"
        found = filled(section, inner) if isinstance(section, DataConfig) else with_sources(section, f"{inner}.")
        if found is not section:
            changed[name] = found
    return config.model_copy(update=changed) if changed else config


def tiny(config: RunConfig) -> dict[str, Any]:
    """What tiny mode changes of any run."""
    batch = min(config.batch_size, 32)
    return {
        "epochs": 2.0,
        "batch_size": batch,
        "data": tiny_data(config.data, batch * 2),
        "engine": config.engine.model_copy(update={"workers": 0, "compile": False}),
        "schedule": config.schedule.model_copy(update={"warmup_epochs": min(config.schedule.warmup_epochs, 0.5)}),
        "log": config.log.model_copy(update={"every": 1}),
    }


def settle_evaluation(
    evaluate: EvaluateConfig,
    words: Sequence[str],
    values: Mapping[str, Any] | None = None,
    *,
    also: Sequence[str] = (),
) -> EvaluateConfig:
    """`evaluate` with the whole settings of every evaluator that will run, refused here rather than after a training.

    What the words and values set must have an effect; what a recipe's file sets need not. `also`: evaluators that run
    beside those that are chosen. Raises ConfigError, in one line.
    """
    return settle(evaluate, given=set_within("evaluate", words, values), also=also)


def data_values(data: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What Python functions take as ``data``: the name of a source, a folder of images, or a mapping of settings."""
    if isinstance(data, Mapping):
        return dict(data)
    return {"name": data} if data in source_names() else {"name": "folder", "path": Path(data)}
