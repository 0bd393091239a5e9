"""Fixtures: the name of each registered task, and the task itself on a tiny backbone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unlabeled.pretext.base import PretextTask
from unlabeled.pretext.registry import task_names

sys.path.insert(0, str(Path(__file__).parent))  # for `tiny_tasks`, in spawned processes too

from tiny_tasks import tiny_task


@pytest.fixture(params=task_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(name: str) -> PretextTask:
    return tiny_task(name)
