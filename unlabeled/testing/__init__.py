"""The contracts of a task, an evaluator and a source as checks that run anywhere, with or without pytest.

>>> from unlabeled.testing import check_evaluator, check_source, check_task
>>> check_task("rotation")
>>> check_evaluator("knn")
>>> check_source("digits")

`docs/how-to/own-task.md`, `docs/how-to/own-evaluator.md` and `docs/how-to/own-source.md` explain the rules.
"""

from __future__ import annotations

import warnings
from typing import Any

from unlabeled.testing.case import TINY_BACKBONES, ContractError, TaskCase, images, views_batch
from unlabeled.testing.check import CHECKS, Check, check_evaluator, check_task, run_check
from unlabeled.testing.evaluator import EVALUATOR_CHECKS, EvaluatorCase
from unlabeled.testing.parity import RankResult, compare_with_one, run_two_processes, two_processes_equal_one
from unlabeled.testing.sources import (
    SOURCE_CHECKS,
    SourceCase,
    SourceCheck,
    another_process_reads_the_same,
    check_source,
    compare_with_another,
    read_in_another_process,
)

__all__ = [
    "CHECKS",
    "EVALUATOR_CHECKS",
    "SOURCE_CHECKS",
    "TINY_BACKBONES",
    "Check",
    "ContractError",
    "EvaluatorCase",
    "RankResult",
    "SourceCase",
    "SourceCheck",
    "TaskCase",
    "another_process_reads_the_same",
    "check_evaluator",
    "check_source",
    "check_task",
    "compare_with_another",
    "compare_with_one",
    "images",
    "read_in_another_process",
    "run_check",
    "run_two_processes",
    "two_processes_equal_one",
    "views_batch",
]

_OLD_NAMES = {"SourceSubject": "SourceCase", "Subject": "TaskCase", "pictures": "images"}


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        current = _OLD_NAMES[name]
        warnings.warn(f"unlabeled.testing.{name} is now unlabeled.testing.{current}", DeprecationWarning, stacklevel=2)
        return globals()[current]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
