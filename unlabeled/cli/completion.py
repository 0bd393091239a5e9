"""``unlabeled completion``: a script for a shell."""

from __future__ import annotations

import argparse
import sys

from unlabeled.cli.commands import COMMANDS
from unlabeled.workflows.completion import completion_script


def run(given: argparse.Namespace) -> int:
    """Prints the script; returns the exit code."""
    options = {
        name: [one.name for one in command.arguments if one.name.startswith("--")] + ["--debug"]
        for name, command in COMMANDS.items()
    }
    sys.stdout.write(completion_script(given.shell, options))
    return 0
