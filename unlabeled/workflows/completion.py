"""Shell completion: scripts that hold every name themselves, so that a TAB starts no Python.

The names are those of the moment at which the script is written: commands, options, settings, tasks, evaluators,
sources and recipes, those of installed packages too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unlabeled.eval.registry import evaluator_names
from unlabeled.pretext.registry import task_names
from unlabeled.ssl.config.composition import options
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.registry import source_names
from unlabeled.workflows import describe_settings as described
from unlabeled.workflows.describe_settings import COMMANDS, GROUPS, Setting

SHELLS = ("bash", "zsh", "fish")
_TEMPLATES = Path(__file__).with_name("completion_scripts")
_HAS_DATA = ("pretrain", "evaluate", "finetune", "export", "doctor")
"""Commands with a section of data. A gauntlet has a list, the settings of which are inside of it."""


@dataclass
class Names:
    """Everything that can be completed."""

    options: dict[str, list[str]]
    """Command → its options, such as ``--multirun``."""
    keys: dict[str, list[str]] = field(default_factory=dict)
    """Command → settings, without those of tasks and sources."""
    task_keys: dict[str, list[str]] = field(default_factory=dict)
    """Task → its settings."""
    source_keys: dict[str, list[str]] = field(default_factory=dict)
    """Source → its settings."""
    values: dict[str, list[str]] = field(default_factory=dict)
    """Setting → the words that it can have, also within a list."""
    topics: list[str] = field(default_factory=list)
    """What ``unlabeled settings`` takes."""


def completion_script(shell: str, command_options: Mapping[str, Sequence[str]]) -> str:
    """The script for `shell`; `command_options`: command → its options. Raises ConfigError for another shell."""
    if shell not in SHELLS:
        raise ConfigError(f"completion: {shell!r} is not possible; give {', '.join(SHELLS)}")
    names = collect({command: list(found) for command, found in command_options.items()})
    language = "fish" if shell == "fish" else "bash"  # zsh runs functions made for bash
    template = (_TEMPLATES / f"unlabeled.{language}").read_text(encoding="utf-8")
    tables = _fish_tables(names) if language == "fish" else _bash_tables(names)
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return start + template.replace("# @tables@\n", tables)


def collect(command_options: dict[str, list[str]]) -> Names:
    """All names; those of plugins that cannot be imported are left out, with their settings."""
    names = Names(command_options)
    shared = [one for group in GROUPS if group not in ("run", "evaluate") for one in described.group_settings(group)]
    evaluation = described.group_settings("evaluate")
    for name in evaluator_names():
        evaluation += _tried(described.evaluator_settings, name)
    for command in COMMANDS:
        found = described.command_settings(command)
        groups = {one.name.removesuffix(".*") for one in found if one.name.endswith(".*")}
        found += [one for one in shared if one.name.partition(".")[0] in groups]
        found += evaluation if "evaluate" in groups else []
        names.keys[command] = _keys(found, names)
    for task in task_names():
        names.task_keys[task] = _keys(_tried(described.task_settings, task), names)
    for source in source_names():
        names.source_keys[source] = _keys(_tried(described.source_settings, source), names)
    _named(names)
    return names


def _named(names: Names) -> None:
    """What names stand for whole sections, and the values that are names themselves."""
    names.keys["pretrain"] += ["task", "data", "backbone", "recipe"]
    for command in set(_HAS_DATA) - {"pretrain"}:
        names.keys[command].append("data")
    names.values |= dict.fromkeys(("data", "data.name", "evaluate.data"), source_names())
    names.values |= {"task": task_names(), "recipe": options("recipe")}
    names.values |= {key: [*evaluator_names(), "all"] for key in ("evaluators", "evaluate.evaluators")}
    kinds = {"task": task_names(), "evaluator": evaluator_names(), "data": source_names()}
    names.topics = [*dict.fromkeys([*COMMANDS, *GROUPS])]
    names.topics += [f"{kind}={name}" for kind, known in kinds.items() for name in known]


def _keys(settings: Sequence[Setting], names: Names) -> list[str]:
    """Names that can be typed as they are; their possible values go to `names`."""
    found = [one for one in settings if re.fullmatch(r"[\w.]+", one.name) and one.name not in ("target", "run")]
    names.values |= {one.name: list(one.choices) for one in found if one.choices}
    return [one.name for one in found]


def _tried(find: Callable[[str], list[Setting]], name: str) -> list[Setting]:
    try:
        return find(name)
    except ConfigError:  # of a plugin that cannot be imported
        return []


def _tables(names: Names) -> dict[str, dict[str, list[str]]]:
    """Function → its cases: pattern → names."""
    return {
        "options": names.options,
        "keys": names.keys,
        "task_keys": {f"pretrain.{task}": keys for task, keys in names.task_keys.items()},
        "source_keys": {
            "|".join(f"{command}.{source}" for command in _HAS_DATA): keys for source, keys in names.source_keys.items()
        },
        "values": names.values,
    }


def _bash_tables(names: Names) -> str:
    lines = [f'_unlabeled_commands="{" ".join(names.options)}"', f'_unlabeled_topics="{" ".join(names.topics)}"']
    for function, cases in _tables(names).items():
        lines += [f"_unlabeled_{function}() {{", "    REPLY=", '    case "$1${2:+.$2}" in']
        lines += [f'        {case}) REPLY="{" ".join(found)}" ;;' for case, found in cases.items()]
        lines += ["    esac", "}"]
    return "\n".join(lines) + "\n"


def _fish_tables(names: Names) -> str:
    lines = [
        f"set -g __unlabeled_commands {' '.join(names.options)}",
        f"set -g __unlabeled_topics {' '.join(names.topics)}",
    ]
    for function, cases in _tables(names).items():
        lines += [f"function __unlabeled_{function}", "    switch (string join . $argv)"]
        for case, found in cases.items():
            lines += [f"        case {' '.join(case.split('|'))}", f"            printf '%s\\n' {' '.join(found)}"]
        lines += ["    end", "end"]
    return "\n".join(lines) + "\n"
