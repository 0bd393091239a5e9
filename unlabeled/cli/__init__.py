"""The command ``unlabeled``: a file a command, each thin: words in, a workflow called, lines out."""

from unlabeled.cli.main import main

__all__ = ["main"]
