"""The command ``unlabeled``: pretrain, evaluate, gauntlet, report, finetune, export and what helps with them.

Exit codes: 0 done · 2 a fault of the input, in one line · 75 stopped by a signal after writing a checkpoint (the same
command goes on) · 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from unlabeled._version import __version__
from unlabeled.ssl.core.errors import UnlabeledError

_EPILOG = """\
settings are key=value words, the same for every way to start a run:
  unlabeled pretrain task=mae data=folder data.path=images backbone=vit_small_patch16_224 out=runs/x epochs=100
  accelerate launch pretrain.py task=rotation data=digits backbone=resnet18 out=runs/y
  unlabeled pretrain --multirun optim.lr=1e-3,1e-4 engine.seed=range(3) out=runs/sweep
  unlabeled evaluate runs/x            unlabeled evaluate resnet18 data=shapes
  unlabeled finetune runs/x data=folder data.path=labeled out=runs/x_finetuned
  unlabeled export runs/x out=backbone.safetensors
  unlabeled sizes runs/poa             unlabeled export runs/poa width=384 depth=12 out=small.safetensors
  unlabeled export runs/poa like=vit_small_patch16_224 out=vit_small.safetensors
  unlabeled evaluate runs/poa 'sizes=[[384,12],[768,12]]' beside=[runs/alone]
  unlabeled doctor data=folder data.path=images
  unlabeled matrix task=mae module=beit
  unlabeled gauntlet backbones=[runs/x,resnet18] data=[digits,shapes] evaluators=[knn,linear] out=runs/gauntlet
  unlabeled report runs/x runs/y out=reports/xy
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = _parser().parse_args(arguments)
    _set_up_logging()
    try:
        return int(importlib.import_module(f"unlabeled.cli.{given.command}").run(given))
    except UnlabeledError as error:
        if given.debug:
            raise
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"unlabeled: {error}\n" if rank == "0" else f"unlabeled [rank {rank}]: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


_COMMANDS = {
    "pretrain": "pretrain a backbone on unlabeled images",
    "evaluate": "kNN, linear probe and report of a run (sizes=... for those it holds), a timm model or a weights file",
    "finetune": "train a run, a timm model or a weights file into a classifier, and its twin from random weights",
    "export": "write a run's network, or sizes that it holds (width= depth=, like=, sizes=), as files that timm loads",
    "sizes": "list the sizes that an elastic run holds, with their cost and what was measured of them",
    "doctor": "scan a data source: count, sizes, formats, bad files, decoding speed",
    "tasks": "list the pretext tasks",
    "matrix": "try every task on every architecture of timm: what runs on what, and why not",
    "gauntlet": "evaluate many backbones on many data sets in one job that goes on where it was stopped",
    "report": "compare runs side by side, from their reports",
}
"""Command → what ``--help`` says of it. The module of that name in this folder runs it and is imported when it is
chosen, so that help and faults of the command line need no torch."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unlabeled",
        description="Self-supervised vision pretraining: any backbone, any pretext task, and evidence that it worked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unlabeled {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
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
