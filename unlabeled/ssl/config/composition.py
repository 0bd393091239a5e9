"""Words of the command line and YAML files in ``configs/`` → a validated configuration.

Hydra composes (groups ``task``, ``data``, ``recipe``; overrides; sweeps), pydantic validates. Words that Hydra would
refuse or misread are handled here, so that each fault is one line:

* ``backbone=NAME`` is short for ``backbone.name=NAME``; ``data=PATH`` is not guessed at;
* any other word becomes an add-or-override, and pydantic names the setting that does not exist.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.config.schema import PretrainConfig, RunConfig
from unlabeled.ssl.core.errors import ConfigError, first_line, nearest

GROUPS = ("task", "data", "recipe")
"""Folders of ``configs/`` that a word ``group=option`` chooses from."""

SectionT = TypeVar("SectionT", bound=Section)


def config_folder() -> Path:
    """``configs/``: inside the installed package, else beside it in a clone."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ConfigError(f"configs: not found beside {package}; install the package again")


def options(group: str) -> list[str]:
    """Names that ``group=`` may take, such as ``cifar10/mae_vit`` for recipes."""
    folder = config_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def compose_config(command: str, words: Sequence[str], model: type[SectionT]) -> SectionT:
    """The configuration of `command` (``pretrain``, ``evaluate``, ``doctor``) under the given words.

    Raises ConfigError, in one line, for a word that cannot be read, an unknown setting, or an impossible value.
    """
    return validate(composed(command, words), model)


def composed(command: str, words: Sequence[str]) -> Any:
    """As `compose_config`, before validation: mappings, lists and plain values."""
    overrides = [_to_hydra(override) for override in parse(words)]
    try:
        with initialize_config_dir(str(config_folder()), version_base=None):
            config = compose(command, overrides=[word for word in overrides if word is not None])
        return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"config: {first_line(error)}") from None


def validate(values: Any, model: type[SectionT]) -> SectionT:
    """`values` as `model`; raises ConfigError in one line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, model)) from None


def parse(words: Sequence[str]) -> list[Override]:
    """Words → Hydra overrides. Raises ConfigError for a word that is not ``key=value``."""
    parsed = []
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is not a setting; write key=value, such as epochs=100")
        try:
            parsed += OverridesParser.create().parse_overrides([_dotted(word)])
        except HydraException as error:
            raise ConfigError(
                f"{word!r} cannot be read ({first_line(error)}); quote special characters: 'key=\"value\"'"
            ) from None
    return parsed


def _dotted(word: str) -> str:
    """``task.tasks[1].weight=2`` as Hydra has it: ``task.tasks.1.weight=2``."""
    key, equals, value = word.partition("=")
    return re.sub(r"\[(\d+)\]", r".\1", key) + equals + value


def sweep(words: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """``--multirun``: every combination of the swept values as (words, label of the combination).

    A sweep is written as Hydra writes it: ``optim.lr=1e-3,1e-4``, ``engine.seed=range(3)``, ``task=mae,rotation``.
    """
    choices: list[list[tuple[str, str]]] = []
    for override in parse(words):
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
            choices.append(
                [(f"{override.key_or_group}={value}", f"{override.key_or_group}={value}") for value in values]
            )
        else:
            choices.append([(str(override.input_line), "")])
    for combination in itertools.product(*choices):
        label = ",".join(label for _, label in combination if label)
        yield [word for word, _ in combination], label.replace("/", "_")


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of the Python functions → the words of the command line.

    A mapping for a group such as ``data={"name": "folder", "path": ...}`` becomes its choice and its fields; keys with
    dots or double underscores reach inside sections: ``optim__lr=1e-3``.
    """
    words: list[str] = []
    for key, value in settings.items():
        name = key.replace("__", ".")
        if isinstance(value, Mapping):
            fields = dict(value)
            if name in GROUPS and "name" in fields:
                words.append(f"{name}={fields.pop('name')}")
            words += words_of({f"{name}.{field}": inner for field, inner in fields.items()})
        else:
            words.append(f"{name}={_literal(value)}")
    return words


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    if isinstance(value, (str, Path)):
        escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value)


def _to_hydra(override: Override) -> str | None:
    """One override in the form that Hydra takes."""
    key, line = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        raise ConfigError(f"{line!r} asks for a sweep; add --multirun, or quote the value: '{key}=\"...\"'")
    if key in GROUPS and "." not in key and not isinstance(override.value(), dict):
        return _group_word(key, str(override.value()))
    if key in ("backbone", "evaluate.data", "task") and isinstance(override.value(), str):
        return f"++{key}.name={override.get_value_element_as_str()}"
    if line.startswith("~"):
        return line
    return f"++{line.lstrip('+')}"


def _group_word(group: str, option: str) -> str | None:
    if option == "None" and group == "recipe":
        return None
    known = options(group)
    if option in known:
        return f"{group}={option}"
    if group == "task":
        from unlabeled.pretext.registry import task_class  # a plugin's task has no file in configs/

        task_class(option)
        return f"++task.name={option}"
    if group == "data" and ("/" in option or Path(option).exists()):
        raise ConfigError(f"data: {option!r} is a path; write data=folder data.path={option}")
    raise ConfigError(f"{group}: {option!r} does not exist; {nearest(option, known)}")


def pretrain_config(words: Sequence[str]) -> PretrainConfig:
    """The validated configuration of a pretraining run, its task's own settings and debug mode included."""
    from unlabeled.pretext.registry import task_config

    config = compose_config("pretrain", words, PretrainConfig)
    task_config(config.task)
    return shrink(config) if config.debug else config


def shrink(config: PretrainConfig) -> PretrainConfig:
    """Tiny mode: two epochs of two steps on 64 pictures, no workers; everything else as it was asked for."""
    linear = config.evaluate.linear.model_copy(update={"epochs": 2})
    evaluate = config.evaluate.model_copy(update={"limit": 128, "linear": linear})
    return config.model_copy(update={**tiny(config), "evaluate": evaluate})


def tiny(config: RunConfig) -> dict[str, Any]:
    """What tiny mode changes of any run."""
    batch = min(config.batch_size, 32)
    return {
        "epochs": 2.0,
        "batch_size": batch,
        "data": config.data.model_copy(update={"limit": batch * 2, "count": 256}),
        "engine": config.engine.model_copy(update={"workers": 0, "compile": False}),
        "schedule": config.schedule.model_copy(update={"warmup_epochs": min(config.schedule.warmup_epochs, 0.5)}),
        "log": config.log.model_copy(update={"every": 1}),
    }
