"""Turns a pydantic ValidationError into one line with the field, the value and the remedy."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from unlabeled.ssl.core.errors import nearest

_SHOWN = 80
"""Characters of a value that a message shows."""

# types of pydantic errors, for which pydantic's own message would name classes
_MAPPINGS = {"dict_type", "model_type", "model_attributes_type"}
_LISTS = {"list_type", "tuple_type"}


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for the first error in `error`, with the number of further ones.

    `prefix` is the section that `model` belongs to, such as ``task``; it precedes the name of the field.
    """
    faults = [(fault, _location(fault, model)) for fault in error.errors()]
    fault, location = faults[0]
    same, either = [fault], ""
    # a union of a literal and something else, such as "all" or a list, reports one error for each member
    if fault["type"] == "literal_error":
        same = [other for other, where in faults if where[: len(location)] == location]
        # an entry of a list that is wrong is more specific than the wrong type of the whole value
        fault, location = next((pair for pair in faults if pair[1][:-1] == location), faults[0])
        if fault is same[0]:
            either = "".join(f" or {_wanted(other).split(',')[0]}" for other in same[1:])
    field = ".".join(str(key) for key in ([prefix] if prefix else []) + location)
    more = f" (and {len(faults) - len(same)} more)" if len(faults) > len(same) else ""
    return _phrase(fault, field, location, model, prefix) + either + more


def _location(fault: Any, model: type[BaseModel]) -> list[str | int]:
    """The keys that lead to the error, without pydantic's names for the members of a union."""
    location: list[str | int] = []
    for key in fault["loc"]:
        section = _model_at(model, location)
        # "path" may be a member of a union or a field
        if not _is_union_tag(key) or (section is not None and key in section.model_fields):
            location.append(key)
    return location


def _phrase(fault: Any, field: str, location: list[str | int], model: type[BaseModel], prefix: str) -> str:
    kind, value = fault["type"], fault["input"]
    shown = in_short(value)
    if kind == "extra_forbidden":
        section = _model_at(model, location[:-1])
        known = list(section.model_fields) if section else []
        where = ".".join(([prefix] if prefix else []) + [str(key) for key in location[:-1]])
        near = nearest(str(location[-1]), known)
        return f"{field}: there is no such setting{f' in {where}' if where else ''}; {near}"
    if kind == "invalid_key":
        return f"{field}: {shown} is not the name of a setting; names are text"
    if kind == "missing":
        return f"{field}: not given; set {field}=..."
    if kind == "literal_error":
        return f"{field}: {shown} is not possible; choose {fault['ctx']['expected']}"
    if kind == "value_error":  # raised by a validator of ours, whose text already has value and remedy
        return f"{field or 'config'}: {str(fault['ctx']['error']).replace(chr(10), ' ')}"
    return f"{field}: {shown} is not possible; give {_wanted(fault)}"


def _wanted(fault: Any) -> str:
    if fault["type"] in _MAPPINGS:
        return "a mapping of settings"
    if fault["type"] in _LISTS:
        return "a list"
    wanted: str = fault["msg"].removeprefix("Input should be ")
    return wanted[0].lower() + wanted[1:]


def in_short(value: object) -> str:
    """`value` on one line, cut to 80 characters, for use in a message."""
    text = value.__name__ if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_union_tag(key: str | int) -> bool:
    """Whether `key` is how pydantic names a member of a union: ``int``, ``tuple[int, int]``, ``BaseModel``."""
    return isinstance(key, str) and (
        key in {"int", "float", "bool", "str", "none", "list", "dict", "path"} or "[" in key or key[:1].isupper()
    )


def _model_at(model: type[BaseModel], path: list[str | int]) -> type[BaseModel] | None:
    """The section that `path` leads to from `model`; None if something else is there."""
    for key in path:
        if isinstance(key, int):  # an index into a list; all entries share one model
            continue
        field = model.model_fields.get(str(key))
        if field is None:
            return None
        inner = _inner_model(field.annotation)
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, tuple):
        # Annotated[Section, ...] and tuple[Section, ...]: the first argument is the model
        return _inner_model(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            if (found := _inner_model(member)) is not None:
                return found
    return None
