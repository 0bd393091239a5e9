"""Words and values of a command → its settings, with what tasks and sources bring of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unlabeled.pretext.registry import Recipes
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import compose_config
from unlabeled.ssl.data.source import SOURCES

SectionT = TypeVar("SectionT", bound=Section)


def compose_settings(
    command: str, words: Sequence[str], model: type[SectionT], values: Mapping[str, Any] | None = None
) -> SectionT:
    """The settings of `command` as `model`: its file, then the words, then Python `values` on top.

    Raises ConfigError, in one line, for a word that cannot be read, an unknown setting, or an impossible value.
    """
    return compose_config(command, words, model, values=values, choices={"task": Recipes()})


def data_values(data: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What Python functions take as ``data``: the name of a source, a folder of images, or a mapping of settings."""
    if isinstance(data, Mapping):
        return dict(data)
    return {"name": data} if data in SOURCES else {"name": "folder", "path": Path(data)}
