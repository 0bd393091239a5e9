"""Python values in a form that YAML and JSON can store; objects that they cannot store are replaced by their name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

PYTHON = "python:"
"""Prefix of the text that replaces, in a file, an object that YAML and JSON cannot store."""


def plain(value: Any) -> Any:
    """`value` with only mappings, lists, strings, numbers, booleans and None in it.

    Scalars of numpy and torch become numbers, paths become strings, tuples and sets become lists. A class or function
    becomes ``python:package.module:name``; any other object becomes the same for its class, followed by its repr.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return number(value)  # np.float64 is a float, and YAML cannot write it
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=str)  # sets have no order, files should
    if isinstance(value, PurePath):
        return str(value)
    scalar = number(value)
    return named(value) if scalar is value else scalar  # the same object: it was not a scalar of numpy or torch


def number(value: Any) -> Any:
    """A numpy or torch scalar as a Python number; anything else unchanged."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def whole(value: Any) -> Any:
    """A float without a fraction as an integer, which reads better; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def counted(count: float, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "step"), counted(2.0, "epoch"), counted(3, "process")
    ('1 step', '2 epochs', '3 processes')
    """
    shown = whole(count)
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{shown:g} {noun}{ending}" if isinstance(shown, float) else f"{shown} {noun}{ending}"


def named(value: Any) -> str:
    """``python:package.module:name`` of a class or function; for any other object its class and its repr."""
    if hasattr(value, "__qualname__"):
        return f"{PYTHON}{class_path(value)}"
    text = " ".join(repr(value).split())
    # without a repr that has a memory address, which differs in each process and would make a resumed run look changed
    return f"{PYTHON}{class_path(type(value))}" + ("" if " at 0x" in text else f" {text}")


def class_path(kind: Any) -> str:
    """``package.module:Name`` of a class or function."""
    return f"{kind.__module__}:{kind.__qualname__}"


def objects_in(value: Any, field: str) -> str | None:
    """Dotted path, starting with `field`, of the first object in `value` that `plain` replaced by its name; or None."""
    if isinstance(value, str):
        return field if value.startswith(PYTHON) else None
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, one in inner if (found := objects_in(one, f"{field}.{key}"))), None)
