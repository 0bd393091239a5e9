"""The contracts of a pretext task and of a data source as checks that run anywhere, pytest or not.

>>> from unlabeled.testing import check_source, check_task
>>> check_task("rotation")
>>> check_source("digits")

`docs/write-a-task.md` and `docs/write-a-source.md` say what the rules are for.
"""

from unlabeled.testing.check import CHECKS, Check, check_task, run_check
from unlabeled.testing.parity import RankResult, compare_with_one, run_two_processes, two_processes_equal_one
from unlabeled.testing.sources import (
    SOURCE_CHECKS,
    SourceCheck,
    SourceSubject,
    another_process_reads_the_same,
    check_source,
    compare_with_another,
    read_in_another_process,
)
from unlabeled.testing.subject import TINY_BACKBONES, ContractError, Subject, pictures, views_batch

__all__ = [
    "CHECKS",
    "SOURCE_CHECKS",
    "TINY_BACKBONES",
    "Check",
    "ContractError",
    "RankResult",
    "SourceCheck",
    "SourceSubject",
    "Subject",
    "another_process_reads_the_same",
    "check_source",
    "check_task",
    "compare_with_another",
    "compare_with_one",
    "pictures",
    "read_in_another_process",
    "run_check",
    "run_two_processes",
    "two_processes_equal_one",
    "views_batch",
]
