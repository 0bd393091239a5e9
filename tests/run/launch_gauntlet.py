"""Runs ``unlabeled gauntlet`` with the given words and kills its own process inside of a cell.

python launch_gauntlet.py CELL words...
"""

import os
import signal
import sys
from typing import Any

from unlabeled.cli import main
from unlabeled.workflows.gauntlet import job

judged = job.judged
begun = 0


def judge_and_die(*arguments: Any) -> Any:
    global begun
    begun += 1
    found = judged(*arguments)
    if begun == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return found


if __name__ == "__main__":
    job.judged = judge_and_die
    sys.exit(main(["gauntlet", "--debug", *sys.argv[2:]]))
