"""Training steps of the masked tasks against the same steps as the methods' authors execute them.

    python -m benchmarks.masked                                     # all models, fp32, this machine
    python -m benchmarks.masked --models mae_vit_b --pairs 5 --dtype fp32 mixed

Both sides start from the same weights and see the same images and masks; in fp32 their losses must agree to 1e-4, or
nothing is measured. A step is forward and backward; the optimizer is the same for both and left out. Results go to
``benchmarks/results/masked_<device>.json``, from which the tables of ``docs/results/benchmarks.md`` are made.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import MODELS, Model
from benchmarks.originals import OriginalLoss, original_loss
from benchmarks.tables import RESULTS, add_result, result_file, write_tables
from benchmarks.timing import (
    Step,
    gigaflops,
    machine,
    matrix_rate,
    paired_times,
    peak_gigabytes,
    quartiles,
    relative_difference,
)
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.cpu import cpu_kernels
from unlabeled.ssl.task import PretextTask

DTYPES = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "mixed": ("bf16", "fp32")}
"""Name → precision of our side and of the original."""
AGREEMENT = 1e-4
"""Largest relative difference of the two losses in fp32."""
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}

log = logging.getLogger(__name__)


@dataclass
class Duel:
    """One model, executed in our way and in the original one, each on its own copy of the same weights."""

    model: Model
    ours: PretextTask
    theirs: PretextTask
    original: OriginalLoss
    images: Tensor
    noise: Tensor
    forward: Callable[..., Any]
    """Our side as it is run: the task, or its compiled form."""
    kernels: bool | None = None
    """As the engine's setting of that name."""

    def our_loss(self, *, eager: bool = False) -> Tensor:
        forward = self.ours if eager else self.forward
        with nullcontext() if eager else cpu_kernels(self.images.device, self.kernels):
            loss: Tensor = forward({"image": self.images}, noise=self.noise).loss
        return loss

    def original_loss(self) -> Tensor:
        return self.original(self.theirs, self.images, self.noise)

    def forget(self) -> None:
        """Frees the gradients of both sides."""
        for task in (self.ours, self.theirs):
            task.zero_grad(set_to_none=True)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of both sides after a step each, for the parameters that are trained."""
        sides = [
            {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
            for task in (self.ours, self.theirs)
        ]
        assert sides[0].keys() == sides[1].keys(), sorted(sides[0].keys() ^ sides[1].keys())
        return list(sides[0].values()), list(sides[1].values())


def set_up(
    model: Model, device: torch.device, *, compiled: bool = False, kernels: bool | None = None, seed: int = 0
) -> Duel:
    """Builds both sides of `model` from random weights, and images and noise for the masks."""
    torch.manual_seed(seed)
    task = create_task(model.task, create_backbone(model.backbone, size=model.size, **model.kwargs)).to(device).train()
    with torch.no_grad():  # layer scales and response norms that begin at 0 would hide what is behind them
        for parameter in task.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = copy.deepcopy(task)
    if model.channels_last:
        task = task.to(memory_format=torch.channels_last)
    images = torch.randn(model.batch, 3, model.size, model.size, device=device)
    noise = task.draw({"image": images})["noise"]
    forward = torch.compile(task) if compiled else task
    original = original_loss(model.task["name"])
    return Duel(model, task, theirs, original, images, noise, forward, False if compiled else kernels)


def training_step(task: PretextTask, loss: Callable[[], Tensor], precision: str, device: torch.device) -> Tensor:
    """Forward and backward from empty gradients; returns the loss."""
    task.zero_grad(set_to_none=True)
    cast: AbstractContextManager[Any] = (
        nullcontext() if precision == "fp32" else torch.autocast(device.type, _TORCH[precision])
    )
    with cast:
        value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def agreement(duel: Duel, device: torch.device) -> dict[str, float]:
    """Relative differences of loss and gradients in fp32. Raises AssertionError when the losses disagree."""
    ours = training_step(duel.ours, duel.our_loss, "fp32", device)
    theirs = training_step(duel.theirs, duel.original_loss, "fp32", device)
    difference = abs(float(ours) - float(theirs)) / abs(float(theirs))
    assert difference <= AGREEMENT, f"{duel.model.title}: losses {float(ours)} and {float(theirs)} differ"
    gradients = relative_difference(*duel.gradients())
    return {"loss": float(theirs), "loss_difference": difference, "gradient_difference": gradients}


def measure(model: Model, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of results: speed, memory and operations of both sides; ``docs/results/benchmarks.md`` explains them."""
    device = torch.device(options.device)
    duel = set_up(model, device, compiled=options.compile, kernels=options.cpu_kernels)
    agreed = agreement(duel, device)
    precision = dict(zip(("ours", "original"), DTYPES[dtype], strict=True))

    def step(side: str, *, eager: bool = False) -> Tensor:
        if side == "original":
            return training_step(duel.theirs, duel.original_loss, precision[side], device)
        return training_step(duel.ours, partial(duel.our_loss, eager=eager), precision[side], device)

    sides: dict[str, Step] = {side: partial(step, side) for side in precision}
    flops = {side: gigaflops(partial(step, side, eager=True)) for side in precision}
    memory = {}
    for side, one in sides.items():
        duel.forget()
        memory[side] = peak_gigabytes(one, device)
    times = paired_times(
        sides["ours"], sides["original"], pairs=options.pairs, warmup=options.warmup, repeat=options.repeat,
        device=device,
    )  # fmt: skip
    seconds = dict(zip(precision, map(quartiles, times), strict=True))
    return {
        "precision": precision,
        "batch": model.batch,
        "size": model.size,
        "pairs": options.pairs,
        "speedup": quartiles([slow / fast for fast, slow in zip(*times, strict=True)]),
        "seconds": seconds,
        "images_per_s": {side: model.batch / found["median"] for side, found in seconds.items()},
        "peak_gb": memory,
        "gigaflop": flops,
        **agreed,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=sorted(MODELS), choices=sorted(MODELS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=sorted(DTYPES), help="mixed: bf16 against fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=7, help="turns; each gives one ratio")
    parser.add_argument("--repeat", type=int, help="steps timed together in a turn (CPU: 1, GPU: 10)")
    parser.add_argument("--warmup", type=int, help="untimed steps of each side (CPU: 1, GPU: 5)")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the model's own number")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--cpu-kernels",
        action=argparse.BooleanOptionalAction,
        help="our fp32 linear layers through oneDNN (CPU; as the engine)",
    )
    parser.add_argument("--compile", action="store_true", help="our side through torch.compile")
    parser.add_argument("--toy", action="store_true", help="tiny networks: whether everything runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(words)
    cuda = torch.device(options.device).type == "cuda"
    options.repeat = options.repeat or (10 if cuda else 1)
    options.warmup = (5 if cuda else 1) if options.warmup is None else options.warmup
    return options


def main(words: list[str] | None = None) -> Path:
    """Measures what the command line names, adds it to the device's file of results, and returns that file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    found = machine(device)
    rates = {name: matrix_rate(device, dtype) for name, dtype in _TORCH.items()}
    file = result_file(options.results, found["device"])
    for name in options.models:
        model = MODELS[name].small() if options.toy else MODELS[name]
        model = replace(model, batch=options.batch or model.batch)
        for dtype in options.dtype:
            row = measure(model, dtype, options)
            key = " ".join(
                [name, dtype]
                + ["compiled"] * options.compile
                + ["plain"] * (options.cpu_kernels is False)
                + ["toy"] * options.toy
            )
            add_result(file, key, {"title": model.title, "machine": found, "matrix_rate": rates, **row})
            speedup = row["speedup"]
            log.info("%s: %.2fx (%.2f to %.2f)", key, speedup["median"], speedup["low"], speedup["high"])
    if options.results == RESULTS:
        write_tables()
    return file


if __name__ == "__main__":
    main()
