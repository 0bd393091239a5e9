"""What the heads of POA cost with all logits at once and with those of a few rows at a time.

    python -m benchmarks.heads                       # the published numbers of prototypes, each alone and all four
    python -m benchmarks.heads --threads 1 --pairs 3 --chunks 256 1024

A step is the teacher's assignments, all terms of the loss and their gradients, from directions to prototypes; networks,
projections and the optimizer are left out. Both ways are timed in turns in one process. On a CPU each peak of memory is
that of a process of its own, without what it held before the step. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import begun, machine, paired_times, peak_gigabytes, table_head
from unlabeled.pretext.self_distillation.poa_losses import Crops, PatchTerms, TeacherHead, TermWeights, head_loss
from unlabeled.pretext.self_distillation.self_distillation import sinkhorn_offsets

log = logging.getLogger(__name__)

PUBLISHED = (8192, 16384, 32768, 65536)
"""Prototypes of the four heads."""
LARGE, SMALL, HIDDEN = 2, 8, 59
"""Crops of each size, and hidden places, of an image: half of the large crops hide 30 % of 196 places on average."""
CHANNELS = 256
TEMPERATURE = 0.07


def step_of(heads: Sequence[int], chunk: int | None, batch: int, device: torch.device) -> Callable[[], None]:
    """The step for heads of so many prototypes each, with `chunk` rows of logits at a time; None: all."""
    generator = torch.Generator(device).manual_seed(0)
    views, positions = LARGE + SMALL, HIDDEN * batch

    def units(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, CHANNELS, generator=generator, device=device), dim=-1)

    sharp = (units(LARGE, batch), units(positions))
    students = [units(*shape).requires_grad_() for shape in ((views, batch), (positions,)) for _ in range(2)]
    prototypes = [(units(one), units(one).requires_grad_()) for one in heads]
    weights = torch.full((positions,), 2 / HIDDEN, device=device)

    def loss(teacher: Tensor, student: Tensor) -> Tensor:
        rows = [one.flatten(0, -2) for one in sharp]
        offsets = [sinkhorn_offsets(one, teacher, TEMPERATURE, chunk=chunk) for one in rows]
        crops = Crops(sharp[0], students[:2], offsets[0])
        hidden = PatchTerms(sharp[1], students[2:], weights, offsets[1])
        head = TeacherHead(teacher, TEMPERATURE)
        return head_loss(crops, hidden, head, student, weights=TermWeights(), chunk=chunk)[0]

    def step() -> None:
        for leaf in (*students, *(student for _, student in prototypes)):
            leaf.grad = None
        total = sum((loss(*one) for one in prototypes), torch.zeros((), device=device)) / len(heads)
        total.backward()  # type: ignore[no-untyped-call]

    return step


def peak(heads: Sequence[int], chunk: int | None, batch: int, device: torch.device) -> float:
    """Most memory that a step holds beyond its inputs, gradients included, in 1e9 bytes."""
    if device.type == "cuda":
        return peak_gigabytes(step_of(heads, chunk, batch, device), device) or 0.0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_process, (heads, chunk, batch, torch.get_num_threads()))


def _peak_of_process(heads: Sequence[int], chunk: int | None, batch: int, threads: int) -> float:
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    step_of((64,), chunk, 2, cpu)()  # what libraries allocate once
    step = step_of(heads, chunk, batch, cpu)
    before = _most_resident()
    step()
    return _most_resident() - before


def _most_resident() -> float:
    """Of this process so far. (On Linux the figure of `getrusage` begins with that of the parent.)"""
    listing = Path("/proc/self/status")
    if listing.is_file():
        return float(re.findall(r"VmHWM:\s+(\d+) kB", listing.read_text())[0]) * 1024 / 1e9
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 1e9


def measure(heads: Sequence[int], options: argparse.Namespace, device: torch.device) -> list[str]:
    """One row of the table: seconds and memory with all logits at once, and for each chunk."""
    whole = step_of(heads, None, options.batch, device)
    cells, seconds = [], []
    for chunk in options.chunks:
        parts = step_of(heads, chunk, options.batch, device)
        found, base = paired_times(parts, whole, pairs=options.pairs, warmup=1, repeat=1, device=device)
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        memory = peak(heads, chunk, options.batch, device)
        cells += [f"{statistics.median(found):.2f} ({ratio:.2f})", f"{memory:.2f}"]
        seconds += base
    memory = peak(heads, None, options.batch, device)
    return [" + ".join(map(str, heads)), f"{statistics.median(seconds):.2f}", f"{memory:.2f}", *cells]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prototypes", nargs="+", type=int, default=PUBLISHED, metavar="K", help="one head each")
    parser.add_argument("--chunks", nargs="+", type=int, default=[256], metavar="ROWS", help="rows at a time")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--pairs", type=int, default=3, help="turns; each gives one ratio")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> list[str]:
    """Measures what the command line names and prints the table; returns its lines."""
    options = parse(words)
    device = begun(options.device, options.threads)
    head = ["prototypes", "all at once, s", "GB"]
    for chunk in options.chunks:
        head += [f"{chunk} rows, s (to all at once)", "GB"]
    lines = table_head(head)
    log.info("%s", "\n".join(lines))
    every = tuple(options.prototypes)
    for heads in [(one,) for one in every] + [every] * (len(every) > 1):
        lines.append(f"| {' | '.join(measure(heads, options, device))} |")
        log.info("%s", lines[-1])
    found = machine(device)
    log.info("\n%s, %s threads, batch %d, fp32", found["device"], found["threads"], options.batch)
    return lines


if __name__ == "__main__":
    main()
