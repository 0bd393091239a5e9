"""Docstrings under fields: the one text that the command line, the docs and the contract checks read."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel

_UNIT = re.compile(r"\s*\[([^\[\]]+)\]$")


class FieldText(NamedTuple):
    """What a field's docstring says."""

    meaning: str
    """One paragraph of plain text; empty where there is none."""
    unit: str
    """The words in square brackets that end the docstring, such as ``pixels``; empty for a field without a unit."""


def field_texts(model: type[BaseModel]) -> dict[str, FieldText]:
    """Field → what its docstring says, inherited where a subclass changes only the default.

    Fields of classes without source at hand (typed into an interpreter) are not in it, unless they have a
    ``Field(description=...)``.
    """
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            found |= _documented(cls) or {}
    found |= {name: field.description for name, field in model.model_fields.items() if field.description}
    return {name: split_unit(found[name]) for name in model.model_fields if name in found}


def split_unit(text: str) -> FieldText:
    """``"Side of an image. [pixels]"`` → (``"Side of an image."``, ``"pixels"``), on one line, without backquotes."""
    line = " ".join(text.split()).replace("`", "")
    match = _UNIT.search(line)
    return FieldText(line[: match.start()], match[1]) if match else FieldText(line, "")


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line, without backquotes; empty for None.

    A docstring's first paragraph counts: "e.g." and "arXiv 2111.06377" do not end a sentence.
    """
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split()).replace("`", "")
    match = re.match(r"(.*?(?<!e\.g)(?<!i\.e)[.!?])(?=\s+[A-Z(]|$)", paragraph)
    return match[1] if match else paragraph


def has_source(model: type[BaseModel]) -> bool:
    """Whether the source of `model` and its bases is at hand, so that a missing docstring is known to be missing."""
    bases = [cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel]
    return all(_documented(cls) is not None for cls in bases)


@cache
def _documented(cls: type[BaseModel]) -> dict[str, str] | None:
    """Field → the string that follows it in the body of `cls` itself; None where the source is not at hand."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return None
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(tree.body if isinstance(tree, ast.ClassDef) else []):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[statement.target.id] = text.value
    return found
