"""Words and values of a command → its settings, with what tasks and sources bring of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unlabeled.eval.registry import settle
from unlabeled.pretext.registry import Recipes
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import compose_config, set_within
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.data.source import SOURCES

SectionT = TypeVar("SectionT", bound=Section)


def compose_settings(
    command: str, words: Sequence[str], model: type[SectionT], values: Mapping[str, Any] | None = None
) -> SectionT:
    """The settings of `command` as `model`: its file, then the words, then Python `values` on top.

    Raises ConfigError, in one line, for a word that cannot be read, an unknown setting, or an impossible value.
    """
    return compose_config(command, words, model, values=values, choices={"task": Recipes()})


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
    return {"name": data} if data in SOURCES else {"name": "folder", "path": Path(data)}
