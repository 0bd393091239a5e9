"""Parts in packages of their own: installed into a fresh environment, offline, they are there like built-in ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "unlabeled-jigsaw"
EXTRAS = ROOT / "examples" / "unlabeled-extras"
SMALL = '{"grid": 2, "permutations": 24}'
pytestmark = pytest.mark.slow

# Runs scripts of the environment in forks of one interpreter, which has imported torch and ours and nothing of pytest.
SERVER = """
import json, os, runpy, sys, traceback
import torch, unlabeled, unlabeled.testing

for name in dir(unlabeled):
    getattr(unlabeled, name)
for line in sys.stdin:
    words, out, error = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code, sys.argv = 0, words
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Environment:
    """A virtual environment that finds torch and all else where this interpreter finds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / Path(sys.executable).name
        site = self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        # not --system-site-packages: of an interpreter that is in an environment itself, that gives the base's packages
        outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        Path(site, "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
        self.server: subprocess.Popen[str] | None = None

    def run(self, *command: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs `command` in the environment's folder, which holds no source of ours; checks its exit code."""
        overrides = [str(word) for word in command]
        done = subprocess.run(
            overrides, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, f"{overrides}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done

    @property
    def variables(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PIP_NO_INDEX": "1"}

    def fork(self, script: Path, *overrides: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """As `run` does with a Python script, in a fork of an interpreter of the environment: no import of torch."""
        if self.server is None:
            command, pipe = [str(self.python), "-c", SERVER], subprocess.PIPE
            self.server = subprocess.Popen(
                command, cwd=self.folder, env=self.variables, stdin=pipe, stdout=pipe, text=True
            )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        command = [str(word) for word in (script, *overrides)]
        out, error = self.folder / "out.txt", self.folder / "error.txt"
        self.server.stdin.write(json.dumps([command, str(out), str(error)]) + "\n")
        self.server.stdin.flush()
        done = subprocess.CompletedProcess(
            command, int(self.server.stdout.readline()), out.read_text("utf-8"), error.read_text("utf-8")
        )
        assert done.returncode == code, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate(timeout=60)

    def install(self, project: Path) -> None:
        """Builds and installs `project` from its folder, with nothing from any index."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--ignore-installed"]
        self.run(*pip, "--no-deps", "--no-build-isolation", "--no-index", project)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    made = Environment(tmp_path_factory.mktemp("plugin") / "env")
    made.install(ROOT)
    made.install(EXAMPLE)
    made.install(EXTRAS)
    yield made
    made.close()


def test_it_is_listed_with_the_package_that_brings_it(environment: Environment) -> None:
    printed = environment.fork(environment.bin / "unlabeled", "tasks", "--json").stdout
    tasks = {task["name"]: task for task in json.loads(printed)}
    jigsaw = tasks.pop("jigsaw")
    assert jigsaw["summary"] == "Predicts how the tiles of an image were shuffled."
    assert (jigsaw["needs"], jigsaw["origin"]) == (["pooled"], "unlabeled-jigsaw 0.1.0")
    assert {task["origin"] for task in tasks.values()} == {"built in"}
    shown = environment.fork(environment.bin / "unlabeled", "settings", "task=jigsaw").stdout
    assert "task.permutations" in shown
    assert "Number of orders to choose from." in shown


def test_the_contract_is_checked_without_pytest(environment: Environment, tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import sys\n"
        "from unlabeled.testing import check_task\n"
        "import unlabeled, unlabeled_jigsaw\n"
        "assert all(module.__file__.startswith(sys.prefix) for module in (unlabeled, unlabeled_jigsaw))\n"
        f"check_task('jigsaw', settings={SMALL})\n"
        "assert not {'pytest', '_pytest'} & set(sys.modules)\n"
    )
    environment.fork(script)


@pytest.mark.parametrize("example", [EXAMPLE, EXTRAS], ids=lambda folder: folder.name)
def test_its_own_tests_pass(environment: Environment, example: Path, tmp_path: Path) -> None:
    script = tmp_path / "test.py"
    script.write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n")
    overrides = ["-q", "-p", "no:cacheprovider", "-k", "not contract", "--rootdir", example, example / "tests"]
    assert "passed" in environment.fork(script, *overrides).stdout


def test_a_debug_run_leaves_what_any_run_leaves(environment: Environment, tmp_path: Path) -> None:
    overrides = [
        "task=jigsaw", "task.grid=2", "task.permutations=24", "data=shapes", "backbone=resnet18", "backbone.size=32",
        "backbone.kwargs={channels:[8,8,8,8],stem_width:8}", "debug=true", f"out={tmp_path / 'run'}",
    ]  # fmt: skip
    environment.fork(environment.bin / "unlabeled", "pretrain", *overrides)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all({"loss", "accuracy", "grad_norm"} <= row.keys() for row in rows)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["optim"]["name"], config["optim"]["lr"]) == ("sgd", 0.01), "the recipe that the task brings"
    assert (tmp_path / "run" / "backbone.safetensors").is_file()
    assert (tmp_path / "run" / "report" / "report.html").is_file()


def test_its_faults_are_one_line_too(environment: Environment, tmp_path: Path) -> None:
    command = [environment.bin / "unlabeled", "pretrain", "task=jigsaw", "data=digits", f"out={tmp_path / 'run'}"]
    done = environment.fork(*command, "task.gird=2", code=2)
    assert done.stderr == "unlabeled: task.gird: there is no such setting in task; did you mean 'grid'?\n"
    done = environment.fork(environment.bin / "unlabeled", "pretrain", "task=jigsw", code=2)
    assert done.stderr == "unlabeled: task: 'jigsw' is not a pretext task; did you mean 'jigsaw'?\n"


def test_an_evaluator_of_another_package_is_one_of_all(environment: Environment, tmp_path: Path) -> None:
    code = "from unlabeled import check_evaluator; check_evaluator('centroid', settings={'shots': [1, 5]})"
    environment.run(environment.python, "-c", code)
    overrides = [
        "evaluate", "resnet18", "pretrained=false", "backbone.size=32", "data=digits", "evaluate.limit=60",
        "backbone.kwargs={channels:[8,8,8,8],stem_width:8}", "evaluate.evaluators=[knn,centroid]",
        "evaluate.embedding=null", "evaluate.maps=0", "device=cpu", "workers=0", f"out={tmp_path / 'report'}",
    ]  # fmt: skip
    environment.fork(environment.bin / "unlabeled", *overrides, "evaluate.centroid.shots=[1,5]")
    section = json.loads((tmp_path / "report" / "report.json").read_text())["evaluators"][-1]
    assert (section["name"], section["title"]) == ("centroid", "Nearest class mean")
    assert [row["label"] for row in section["rows"]] == [
        "nearest class mean", "class mean of 1 images", "class mean of 5 images",
    ]  # fmt: skip
    assert "Nearest class mean by images" in (tmp_path / "report" / "report.html").read_text(), "the curve"
    done = environment.fork(environment.bin / "unlabeled", *overrides, "evaluate.centroid.shot=1", code=2)
    fault = "evaluate.centroid.shot: there is no such setting in evaluate.centroid; did you mean 'shots'?"
    assert done.stderr == f"unlabeled: {fault}\n"


def test_its_source_is_chosen_by_name_and_says_its_faults(environment: Environment, tmp_path: Path) -> None:
    for split, count in (("train", 24), ("test", 8)):
        images = np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        np.save(tmp_path / f"{split}_images.npy", images)
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count) % 2)
    command = environment.bin / "unlabeled"
    overrides = ["data=npy", f"data.path={tmp_path}"]
    assert "24" in environment.fork(command, "doctor", *overrides, "workers=0").stdout
    small = ["backbone.size=32", "backbone.kwargs={channels:[8,8,8,8],stem_width:8}", "batch_size=8", "debug=true"]
    run = ["task=rotation", "backbone=resnet18", *overrides, *small, f"out={tmp_path / 'run'}"]
    environment.fork(command, "pretrain", *run)
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert data == {"name": "npy", "limit": 16, "max_bad_fraction": 0.05, "path": str(tmp_path)}
    assert "random" in (tmp_path / "run" / "report" / "report.md").read_text(), "its labels are evaluated"
    done = environment.fork(command, "doctor", "data=npy", code=2)
    assert done.stderr == "unlabeled: data.path: not given; set data.path=...\n"
    done = environment.fork(command, "doctor", *overrides, "data.count=3", code=2)
    assert done.stderr == "unlabeled: data.count: 3 has no effect with data=npy, it is a setting of shapes; remove it\n"
