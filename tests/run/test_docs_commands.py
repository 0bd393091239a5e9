"""The commands of README and the tutorial run in order, and every command of the how-to pages has settings that exist.

Conventions of the pages, as HTML comments on the line before a fenced block:

- ``<!-- not run: reason -->``: the block is not run here (its settings are checked all the same);
- ``<!-- file: NAME -->``: the reader saves the block as NAME;
- ``<!-- interrupted -->``: the reader presses Ctrl-C during the command, which ends with code 75.

Blocks of ``text`` are output. What is shortened: ``unlabeled pretrain`` and ``finetune`` get ``debug=true``, and the
images are fewer (`FEWER`).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # for `launch`, in the processes too

from launch import launch

from unlabeled import open_source
from unlabeled.ssl.config.schema import DataConfig
from unlabeled.workflows.evaluate import evaluate_config
from unlabeled.workflows.export import export_config
from unlabeled.workflows.finetune.run import finetune_config
from unlabeled.workflows.gauntlet.settings import gauntlet_config
from unlabeled.workflows.inspect_data import doctor_config
from unlabeled.workflows.pretrain import pretrain_config, swept_configs

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = ("own-data", "several-gpus", "resume", "compare-runs", "small-machine")
PAGES = ["README.md", "docs/tutorial.md", *(f"docs/how-to/{name}.md" for name in HOW_TO)]

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SHORTENED = ("pretrain", "finetune")
FEWER = {"2048": "128", "3072": "192", "4096": "256"}
"""Numbers of images in files that the reader saves."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    """Its language, such as ``sh``."""
    text: str
    mark: str
    """The comment before it, or nothing."""

    @property
    def commands(self) -> list[str]:
        """Its lines, where continued ones are joined and comments of their own are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(text: str) -> list[Block]:
    return [Block(match["kind"], match["text"], match["mark"] or "") for match in _BLOCK.finditer(text)]


def page(name: str) -> list[Block]:
    return blocks((ROOT / name).read_text(encoding="utf-8"))


def run_page(name: str, folder: Path) -> None:
    """Follows `name` as a reader would who starts in `folder`."""
    for number, block in enumerate(page(name)):
        if block.mark.startswith("file: "):
            text = re.sub("|".join(FEWER), lambda match: FEWER[match[0]], block.text)
            (folder / block.mark.removeprefix("file: ")).write_text(text)
        elif block.kind == "python" and not block.mark.startswith("not run: "):
            script = folder / f"block_{number}.py"
            script.write_text(_short_python(block.text))
            _launch([], folder, script=script)
        elif block.kind == "sh" and not block.mark.startswith("not run: "):
            for command in block.commands:
                run_command(command, folder, interrupted=block.mark == "interrupted")


def run_command(command: str, folder: Path, interrupted: bool = False) -> None:
    """A line of a shell block, in `folder`."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["python"]:
        _launch(words[2:], folder, script=folder / words[1])
    elif words[:1] != ["unlabeled"]:
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    else:
        words = words[1:]
        if words[0] in _SHORTENED:
            words.append("debug=true")
        _launch(words, folder, before=interrupt_after_two_steps if interrupted else None, code=75 if interrupted else 0)


def _short_python(text: str) -> str:
    return re.sub(r"(unlabeled\.(?:pretrain|finetune)\()", r"\1debug=True, ", text)


def _launch(
    words: Sequence[str],
    folder: Path,
    script: Path | None = None,
    before: Callable[[], None] | None = None,
    code: int = 0,
) -> None:
    """``unlabeled WORDS`` or a script, in a process of its own whose working folder is `folder`."""
    log = folder.with_suffix(".log")
    codes = launch(list(words), log, script=script, before=partial(_enter, folder, before))
    assert codes == [code], f"{' '.join(words) or script}\n{log.read_text()[-3000:]}"


def _enter(folder: Path, before: Callable[[], None] | None) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    if before is not None:
        before()


def interrupt_after_two_steps() -> None:
    """This process will get what Ctrl-C sends after its second optimizer step."""
    from unlabeled.ssl.train import loop

    record = loop.record

    def record_and_interrupt(*arguments: Any, **named: Any) -> None:
        record(*arguments, **named)
        if arguments[1] == 2:  # the step
            os.kill(os.getpid(), signal.SIGINT)

    loop.record = record_and_interrupt


def draw_images(folder: Path) -> None:
    """The folders that README takes for granted: ``images``, and ``labeled`` with a sub-folder for each class."""
    shapes = open_source(DataConfig(name="shapes", count=160), "train")
    labels = shapes.labels()
    assert labels is not None
    assert shapes.classes is not None
    for index, label in enumerate(labels.tolist()):
        into = folder / "images" if index < 80 else folder / "labeled" / shapes.classes[label]
        into.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.read(index).permute(1, 2, 0).numpy()).save(into / f"{index}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "reader"
    made.mkdir()
    return made


@pytest.mark.slow
def test_the_commands_of_the_readme_run(folder: Path) -> None:
    draw_images(folder)
    run_page("README.md", folder)
    for name in ("simclr", "rotation", "python"):
        assert (folder / "runs" / name / "report" / "report.html").is_file()
        assert (folder / "runs" / name / "backbone.safetensors").is_file()
    assert [path.name for path in (folder / "reports").glob("*/compare.html")] == ["compare.html"]


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(folder: Path) -> None:
    run_page("docs/tutorial.md", folder)
    run = folder / "runs" / "rotation"
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- run folder -->\n(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    promised = [name for line in listed[1].splitlines() for name in re.findall(r"`([\w./]+)`", line.split("|")[1])]
    assert len(promised) > 6
    for name in promised:
        assert (run / name).exists(), f"the tutorial promises {name}"
    assert (folder / "reports" / "two" / "compare.html").is_file()
    steps = sorted(path.name for path in (folder / "runs" / "short" / "checkpoints").glob("step_*"))
    assert steps[-1] == "step_00000004", "the interrupted run came to its end"


def commands_of(name: str) -> list[list[str]]:
    """The ``unlabeled`` commands of a page, those that are not run included, without the first word."""
    found = []
    for block in page(name):
        for command in block.commands if block.kind == "sh" else ():
            words = shlex.split(command, comments=True)
            script = next((word for word in words if word in ("pretrain.py", "finetune.py")), None)
            start = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == "unlabeled"), None)
            if script is not None:
                found.append([script.removesuffix(".py"), *words[words.index(script) + 1 :]])
            elif start is not None and words[0] != "pip":
                found.append(words[start + 1 :])
    return found


CHECKS: dict[str, Callable[[list[str]], Any]] = {
    "doctor": doctor_config,
    "evaluate": lambda words: evaluate_config(words[0], words[1:]),
    "export": lambda words: export_config(words[0], words[1:]),
    "finetune": lambda words: finetune_config(words[0], words[1:]),
    "gauntlet": gauntlet_config,
    "pretrain": lambda words: swept_configs(words[1:]) if words[0] == "--multirun" else pretrain_config(words),
}
"""Command → what refuses, in one line, settings that do not exist or values that cannot be."""
WITHOUT_SETTINGS = {"report", "settings", "sizes", "tasks"}


@pytest.mark.parametrize("name", PAGES)
def test_every_command_has_settings_that_exist(name: str) -> None:
    found = [words for words in commands_of(name) if words[0] not in WITHOUT_SETTINGS]
    assert found
    for words in found:
        CHECKS[words[0]](words[1:])


def test_a_wrong_command_is_found(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"optim\.rate: there is no such setting"):
        run_command("unlabeled pretrain task=rotation data=digits backbone=resnet18 optim.rate=1", folder)
    with pytest.raises(AssertionError, match="No such file"):
        run_command("cat nothing.txt", folder)


def test_blocks_are_read_with_their_marks() -> None:
    text = "a\n<!-- not run: why -->\n```sh\none \\\n  two  # x\n# no\n```\nb\n```python\nc = 1\n```\n```text\nd\n```\n"
    first, second, third = blocks(text)
    assert (first.mark, first.commands) == ("not run: why", ["one    two  # x"])
    assert (second.kind, second.text, second.mark) == ("python", "c = 1\n", "")
    assert third.kind == "text"
