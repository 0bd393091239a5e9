"""What every pretext task must keep to. A new task is tested here by being registered; the rules are the kit's."""

from __future__ import annotations

import pytest

from unlabeled.testing import CHECKS, Check, TaskCase, run_check


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_contract(check: Check, case: TaskCase) -> None:
    run_check(check, case)
