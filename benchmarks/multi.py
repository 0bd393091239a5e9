"""What a step of several tasks at once costs against the steps of the same tasks one after the other.

    python -m benchmarks.multi                       # both mixtures, fp32, this machine
    python -m benchmarks.multi --threads 1 --pairs 5 --batch 32

A step is forward and backward; the optimizer, which a mixture runs once and two runs run twice, is left out. All sides
see the same number of images of random pixels. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import begun, machine, paired_times, table_head
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.cpu import cpu_kernels
from unlabeled.ssl.task import PretextTask

log = logging.getLogger(__name__)


class Mixture(NamedTuple):
    """Two tasks and the network that they share."""

    title: str
    backbone: dict[str, Any]
    tasks: tuple[dict[str, Any], dict[str, Any]]


MIXTURES = (
    Mixture(
        "MAE + rotation, ViT of width 192 and depth 6, 32 px",
        {"name": "vit_tiny_patch16_224", "size": 32, "patch_size": 4, "depth": 6},
        ({"name": "mae", "decoder": {"dim": 96, "depth": 2, "heads": 3}}, {"name": "rotation"}),
    ),
    Mixture(
        "SparK + rotation, ResNet-18 of half width, 32 px",
        {"name": "resnet18", "size": 32, "channels": [32, 64, 128, 256], "output_stride": 8},
        ({"name": "spark", "decoder": {"width": 128}}, {"name": "rotation"}),
    ),
)
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "split 1 : 1": {"batch": "split"},
    "shared, measuring": {"balance": "gradient_norm", "balance_every": 1},
}
"""Column → settings of the mixture. The last one measures gradient norms in this step, as one in twenty does."""


def step_of(mixture: Mixture, task: dict[str, Any], images: Tensor) -> Callable[[], None]:
    """Forward and backward of `task` on a network of its own, over uint8 `images` (B, 3, h, w)."""
    torch.manual_seed(0)
    built: PretextTask = create_task(task, create_backbone(**mixture.backbone)).to(images.device).train()
    labels = [one["name"] + "/" for one in task["tasks"]] if task["name"] == "multi" else [""]
    batch = {f"{label}image": images for label in labels}

    def step() -> None:
        built.zero_grad(set_to_none=True)
        built(batch).loss.backward()
        built.after_step(0.5)

    return step


def measure(mixture: Mixture, options: argparse.Namespace, device: torch.device) -> list[str]:
    """One row of the table: milliseconds of each task alone and of both at once, with the ratio to their sum."""
    side = mixture.backbone["size"]
    images = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8, device=device)
    singles = [step_of(mixture, task, images) for task in mixture.tasks]

    def one_after_the_other() -> None:
        for step in singles:
            step()

    def times(ours: Callable[[], None], other: Callable[[], None]) -> tuple[list[float], list[float]]:
        return paired_times(ours, other, pairs=options.pairs, warmup=1, repeat=options.repeat, device=device)

    row = [mixture.title, *(f"{1e3 * statistics.median(found):.0f}" for found in times(*singles))]
    for settings in KINDS.values():
        together = step_of(mixture, {"name": "multi", "tasks": list(mixture.tasks), **settings}, images)
        found, apart = times(together, one_after_the_other)
        ratio = statistics.median(a / b for a, b in zip(found, apart, strict=True))
        row.append(f"{1e3 * statistics.median(found):.0f} ({ratio:.2f})")
    return row


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--pairs", type=int, default=7, help="turns; each gives one ratio")
    parser.add_argument("--repeat", type=int, default=1, help="steps timed together in a turn")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> list[str]:
    """Measures both mixtures and prints the table; returns its lines."""
    options = parse(words)
    device = begun(options.device, options.threads)
    head = ["mixture", "first alone, ms", "second alone, ms", *(f"{kind}, ms (to the sum)" for kind in KINDS)]
    lines = table_head(head)
    with cpu_kernels(device, None):
        lines += [f"| {' | '.join(measure(mixture, options, device))} |" for mixture in MIXTURES]
    found = machine(device)
    for line in (*lines, "", f"{found['device']}, {found['threads']} threads, batch {options.batch}, fp32"):
        log.info("%s", line)
    return lines


if __name__ == "__main__":
    main()
