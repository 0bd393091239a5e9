"""The public names of the package, by section, as directives of autodoc."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import unlabeled

_SECTION = re.compile(r"^    # (?P<title>.+?)\.?$")
_NAME = re.compile(r'^    "(?P<name>\w+)": ')


def public_sections() -> dict[str, list[str]]:
    """Section → public names: the comments in the table of `unlabeled` are its sections."""
    found: dict[str, list[str]] = {}
    lines = Path(unlabeled.__file__).read_text(encoding="utf-8").split("_PUBLIC = {\n")[1].split("\n}\n")[0]
    section: list[str] = []
    for line in lines.splitlines():
        if title := _SECTION.match(line):
            section = found.setdefault(title["title"], [])
        elif name := _NAME.match(line):
            section.append(name["name"])
    return found


def api_listing() -> Iterator[str]:
    """The lines of the page, in MyST Markdown."""
    for title, names in public_sections().items():
        yield from ("", f"## {title}", "", "```{eval-rst}")
        for name in names:
            yield from _directive(name)
        yield "```"


def _directive(name: str) -> Iterator[str]:
    found = getattr(unlabeled, name)
    if inspect.isfunction(found):
        yield f".. autofunction:: unlabeled.{name}"
    elif not inspect.isclass(found):
        yield from _data(name)
    elif issubclass(found, Exception):
        yield from (f".. autoexception:: unlabeled.{name}", "   :show-inheritance:")
    elif issubclass(found, BaseModel) and found.model_fields:
        yield from (f".. autoclass:: unlabeled.{name}", "   :no-members:", "")
        yield "   Its fields are in :doc:`/reference/settings`."
    else:
        yield f".. autoclass:: unlabeled.{name}"
    yield ""


def _data(name: str) -> Iterator[str]:
    """A constant or a type: autodoc would not find its docstring where it is exported again."""
    value, text = _assigned(name)
    yield from (f".. py:data:: unlabeled.{name}", "")
    if len(value) < 100:
        yield from (f"   ``{value}``", "")
    yield from (f"   {line}".rstrip() for line in text.splitlines())


def _assigned(name: str) -> tuple[str, str]:
    """What is assigned to `name` in the module that defines it, and the string that follows."""
    body = ast.parse(inspect.getsource(importlib.import_module(unlabeled._PUBLIC[name]))).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            text = following.value if isinstance(following, ast.Expr) else None
            documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
            value = ast.unparse(statement.value) if isinstance(statement, (ast.Assign, ast.AnnAssign)) else ""
            return value, inspect.cleandoc(text.value) if documented else ""
    raise LookupError(f"{name} is not assigned in {unlabeled._PUBLIC[name]}")
