"""Python values as files hold them: what YAML and JSON have no form for is named instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

PYTHON = "python:"
"""Begins the text that stands in a file for an object that no file holds."""


def plain(value: Any) -> Any:
    """`value` of mappings, lists, text, numbers, truth values and None alone.

    Scalars of numpy and torch become numbers, paths text, tuples and sets lists. A class or function becomes
    ``python:package.module:name``, any other object that with its text, where this says the same in every process.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return number(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=str)
    if isinstance(value, PurePath):
        return str(value)
    scalar = number(value)
    return named(value) if scalar is value else scalar


def number(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own number; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def named(value: Any) -> str:
    """``python:package.module:name`` of a class or function; of any other object its class and its text."""
    if hasattr(value, "__qualname__"):
        return f"{PYTHON}{class_path(value)}"
    text = " ".join(repr(value).split())
    return f"{PYTHON}{class_path(type(value))}" + ("" if " at 0x" in text else f" {text}")  # no address lasts


def class_path(kind: Any) -> str:
    """``package.module:Name`` of a class or function."""
    return f"{kind.__module__}:{kind.__qualname__}"


def objects_in(value: Any, field: str) -> str | None:
    """The field, within `field`, of the first object that a file only names (see `plain`); None without any."""
    if isinstance(value, str):
        return field if value.startswith(PYTHON) else None
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, one in inner if (found := objects_in(one, f"{field}.{key}"))), None)
