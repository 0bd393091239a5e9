"""From overrides on the command line and YAML files in ``configs/`` to a validated configuration.

Hydra composes (groups ``task``, ``data``, ``recipe``; overrides; sweeps), pydantic validates. Overrides that Hydra
would refuse or misread are handled here, so that each mistake gives an error of one line:

* ``backbone=NAME`` is short for ``backbone.name=NAME``;
* any other override is passed on as add-or-override (``++``), and pydantic reports a setting that does not exist.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.messages import explain, in_short
from unlabeled.ssl.config.renamed import new_name, with_new_names
from unlabeled.ssl.core.errors import ConfigError, first_line, nearest
from unlabeled.ssl.core.plain import number

GROUPS = ("task", "data", "recipe")
"""Groups that ``group=option`` chooses from: files in ``configs/``, tasks and data sources."""

_NAMED = ("backbone", "evaluate.data")
"""Sections that accept a bare name: ``backbone=NAME`` means ``backbone.name=NAME``."""

Choices = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Group → name → settings that an override such as ``task=mae`` stands for. Only the chosen names are looked up."""

SectionT = TypeVar("SectionT", bound=Section)


def config_folder() -> Path:
    """``configs/``: inside the installed package, or next to the package in a clone."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ConfigError(f"configs: not found next to {package}; install the package again")


def options(group: str) -> list[str]:
    """Names of the files in ``configs/`` that ``group=`` accepts, such as ``cifar10/mae_vit`` for recipes."""
    folder = config_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def compose_config(
    command: str,
    overrides: Sequence[str],
    model: type[SectionT],
    *,
    values: Mapping[str, Any] | None = None,
    choices: Choices | None = None,
) -> SectionT:
    """The configuration of `command` (``pretrain``, ``evaluate``, ``doctor``) with the given overrides and values.

    Raises ConfigError for an override that cannot be parsed, an unknown setting, or an impossible value.
    """
    return validate(composed(command, overrides, values=values, choices=choices), model)


def composed(
    command: str, overrides: Sequence[str], *, values: Mapping[str, Any] | None = None, choices: Choices | None = None
) -> dict[str, Any]:
    """Like `compose_config`, but before validation: mappings, lists and plain values.

    `choices` are names that ``task=NAME`` and the like accept in addition to the files in ``configs/``. `values` are
    Python objects that take precedence over everything else and are never parsed; a mapping is merged into the section
    of its name, anything else replaces it.
    """
    chosen, given = _split(values or {})
    parsed = parse(overrides)
    # Hydra reads the chosen tasks and sources as if they were files
    _store(choices or {}, _choices_of(command, parsed) | set(chosen.items()))
    lines = [_group_override(group, name, choices or {}) for group, name in chosen.items()]
    lines += [_to_hydra(override, choices or {}) for override in parsed]
    try:
        with initialize_config_dir(str(config_folder()), version_base=None):
            config = compose(command, overrides=[line for line in lines if line is not None])
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {first_line(error)}") from None
    # Python objects are merged after Hydra, which would parse text and refuse other types
    return merged(with_new_names(plain), given)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`: mappings are merged key by key, any other value of `over` replaces that of `under`."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def set_within(section: str, overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> set[str]:
    """Names of the settings in `section` that the overrides and values set, ignoring files."""
    _, nested = _split(values or {})
    found = set(nested.get(section, ()))
    for override in parse(overrides):
        first, _, inside = override.key_or_group.partition(".")
        if first == section:
            value = None if inside or override.is_delete() else override.value()
            # section.name=... sets one name, section={...} sets those of the mapping
            found |= {inside.partition(".")[0]} if inside else set(value if isinstance(value, Mapping) else ())
    return found


def _choices_of(command: str, parsed: Sequence[Override]) -> set[tuple[str, str]]:
    """(group, name) of everything that the overrides, the command's file or the recipe's file choose."""
    chosen = {(override.key_or_group, str(override.value())) for override in parsed}
    files = [config_folder() / f"{command}.yaml"]
    files += [_recipe_file(name) for group, name in chosen if group == "recipe"]
    for file in files:  # grows while it is iterated over
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for entry in content.get("defaults", ()):
            if isinstance(entry, str) and entry != "_self_":  # a recipe that begins with another one
                files.append(_recipe_file(entry))
            pairs = entry.items() if isinstance(entry, Mapping) else ()
            # keys of a defaults list look like "task", "optional data" or "override /task"
            chosen |= {(str(key).rpartition(" ")[2].strip("/"), str(value)) for key, value in pairs}
    return chosen


def _recipe_file(name: str) -> Path:
    return config_folder() / "recipe" / f"{name}.yaml"


def _store(choices: Choices, chosen: set[tuple[str, str]]) -> None:
    """Registers the `chosen` entries of `choices` with Hydra as if they were files in ``configs/``."""
    for group, name in chosen:  # not all of `choices`: looking one up imports its class
        if name in choices.get(group, ()):
            ConfigStore.instance().store(group=group, name=name, node=dict(choices[group][name]), package="_global_")


def _split(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Splits keyword arguments into (group → chosen name) and the remaining settings as nested mappings.

    A key with dots or double underscores addresses a nested setting: ``optim__lr=1e-3``. It takes precedence over the
    section as a mapping, ``optim={"lr": ...}``, in whichever order they come. Where a section has a name, the bare name
    is enough. Raises ConfigError for one key in two spellings.
    """
    nested: dict[str, Any] = {}
    paths = {key: key.replace("__", ".").split(".") for key in values}
    # short paths first, so that optim__lr=... is merged on top of optim={...}
    for key, path in sorted(paths.items(), key=lambda item: len(item[1])):
        if other := next((one for one, its in paths.items() if its == path and one != key), None):
            raise ConfigError(f"{'.'.join(path)}: given twice, as {key} and as {other}; give it once")
        tree = _plain(values[key])
        for name in reversed(path):
            tree = {name: tree}
        for section_path in (*GROUPS, *_NAMED):
            tree = _with_name(tree, section_path.split("."))
        nested = _merge_checked(nested, tree)
    # the names of groups become overrides of their own, so that Hydra loads the file of that name
    chosen = {}
    for group in GROUPS:
        section = nested.get(group)
        if isinstance(section, Mapping) and "name" in section:
            chosen[group] = str(section["name"])
            nested[group] = {field: inner for field, inner in section.items() if field != "name"}
    nested.pop("recipe", None)  # a recipe has no settings but its name
    return chosen, with_new_names(nested)


def _with_name(tree: Any, path: Sequence[str]) -> Any:
    """`tree`, with a string at `path` replaced by ``{"name": string}``."""
    if not isinstance(tree, Mapping) or path[0] not in tree:
        return tree
    inner, rest = tree[path[0]], path[1:]
    changed = _with_name(inner, rest) if rest else {"name": inner} if isinstance(inner, str) else inner
    return {**tree, path[0]: changed}


def _merge_checked(under: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Like `merged`, but raises ConfigError where `over` has a section and `under` a value that is not one."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key, value)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = _merge_checked(below, value, f"{prefix}{key}.")
        elif isinstance(value, Mapping):
            shown = f"{in_short(below)} and {in_short(value)}"
            raise ConfigError(f"{prefix}{key}: given twice, {shown}; give it once")
        else:
            result[key] = value
    return result


def _plain(value: Any) -> Any:
    """A section as a mapping of the settings that were set in it, a numpy or torch scalar as a number; anything else
    unchanged."""
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in value.model_fields_set}
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else number(value)


def validate(values: Any, model: type[SectionT]) -> SectionT:
    """`values` validated as `model`. Raises ConfigError, one line, for the first value that is not possible."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parses overrides with Hydra's grammar. Raises ConfigError for one that is not ``key=value``."""
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            found = os.path.exists(text)  # Path.exists raises for text that cannot be a path
            hint = f"for a folder of images write data=folder data.path={text}"
            remedy = hint if found else "write key=value, such as epochs=100"
            raise ConfigError(f"{text!r} is not a setting; {remedy}")
        try:
            parsed += OverridesParser.create().parse_overrides([_dotted(text)])
        except HydraException as error:
            raise ConfigError(
                f"{text!r} cannot be read ({first_line(error)}); quote special characters: 'key=\"value\"'"
            ) from None
    return parsed


def _dotted(text: str) -> str:
    """``task.tasks[1].weight=2`` in Hydra's notation, ``task.tasks.1.weight=2``, under the setting's present name."""
    key, equals, value = text.partition("=")
    prefix = re.match(r"[+~]*", key)
    assert prefix is not None, "the pattern also matches nothing"
    return prefix[0] + new_name(re.sub(r"\[(\d+)\]", r".\1", key[prefix.end() :])) + equals + value


def sweep(overrides: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """For ``--multirun``: every combination of the swept values, as (overrides, label of the combination).

    Sweeps use Hydra's notation: ``optim.lr=1e-3,1e-4``, ``engine.seed=range(3)``, ``task=mae,rotation``.
    """
    choices: list[list[tuple[str, str]]] = []
    for override in parse(overrides):
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
            choices.append(
                [(f"{override.key_or_group}={value}", f"{override.key_or_group}={value}") for value in values]
            )
        else:
            choices.append([(str(override.input_line), "")])
    for combination in itertools.product(*choices):
        label = ",".join(label for _, label in combination if label)
        # a label names the folder of its run, so it must not contain a slash
        yield [override for override, _ in combination], label.replace("/", "_")


def _to_hydra(override: Override, choices: Choices) -> str | None:
    """An override as Hydra expects it; None if there is nothing to pass on."""
    key, line = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        raise ConfigError(f"{line!r} asks for a sweep; add --multirun, or quote the value: '{key}=\"...\"'")
    if key in GROUPS and "." not in key and not isinstance(override.value(), dict):
        return _group_override(key, str(override.value()), choices)
    if key in (*_NAMED, "task") and isinstance(override.value(), str):
        return f"++{key}.name={override.get_value_element_as_str()}"
    if line.startswith("~"):  # a deletion
        return line
    # add or override: Hydra would refuse a key that no YAML file has, and its message is longer than pydantic's
    return f"++{line.lstrip('+')}"


def _group_override(group: str, option: str, choices: Choices) -> str | None:
    if option == "None" and group == "recipe":  # recipe=null
        return None
    known = sorted({*options(group), *choices.get(group, ())})
    if option in known:
        return f"{group}={option}"
    if group in choices:
        choices[group][option]  # raises the ConfigError of the group's registry, which knows what to suggest
    raise ConfigError(f"{group}: {option!r} does not exist; {nearest(option, known)}")
