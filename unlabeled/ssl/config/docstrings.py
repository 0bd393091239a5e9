"""Docstrings under fields: the single source of what the command line, the docs and the contract checks show."""

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
    """The docstring of a field."""

    meaning: str
    """One paragraph of plain text; empty if there is no docstring."""
    unit: str
    """The unit in square brackets at the end of the docstring, such as ``pixels``; empty for a field without a unit."""


def field_texts(model: type[BaseModel]) -> dict[str, FieldText]:
    """The docstring of each field by name; a subclass that only changes a default inherits the docstring.

    Fields of classes without available source code (typed into an interpreter) are missing unless they have a
    ``Field(description=...)``.
    """
    found: dict[str, str] = {}
    # bases first, so that a subclass overrides them
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

    Only the first paragraph counts. "e.g." and "arXiv 2111.06377" do not end a sentence.
    """
    # a sentence ends at punctuation that is followed by a space and a capital letter or parenthesis
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split()).replace("`", "")
    match = re.match(r"(.*?(?<!e\.g)(?<!i\.e)[.!?])(?=\s+[A-Z(]|$)", paragraph)
    return match[1] if match else paragraph


def has_source(model: type[BaseModel]) -> bool:
    """Whether the source code of `model` and its bases is available, so that a docstring can be found missing."""
    bases = [cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel]
    return all(_documented(cls) is not None for cls in bases)


@cache
def _documented(cls: type[BaseModel]) -> dict[str, str] | None:
    """The string that follows each field in the body of `cls` itself; None if its source code is not available."""
    # Python discards strings under attributes, so the source is parsed; dedent for classes inside functions
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
