"""Types and values of settings as a reader of a table sees them, and as a user types them."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

REQUIRED = "required"
"""Stands in place of a default where there is none."""

_NAMES = {int: "integer", float: "number", str: "text", bool: "true/false"}
_PLURALS = {"integer": "integers", "number": "numbers", "path": "paths", "pair": "pairs", "tuple": "tuples"}
_COUNTS = {2: "two", 3: "three", 4: "four"}


class Shape(NamedTuple):
    """What an annotation allows, with ``Annotated`` taken off and unions flattened."""

    members: tuple[Any, ...]
    optional: bool
    """Whether ``null`` is possible."""


def shape_of(annotation: Any) -> Shape:
    """The members of `annotation`, in the order in which they are written."""
    found = list(_members(annotation))
    return Shape(tuple(one for one in found if one is not type(None)), type(None) in found)


def _members(annotation: Any) -> typing.Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _members(one)
    else:
        yield annotation


def readable_type(annotation: Any) -> str:
    """``integer or null``, ``one of: cosine, multistep``, ``list of numbers``, ``two numbers``, ..."""
    shape = shape_of(annotation)
    literals = [str(value) for one in shape.members if typing.get_origin(one) is Literal for value in _values(one)]
    others = [_single(one) for one in shape.members if typing.get_origin(one) is not Literal]
    names = [*literals, *others, *(["null"] if shape.optional else [])]
    if literals and len(names) > 1:
        return "one of: " + ", ".join(names)
    return " or ".join(names)


def _single(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (tuple, list, set, frozenset):
        inner = [one for one in arguments if one is not Ellipsis]
        if origin is tuple and Ellipsis not in arguments and len({readable_type(one) for one in inner}) > 1:
            return "pair" if len(inner) == 2 else "tuple"
        if origin is tuple and Ellipsis not in arguments and len(inner) in _COUNTS:
            return f"{_COUNTS[len(inner)]} {_plural(readable_type(inner[0]))}"
        return f"list of {_plural(readable_type(inner[0]))}" if inner else "list"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if annotation in _NAMES:
        return _NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "settings"
    return "mapping" if annotation is dict or hasattr(annotation, "_fields") else "any value"


def _plural(name: str) -> str:
    if name.startswith("one of: "):
        return name.removeprefix("one of: ")
    return _PLURALS.get(name, name)


def _values(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation)


def choices_in(annotation: Any) -> list[str]:
    """The words that `annotation` allows, as they are typed: those of a ``Literal``, true and false, null."""
    shape, found = shape_of(annotation), list[str]()
    for one in shape.members:
        if typing.get_origin(one) is Literal:
            found += [typed_value(value) for value in _values(one)]
        elif one is bool:
            found += ["true", "false"]
    return [*found, "null"] if found and shape.optional else found


def typed_value(value: Any) -> str:
    """`value` as it is typed on the command line: ``null``, ``true``, ``0.05``, ``[0.2,1]``, ``{name: mae}``."""
    if value is PydanticUndefined or value is ...:
        return REQUIRED
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
        return typed_value({name: one for name, one in fields.items() if typed_value(one) != "{}"})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {typed_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "[" + ",".join(typed_value(inner) for inner in value) + "]"
    return str(value) or "''"


def _number(value: float) -> str:
    """The shortest form of six digits: 25 and not 25.0, 1.5e-4 and not 0.00015."""
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.6g}".replace("e+0", "e").replace("e+", "e")
