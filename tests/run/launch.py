"""Runs ``unlabeled pretrain`` with the given words and, if asked to, kills its own process after a step.

python launch.py KILL_AFTER_STEP|never words...
"""

import os
import signal
import sys
from typing import Any

from unlabeled.cli import main
from unlabeled.ssl.train import loop as engine

record = engine.record


def record_and_die(run: Any, step: int, *arguments: Any) -> None:
    record(run, step, *arguments)
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] != "never":
        engine.record = record_and_die
    sys.exit(main(["pretrain", "--debug", *sys.argv[2:]]))
