"""The contracts of a pretext task and of an evaluator as checks that run anywhere, pytest or not.

>>> from unlabeled.testing import check_evaluator, check_task
>>> check_task("rotation")
>>> check_evaluator("knn")

`docs/write-a-task.md` and `docs/write-an-evaluator.md` say what the rules are for.
"""

from unlabeled.testing.check import CHECKS, Check, check_evaluator, check_task, run_check
from unlabeled.testing.evaluator import EVALUATOR_CHECKS, EvaluatorCase
from unlabeled.testing.parity import RankResult, compare_with_one, run_two_processes, two_processes_equal_one
from unlabeled.testing.subject import TINY_BACKBONES, ContractError, Subject, pictures, views_batch

__all__ = [
    "CHECKS",
    "EVALUATOR_CHECKS",
    "TINY_BACKBONES",
    "Check",
    "ContractError",
    "EvaluatorCase",
    "RankResult",
    "Subject",
    "check_evaluator",
    "check_task",
    "compare_with_one",
    "pictures",
    "run_check",
    "run_two_processes",
    "two_processes_equal_one",
    "views_batch",
]
