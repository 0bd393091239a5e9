"""What can be set, and what it means: every setting of commands, tasks, evaluators and sources, from their source.

The tables of ``unlabeled settings``, shell completion and the pages of the docs all come from here. A setting's type
and default are those of its field; its unit and meaning are the field's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from unlabeled.eval.registry import evaluator_class, evaluator_names
from unlabeled.pretext.registry import Recipes, task_class, task_names
from unlabeled.ssl.config.docstrings import FieldText, field_texts, first_sentence
from unlabeled.ssl.config.readable import REQUIRED, choices_in, readable_type, shape_of, typed_value
from unlabeled.ssl.config.schema import (
    BackboneConfig,
    DataConfig,
    DoctorRun,
    EngineConfig,
    EvaluateConfig,
    EvaluateRun,
    ExportRun,
    LogConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
)
from unlabeled.ssl.core.errors import ConfigError, nearest
from unlabeled.ssl.data.registry import source_class, source_names
from unlabeled.ssl.task import TaskConfig
from unlabeled.workflows.compatibility.measure import MatrixRun
from unlabeled.workflows.finetune.config import FinetuneConfig
from unlabeled.workflows.gauntlet.settings import GauntletRun

GROUPS: Mapping[str, type[BaseModel]] = {
    "run": RunConfig,
    "data": DataConfig,
    "backbone": BackboneConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "engine": EngineConfig,
    "evaluate": EvaluateConfig,
    "log": LogConfig,
}
"""Sections that several commands share, in the order in which a user meets them; ``run`` stands for what is in none."""

COMMANDS: Mapping[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateRun,
    "finetune": FinetuneConfig,
    "gauntlet": GauntletRun,
    "export": ExportRun,
    "doctor": DoctorRun,
    "matrix": MatrixRun,
}
"""Commands that take settings."""

_KINDS = ("task", "evaluator", "data")
_RESULT = ("module", "fingerprint")
"""Fields of `BackboneConfig` that a run writes and nobody sets."""


@dataclass(frozen=True)
class Setting:
    """One setting of a command, a task, an evaluator or a source."""

    name: str
    """What is typed before the equals sign, such as ``optim.lr`` or ``task.decoder.depth``."""
    type: str
    """Readable: ``number``, ``integer or null``, ``true/false``, ``one of: cosine, step``, ``list of integers``."""
    default: str
    """As it would be typed; ``required`` where there is none; empty for a whole group of settings."""
    unit: str
    """Such as ``pixels``; empty without one."""
    meaning: str
    """One paragraph of plain text."""
    choices: tuple[str, ...] = ()
    """Every word that is possible, where these are few; for completion."""


@dataclass(frozen=True)
class SettingsTable:
    """The settings of one thing, with a heading."""

    title: str
    """Such as ``task=mae``."""
    summary: str
    """The first sentence about it."""
    settings: tuple[Setting, ...]
    recipe: tuple[tuple[str, str], ...] = ()
    """Of a task: setting and value of everything that ``task=NAME`` sets of a run."""


def group_settings(group: str) -> list[Setting]:
    """The settings of a group, such as ``optim``. Raises ConfigError for an unknown one."""
    model = _known(group, GROUPS, "group of settings")
    if group == "run":
        return [one for one in _walk(model, "") if "." not in one.name]
    return list(_walk(model, f"{group}."))


def command_settings(command: str) -> list[Setting]:
    """The settings of a command, required ones first and those in sections last; a shared group is one line."""
    found = _walk(_known(command, COMMANDS, "command with settings"), "")
    return sorted(found, key=lambda one: ("." in one.name, "." not in one.name and one.default != REQUIRED))


def task_settings(task: str) -> list[Setting]:
    """The settings of a task, ``task.*``."""
    return list(_walk(task_class(task).Config, "task."))


def evaluator_settings(evaluator: str) -> list[Setting]:
    """The settings of an evaluator, ``evaluate.NAME.*``."""
    return list(_walk(evaluator_class(evaluator).Config, f"evaluate.{evaluator}."))


def source_settings(source: str) -> list[Setting]:
    """The settings of a data source, ``data.*``."""
    return list(_walk(source_class(source).Config, "data."))


def task_recipe(task: str) -> list[tuple[str, str]]:
    """(setting, value) of everything that ``task=NAME`` sets of a run."""
    return [pair for pair in _leaves(Recipes()[task], "") if pair[0] != "task.name"]


def describe(what: str) -> list[SettingsTable]:
    """What ``unlabeled settings WHAT`` shows: of a group or command, or of ``task=``, ``evaluator=`` or ``data=NAME``.

    Raises ConfigError, with the nearest names, for anything else.
    """
    kind, equals, name = what.partition("=")
    if equals and kind == "task":
        table = SettingsTable(what, _says(task_class(name)), tuple(task_settings(name)), tuple(task_recipe(name)))
    elif equals and kind == "evaluator":
        table = SettingsTable(what, _says(evaluator_class(name).Config), tuple(evaluator_settings(name)))
    elif equals and kind == "data":
        table = SettingsTable(what, _says(source_class(name).Config), tuple(source_settings(name)))
    else:
        return list(_of_name(what))
    return [table]


def _of_name(what: str) -> Iterator[SettingsTable]:
    """A group and a command of one name, such as ``evaluate``, are both shown."""
    if what not in GROUPS and what not in COMMANDS:
        raise ConfigError(f"settings: {what!r} is no group or command; {_meant(what)}")
    if what in COMMANDS:
        model = COMMANDS[what]
        yield SettingsTable(f"unlabeled {what}", _says(model), tuple(command_settings(what)))
    if what in GROUPS:
        yield SettingsTable(what, _says(GROUPS[what]), tuple(group_settings(what)))


def _meant(what: str) -> str:
    """A task, evaluator or source that was given without what it is, or the nearest names."""
    names = {"task": task_names(), "evaluator": evaluator_names(), "data": source_names()}
    equals = "=" in what
    if not equals and (found := [f"{one}={what}" for one in _KINDS if what in names[one]]):
        return "did you mean " + " or ".join(found) + "?"
    if equals:
        return "write task=NAME, evaluator=NAME or data=NAME"
    return nearest(what, {**GROUPS, **COMMANDS})


def _known(name: str, known: Mapping[str, type[BaseModel]], noun: str) -> type[BaseModel]:
    if name not in known:
        raise ConfigError(f"settings: {name!r} is no {noun}; {nearest(name, known)}")
    return known[name]


def _says(cls: type[Any]) -> str:
    return first_sentence(cls.__doc__)


def _walk(model: type[BaseModel], prefix: str, given: BaseModel | None = None) -> Iterator[Setting]:
    """The settings of `model`, with those of sections inside it under dotted names.

    `given` holds defaults that replace those of `model`. A section that is one of `GROUPS` is one line.
    """
    texts = field_texts(model)
    for name, field in model.model_fields.items():
        if issubclass(model, BackboneConfig) and name in _RESULT:
            continue
        text, whole = texts.get(name, FieldText("", "")), f"{prefix}{name}"
        default = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        shape = shape_of(field.annotation)
        section = next((one for one in shape.members if _is_section(one)), None)
        if section is TaskConfig:  # a mixture: the fields of each task are written next to its name
            yield Setting(f"{prefix}KEY", "any value", "the task's own", "", text.meaning)
        elif section is not None and section in GROUPS.values():
            yield _group_line(whole, section, field, text)
        else:
            if section is None or shape != ((section,), False):
                yield _setting(whole, field, default, text)
            if section is not None:
                yield from _walk(section, f"{whole}.", default if isinstance(default, section) else None)
            elif (entry := _entry(shape.members)) is not None:
                yield from _walk(entry, f"{whole}[N].")


def _setting(name: str, field: FieldInfo, default: Any, text: FieldText) -> Setting:
    choices = tuple(choices_in(field.annotation))
    return Setting(name, readable_type(field.annotation), typed_value(default), text.unit, text.meaning, choices)


def _group_line(name: str, section: type[BaseModel], field: FieldInfo, text: FieldText) -> Setting:
    group = next(group for group, model in GROUPS.items() if model is section)
    meaning = f"{text.meaning or _says(section)} See: unlabeled settings {group}"
    default = "null" if field.default is None else ""  # what it is otherwise, its own settings say
    return Setting(f"{name}.*", readable_type(field.annotation), default, "", meaning)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _entry(members: Sequence[Any]) -> type[BaseModel] | None:
    """The settings of which a list has one set for each entry; None for any other type."""
    arguments = [shape_of(one) for member in members for one in get_args(member)]
    found = [one for shape in arguments for one in shape.members if _is_section(one)]
    return found[0] if found else None


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", typed_value(value)


def overview() -> dict[str, dict[str, str]]:
    """Kind → name → what it is, in one sentence: everything that `describe` takes."""
    return {
        "Commands": {name: _says(model) for name, model in COMMANDS.items()},
        "Groups of settings": {name: _says(model) for name, model in GROUPS.items()},
        "Tasks": {name: _tried(name, task_class) for name in task_names()},
        "Evaluators": {name: _tried(name, lambda one: evaluator_class(one).Config) for name in evaluator_names()},
        "Data sources": {name: _tried(name, lambda one: source_class(one).Config) for name in source_names()},
    }


def _tried(name: str, find: Callable[[str], type[Any]]) -> str:
    """The first sentence of what `find` gives; the reason where a plugin cannot be imported."""
    try:
        return _says(find(name))
    except ConfigError as error:
        return str(error)
