"""Turns a pydantic ValidationError into one line that names the field, the value and the remedy."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from unlabeled.ssl.core.errors import nearest

_SHOWN = 80

_MAPPINGS = {"dict_type", "model_type", "model_attributes_type"}
_LISTS = {"list_type", "tuple_type"}


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for the first fault in `error`; says how many others there are.

    `prefix` is the section that `model` stands in, such as ``task``; it is put before the field's name.
    """
    faults = [(fault, _location(fault, model)) for fault in error.errors()]
    fault, location = faults[0]
    same, either = [fault], ""
    if fault["type"] == "literal_error":  # a word, or something else: the fault within a list is told
        same = [other for other, where in faults if where[: len(location)] == location]
        fault, location = next((pair for pair in faults if pair[1][:-1] == location), faults[0])
        if fault is same[0]:
            either = "".join(f" or {_wanted(other).split(',')[0]}" for other in same[1:])
    field = ".".join(str(part) for part in ([prefix] if prefix else []) + location)
    more = f" (and {len(faults) - len(same)} more)" if len(faults) > len(same) else ""
    return _phrase(fault, field, location, model, prefix) + either + more


def _location(fault: Any, model: type[BaseModel]) -> list[str | int]:
    """Where the fault is, without pydantic's names of the members of a union."""
    location: list[str | int] = []
    for part in fault["loc"]:
        section = _model_at(model, location)
        if not _is_union_tag(part) or (section is not None and part in section.model_fields):  # "path" may be either
            location.append(part)
    return location


def _phrase(fault: Any, field: str, location: list[str | int], model: type[BaseModel], prefix: str) -> str:
    kind, value = fault["type"], fault["input"]
    shown = in_short(value)
    if kind == "extra_forbidden":
        section = _model_at(model, location[:-1])
        known = list(section.model_fields) if section else []
        where = ".".join(([prefix] if prefix else []) + [str(part) for part in location[:-1]])
        near = nearest(str(location[-1]), known)
        return f"{field}: there is no such setting{f' in {where}' if where else ''}; {near}"
    if kind == "invalid_key":
        return f"{field}: {shown} is no name of a setting; names are text"
    if kind == "missing":
        return f"{field}: not given; set {field}=..."
    if kind == "literal_error":
        return f"{field}: {shown} is not possible; choose {fault['ctx']['expected']}"
    if kind == "value_error":
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
    """`value` in one line of a message."""
    text = value.__name__ if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_union_tag(part: str | int) -> bool:
    """Pydantic names the member of a union in the location: ``int``, ``tuple[int, int]``, ``BaseModel``."""
    return isinstance(part, str) and (
        part in {"int", "float", "bool", "str", "none", "list", "dict", "path"} or "[" in part or part[:1].isupper()
    )


def _model_at(model: type[BaseModel], path: list[str | int]) -> type[BaseModel] | None:
    for part in path:
        if isinstance(part, int):  # a place in a list, whose entries are of one model
            continue
        field = model.model_fields.get(str(part))
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
        return _inner_model(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            if (found := _inner_model(member)) is not None:
                return found
    return None
