"""What every evaluator must keep to. A new one is tested here by being registered; the rules are the kit's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from unlabeled.eval.registry import evaluator_names
from unlabeled.testing import EVALUATOR_CHECKS, EvaluatorCase, run_check

SMALL: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 2, "lr": (0.1, 1.0), "weight_decay": (0.0,)},
    "few_shot": {"episodes": 20, "ways": 3},
    "low_label": {"fractions": (0.2, 1.0), "draws": 2, "steps": 4, "probe": {"epochs": 2, "lr": (0.1,)}},
    "segmentation": {"epochs": 2, "lr": (0.1, 1.0)},
    "invariance": {"images": 12, "views": 3},
    "corruption": {"corruptions": ("gaussian_noise", "contrast"), "severities": (1, 5)},
}
"""Settings that cost less and say the same."""


@functools.cache
def case(name: str) -> EvaluatorCase:
    return EvaluatorCase.of(name, SMALL.get(name))


@pytest.mark.parametrize("check", EVALUATOR_CHECKS, ids=[check.__name__ for check in EVALUATOR_CHECKS])
@pytest.mark.parametrize("name", evaluator_names())
def test_contract(name: str, check: Callable[[EvaluatorCase], None]) -> None:
    run_check(check, case(name))
