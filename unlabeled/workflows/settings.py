"""Turns the overrides and values of a command into its settings, including those of tasks and sources."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from unlabeled.eval.registry import settle
from unlabeled.pretext.registry import Recipes
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import adopt
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import compose_config, parse, set_within
from unlabeled.ssl.config.messages import in_short
from unlabeled.ssl.config.schema import BackboneConfig, DataConfig, EvaluateConfig, RunConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.core.plain import whole
from unlabeled.ssl.data.registry import Sources, filled, source_names
from unlabeled.ssl.data.registry import tiny as tiny_data

SectionT = TypeVar("SectionT", bound=Section)

logger = logging.getLogger(__name__)


def compose_settings(
    command: str, overrides: Sequence[str], model: type[SectionT], values: Mapping[str, Any] | None = None
) -> SectionT:
    """Composes the settings of `command`: its configuration file, then `overrides`, then Python `values` on top.

    Returns an instance of `model`. Data sections are validated by their source and completed with its defaults. Raises
    ConfigError for an override that cannot be parsed, an unknown setting or an invalid value.
    """
    choices = {"task": Recipes(), "data": Sources()}
    # sources are plugins with their own settings, which the composed model does not know
    return with_sources(compose_config(command, overrides, model, values=values, choices=choices))


def with_sources(config: SectionT, field: str = "") -> SectionT:
    """Completes every data section that was set with the settings of its source, also in nested sections.

    `field` is the dotted prefix for error messages.
    """
    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        # a default section stays incomplete: it may name a source that needs settings, such as a path
        if name not in config.model_fields_set or not isinstance(section, Section):
            continue
        inner = f"{field}{name}"
        found = filled(section, inner) if isinstance(section, DataConfig) else with_sources(section, f"{inner}.")
        if found is not section:
            changed[name] = found
    return config.model_copy(update=changed) if changed else config


def tiny(config: RunConfig) -> dict[str, Any]:
    """The settings that debug mode changes in any run, for `model_copy`."""
    batch = min(config.batch_size, 32)
    return {
        "epochs": 2.0,
        "batch_size": batch,
        "data": tiny_data(config.data, batch * 2),
        "engine": config.engine.model_copy(update={"workers": 0, "compile": False}),
        "schedule": config.schedule.model_copy(update={"warmup_epochs": min(config.schedule.warmup_epochs, 0.5)}),
        "log": config.log.model_copy(update={"every": 1}),
    }


def log_replaced(
    before: RunConfig, after: RunConfig, overrides: Sequence[str], values: Mapping[str, Any] | None = None
) -> None:
    """Logs which of the settings that the user gave, in `overrides` or `values`, debug mode replaced."""
    paths = [override.key_or_group.split(".") for override in parse(overrides)]
    paths += [key.replace("__", ".").split(".") for key in values or {}]
    replaced = [change for path in dict.fromkeys(map(tuple, paths)) if (change := _change(before, after, path))]
    if replaced:
        logger.info("debug=true: %s", ", ".join(replaced))


def _change(before: object, after: object, path: Sequence[str]) -> str | None:
    """``epochs 100 -> 2``; None if the setting at `path` is unchanged or a section."""
    for name in path:
        before, after = getattr(before, name, None), getattr(after, name, None)
    if before == after or isinstance(before, (Section, Mapping)):
        return None
    old, new = ("null" if value is None else str(whole(value)) for value in (before, after))
    return f"{'.'.join(path)} {old} -> {new}"


def settle_evaluation(
    evaluate: EvaluateConfig,
    overrides: Sequence[str],
    values: Mapping[str, Any] | None = None,
    *,
    also: Sequence[str] = (),
) -> EvaluateConfig:
    """Completes the settings of every evaluator that will run, so that errors surface before training.

    A setting in `overrides` or `values` must have an effect; one in a recipe file need not. `also`: evaluators that run
    in addition to the chosen ones. Raises ConfigError.
    """
    return settle(evaluate, given=set_within("evaluate", overrides, values), also=also)


def data_values(data: object) -> dict[str, Any]:
    """Converts the ``data`` argument of Python functions into settings.

    Accepts the name of a source, a folder of images, or the settings of a source; raises ConfigError for anything else.
    """
    if isinstance(data, DataConfig):
        return {name: getattr(data, name) for name in data.model_fields_set | {"name"}}
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, (str, Path)):
        # a source's name wins over a folder of the same name; write "./name" for the folder
        return {"name": data} if data in source_names() else {"name": "folder", "path": Path(data)}
    given = "a path, the name of a source, a mapping such as {'name': 'folder', 'path': ...} or a DataConfig"
    raise ConfigError(f"data: {in_short(data)} is not possible; give {given}")


def run_folder(run: object) -> Path:
    """Checks the ``run`` argument of Python functions. Raises ConfigError for anything but a path."""
    if isinstance(run, (str, Path)):
        return Path(run)
    raise ConfigError(f"run: {in_short(run)} is not possible; give a run folder, and its model as backbone=...")


def given_backbone(
    backbone: object, values: Mapping[str, Any], *, alongside: str | Path | None = None
) -> Backbone | None:
    """Returns a copy of `backbone` for the run if it is a model; None if it is a name or settings.

    `values`: the other settings; none of them may concern the backbone. `alongside`: see `adopt`. Raises ConfigError or
    CapabilityError if it cannot serve as a backbone.
    """
    if backbone is None or isinstance(backbone, (str, Mapping, BackboneConfig)):
        return None
    if isinstance(backbone, type) or not isinstance(backbone, nn.Module):
        wanted = "a timm name, a mapping such as {'name': ..., 'size': ...}, an nn.Module or an unlabeled.Backbone"
        raise ConfigError(f"backbone: {in_short(backbone)} is not possible; {_instead(backbone, wanted)}")
    for key in values:
        if key.replace("__", ".").startswith("backbone."):
            raise ConfigError(
                f"{key.replace('__', '.')}: has no effect on a module; give unlabeled.Backbone(module, size=(h, w)), "
                "and weights with unlabeled.load_weights(module, file)"
            )
    return adopt(backbone, alongside=alongside)


def _instead(given: object, wanted: str) -> str:
    """The remedy for an argument that is not a model. A class was probably passed by mistake for an instance."""
    return f"build it: {given.__name__}(...)" if isinstance(given, type) else f"give {wanted}"


class Request(NamedTuple):
    """The parsed arguments of a function such as `unlabeled.evaluate`."""

    target: str | Path
    """A run folder, a timm name or a weights file; for a model passed from Python, its class."""
    backbone: Backbone | None
    """The model, if it is passed from Python."""
    values: dict[str, Any]
    """The other settings."""


def read_request(target: object, data: object, settings: Mapping[str, Any]) -> Request:
    """Parses the arguments of `unlabeled.evaluate` and `unlabeled.finetune`.

    Raises ConfigError or CapabilityError.
    """
    values = dict(settings) if data is None else {"data": data_values(data), **settings}
    if isinstance(target, (str, Path)):
        own = given_backbone(values.get("backbone"), values, alongside=target)
        if own is not None:
            del values["backbone"]
        return Request(target, own, values)
    # from here on, the target itself is the model
    if not isinstance(target, nn.Module):
        wanted = "a run folder, a timm name, a weights file, an nn.Module or an unlabeled.Backbone"
        raise ConfigError(f"target: {in_short(target)} is not possible; {_instead(target, wanted)}")
    if "backbone" in values:
        raise ConfigError("backbone: has no effect if the target is itself a model; remove it")
    own = given_backbone(target, values)
    assert own is not None, "the target is an nn.Module"
    return Request(own.origin, own, values)
