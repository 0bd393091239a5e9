"""The training loop, which is the same for all tasks: a task computes the loss, the loop does everything else.

    for each optimizer step: learning rates · micro-steps (forward, backward) · before_step · clip · check on all ranks
                             · optimizer step · after_step · metrics · online evaluation · checkpoint

A run that is killed at any point and resumed is bit-equal to one that was never stopped: every micro-step is seeded
from (seed, step, micro-step, rank), and the order of the data is a function of the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unlabeled.ssl.config.schema import RunConfig
from unlabeled.ssl.core.cpu import cpu_kernels
from unlabeled.ssl.core.distributed import gather_lists, sum_over_ranks
from unlabeled.ssl.core.errors import ConfigError, DivergedError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.core.signals import StopRequest
from unlabeled.ssl.data.bad import BadImage, BadImages
from unlabeled.ssl.data.loader import LoadedBatch
from unlabeled.ssl.task import Batch, PretextTask, StepOutput
from unlabeled.ssl.train.collapse import WATCH_EVERY, CollapseAlarm, feature_metrics
from unlabeled.ssl.train.curriculum import Curriculum
from unlabeled.ssl.train.monitor import Meter, Monitor, Stopwatch, memory_gb
from unlabeled.ssl.train.optimizer import set_learning_rates
from unlabeled.ssl.train.run_folder import Plan
from unlabeled.ssl.train.saver import Saver
from unlabeled.ssl.train.schedule import Schedule, weight_decay_at

logger = logging.getLogger(__name__)


class Online(Protocol):
    """Evaluation of the task during the run."""

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` optimizer steps."""
        ...

    def run(self, task: PretextTask, device: torch.device) -> dict[str, float]:
        """Metrics for a line of ``metrics.jsonl``, on the main process; all ranks call it. `task` is unsharded."""
        ...


@dataclass
class Training:
    """Everything that the loop needs; created by `unlabeled.ssl.train.build.assemble`."""

    config: RunConfig
    accelerator: Accelerator
    task: PretextTask
    model: nn.Module
    """`task` as Accelerate wrapped it (DDP, FSDP), or itself."""
    optimizer: Any
    schedule: Schedule
    plan: Plan
    curriculum: Curriculum | None
    batches: Iterator[LoadedBatch]
    bad: BadImages
    meter: Meter
    monitor: Monitor
    saver: Saver
    online: Online
    alarm: CollapseAlarm
    start_step: int
    watch: Stopwatch


def train(run: Training) -> str | None:
    """Runs until the last step or a signal; returns the signal's name, or None if the run is complete.

    Raises DivergedError, before the optimizer step, if the loss or the gradients are not finite on any rank, and
    DataError if too many images cannot be decoded.
    """
    run.model.train()
    # torch.compile chooses kernels itself
    kernels = False if run.config.engine.compile else run.config.engine.cpu_kernels
    main = run.accelerator.is_main_process
    with StopRequest(announce=main) as stop, cpu_kernels(run.accelerator.device, kernels):
        for step in range(run.start_step, run.plan.total_steps):
            # forward and backward
            lr = run.schedule(step)
            set_learning_rates(run.optimizer, lr, weight_decay_at(run.config.optim, step, run.schedule.cosine_steps))
            local, bad, features = accumulate(run, step)
            run.task.before_step(step / run.plan.total_steps)
            norm = gradient_norm(run)

            # update, unless a rank reports a loss that is not finite
            values, stopping = consult_ranks(run, step, local, bad, norm, stop.requested is not None)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.task.after_step((step + 1) / run.plan.total_steps)

            # metrics, evaluation, checkpoint; from here on, steps are counted from 1
            record(run, step + 1, values, lr, features)
            evaluate_online(run, step + 1)
            run.bad.check()
            if stopping or run.saver.due(step + 1):
                run.saver.save(step + 1, run.meter)
            if stopping and step + 1 < run.plan.total_steps:
                if main:
                    stopped = f"stopped at step {step + 1} of {run.plan.total_steps}"
                    logger.info("%s, checkpoint written; repeat the command to continue", stopped)
                return stop.requested or "a signal on another rank"
    return None


def accumulate(run: Training, step: int) -> tuple[dict[str, Tensor], list[BadImage], Tensor | None]:
    """Forward and backward passes of all micro-steps. Returns this rank's mean loss and logs, the images that could not
    be decoded, and the features of the last micro-step if the task returns any."""
    config, accelerator = run.config.engine, run.accelerator
    totals: dict[str, Tensor] = {}
    bad: list[BadImage] = []
    for micro in range(config.accumulation):
        batch = next_batch(run)
        bad += batch.bad
        tensors: Batch = {
            name: value.to(accelerator.device, non_blocking=True) for name, value in batch.tensors.items()
        }
        if run.curriculum is not None:
            tensors = run.curriculum.apply(tensors, step)
        # a function of the step, so that a resumed run draws the same masks and dropout
        torch.manual_seed(derive("step", config.seed, step, micro, accelerator.process_index))
        last = micro == config.accumulation - 1
        # gradients are summed over ranks in the last backward pass only
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            output: StepOutput = run.model(tensors)
            accelerator.backward(output.loss / config.accumulation)
        for name, value in {"loss": output.loss, **output.logs}.items():
            # stays on the device: reading a value would wait for it
            addend = value.detach().double() / config.accumulation
            totals[name] = totals[name] + addend if name in totals else addend
    run.watch.images += run.plan.batch_size
    return totals, bad, output.features


def next_batch(run: Training) -> LoadedBatch:
    """The next micro-batch; adds the time spent waiting for it to the stopwatch."""
    begin = time.perf_counter()
    batch = next(run.batches)
    run.watch.waited += time.perf_counter() - begin
    return batch


def gradient_norm(run: Training) -> Tensor:
    """L2 norm of all gradients before clipping. Clips them to ``engine.clip`` if it is set: all together, or separately
    for each submodule of the task with ``engine.clip_parts``."""
    config, accelerator = run.config.engine, run.accelerator
    limit = config.clip if config.clip is not None else math.inf  # infinite: only measures
    if not config.clip_parts:
        return _full_norm(accelerator.clip_grad_norm_(run.model.parameters(), limit), accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("engine.clip_parts: FSDP 1 clips all gradients together; set fsdp_version: 2")
    accelerator.unscale_gradients()  # Accelerate's own clipping does this itself, torch's does not
    norms = [nn.utils.clip_grad_norm_(parameters, limit) for parameters in parameters_by_child(run.task)]
    total: Tensor = torch.linalg.vector_norm(torch.stack([_full_norm(norm, accelerator.device) for norm in norms]))
    return total


def parameters_by_child(task: PretextTask) -> list[list[nn.Parameter]]:
    """Trainable parameters of each child module of the task; a shared parameter counts for the first child only.

    Parameters that the task itself owns, such as mask tokens, form one more list.
    """
    by_child: dict[str, list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            child, inside, _ = name.partition(".")
            by_child.setdefault(child if inside else "", []).append(parameter)
    return list(by_child.values())


def _full_norm(norm: Tensor, device: torch.device) -> Tensor:
    """A norm as a float64 scalar on `device`, the same on all ranks."""
    if isinstance(norm, DTensor):  # under FSDP 2 each rank has only its own shard's contribution
        norm = norm.full_tensor()
    return torch.as_tensor(norm).detach().double().to(device)


def consult_ranks(
    run: Training, step: int, values: dict[str, Tensor], bad: list[BadImage], norm: Tensor, stopping: bool
) -> tuple[dict[str, float], bool]:
    """Combines what the ranks know about a step: means of `values`, and whether any rank received a signal to stop.

    Raises DivergedError on all ranks if the loss or the gradients are not finite on any of them.
    """
    names, device = list(values), run.accelerator.device
    finite = torch.isfinite(values["loss"])
    if run.accelerator.scaler is None:  # under fp16 the scaler skips steps whose gradients overflow
        finite = finite & torch.isfinite(norm)
    # everything in one tensor: one reduction, and the only synchronization with the device in a step
    flags = torch.tensor([len(bad), stopping], device=device, dtype=torch.float64)
    local = torch.cat([torch.stack([*values.values(), (~finite).double()]), flags])
    summed = sum_over_ranks(local)
    *sums, broken, bad_images, stops = summed.tolist()
    means = {name: total / run.accelerator.num_processes for name, total in zip(names, sums, strict=True)}
    means["grad_norm"] = norm.item()
    if broken:
        raise DivergedError(
            f"loss: not finite at step {step} (loss {means['loss']:.4g}, gradient norm {means['grad_norm']:.4g}); "
            "lower optim.lr, set engine.clip=1 or engine.precision=fp32; "
            f"last good checkpoint: {run.saver.newest() or 'none'}"
        )
    if bad_images:  # the same on all ranks, so that all of them gather or none does
        run.bad.add(gather_lists(bad))
    return means, bool(stops)


def record(run: Training, step: int, values: dict[str, float], lr: float, features: Tensor | None) -> None:
    """Adds a step to the meter, writes metrics every ``log.every`` steps and at the end, and checks for collapse."""
    run.meter.add(values)
    due = step % run.config.log.every == 0 or step == run.plan.total_steps
    watched = feature_metrics(features) if features is not None and (due or step % WATCH_EVERY == 0) else {}
    if step % WATCH_EVERY == 0:
        run.alarm.update(step, {**values, **watched})
    if due:
        row = {**run.meter.take(), **watched, "lr": lr, **run.watch.take()}
        row["memory_gb"] = memory_gb(run.accelerator.device)
        if run.curriculum is not None:
            row["size"] = run.curriculum.size(step - 1)[0]  # `step` counts from 1 here
        if run.bad.count:
            row["bad_images"] = run.bad.count
        run.monitor.row(step, run.plan.epoch(step), row)
        run.monitor.show(step, row, run.bad.count)


def unsharded_task(run: Training) -> PretextTask:
    """The task for use outside training: the task itself, or an unsharded copy under FSDP. All ranks must call it."""
    if not run.saver.sharded:
        return run.task
    copy = type(run.task)(run.task.config, run.task.backbone.unfilled()).to(run.accelerator.device)
    state = [run.saver.full_model_state()]  # complete on the main process only
    dist.broadcast_object_list(state, src=0)
    copy.load_state_dict(state[0])
    return copy


def evaluate_online(run: Training, step: int) -> None:
    """Evaluates the task after `step` steps if that is due, and writes the metrics."""
    if run.online.due(step):
        values = run.online.run(unsharded_task(run), run.accelerator.device)
        run.model.train()  # evaluation leaves the task in eval mode
        if values:
            run.monitor.row(step, run.plan.epoch(step), values)
            logger.info("epoch %.1f  %s", run.plan.epoch(step), "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
