"""Writes the generated parts of README and the pages: ``make docs-tables``, or ``python docs/tables.py``.

A page asks for a part with a pair of comments, and everything between them is replaced::

    <!-- generated: settings task=mae -->
    <!-- end -->

What can be asked for is in `PARTS`. `tests/structure/test_generated_tables.py` holds the committed text current.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

import unlabeled
from unlabeled.cli.commands import COMMANDS
from unlabeled.eval.registry import evaluator_class, evaluator_names, evaluator_origin
from unlabeled.pretext.registry import task_class, task_names, task_origin
from unlabeled.ssl.config.docstrings import first_sentence
from unlabeled.ssl.config.renamed import RENAMED
from unlabeled.ssl.data.registry import source_class, source_names, source_origin
from unlabeled.workflows.compatibility.measure import Matrix
from unlabeled.workflows.describe_settings import GROUPS, Setting, describe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

_MARKED = re.compile(r"(?P<begin><!-- generated: (?P<what>[^>]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_SECTION = re.compile(r"^    # (?P<title>.+?)\.?$")
_NAME = re.compile(r'^    "(?P<name>\w+)": ')
_GROUP_HINT = re.compile(r" ?See: unlabeled settings (\w+)$")


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]


def update(text: str, page: Path) -> str:
    """`text` of `page` with every generated part written again. Raises ValueError for an unknown part."""
    return _MARKED.sub(lambda match: match["begin"] + _part(match["what"], page) + match["end"], text)


def asked_for(text: str) -> list[str]:
    """The generated parts in a page, such as ``settings task=mae``."""
    return [match["what"] for match in _MARKED.finditer(text)]


def _part(what: str, page: Path) -> str:
    name, _, rest = what.partition(" ")
    if name not in PARTS:
        raise ValueError(f"{page.name}: {what!r} cannot be generated; known: {', '.join(PARTS)}")
    return "\n".join(PARTS[name](rest, page)).strip("\n") + "\n"


def built_in(names: Iterable[str], origin: Callable[[str], str]) -> list[str]:
    """Those that this package brings: what else is installed or registered here must not show in its pages."""
    return [name for name in names if origin(name) == "built in"]


def settings(what: str, page: Path) -> Iterator[str]:
    """The settings of a group, a command, or of ``task=``, ``evaluator=`` or ``data=NAME``."""
    tables = describe(what)
    for table in tables:
        if len(tables) > 1:
            yield from ("", f"**`{table.title}`**")
        yield from ("", *_settings_table(table.settings, page))
        if table.recipe:
            yield from ("", f"`{what}` also sets, unless you set it yourself:", "")
            yield from _rows(("setting", "value"), ([_code(key), _code(value)] for key, value in table.recipe))


def evaluator_settings(_: str, page: Path) -> Iterator[str]:
    """A section for each evaluator: what it measures and its settings."""
    for name in built_in(evaluator_names(), evaluator_origin):
        evaluator = evaluator_class(name)
        yield from ("", f"### {name}", "", f"{evaluator.title}. {first_sentence(evaluator.__doc__)}")
        yield from settings(f"evaluator={name}", page)


def source_settings(_: str, page: Path) -> Iterator[str]:
    """A section for each data source: what it reads and its settings."""
    for name in built_in(source_names(), source_origin):
        yield from ("", f"### {name}", "", _whole(first_sentence(source_class(name).__doc__)))
        yield from settings(f"data={name}", page)


def _settings_table(found: Sequence[Setting], page: Path) -> Iterator[str]:
    if not found:
        yield "No settings."
        return
    rows = ([_code(one.name), _type(one), _code(one.default), _meaning(one.meaning, page)] for one in found)
    yield from _rows(("setting", "type", "default", "meaning"), rows)


def _type(setting: Setting) -> str:
    return _cell(f"{setting.type} [{setting.unit}]" if setting.unit else setting.type)


def _meaning(text: str, page: Path) -> str:
    """A setting that stands for a whole group links to it."""
    match = _GROUP_HINT.search(text)
    if match is None or match[1] not in GROUPS:
        return _cell(text)
    link = f"[Settings of `{match[1]}`]({_relative(DOCS / 'reference/settings.md', page)}#{match[1]})"
    return f"{_cell(text[: match.start()])} {link}.".strip()


def tasks(_: str, page: Path) -> Iterator[str]:
    """A row for each pretext task."""
    matrix = Matrix.loads((DOCS / "reference/matrix.json").read_text(encoding="utf-8"))
    rows = []
    for name in built_in(task_names(), task_origin):
        task = task_class(name)
        cells = [row[name] for row in matrix.entries.values() if name in row]
        able = f"{sum(cell.status == 'runs' for cell in cells)} of {len(cells)}"
        paper = f"[{task.paper.year}]({task.paper.url})" if task.paper else "–"
        link = f"[`{name}`]({_relative(DOCS / f'methods/{name}.md', page)})"
        rows.append([link, _cell(first_sentence(task.__doc__)), _cell(task.good_for), able, paper])
    yield from _rows(("task", "what it does", "good for", "runs on", "paper"), rows)


def task_pages(_: str, page: Path) -> Iterator[str]:
    """The pages of the tasks in the navigation, by the names that users type."""
    yield from ("```{toctree}", ":hidden:", "")
    yield from (f"{name} <{name}>" for name in built_in(task_names(), task_origin))
    yield "```"


def evaluators(_: str, page: Path) -> Iterator[str]:
    """A row for each evaluator."""
    target = _relative(DOCS / "reference/evaluators.md", page)
    rows = []
    for name in built_in(evaluator_names(), evaluator_origin):
        evaluator = evaluator_class(name)
        needs = {"features": "features", "backbone": "the backbone"}.get(evaluator.needs, "features and images")
        rows.append([f"[`{name}`]({target}#{name})", _cell(first_sentence(evaluator.__doc__)), needs])
    yield from _rows(("evaluator", "what it measures", "works on"), rows)


def sources(_: str, page: Path) -> Iterator[str]:
    """A row for each data source."""
    rows = []
    for name in built_in(source_names(), source_origin):
        source = source_class(name)
        path = " data.path=…" if "path" in source.Config.model_fields else ""
        rows.append([_code(f"data={name}{path}"), (source.__doc__ or "").splitlines()[0].replace("``", "`")])
    yield from _rows(("data", "what it reads"), rows)


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


def api(_: str, page: Path) -> Iterator[str]:
    """Every public name, by section, as directives of autodoc."""
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
    for statement, following in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if statement.value is not None and name in [ast.unparse(target) for target in targets]:
            text = following.value if isinstance(following, ast.Expr) else None
            documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
            return ast.unparse(statement.value), inspect.cleandoc(ast.literal_eval(text)) if text and documented else ""
    raise LookupError(f"{name} is not assigned in {unlabeled._PUBLIC[name]}")


def commands(_: str, page: Path) -> Iterator[str]:
    """A row for each command, then a section for each with its examples."""
    yield from _rows(
        ("command", "what it does"), ([_command(name), _cell(COMMANDS[name].summary)] for name in COMMANDS)
    )
    for name, command in COMMANDS.items():
        yield from ("", f"### {name}", "", _cell(command.description), "", "```sh")
        for example in command.examples:
            yield from (f"# {example.purpose}", example.line)
        yield "```"


def _command(name: str) -> str:
    places = [argument.options.get("metavar", "") for argument in COMMANDS[name].arguments]
    return _code(" ".join(["unlabeled", name, *(place for place in places if place and place != "key=value")]))


def renamed(_: str, page: Path) -> Iterator[str]:
    """Settings that had another name."""
    yield from _rows(("old", "now"), ([_code(old), _code(new)] for old, new in RENAMED.items()))


PARTS: dict[str, Callable[[str, Path], Iterator[str]]] = {
    "api": api,
    "commands": commands,
    "evaluator-settings": evaluator_settings,
    "evaluators": evaluators,
    "renamed": renamed,
    "settings": settings,
    "source-settings": source_settings,
    "sources": sources,
    "task-pages": task_pages,
    "tasks": tasks,
}


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _cell(text: str) -> str:
    """Plain text in a table: bars would end the cell, stars and angles would be read as Markdown."""
    return re.sub(r"(?<!\\)[|*<]", lambda match: "\\" + match[0], " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _whole(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _relative(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def main() -> None:
    """Rewrites the pages whose generated parts are not current, and names them."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (current := update(text, page)) != text:
            page.write_text(current, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
