"""Notebooks, examples and docs import from `unlabeled` alone, and what it exports is there and says what it is."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest

import unlabeled

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = {"unlabeled.cli", "unlabeled.testing"}
"""Modules inside the package that users are told of."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]


def inner_imports(code: str) -> list[str]:
    """Modules inside the package that Python `code` imports; lines of IPython's own are left out."""
    plain = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(plain))):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith("unlabeled.") and name not in DOCUMENTED]


def inner_mentions(text: str) -> list[str]:
    """Dotted names of modules inside the package that a page tells users to take."""
    folders = "|".join(path.name for path in (ROOT / "unlabeled").iterdir() if path.is_dir() and path.name != "testing")
    return re.findall(rf"\bunlabeled\.(?:{folders})\.\w+[\w.]*", text)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_nothing_inside(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [
        name for cell in cells if cell["cell_type"] == "code" for name in inner_imports("".join(cell["source"]))
    ] == []
    assert [name for cell in cells for name in inner_mentions("".join(cell["source"]))] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_import_nothing_inside(path: Path) -> None:
    assert inner_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_name_nothing_inside(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        assert inner_imports(block) == []
    assert inner_mentions(text) == []


def test_the_scan_finds_what_it_looks_for() -> None:
    assert inner_imports("%time\nimport unlabeled.ssl.x as x\nfrom unlabeled.eval import y") == [
        "unlabeled.ssl.x",
        "unlabeled.eval",
    ]
    assert inner_imports("import unlabeled\nfrom unlabeled.testing import check_task") == []
    assert inner_mentions("use `unlabeled.ssl.core.seeds.derive`, not unlabeled.derive or unlabeled/ssl/x.py") == [
        "unlabeled.ssl.core.seeds.derive"
    ]


@pytest.mark.parametrize("name", unlabeled.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(unlabeled, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__doc__, f"{name} has no docstring"
        assert not found.__doc__.startswith(f"{name}("), f"{name} has only the docstring that Python made"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "unlabeled" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == unlabeled._PUBLIC
    assert sorted(unlabeled.__dir__()) == sorted(unlabeled.__all__)
