"""Two ways to compute the same thing, timed against each other in one process.

Other work on a machine comes and goes over seconds, so the two sides take turns and each turn gives one ratio; the
median over the turns is reported with its quartiles.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Step = Callable[[], Any]


def begun(device: str, threads: int | None) -> torch.device:
    """Prints plain lines from here on, the package's warnings alone among them; returns the device."""
    lines = logging.StreamHandler(sys.stdout)
    lines.addFilter(lambda record: record.levelno >= logging.WARNING or not record.name.startswith("unlabeled"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[lines])
    if threads:
        torch.set_num_threads(threads)
    return torch.device(device)


def table_head(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table of numbers, of which the first column is words."""
    return [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]


def paired_times(
    ours: Step,
    original: Step,
    *,
    pairs: int,
    warmup: int,
    repeat: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of one call of each side, `pairs` times each, in turns; every second turn begins with the other side.

    Each time is the mean of `repeat` calls in a row, after `warmup` untimed calls of both sides. `clock` may count this
    process's time on the processors instead, which other work disturbs less.
    """
    for _ in range(warmup):
        ours()
        original()
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs):
        sides = [(ours, times[0]), (original, times[1])]
        for step, found in sides if turn % 2 == 0 else reversed(sides):
            found.append(_seconds(step, repeat, device, clock))
    return times


def _seconds(step: Step, repeat: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    _synchronize(device)
    began = clock()
    for _ in range(repeat):
        step()
    _synchronize(device)
    return (clock() - began) / repeat


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``low`` and ``high`` quartile."""
    if len(values) == 1:
        return {"low": values[0], "median": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def peak_gigabytes(step: Step, device: torch.device) -> float | None:
    """Most memory that one call holds beyond what was held before (activations, gradients); None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def gigaflops(step: Step) -> float:
    """Floating-point operations of matrix products and convolutions in one call, in 1e9; a multiply-add is two."""
    counter = _Counter()  # type: ignore[no-untyped-call]
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels of a CPU have no formula
        step()
    return counter.total / 1e9


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own formulas. (Its `FlopCounterMode` also hooks modules, which masked maps cannot pass.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if func is torch.ops.aten.convolution_backward.default:
            self.total += _convolution_backward(*args)
        elif formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *options: Any) -> int:
    """As many operations as forward, for each of both gradients. (torch's formula takes groups for dense ones.)"""
    transposed, (of_x, of_weight, _) = options[4], options[-1]
    positions = (x if transposed else gradient)[:, :1].numel()
    return 2 * positions * weight.numel() * (int(of_x) + int(of_weight))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square matrix product on this machine, in 1e9 operations a second: the median of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeat = 20 if device.type == "cuda" else 1
    times = [_seconds(lambda: a @ b, repeat, device) for _ in range(6)][1:]
    return 2 * size**3 / statistics.median(times) / 1e9


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on, and with which commit of this repository."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "tf32": str(torch.backends.cuda.matmul.allow_tf32) if device.type == "cuda" else "",
        "commit": _commit(),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(errors="replace").splitlines() if listing.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the repository that this file lies in; with ``+`` when files differ from it, empty outside of one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, over all tensors together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return float((error / size) ** 0.5) if size else float(error > 0)
