"""The commands: what each does, takes, and looks like in use. `unlabeled.cli.main` builds its parsers from this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A command line, and what it is for."""

    purpose: str
    line: str
    """At most 78 characters, so that it fits a terminal of 80 columns."""


class Argument(NamedTuple):
    """One argument of a command, as argparse has it."""

    name: str
    options: Mapping[str, Any]


OVERRIDES = Argument("overrides", {"nargs": "*", "metavar": "key=value", "help": "settings of this command"})
TARGET = Argument("target", {"metavar": "TARGET", "help": "a run folder, the name of a timm model, or a weights file"})
RUN = Argument("run", {"metavar": "RUN", "help": "a run folder, or another exported backbone"})
JSON = Argument("--json", {"action": "store_true", "help": "print JSON instead of a table"})


@dataclass(frozen=True)
class Command:
    """One command of ``unlabeled``; the module of its name in this folder runs it."""

    summary: str
    """One line in the list of commands."""
    description: str
    """A paragraph above the arguments in its own help."""
    examples: tuple[Example, ...]
    arguments: tuple[Argument, ...] = field(default=(OVERRIDES,))
    settings: tuple[str, ...] = ()
    """Lines that say where its settings are listed."""


COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "check a data source: counts, sizes, broken files, speed",
        "Scans a data source before you spend GPU hours on it: number of images, sizes, formats, duplicates, broken "
        "files, class balance and decoding speed.",
        (
            Example("a folder of images", "unlabeled doctor data=folder data.path=photos"),
            Example(
                "the first 1,000 images of a table", "unlabeled doctor data=parquet data.path=a.parquet limit=1000"
            ),
        ),
        settings=("unlabeled settings doctor", "unlabeled settings data=folder"),
    ),
    "pretrain": Command(
        "pretrain a backbone on images without labels",
        "Pretrains any timm backbone with a pretext task, writes checkpoints, exports the backbone, and evaluates it "
        "if the data has labels. Run the same command again to resume an interrupted run.",
        (
            Example("try it: generated images, two minutes on a CPU", "unlabeled pretrain recipe=demo out=runs/demo"),
            Example("your own images", "unlabeled pretrain task=mae data=folder data.path=photos out=runs/mae"),
            Example("change settings", "unlabeled pretrain task=mae task.mask_ratio=0.6 optim.lr=1e-3 epochs=200"),
            Example(
                "every combination of values", "unlabeled pretrain --multirun task=mae,dino 'engine.seed=range(3)'"
            ),
        ),
        (
            Argument("--multirun", {"action": "store_true", "help": "run every combination of the given values"}),
            OVERRIDES,
        ),
        (
            "unlabeled settings pretrain",
            "unlabeled settings task=mae       (its own settings and recipe)",
            "unlabeled settings data=folder",
        ),
    ),
    "evaluate": Command(
        "evaluate a run, timm model or weights file; write a report",
        "Evaluates frozen features on labeled data (kNN, linear probe and others), compares them with raw pixels and "
        "with random weights, and writes a report.",
        (
            Example("a run, on its own data", "unlabeled evaluate runs/demo"),
            Example(
                "a timm model, with all evaluators", "unlabeled evaluate resnet18 data=shapes evaluate.evaluators=all"
            ),
            Example(
                "a run, on labeled images",
                "unlabeled evaluate runs/mae data=folder data.path=photos data.labels=true",
            ),
            Example("sizes of an elastic run", "unlabeled evaluate runs/poa 'sizes=[[384,12],[768,12]]'"),
        ),
        (TARGET, OVERRIDES),
        ("unlabeled settings evaluate", "unlabeled settings evaluator=knn"),
    ),
    "report": Command(
        "compare runs side by side",
        "Compares runs from their reports: settings, results with confidence intervals, curves.",
        (
            Example("two runs", "unlabeled report runs/mae runs/dino"),
            Example("choose the folder to write to", "unlabeled report runs/mae runs/dino out=reports/mae_dino"),
        ),
        (Argument("overrides", {"nargs": "+", "metavar": "RUN", "help": "run folders, and optionally out=FOLDER"}),),
    ),
    "finetune": Command(
        "train a run, timm model or weights file into a classifier",
        "Fine-tunes a pretrained network on labeled data, then trains the same network from random weights for "
        "comparison.",
        (
            Example("a run", "unlabeled finetune runs/mae data=folder data.path=labeled out=runs/tuned"),
            Example(
                "only the classifier, with 10 % of the labels",
                "unlabeled finetune runs/mae data=digits frozen=true label_fraction=0.1",
            ),
            Example("a timm model, without the comparison", "unlabeled finetune resnet18 data=digits baseline=false"),
        ),
        (TARGET, OVERRIDES),
        ("unlabeled settings finetune", "unlabeled settings data=folder"),
    ),
    "export": Command(
        "write a run's backbone, or sizes of an elastic run, for timm",
        "Writes the backbone of a run as a safetensors file that timm loads, or sub-networks of an elastic run.",
        (
            Example("the backbone of a run", "unlabeled export runs/mae out=backbone.safetensors"),
            Example("one size of an elastic run", "unlabeled export runs/poa width=384 depth=12 out=small.safetensors"),
            Example(
                "the size of a timm model", "unlabeled export runs/poa like=vit_small_patch16_224 out=s.safetensors"
            ),
        ),
        (RUN, OVERRIDES),
        ("unlabeled settings export",),
    ),
    "sizes": Command(
        "list the sizes in an elastic run",
        "Lists the sizes that an elastic run (task=poa) holds, with their cost and their measured accuracy.",
        (Example("an elastic run", "unlabeled sizes runs/poa"),),
        (RUN,),
    ),
    "gauntlet": Command(
        "evaluate many backbones on many datasets, resumable",
        "Evaluates every backbone on every dataset and writes one table. Run the same command again to resume it.",
        (
            Example(
                "two backbones, two datasets",
                "unlabeled gauntlet 'backbones=[runs/mae,resnet18]' 'data=[digits,shapes]'",
            ),
            Example(
                "more evaluators",
                "unlabeled gauntlet backbones=resnet18 data=digits 'evaluators=[knn,cluster]'",
            ),
        ),
        settings=("unlabeled settings gauntlet", "unlabeled settings evaluator=knn"),
    ),
    "tasks": Command(
        "list the pretext tasks: what they do, need and suit",
        "Lists the pretext tasks, built in and from installed packages: what each does, when to choose it, what it "
        "needs of the backbone, and its paper.",
        (
            Example("all tasks", "unlabeled tasks"),
            Example("for scripts", "unlabeled tasks --json"),
        ),
        (JSON,),
        ("unlabeled settings task=mae",),
    ),
    "settings": Command(
        "explain the settings of commands, tasks, evaluators and data",
        "Prints the name, type, default, unit and meaning of settings. Without an argument, lists what there is.",
        (
            Example("an overview", "unlabeled settings"),
            Example("a group of settings", "unlabeled settings optim"),
            Example("a task and its recipe", "unlabeled settings task=mae"),
            Example("an evaluator, as JSON", "unlabeled settings evaluator=knn --json"),
        ),
        (
            Argument(
                "what",
                {
                    "nargs": "?",
                    "metavar": "WHAT",
                    "help": "a command, a group such as optim, task=NAME, evaluator=NAME or data=NAME",
                },
            ),
            JSON,
        ),
    ),
    "matrix": Command(
        "try every task on every architecture of timm",
        "Runs one step of each task on a small network of each architecture module of timm, and tabulates what runs "
        "on what, and why not.",
        (
            Example("one task, one module", "unlabeled matrix task=mae module=beit"),
            Example("everything, into a page", "unlabeled matrix out=docs/matrix.md"),
        ),
        settings=("unlabeled settings matrix",),
    ),
    "completion": Command(
        "print a script for completion in your shell",
        "Prints a completion script for bash, zsh or fish. Write it to a file once, and again after you install or "
        "update unlabeled or its plugins.",
        (
            Example("bash", "unlabeled completion bash > ~/.unlabeled.bash; source ~/.unlabeled.bash"),
            Example("zsh", "unlabeled completion zsh > ~/.unlabeled.zsh; source ~/.unlabeled.zsh"),
            Example("fish", "unlabeled completion fish > ~/.config/fish/completions/unlabeled.fish"),
        ),
        (Argument("shell", {"choices": ("bash", "zsh", "fish"), "help": "your shell"}),),
    ),
}
"""In the order of the list in ``unlabeled --help``: as a user meets them."""
