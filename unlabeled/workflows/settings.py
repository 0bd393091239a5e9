"""Words and values of a command → its settings, with what tasks and sources bring of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from unlabeled.eval.registry import settle
from unlabeled.pretext.registry import Recipes
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.given import adopt
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import compose_config, set_within
from unlabeled.ssl.config.messages import in_short
from unlabeled.ssl.config.schema import BackboneConfig, DataConfig, EvaluateConfig, RunConfig
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.registry import Sources, filled, source_names
from unlabeled.ssl.data.registry import tiny as tiny_data

SectionT = TypeVar("SectionT", bound=Section)


def compose_settings(
    command: str, overrides: Sequence[str], model: type[SectionT], values: Mapping[str, Any] | None = None
) -> SectionT:
    """The settings of `command` as `model`: its file, then the words, then Python `values` on top.

    Sections of data are checked by their source, and hold all of its settings. Raises ConfigError, in one line, for a
    word that cannot be read, an unknown setting, or an impossible value.
    """
    choices = {"task": Recipes(), "data": Sources()}
    return with_sources(compose_config(command, overrides, model, values=values, choices=choices))


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
    overrides: Sequence[str],
    values: Mapping[str, Any] | None = None,
    *,
    also: Sequence[str] = (),
) -> EvaluateConfig:
    """`evaluate` with the whole settings of every evaluator that will run, refused here rather than after a training.

    What the words and values set must have an effect; what a recipe's file sets need not. `also`: evaluators that run
    beside those that are chosen. Raises ConfigError, in one line.
    """
    return settle(evaluate, given=set_within("evaluate", overrides, values), also=also)


def data_values(data: object) -> dict[str, Any]:
    """What Python functions take as ``data``: the name of a source, a folder of images, or settings of a source.

    Raises ConfigError for anything else.
    """
    if isinstance(data, DataConfig):
        return {name: getattr(data, name) for name in data.model_fields_set | {"name"}}
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, (str, Path)):
        return {"name": data} if data in source_names() else {"name": "folder", "path": Path(data)}
    given = "a path, the name of a source, a mapping such as {'name': 'folder', 'path': ...} or a DataConfig"
    raise ConfigError(f"data: {in_short(data)} is not possible; give {given}")


def run_folder(run: object) -> Path:
    """What Python functions take as a run. Raises ConfigError for anything but a path, such as the network itself."""
    if isinstance(run, (str, Path)):
        return Path(run)
    raise ConfigError(f"run: {in_short(run)} is not possible; give a run's folder, and its network as backbone=...")


def given_backbone(
    backbone: object, values: Mapping[str, Any], *, alongside: str | Path | None = None
) -> Backbone | None:
    """The run's own copy of `backbone` where that is a network itself; None where it is a name or settings.

    `values`: the other settings, none of which may be of the backbone. `alongside`: see `adopt`. Raises
    ConfigError or CapabilityError for what is no backbone.
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
    """The remedy for what is no network; a class is one that was not built."""
    return f"build it: {given.__name__}(...)" if isinstance(given, type) else f"give {wanted}"


class Request(NamedTuple):
    """What a function such as `unlabeled.evaluate` is to work on."""

    target: str | Path
    """A run folder, a timm name or a file of weights; of a network that is given itself, its class."""
    backbone: Backbone | None
    """The network, where it is given from Python."""
    values: dict[str, Any]
    """The other settings."""


def read_request(target: object, data: object, settings: Mapping[str, Any]) -> Request:
    """Arguments of `unlabeled.evaluate` and `unlabeled.finetune`. Raises ConfigError or CapabilityError."""
    values = dict(settings) if data is None else {"data": data_values(data), **settings}
    if isinstance(target, (str, Path)):
        own = given_backbone(values.get("backbone"), values, alongside=target)
        if own is not None:
            del values["backbone"]
        return Request(target, own, values)
    if not isinstance(target, nn.Module):
        wanted = "a run folder, a timm name, a file of weights, an nn.Module or an unlabeled.Backbone"
        raise ConfigError(f"target: {in_short(target)} is not possible; {_instead(target, wanted)}")
    if "backbone" in values:
        raise ConfigError("backbone: has no effect beside a target that is a network itself; leave it out")
    own = given_backbone(target, values)
    assert own is not None, "an nn.Module is a network"
    return Request(own.origin, own, values)
