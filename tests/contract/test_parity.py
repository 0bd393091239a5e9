"""Two gloo processes on half batches give the loss and the gradients of one process on the whole batch."""

from __future__ import annotations

import pytest
from tiny_tasks import SMALL

from unlabeled.pretext.registry import task_names
from unlabeled.testing import RankResult, TaskCase, compare_with_one, run_two_processes


@pytest.fixture(scope="module")
def two_processes() -> dict[str, tuple[RankResult, RankResult]]:
    """All tasks in one pair of processes."""
    names = task_names()
    cases = [TaskCase.of(name, settings=SMALL.get(name)) for name in names]
    return dict(zip(names, run_two_processes(cases), strict=True))


@pytest.mark.slow
def test_two_processes_equal_one(
    two_processes: dict[str, tuple[RankResult, RankResult]], name: str, case: TaskCase
) -> None:
    compare_with_one(case, two_processes[name])
