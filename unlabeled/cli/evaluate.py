"""``unlabeled evaluate``: the evaluators and a report for a run, a timm model or a file of weights."""

from __future__ import annotations

import argparse

from unlabeled.workflows.evaluate import evaluate_config, evaluate_target


def run(given: argparse.Namespace) -> int:
    """Evaluates; returns the exit code."""
    evaluate_target(evaluate_config(given.target, given.overrides))
    return 0
