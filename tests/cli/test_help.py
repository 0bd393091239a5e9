"""Help of each command: its own examples, which are valid, and no torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from unlabeled.cli.commands import COMMANDS
from unlabeled.cli.main import _parser, main
from unlabeled.workflows.describe_settings import COMMANDS as WITH_SETTINGS
from unlabeled.workflows.describe_settings import describe
from unlabeled.workflows.evaluate import evaluate_config
from unlabeled.workflows.export import export_config
from unlabeled.workflows.finetune.run import finetune_config
from unlabeled.workflows.gauntlet.settings import gauntlet_config
from unlabeled.workflows.inspect_data import doctor_config
from unlabeled.workflows.pretrain import pretrain_config, swept_configs

EXAMPLES = [(name, example) for name, command in COMMANDS.items() for example in command.examples]
MODULES = {path.stem for path in (Path(__file__).resolve().parents[2] / "unlabeled" / "cli").glob("*.py")}


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_a_module_and_every_module_a_command() -> None:
    assert MODULES - {"__init__", "main", "commands"} == set(COMMANDS)


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_fits(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of([name], capsys)
    assert max(len(line) for line in text.splitlines()) <= columns
    examples = COMMANDS[name].examples
    assert 1 <= len(examples) <= 4
    assert all(f"  {example.line}\n" in f"{text}\n" for example in examples)
    assert ("unlabeled settings" in text) == (name in WITH_SETTINGS or name in ("settings", "tasks"))


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == help_of([], capsys)


def test_the_list_of_commands_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of([], capsys).splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines) <= 80
    starts = [line.split()[0] for line in lines if line.startswith("    ") and line.split()[0] in COMMANDS]
    assert starts == list(COMMANDS)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example.line for _, example in EXAMPLES])
def test_examples_are_valid(name: str, example: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mae").mkdir(parents=True)  # a target must exist
    monkeypatch.chdir(tmp_path)
    line = example.line  # type: ignore[attr-defined]
    assert len(line) <= 78
    program, *words = shlex.split(line.partition(" > ")[0])
    assert program == "unlabeled"
    given = _parser().parse_args(words)
    assert given.command == name
    if name == "pretrain":
        if given.multirun:
            assert len(swept_configs(given.overrides)) == 6
        else:
            pretrain_config(given.overrides)
    elif name == "evaluate":
        assert evaluate_config(given.target, given.overrides).target == given.target
    elif name == "finetune":
        assert finetune_config(given.target, given.overrides).target == given.target
    elif name == "export":
        assert str(export_config(given.run, given.overrides).run) == given.run
    elif name == "doctor":
        assert doctor_config(given.overrides).data.name in ("folder", "parquet")
    elif name == "gauntlet":
        assert gauntlet_config(given.overrides).backbones
    elif name == "settings" and given.what is not None:
        assert describe(given.what)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.settings])
def test_the_pointers_lead_somewhere(name: str) -> None:
    for line in COMMANDS[name].settings:
        assert describe(shlex.split(line)[2])[0].settings


def test_help_imports_no_torch() -> None:
    code = "import sys\nfrom unlabeled.cli import main\ntry: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
