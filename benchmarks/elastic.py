"""What POA's elastic student adds to a step of teacher and intact student, mean over the sub-networks of a pass.

    python -m benchmarks.elastic                     # ViTs with the published proportions, at widths a CPU can do
    python -m benchmarks.elastic --model vit_large_patch16_224 --width 384 --step 64 --depth 12 --size 224

A step is forward and backward of the whole task with the patch loss, two large and eight small crops, small heads; the
optimizer is left out. The sub-networks are those of steps spread over a pass of the published sampler (S = 3), so the
small ones weigh more. Each is timed in turns with the step without it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.timing import begun, machine, paired_times, table_head
from unlabeled.pretext.common.multi_crop import local_size
from unlabeled.pretext.registry import create_task
from unlabeled.pretext.self_distillation.poa import POA
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.cpu import cpu_kernels

log = logging.getLogger(__name__)

HEADS = {"prototypes": (1024, 2048), "hidden": 512, "bottleneck": 128}
"""Small ones, whose cost is not what is asked here."""


def task_of(options: argparse.Namespace, device: torch.device, *, elastic: bool) -> POA:
    """POA on the network of `options`, with or without sub-networks."""
    torch.manual_seed(0)
    arguments = {"embed_dim": options.full, "depth": options.blocks, "num_heads": options.full // options.step}
    own = arguments if options.full else {}
    backbone = create_backbone(options.model, size=options.size, dynamic_img_size=True, **own)
    blocks = len(cast(Any, backbone.model).blocks)
    least = (options.width, options.depth) if elastic else (backbone.embed_dim, blocks)
    sizes = {"width": least[0], "width_step": options.step, "depth": least[1]}
    task = create_task({"name": "poa", "elastic": sizes, "patches_from": 0, **HEADS}, backbone)
    return cast(POA, task.to(device).train())


def step_of(task: POA, batch: dict[str, Tensor], number: int, precision: torch.dtype) -> Callable[[], None]:
    """Forward and backward of optimizer step `number`."""
    task.steps.fill_(number)
    torch.manual_seed(0)
    draw = task.draw(batch)

    def step() -> None:
        task.steps.fill_(number)
        task.zero_grad(set_to_none=True)
        with torch.autocast(draw["noise"].device.type, precision, enabled=precision != torch.float32):
            loss = task(batch, **draw).loss
        loss.backward()

    return step


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a ViT of timm")
    parser.add_argument("--full", type=int, default=256, help="its width; 0: as timm has it")
    parser.add_argument("--blocks", type=int, default=12, help="its depth, if --full is not 0")
    parser.add_argument("--size", type=int, default=112, help="pixels of large crops")
    parser.add_argument("--width", type=int, default=96, help="smallest width")
    parser.add_argument("--step", type=int, default=16, help="between widths")
    parser.add_argument("--depth", type=int, default=6, help="smallest depth")
    parser.add_argument("--samples", type=int, default=12, help="sub-networks timed")
    parser.add_argument("--pairs", type=int, default=3, help="turns for each")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> list[str]:
    """Measures and prints the table; returns its lines."""
    options = parse(words)
    device = begun(options.device, options.threads)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    whole, alone = (task_of(options, device, elastic=elastic) for elastic in (True, False))
    local = local_size(whole.config, whole.backbone)[0]
    shapes = {"globals": (2, options.size), "locals": (8, local)}
    batch = {
        name: torch.randint(0, 256, (options.batch, count, 3, side, side), dtype=torch.uint8, device=device)
        for name, (count, side) in shapes.items()
    }
    plain, ratios, parts = step_of(alone, batch, 0, precision), [], []
    full = whole.sizes.full.width**2 * whole.sizes.full.depth
    with cpu_kernels(device):
        for number in range(options.samples):
            step = step_of(whole, batch, number, precision)
            size = whole.size()
            found, without = paired_times(step, plain, pairs=options.pairs, warmup=1, repeat=1, device=device)
            ratios.append(statistics.median(a / b for a, b in zip(found, without, strict=True)))
            parts.append(size.width**2 * size.depth / full)
            log.info("%s: %.3f", size, ratios[-1])
    head = ["network", "sizes", "part of the network, mean", "elastic step / plain step, mean", "smallest", "largest"]
    row = [str(whole.sizes.full), str(len(whole.sizes.sizes)), f"{statistics.mean(parts):.2f}"]
    row += [f"{value:.2f}" for value in (statistics.mean(ratios), min(ratios), max(ratios))]
    lines = [*table_head(head), f"| {' | '.join(row)} |"]
    shown = machine(device)
    for line in (
        *lines,
        "",
        f"{shown['device']}, {shown['threads']} threads, batch {options.batch}, {options.precision}",
    ):
        log.info("%s", line)
    return lines


if __name__ == "__main__":
    main()
