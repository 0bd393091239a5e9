"""The contract of a pretext task as a check that runs anywhere, pytest or not.

>>> from unlabeled.testing import check_task
>>> check_task("rotation")

`docs/write-a-task.md` says what the rules are for.
"""

from unlabeled.testing.check import CHECKS, Check, check_task, run_check
from unlabeled.testing.parity import RankResult, compare_with_one, run_two_processes, two_processes_equal_one
from unlabeled.testing.subject import TINY_BACKBONES, ContractError, Subject, pictures, views_batch

__all__ = [
    "CHECKS",
    "TINY_BACKBONES",
    "Check",
    "ContractError",
    "RankResult",
    "Subject",
    "check_task",
    "compare_with_one",
    "pictures",
    "run_check",
    "run_two_processes",
    "two_processes_equal_one",
    "views_batch",
]
