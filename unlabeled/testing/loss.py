"""Rules for the loss: its type, its gradient, the source of its randomness, and what it averages over."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from unlabeled.ssl.task import PretextTask, StepOutput
from unlabeled.testing.case import IMAGES, TaskCase, listed, require

_EXACT = 1e-6
"""Largest difference in double precision, absolute and relative to the largest gradient."""
_BF16 = 0.05
"""Largest difference of a loss under bfloat16, absolute for small losses, else relative."""


def loss_is_a_finite_float32_scalar(case: TaskCase) -> None:
    """`forward` returns a StepOutput with a differentiable loss."""
    task = case.task()
    output = task(case.batch(task))
    found = f"forward returned {type(output).__name__}"
    require(isinstance(output, StepOutput), found, "return StepOutput(loss, logs)")
    loss = output.loss
    require(loss.shape == (), f"the loss has shape {tuple(loss.shape)}", "return its mean over the local batch")
    require(loss.dtype == torch.float32, f"the loss is {loss.dtype}", "compute it from .float() tensors")
    require(torch.isfinite(loss), f"the loss is {loss.item()}", "look for a logarithm, root or division at zero")
    require(loss.requires_grad, "the loss has no graph", "compute it outside torch.no_grad()")


def logs_and_features_are_detached(case: TaskCase) -> None:
    """Logs are scalar tensors; features, if any, are (N, D)."""
    task = case.task()
    output = task(case.batch(task))
    for name, value in output.logs.items():
        require(isinstance(value, Tensor), f"logs[{name!r}] is a {type(value).__name__}", "give a tensor, not .item()")
        require(value.ndim == 0, f"logs[{name!r}] has shape {tuple(value.shape)}", "give a scalar tensor")
        require(not value.requires_grad, f"logs[{name!r}] still has its graph", "call .detach()")
    require("loss" not in output.logs, "logs has a 'loss'", "leave it out; the engine logs StepOutput.loss")
    if (features := output.features) is not None:
        require(features.ndim == 2, f"features have shape {tuple(features.shape)}", "give (N, D)")
        require(not features.requires_grad, "features still have their graph", "call .detach()")


def every_trainable_parameter_gets_a_gradient(case: TaskCase) -> None:
    """... and no frozen one does. A gradient that is still zero after two steps of SGD counts as missing."""
    task = case.task()
    batch = case.batch(task)
    zero = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    for _ in range(3):  # layers behind a zero-initialized one get their first gradient in the second step
        task.zero_grad()
        task(batch).loss.backward()
        trainable = {name: p for name, p in task.named_parameters() if p.requires_grad}
        none = [name for name, p in trainable.items() if p.grad is None]
        freeze = (
            "freeze what the loss does not reach: self.train_only(backbone.reached_by_pooled()) or .requires_grad_"
            "(False)"
        )
        require(not none, f"no gradient for {listed(none)}", f"{freeze}; DDP would wait for it")
        frozen = [name for name, p in task.named_parameters() if not p.requires_grad and p.grad is not None]
        require(
            not frozen,
            f"a gradient for {listed(frozen)}, which is frozen",
            "freeze it before the forward pass, not after it",
        )
        broken = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
        require(not broken, f"a gradient that is not finite for {listed(broken)}", "look for a root or norm at zero")
        zero -= {name for name, p in trainable.items() if p.grad is not None and bool(p.grad.any())}
        if not zero:
            return
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.sub_(parameter.grad if parameter.grad is not None else 0, alpha=0.1)
    require(False, f"the gradient of {listed(sorted(zero))} stays zero", "use it in the loss, or freeze it")


def parameter_groups_are_complete(case: TaskCase) -> None:
    """`parameter_groups` names every trainable parameter once, with a layer that exists."""
    task = case.task()
    groups = list(task.parameter_groups())
    names = [group.name for group in groups]
    trainable = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    missing = [name for name in trainable if name not in names]
    require(
        not missing, f"{listed(missing)} is in no group", "yield every parameter that super().parameter_groups() has"
    )
    extra = sorted(set(names) - set(trainable))
    require(not extra, f"{listed(extra)} is in a group", "yield trainable parameters only, under their full names")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{listed(twice)} is in several groups", "yield each parameter once")
    foreign = [group.name for group in groups if group.parameter is not trainable[group.name]]
    require(not foreign, f"the parameter given as {listed(foreign)} is another one", "yield the task's own parameters")
    last = task.encoder().depth + 1
    beyond = [f"{group.name} in {group.layer}" for group in groups if not 0 <= group.layer <= last]
    require(not beyond, f"layer of {listed(beyond)}", f"layers go from 0 (stem) to {last} (heads)")


def randomness_comes_from_draw(case: TaskCase) -> None:
    """`draw` returns all randomness of a forward pass, taken from torch's generator, and `forward` accepts it."""
    first, again = (_loss(case, seed=7, passed=False) for _ in range(2))
    generator = "draw from torch's global generator only, not from random, numpy or one of your own"
    require(torch.equal(first, again), "the same seed gives a different loss", generator)
    first, again = (_loss(case, seed=seed, passed=True) for seed in (1, 2))
    keyword = "take it from draw(batch), which forward receives as keywords"
    require(torch.equal(first, again), "forward draws something that draw does not return", keyword)
    by_itself, passed = (_loss(case, seed=7, passed=passed, drawn=7) for passed in (False, True))
    same = "when a keyword is None, take its value from self.draw(batch) and use it unchanged"
    require(torch.equal(by_itself, passed), "forward alone and forward with the same draw passed in differ", same)
    task = case.task()
    batch = case.batch(task)
    rows = [name for name, value in task.draw(batch).items() if len(value) != IMAGES]
    require(not rows, f"draw[{rows and rows[0]!r}] does not have one row per image", "draw (B, ...) tensors")
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        draws.append(task.draw(batch))
    fixed = [name for name in draws[0] if all(torch.equal(draw[name], draws[0][name]) for draw in draws)]
    require(not fixed, f"draw[{fixed and fixed[0]!r}] is the same for eight seeds", generator)


def halves_of_a_batch_add_up(case: TaskCase) -> None:
    """Gradient accumulation: two halves give the loss and gradient of the full batch, in double precision.

    Batch norms use their running statistics here. Does not apply to tasks with ``per_image = False``.
    """
    if not case.cls.per_image:
        return
    task = case.task().double()
    for module in task.modules():
        module.training &= not isinstance(module, _BatchNorm)  # batch statistics of halves differ by design
    without_dropout(task)
    batch = case.batch(task)
    draw = task.draw(batch)
    half = IMAGES // 2
    (full, gradients), *halves = (
        loss_and_gradients(task, cut(batch, rows), cut(draw, rows))
        for rows in (slice(None), slice(0, half), slice(half, None))
    )
    remedy = "make the loss a mean over images, or set per_image = False if images are compared"
    mean = sum(loss for loss, _ in halves) / 2
    require(
        abs(mean - full) <= _EXACT, f"the mean loss of the halves is {mean:.6g}, of the full batch {full:.6g}", remedy
    )
    for name, gradient in gradients.items():
        summed = torch.stack([found[name] for _, found in halves]).mean(0)
        off = (summed - gradient).abs().max()
        require(off <= _EXACT * max(1.0, float(gradient.abs().max())), f"{name}: gradients differ by {off:.2g}", remedy)


def bfloat16_stays_close(case: TaskCase) -> None:
    """Under bf16 autocast the loss is finite, float32, and close to the loss in full precision."""
    task = case.task()
    without_dropout(task)
    batch = case.batch(task)
    draw = task.draw(batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = task(batch, **draw).loss.detach()
    full = task(batch, **draw).loss.detach()
    remedy = "compute targets, softmaxes and distances from .float() tensors, outside autocast"
    require(low.dtype == torch.float32, f"the loss is {low.dtype} under autocast", remedy)
    require(torch.isfinite(low), f"the loss is {low.item()} under autocast", remedy)
    close = abs(low - full) <= _BF16 * max(1.0, abs(float(full)))
    require(close, f"the loss is {low:.4f} under autocast, {full:.4f} without", remedy)


def without_dropout(task: nn.Module) -> None:
    """Turns off dropout and stochastic depth, which belong to the backbone and not to the task."""
    for module in task.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0


def cut(tensors: dict[str, Tensor], images: slice) -> dict[str, Tensor]:
    """The given images of a batch or a draw."""
    return {name: value[images] for name, value in tensors.items()}


def loss_and_gradients(
    task: nn.Module, batch: dict[str, Tensor], draw: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """One forward and backward pass from zeroed gradients."""
    task.zero_grad()
    loss = task(batch, **draw).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def _loss(case: TaskCase, *, seed: int, passed: bool, drawn: int = 0) -> Tensor:
    """Loss of a new task under `seed`, with a draw under seed `drawn` passed in or with its own draw."""
    task: PretextTask = case.task()
    without_dropout(task)
    batch = case.batch(task)
    torch.manual_seed(drawn)
    draw = task.draw(batch) if passed else {}
    torch.manual_seed(seed)
    loss: Tensor = task(batch, **draw).loss.detach()
    return loss
