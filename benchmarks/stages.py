"""Masked ConvNets: rows of visible places against whole maps, for each resolution by itself.

    python -m benchmarks.stages
    python -m benchmarks.stages --models resnet50 --visible 0.4 0.7 --dtype bf16

Each figure is the time of a training step of the encoder with the maps of one resolution stored whole, over that with
all maps as rows of their visible places: above 1, rows are faster there. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.timing import paired_times
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.masked.masking import random_masking
from unlabeled.ssl.backbones.masked.sparse import SparseEncoder
from unlabeled.ssl.backbones.masked.sparse.gathering import Factor

MODELS = ("convnext_tiny", "convnextv2_tiny", "resnet50", "resnet18", "efficientnet_b0", "regnety_008")
FACTORS: dict[str, list[Factor]] = {"all": []} | {f"1/{32 // f}": [(f, f)] for f in (1, 2, 4, 8, 16)}
"""Column → resolutions stored whole; for images of 224 pixels with cells of 32."""


def ratios(backbone: Backbone, visible: float, options: argparse.Namespace) -> list[float]:
    """Time with whole maps over time with rows, for each of FACTORS."""
    device = torch.device(options.device)
    masking = random_masking(torch.rand(options.batch, 49, device=device), round(49 * visible), (7, 7))
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    encoder = SparseEncoder(backbone, (32, 32))
    indices = range(len(backbone.stages))

    def step(execution: str, dense: list[Factor]) -> None:
        encoder.execution, encoder.dense = execution, dense  # type: ignore[assignment]
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            maps = encoder.maps(images, masking, indices)
            sum(one.stored.float().square().mean() for one in maps).backward()  # type: ignore[union-attr]
        backbone.zero_grad(set_to_none=True)

    found = []
    for name, dense in FACTORS.items():
        rows, whole = paired_times(
            lambda: step("gathered", []),
            lambda name=name, dense=dense: step("dense" if name == "all" else "gathered", dense),  # type: ignore[misc]
            pairs=options.pairs, warmup=1, repeat=options.repeat, device=device,
        )  # fmt: skip
        found.append(statistics.median(slow / fast for fast, slow in zip(rows, whole, strict=True)))
    return found


def main(words: list[str] | None = None) -> None:
    """Measures what the command line names and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="ConvNets of timm")
    parser.add_argument("--visible", nargs="+", type=float, default=[0.4], help="visible parts of the cells")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="steps timed together")
    options = parser.parse_args(words)
    print(f"| model, {options.dtype} | visible | {' | '.join(FACTORS)} |")
    print("|---|---:|" + "---:|" * len(FACTORS))
    for name in options.models:
        backbone = create_backbone(name, size=224).to(options.device).to(memory_format=torch.channels_last).train()
        for visible in options.visible:
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios(backbone, visible, options))
            print(f"| {name} | {visible:.0%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
