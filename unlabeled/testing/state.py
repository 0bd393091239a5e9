"""Rules for state: what a checkpoint must contain, when state may change, and that resuming is exact."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.ssl.config.schema import OptimConfig
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.checkpoint import load_checkpoint, save_checkpoint
from unlabeled.ssl.train.optimizer import create_optimizer
from unlabeled.testing.case import TaskCase, listed, require

_STEPS = 3
_MICRO_STEPS = 2
_REGISTER = "keep it in a parameter or a persistent buffer (register_buffer)"


def state_dict_is_complete(case: TaskCase) -> None:
    """A task built under another seed gives the same loss once it has loaded the state dict."""
    task, other = case.task(seed=0), case.task(seed=1)
    batch = case.batch(task)
    draw = task.draw(batch)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    try:
        other.load_state_dict(task.state_dict())
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        require(False, f"the state dict does not load ({' '.join(lines)})", "register the same names every time")
    same = torch.equal(other(batch, **draw).loss, task(batch, **draw).loss)
    require(same, "a task with the same state dict gives a different loss", f"what differs is not in it; {_REGISTER}")


def state_moves_in_after_step_only(case: TaskCase) -> None:
    """Neither a training pass nor an evaluation changes state, and an evaluation leaves nothing for `after_step`."""
    run, watched = _Run(case), _Run(case)
    for one in (run, watched):
        before = own_state(one.task)
        one.backward(0)
        moved = changed(before, own_state(one.task))
        remedy = "a step may have several micro-steps: change state in after_step(progress)"
        require(not moved, f"forward changes {listed(moved)}", remedy)
    _evaluate(watched.task, case.batch(watched.task, seed=99))
    for one in (run, watched):
        one.move(0)
    moved = changed(own_state(run.task), own_state(watched.task))
    remedy = "keep what after_step needs only while self.training"
    require(not moved, f"a pass in eval mode before after_step changes {listed(moved)}", remedy)
    if type(run.task).after_step is PretextTask.after_step or _inner_tasks(run.task):
        return
    for step in range(_STEPS):
        run.backward(step)
        run.optimize()
        before = own_state(run.task)
        run.move(step)
        if changed(before, own_state(run.task)):
            return
    require(False, "after_step changes nothing in the state dict", f"remove it, or: {_REGISTER}")


def a_resumed_run_is_the_same_run(case: TaskCase) -> None:
    """Three optimizer steps of two micro-steps are bit-equal to two steps, a resume, and the third step.

    The resumed task is built under another seed and reads a checkpoint as the engine writes it.
    """
    full, resumed = _Run(case, seed=0), _Run(case, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        for step in range(_STEPS):
            if step == _STEPS - 1:
                state, moments = full.task.state_dict(), full.optimizer.state_dict()
                path = save_checkpoint(Path(folder), step, model=state, optimizer=moments, state={}, keep=1)
            loss = full.step(step)
        model, optimizer, _ = load_checkpoint(path)
    resumed.task.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    again = resumed.step(_STEPS - 1)
    lost = f"a step depends on something that is not in the state dict; {_REGISTER}"
    require(loss == again, f"the loss of step 3 is {loss:.6g}, after a resume {again:.6g}", lost)
    differing = changed(full.task.state_dict(), resumed.task.state_dict())
    require(not differing, f"after step 3, {listed(differing)} differs in a resumed run", lost)


class _Run:
    """A task, its optimizer, and steps whose randomness depends only on their number."""

    def __init__(self, case: TaskCase, seed: int = 0) -> None:
        self.case = case
        self.task = case.task(seed)
        self.optimizer = create_optimizer(self.task, OptimConfig(lr=1e-3))

    def step(self, step: int) -> float:
        """One optimizer step; the sum of its losses."""
        loss = self.backward(step)
        self.optimize()
        self.move(step)
        return loss

    def backward(self, step: int) -> float:
        total = 0.0
        for micro in range(_MICRO_STEPS):
            batch = self.case.batch(self.task, seed=derive("views", step, micro))
            torch.manual_seed(derive("step", step, micro))
            loss = self.task(batch).loss
            (loss / _MICRO_STEPS).backward()
            total += loss.item()
        return total

    def optimize(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def move(self, step: int) -> None:
        self.task.after_step((step + 1) / _STEPS)


def own_state(task: PretextTask) -> dict[str, Tensor]:
    """A copy of the state dict without what layers keep: batch-norm statistics and buffers of the backbone."""
    layers = {f"{prefix}{name}" for prefix, module in _keeping(task) for name, _ in module.named_buffers()}
    return {name: value.clone() for name, value in task.state_dict().items() if name not in layers}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ, or exist in only one of the two."""
    names = [*before, *(name for name in after if name not in before)]
    return [n for n in names if n not in before or n not in after or not torch.equal(before[n], after[n])]


def _keeping(task: PretextTask) -> Iterator[tuple[str, nn.Module]]:
    yield "backbone.", task.backbone
    for name, module in task.named_modules():
        if isinstance(module, _BatchNorm):
            yield f"{name}.", module


def _inner_tasks(task: PretextTask) -> list[PretextTask]:
    """Tasks inside this task, which are checked on their own."""
    return [module for module in task.modules() if isinstance(module, PretextTask) and module is not task]


@torch.no_grad()
def _evaluate(task: PretextTask, batch: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.eval()
    task(batch)
    task.train()
    moved = changed(before, task.state_dict())
    require(not moved, f"a pass in eval mode changes {listed(moved)}", "change state in after_step(progress) only")
