"""The generated parts of README and the docs are current, and nothing that they should list is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import unlabeled
from unlabeled.eval.registry import EVALUATORS, evaluator_origin
from unlabeled.pretext.registry import TASKS, task_origin
from unlabeled.workflows.describe_settings import COMMANDS, GROUPS

ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    """``docs/tables.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = script()


def asked_for(name: str) -> list[str]:
    found: list[str] = TABLES.asked_for((ROOT / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("page", TABLES.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_generated_parts_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") == len(TABLES.asked_for(text))
    assert TABLES.update(text, page) == text, "run `make docs-tables`"


@pytest.mark.parametrize("task", [name for name in TASKS if task_origin(name) == "built in"])
def test_every_task_has_a_page_with_its_settings(task: str) -> None:
    assert f"settings task={task}" in asked_for(f"docs/methods/{task}.md")


def test_the_reference_lists_everything() -> None:
    assert {"evaluators", "evaluator-settings"} <= set(asked_for("docs/reference/evaluators.md"))
    assert {"sources", "source-settings"} <= set(asked_for("docs/reference/sources.md"))
    assert "tasks" in asked_for("docs/methods/index.md")
    assert {f"settings {name}" for name in {*GROUPS, *COMMANDS}} <= set(asked_for("docs/reference/settings.md"))
    assert "commands" in asked_for("docs/reference/cli.md")
    assert "renamed" in asked_for("docs/glossary.md")
    by_hand = (ROOT / "docs/reference/evaluation.md").read_text(encoding="utf-8")
    assert [
        name for name in EVALUATORS if f"\n| `{name}` |" not in by_hand and evaluator_origin(name) == "built in"
    ] == []
    listed = [name for names in TABLES.public_sections().values() for name in names]
    assert sorted(listed) == sorted(unlabeled._PUBLIC)


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = ROOT / "docs" / "page.md"
    text = "before\n<!-- generated: settings log -->\nstale\n<!-- end -->\nafter <!-- end -->\n"
    new = TABLES.update(text, page)
    assert new.startswith("before\n<!-- generated: settings log -->\n| setting | type | default | meaning |\n")
    assert new.endswith("|\n<!-- end -->\nafter <!-- end -->\n")
    assert "\n| `log.every` | " in new
    assert "stale" not in new
    with pytest.raises(ValueError, match=r"page\.md: 'setings log' cannot be generated; known: api, .*settings"):
        TABLES.update("<!-- generated: setings log -->\n<!-- end -->", page)


def test_bars_and_stars_do_not_break_a_table() -> None:
    assert TABLES._cell("a | b *c*\n<d>") == r"a \| b \*c\* \<d>"
