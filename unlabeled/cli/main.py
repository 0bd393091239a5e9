"""The command ``unlabeled``; `unlabeled.cli.commands` is the table of what it can do.

Exit codes: 0 done · 2 a fault of the input, in one line · 75 stopped by a signal after writing a checkpoint (the same
command goes on) · 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial

from unlabeled._version import __version__
from unlabeled.cli.commands import COMMANDS, Command
from unlabeled.ssl.core.errors import UnlabeledError

_EPILOG = """\
settings are written as key=value, such as task=mae optim.lr=1e-3:
  unlabeled settings                lists where to look them up
  unlabeled COMMAND --help          shows examples

first steps:
  unlabeled pretrain recipe=demo out=runs/demo
  unlabeled tasks
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        return 2
    given = parser.parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands. Their modules are imported when they are run, so that help needs no torch."""
    parser = argparse.ArgumentParser(
        prog="unlabeled",
        usage="unlabeled COMMAND [argument ...] [key=value ...]",
        description=_filled(
            "Self-supervised vision pretraining: any backbone, any pretext task, and a report that shows how well it "
            "worked."
        ),
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=18),
    )
    parser.add_argument("-V", "--version", action="version", version=f"unlabeled {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", prog="unlabeled"
    )
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.summary,
            description=_filled(command.description),
            epilog=_epilog(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument in command.arguments:
            one.add_argument(argument.name, **argument.options)
        one.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")
    return parser


def _filled(text: str) -> str:
    """`text` in lines that fit the terminal; argparse leaves them as they are, since examples must not be wrapped."""
    return textwrap.fill(text, min(100, shutil.get_terminal_size().columns - 2), break_on_hyphens=False)


def _epilog(command: Command) -> str:
    """Examples, and where the settings are listed."""
    lines = ["examples:"]
    for example in command.examples:
        lines += [f"  # {example.purpose}", f"  {example.line}"]
    if command.settings:
        lines += ["", "all settings, with their defaults and meanings:", *(f"  {line}" for line in command.settings)]
    return "\n".join(lines)


def _set_up_logging() -> None:
    main_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if main_process else logging.ERROR, stream=sys.stderr)
    for noisy in ("httpx", "datasets", "timm", "PIL", "matplotlib", "faiss", "accelerate", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its retries
    warnings.filterwarnings("ignore", category=FutureWarning)
