"""The command ``unlabeled``: pretrain, evaluate, gauntlet, report, finetune, export and what helps with them.

Exit codes: 0 done · 2 a fault of the input, in one line · 75 stopped by a signal after writing a checkpoint (the same
command goes on) · 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from unlabeled.ssl.core.errors import ConfigError, UnlabeledError
from unlabeled.ssl.core.signals import EXIT_STOPPED

_EPILOG = """\
settings are key=value words, the same for every way to start a run:
  unlabeled pretrain task=mae data=folder data.path=pictures backbone=vit_small_patch16_224 out=runs/x epochs=100
  accelerate launch pretrain.py task=rotation data=digits backbone=resnet18 out=runs/y
  unlabeled pretrain --multirun optim.lr=1e-3,1e-4 engine.seed=range(3) out=runs/sweep
  unlabeled evaluate runs/x            unlabeled evaluate resnet18 data=shapes
  unlabeled finetune runs/x data=folder data.path=labelled out=runs/x_finetuned
  unlabeled export runs/x out=backbone.safetensors
  unlabeled sizes runs/poa             unlabeled export runs/poa width=384 depth=12 out=small.safetensors
  unlabeled export runs/poa like=vit_small_patch16_224 out=vit_small.safetensors
  unlabeled evaluate runs/poa 'sizes=[[384,12],[768,12]]' beside=[runs/alone]
  unlabeled doctor data=folder data.path=pictures
  unlabeled matrix task=mae module=beit
  unlabeled gauntlet backbones=[runs/x,resnet18] data=[digits,shapes] evaluators=[knn,linear] out=runs/gauntlet
  unlabeled report runs/x runs/y out=reports/xy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = _parser().parse_args(arguments)
    _set_up_logging()
    try:
        return int(_COMMANDS[given.command](given) or 0)
    except UnlabeledError as error:
        if given.debug:
            raise
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"unlabeled: {error}\n" if rank == "0" else f"unlabeled [rank {rank}]: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _pretrain(given: argparse.Namespace) -> int:
    from unlabeled.ssl.core.distributed import leave_ranks

    try:
        return _run(given)
    finally:
        leave_ranks()


def _run(given: argparse.Namespace) -> int:
    from unlabeled.ssl.api import pretrain_from
    from unlabeled.ssl.config.composition import pretrain_config, sweep

    if not given.multirun:
        return EXIT_STOPPED if pretrain_from(pretrain_config(given.words)).stopped else 0
    base = next((word.removeprefix("out=") for word in reversed(given.words) if word.startswith("out=")), "runs/sweep")
    for words, label in sweep([word for word in given.words if not word.startswith("out=")]):
        logging.getLogger(__name__).info("--- %s", label)
        if pretrain_from(pretrain_config([*words, f"out='{Path(base) / label}'"])).stopped:
            return EXIT_STOPPED
    return 0


def _evaluate(given: argparse.Namespace) -> None:
    from unlabeled.eval.command import evaluate_target
    from unlabeled.ssl.config.composition import compose_config
    from unlabeled.ssl.config.schema import EvaluateRun

    evaluate_target(compose_config("evaluate", [f"target='{given.target}'", *given.words], EvaluateRun))


def _finetune(given: argparse.Namespace) -> int:
    from unlabeled.eval.finetune.run import finetune_config, finetune_from
    from unlabeled.ssl.core.distributed import leave_ranks

    try:
        return EXIT_STOPPED if finetune_from(finetune_config(given.target, given.words)).stopped else 0
    finally:
        leave_ranks()


def _export(given: argparse.Namespace) -> None:
    from unlabeled.ssl.config.composition import compose_config, words_of
    from unlabeled.ssl.config.schema import ExportRun
    from unlabeled.ssl.subnetworks import export_run

    run = compose_config("export", [*words_of({"run": given.run}), *given.words], ExportRun)
    for exported in export_run(run):
        sys.stdout.write(f"{exported.line}\n")


def _sizes(given: argparse.Namespace) -> None:
    from rich.console import Console

    from unlabeled.eval.size_curve import read_curve
    from unlabeled.report.size_table import render_terminal
    from unlabeled.ssl.backbones.elastic.cost import costs_of
    from unlabeled.ssl.subnetworks import outline_elastic

    folder = Path(given.run)
    whole = outline_elastic(folder)
    curve = read_curve(folder)
    Console().print(render_terminal(costs_of(whole.elastic, whole.backbone), curve))


def _doctor(given: argparse.Namespace) -> None:
    from rich.console import Console

    from unlabeled.ssl.config.composition import compose_config
    from unlabeled.ssl.config.schema import DoctorRun
    from unlabeled.ssl.data.doctor import examine, render

    Console().print(render(examine(compose_config("doctor", given.words, DoctorRun))))


def _tasks(given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from unlabeled.pretext.registry import task_class, task_names, task_origin

    table = Table("task", "what it is", "needs of the backbone", "from", box=None)
    for name in task_names():
        try:
            task = task_class(name)
            what, needs = (task.__doc__ or "-").strip().splitlines()[0], ", ".join(sorted(task.requires))
        except ConfigError as error:  # of a plugin that cannot be imported; the others are listed all the same
            what, needs = str(error), ""
        table.add_row(name, what, needs or "-", task_origin(name))
    Console().print(table)


def _matrix(given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from unlabeled.ssl.matrix import matrix_config, measure
    from unlabeled.ssl.matrix_page import render_terminal, write_page

    run = matrix_config(given.words)
    errors, tasks = Console(stderr=True), logging.getLogger("unlabeled.pretext")
    level = tasks.level
    tasks.setLevel(logging.WARNING)  # what a task says of itself, it would say for each cell
    try:
        matrix = measure(run, lambda modules: iter(track(modules, description="modules", console=errors)))
    finally:
        tasks.setLevel(level)
    if run.out is not None:
        write_page(matrix, run.out)
    Console().print(render_terminal(matrix))


def _gauntlet(given: argparse.Namespace) -> None:
    from unlabeled.eval.gauntlet.job import run_gauntlet
    from unlabeled.eval.gauntlet.progress import CellProgress
    from unlabeled.eval.gauntlet.settings import gauntlet_config

    run = gauntlet_config(given.words)
    with CellProgress() as progress:
        cells = run_gauntlet(run, progress.begin)["cells"]
    log = logging.getLogger(__name__)
    log.info("%d of %d cells, %d failed: %s", cells["done"], cells["total"], cells["failed"], run.out / "table.html")


def _report(given: argparse.Namespace) -> None:
    from unlabeled.report.compare import report_runs

    logging.getLogger(__name__).info("Comparison: %s", report_runs(given.words))


_COMMANDS = {
    "pretrain": _pretrain, "evaluate": _evaluate, "finetune": _finetune, "export": _export, "sizes": _sizes,
    "doctor": _doctor, "tasks": _tasks, "matrix": _matrix, "gauntlet": _gauntlet, "report": _report,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    from unlabeled import __version__

    parser = argparse.ArgumentParser(
        prog="unlabeled",
        description="Self-supervised vision pretraining: any backbone, any pretext task, and evidence that it worked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unlabeled {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("pretrain", "pretrain a backbone on unlabelled images"),
        (
            "evaluate",
            "kNN, linear probe and report of a run (sizes=... for those it holds), a timm model or a weights file",
        ),
        (
            "finetune",
            "train a run, a timm model or a weights file into a classifier, and the same network from random weights",
        ),
        (
            "export",
            "write a run's network, or sizes that it holds (width= depth=, like=, sizes=), as files that timm loads",
        ),
        ("sizes", "list the sizes that an elastic run holds, with their cost and what was measured of them"),
        ("doctor", "scan a data source: count, sizes, formats, bad files, decoding speed"),
        ("tasks", "list the pretext tasks"),
        ("matrix", "try every task on every architecture of timm: what runs on what, and why not"),
        ("gauntlet", "evaluate many backbones on many data sets in one job that goes on where it was stopped"),
        ("report", "compare runs side by side, from their reports"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
        if name == "pretrain":
            command.add_argument("--multirun", action="store_true", help="run every combination of swept values")
        if name in ("evaluate", "finetune"):
            command.add_argument("target", help="a run folder, a timm model name, or a weights file")
        if name in ("export", "sizes"):
            command.add_argument("run", help="a run folder, or another exported backbone")
        if name == "report":
            command.add_argument("words", nargs="+", metavar="RUN", help="run folders, and out=FOLDER")
        elif name not in ("tasks", "sizes"):
            command.add_argument("words", nargs="*", metavar="key=value", help="settings")
    return parser


def _set_up_logging() -> None:
    main_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR, stream=sys.stderr)
    for noisy in ("httpx", "datasets", "timm", "PIL", "matplotlib", "faiss", "accelerate", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its retries
    warnings.filterwarnings("ignore", category=FutureWarning)
