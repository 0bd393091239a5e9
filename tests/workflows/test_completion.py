"""Completion as bash does it: the script is sourced, and its function asked as a TAB asks it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from unlabeled.cli.commands import COMMANDS
from unlabeled.cli.main import main
from unlabeled.pretext.registry import task_names
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.workflows.completion import completion_script

ASK = """
ask() { COMP_LINE="$1"; COMP_POINT=${#1}; COMPREPLY=(); _unlabeled; printf '%s\\n' "${COMPREPLY[@]}"; }
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "unlabeled.bash"
    path.write_text(completion_script("bash", {name: ["--debug"] for name in COMMANDS}), encoding="utf-8")
    return path


def ask(script: Path, line: str) -> list[str]:
    """What is offered at the end of `line`."""
    code = f'PATH=/nowhere; source "$1"; {ASK} ask "$2"'  # with an empty PATH nothing can be started
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", code, "bash", str(script), line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("unlabeled pre", ["pretrain"]),
        ("unlabeled pretrain --de", ["--debug"]),
        ("unlabeled pretrain opt", ["optim."]),
        ("unlabeled pretrain optim.l", ["optim.lr=", "optim.lr_scaling=", "optim.lr_batch=", "optim.layer_decay="]),
        ("unlabeled pretrain task=rot", ["rotation"]),
        ("unlabeled pretrain out=x task=simm", ["simmim"]),
        ("unlabeled pretrain task.decoder.de", ["task.decoder.depth="]),
        ("unlabeled pretrain task=obow task.kap", ["task.kappa="]),
        ("unlabeled pretrain task=obow task.decoder.de", []),
        ("unlabeled pretrain data=sha", ["shapes"]),
        ("unlabeled pretrain data=shapes data.cou", ["data.count="]),
        ("unlabeled pretrain recipe=dem", ["demo"]),
        ("unlabeled pretrain engine.precision=b", ["bf16"]),
        ("unlabeled pretrain engine.compile=", ["true", "false"]),
        ("unlabeled pretrain evaluate.evaluators=[knn,clus", ["[knn,cluster"]),
        ("unlabeled pretrain 'evaluate.evaluators=[knn,clus", ["[knn,cluster"]),
        ("unlabeled evaluate runs/x evaluate.knn.se", ["evaluate.knn.search="]),
        ("unlabeled evaluate ru", []),
        ("unlabeled finetune runs/x augment.mix", ["augment.mixup="]),
        ("unlabeled gauntlet evaluators=[lay", ["[layers"]),
        ("unlabeled settings evaluator=kn", ["knn"]),
        ("unlabeled settings sched", ["schedule"]),
        ("unlabeled completion f", ["fish"]),
        ("unlabeled tasks --d", ["--debug"]),
        ("unlabeled pretrain out=", []),
    ],
)
def test_bash_offers(script: Path, line: str, expected: list[str]) -> None:
    assert ask(script, line) == expected


def test_bash_offers_all_tasks_and_commands(script: Path) -> None:
    assert ask(script, "unlabeled pretrain task=") == task_names()
    assert ask(script, "unlabeled ") == [*COMMANDS, "--help", "--version"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "@tables@" not in text
    assert "task.decoder.depth" in text
    if (program := shutil.which(shell)) is not None:
        assert subprocess.run([program, "-n"], input=text, text=True, check=False).returncode == 0


def test_another_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"completion: 'tcsh' is not possible; give bash, zsh, fish"):
        completion_script("tcsh", {})
