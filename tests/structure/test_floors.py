"""Imports run downward only: of modules, inside of functions, and for types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "unlabeled"

FLOORS = {
    "unlabeled._version": 0,
    "unlabeled._moved": 0,
    "unlabeled.ssl": 0,
    "unlabeled.ssl.core": 0,
    "unlabeled.ssl.config": 1,
    "unlabeled.ssl.data": 2,
    "unlabeled.ssl.nn": 3,
    "unlabeled.ssl.backbones": 4,
    "unlabeled.ssl.task": 5,
    "unlabeled.ssl.train": 6,
    "unlabeled.pretext": 7,
    "unlabeled.eval": 7,
    "unlabeled.report": 8,
    "unlabeled.testing": 8,
    "unlabeled.workflows": 9,
    "unlabeled.api": 10,
    "unlabeled.cli": 10,
    "unlabeled": 11,
}
"""Room → floor; a module is in the room of the longest name that it begins with. 11 is the public face."""

APART = [("unlabeled.pretext", "unlabeled.eval"), ("unlabeled.report", "unlabeled.pretext")]
"""Rooms that do not know each other though their floors would allow it, in either direction for the first."""
THIN = {
    "unlabeled.cli": ("unlabeled.cli", "unlabeled.workflows", "unlabeled.ssl.core", "unlabeled._version"),
    "unlabeled.api": (
        "unlabeled.workflows",
        "unlabeled.eval.results",
        "unlabeled.ssl.backbones",
        "unlabeled.ssl.config.schema",
    ),
}
"""Rooms that may import these alone: what they do is in the workflows."""


class Import(NamedTuple):
    """One import of a module of this package."""

    importer: str
    imported: str
    line: int
    inside: bool
    """Whether it stands in a function."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Every import of `source`, whatever it stands in; a name that is a module itself counts as that module."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: write imports in full"
                for name in child.names:
                    whole = f"{child.module}.{name.name}"
                    yield Import(module, whole if whole in known else str(child.module), child.lineno, inside)
            elif isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(module, name.name, child.lineno, inside)
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from (found for found in walk(ast.parse(source), False))


def all_imports() -> list[Import]:
    known = {module for module, _ in modules()}
    return [found for module, path in modules() for found in imports_of(module, path.read_text(), known)]


def room_of(module: str) -> str:
    return max((room for room in FLOORS if module == room or module.startswith(f"{room}.")), key=len)


def climbing(found: list[Import]) -> list[str]:
    faults = []
    for one in found:
        if one.imported.partition(".")[0] != "unlabeled" or one.importer == "unlabeled":
            continue  # the public face names all floors, and is the only one that does
        here, there = room_of(one.importer), room_of(one.imported)
        thin = next((THIN[room] for room in THIN if here == room), None)
        apart = any((here, there) in ((a, b), (b, a)) for a, b in APART[:1]) or (here, there) in APART
        if FLOORS[there] > FLOORS[here] or apart or (thin and not one.imported.startswith(thin)):
            faults.append(f"{one.importer}:{one.line} imports {one.imported}")
    return faults


def test_no_import_climbs() -> None:
    found = all_imports()
    assert len(found) > 1500
    assert climbing(found) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("unlabeled.ssl.core.seeds", "from unlabeled.ssl.config.base import Section"),
        ("unlabeled.ssl.train.loop", "def f():\n    from unlabeled.pretext.registry import task_class"),
        ("unlabeled.ssl.task", "if TYPE_CHECKING:\n    from unlabeled.eval.results import Evidence"),
        ("unlabeled.pretext.masked_image.mae", "import unlabeled.eval.metrics"),
        ("unlabeled.report.page", "from unlabeled.pretext import registry"),
        ("unlabeled.eval.runner", "from unlabeled import pretrain"),
        ("unlabeled.cli.tasks", "from unlabeled.pretext.registry import task_names"),
    ],
)
def test_an_import_that_climbs_is_found(importer: str, source: str) -> None:
    known = {module for module, _ in modules()}
    assert len(climbing(list(imports_of(importer, source, known)))) == 1


def test_imports_inside_functions_say_why() -> None:
    """A reader stumbles over them: each has a comment at its line, or above it."""
    silent = []
    for module, path in modules():
        lines = path.read_text().splitlines()
        inside = [found for found in imports_of(module, path.read_text(), set()) if found.inside]
        silent += [
            f"{module}:{one.line}"
            for one in inside
            if "#" not in lines[one.line - 1] and "#" not in lines[one.line - 2]
        ]
    assert silent == []


def test_no_folder_is_a_heap() -> None:
    crowded = {
        str(folder.relative_to(PACKAGE)): count
        for folder in {path.parent for _, path in modules()}
        if (count := sum(path.name != "__init__.py" for path in folder.glob("*.py"))) > 15
    }
    assert crowded == {}
