"""Fixtures: the name of each registered task, and what the contract kit tries it on."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from unlabeled.pretext.registry import task_names
from unlabeled.testing import TaskCase

sys.path.insert(0, str(Path(__file__).parent))  # for `tiny_tasks`

from tiny_tasks import SMALL


@functools.cache
def tiny_subject(name: str) -> TaskCase:
    return TaskCase.of(name, settings=SMALL.get(name))


@pytest.fixture(params=task_names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str) -> TaskCase:
    return tiny_subject(name)
