"""The rules in order, and the functions that check one task or evaluator against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from unlabeled.eval.base import Evaluator
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.task import PretextTask
from unlabeled.testing.case import ContractError, TaskCase
from unlabeled.testing.evaluator import EVALUATOR_CHECKS, EvaluatorCase
from unlabeled.testing.loss import (
    bfloat16_stays_close,
    every_trainable_parameter_gets_a_gradient,
    halves_of_a_batch_add_up,
    logs_and_features_are_detached,
    loss_is_a_finite_float32_scalar,
    parameter_groups_are_complete,
    randomness_comes_from_draw,
)
from unlabeled.testing.parity import two_processes_equal_one
from unlabeled.testing.state import (
    a_resumed_run_is_the_same_run,
    state_dict_is_complete,
    state_moves_in_after_step_only,
)
from unlabeled.testing.surface import (
    encoder_loads_into_timm,
    foreign_checkpoints_are_refused,
    task_and_settings_are_documented,
    unknown_settings_are_refused,
    views_pickle_and_have_fixed_shapes,
    visualize_gives_images,
)

Check = Callable[[TaskCase], None]
"""Raises ContractError when the rule stated by its name is broken."""

CHECKS: tuple[Check, ...] = (
    task_and_settings_are_documented,
    unknown_settings_are_refused,
    views_pickle_and_have_fixed_shapes,
    loss_is_a_finite_float32_scalar,
    logs_and_features_are_detached,
    every_trainable_parameter_gets_a_gradient,
    parameter_groups_are_complete,
    randomness_comes_from_draw,
    halves_of_a_batch_add_up,
    bfloat16_stays_close,
    state_dict_is_complete,
    state_moves_in_after_step_only,
    a_resumed_run_is_the_same_run,
    encoder_loads_into_timm,
    visualize_gives_images,
    foreign_checkpoints_are_refused,
)
"""Every rule that one process can check. Later rules assume that earlier ones hold."""


def check_task(
    task: str | type[PretextTask],
    *,
    settings: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
    parity: bool = False,
) -> None:
    """Checks `task`, a registered name or the class itself, against every rule of the contract; seconds on a CPU.

    `settings`: fields of its Config, such as a narrower decoder. `backbone`: the backbone to use; None: the first of
    `TINY_BACKBONES` that can do it. `parity`: also compare with two processes, which must be able to import the class.

    Raises ContractError, an AssertionError, for the first broken rule.
    """
    case = TaskCase.of(task, settings=settings, backbone=backbone)
    for check in (*CHECKS, two_processes_equal_one) if parity else CHECKS:
        run_check(check, case)


def check_evaluator(evaluator: str | type[Evaluator], *, settings: Mapping[str, Any] | None = None) -> None:
    """Checks `evaluator`, a registered name or the class itself, against every rule of the contract; seconds on a CPU.

    `settings`: fields of its Config, such as fewer epochs. The data are generated images of three classes with masks
    and boxes, encoded by a tiny transformer.

    Raises ContractError, an AssertionError, for the first broken rule.
    """
    case = EvaluatorCase.of(evaluator, settings)
    for check in EVALUATOR_CHECKS:
        run_check(check, case)


class Named(Protocol):
    """Anything with a name that can be checked."""

    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=Named)


def run_check(check: Callable[[NamedT], None], case: NamedT) -> None:
    """Checks one rule. The error names the case and the rule. The global random state is restored afterwards."""
    rule = getattr(check, "__name__", "a rule").replace("_", " ")
    broken = f"{case.name} breaks '{rule}'"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(case)
    except ContractError as error:
        raise ContractError(f"{broken}: {error}") from None
    except Exception as error:  # a plugin may raise anything; the rule under which it did helps its author
        raise ContractError(f"{broken}: {type(error).__name__}: {error}") from error
