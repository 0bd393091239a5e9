"""The report of fine-tuning: report.json for programs, report.md for terminals and reviews, report.html for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

from unlabeled.eval.base import Estimate
from unlabeled.eval.comparison import TITLES, Comparison, percent, signed
from unlabeled.eval.environment import versions
from unlabeled.eval.intervals import difference
from unlabeled.report.document import clean, training_summary, write_json
from unlabeled.report.figures import comparison_figure, confusion_figure, training_curves
from unlabeled.report.page import environment
from unlabeled.report.summary import count_parameters, name_backbone, name_data
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.workflows.finetune.accuracy import Accuracy
from unlabeled.workflows.finetune.config import FinetuneConfig
from unlabeled.workflows.finetune.data import LabeledImages

SCHEMA = 2

OWN = "backbone"
"""Key of the fine-tuned network, as in the report of evaluation."""

_LARGEST_CONFUSION = 50
"""Classes up to which report.json holds the confusion matrix."""


@dataclass(frozen=True)
class Facts:
    """What a report says beside the accuracies."""

    title: str
    """Of the target."""
    pretrained: bool
    """Whether it began with trained weights."""
    network: Backbone
    train: LabeledImages
    test: LabeledImages
    steps: int
    seconds: float | None
    """Wall clock of the fine-tuning; None when it was not all in one process."""
    device: str


def write_report(
    config: FinetuneConfig, facts: Facts, own: Mapping[str, Accuracy], alongside: Mapping[str, Accuracy] | None
) -> Path:
    """Writes ``report/report.{json,md,html}`` into the run folder and returns the path of the HTML.

    `own` and `alongside` (the baseline): which weights → accuracy, those to quote first. The JSON is that of
    `finetune_document`. The page needs no other file and no network.
    """
    folder = config.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"": read_metrics(config.out / "metrics.jsonl")}
    if alongside is not None:
        rows[f"{_title(_baseline(config))}: "] = read_metrics(config.out / "scratch" / "metrics.jsonl")
    comparisons = compare(config, own, alongside)
    document = finetune_document(config, facts, own, comparisons) | {"training": training_summary(rows[""])}
    write_json(document, folder / "report.json")
    quoted = next(iter(own.values()))
    figures = {
        "comparison": comparison_figure(comparisons),
        "confusion": confusion_figure(quoted.confusion, facts.test.classes, "the classifier"),
        "curves": [(whose + title, svg) for whose, row in rows.items() for title, svg in training_curves(row)],
    }
    titles = {name: _title(name) for name in comparisons[0].values}
    context = {**document, "facts": _facts(document), "titles": titles, "figures": figures}
    for kind in ("md", "html"):
        template = environment(html=kind == "html").get_template(f"finetune.{kind}.j2")
        (folder / f"report.{kind}").write_text(template.render(context), "utf-8")
    return folder / "report.html"


def finetune_document(
    config: FinetuneConfig, facts: Facts, own: Mapping[str, Accuracy], comparisons: list[Comparison]
) -> dict[str, Any]:
    """The report as JSON values; fractions are 0..1, times in seconds.

    ``schema``, ``kind`` (finetune), ``versions``, ``run`` (what was trained, on what, for how long), ``summary``
    (``level``: better, even, worse, alone; ``text``), ``comparison`` (as in the report of evaluation; encoders are
    ``backbone`` and the baseline), ``classes``, ``majority`` (test accuracy of the commonest training class),
    ``confusion`` (true class by predicted class; null past 50 classes), ``notes``.
    """
    network, labels = facts.network, facts.test.labels
    quoted = next(iter(own.values()))
    commonest = torch.bincount(facts.train.labels, minlength=len(facts.train.classes)).argmax()
    return {
        "schema": SCHEMA,
        "kind": "finetune",
        "versions": versions(),
        "run": {
            "title": clean(f"{facts.title}: {'linear classifier' if config.frozen else 'fine-tuned'}"),
            "target": clean(config.target),
            "pretrained": facts.pretrained,
            "model": clean(name_backbone(network)),
            "parameters": count_parameters(network),
            "input_size": list(network.input_size),
            "data": clean(name_data(config.data)),
            "label_fraction": config.label_fraction,
            "train_images": len(facts.train),
            "test_images": quoted.images,
            "epochs": config.epochs,
            "steps": facts.steps,
            "batch_size": config.batch_size,
            "seconds": facts.seconds,
            "device": facts.device,
            "seed": config.engine.seed,
            "date": date.today().isoformat(),
            "config": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        },
        "summary": _summary(config, facts, comparisons),
        "comparison": [asdict(comparison) for comparison in comparisons],
        "classes": [clean(name) for name in facts.test.classes],
        "majority": float((labels == commonest).float().mean()),
        "confusion": quoted.confusion.tolist() if len(facts.test.classes) <= _LARGEST_CONFUSION else None,
        "notes": _notes(config, quoted, alongside=len(comparisons[0].values) > 1),
    }


def compare(
    config: FinetuneConfig, own: Mapping[str, Accuracy], alongside: Mapping[str, Accuracy] | None
) -> list[Comparison]:
    """Top-1 and top-5 of each set of weights, beside the baseline's; the first is the one to quote."""
    found: list[Comparison] = []
    baseline = _baseline(config)
    for weights, accuracy in own.items():
        for metric, value in accuracy.values.items():
            values, gaps = {OWN: value}, {}
            if alongside is not None:
                other = alongside[weights].values[metric]
                values[baseline] = other
                gap = difference(value.value, other.value, accuracy.images)
                gaps[baseline] = Estimate(value.value - other.value, *gap)
            label = f"top-{metric.removeprefix('top')}" + (f", {weights}" if len(own) > 1 else "")
            found.append(Comparison(f"{metric}/{weights}", label, not found, values, gaps))
    return found


def _baseline(config: FinetuneConfig) -> str:
    return "random" if config.frozen else "from scratch"


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _summary(config: FinetuneConfig, facts: Facts, comparisons: list[Comparison]) -> dict[str, str]:
    """A difference counts as one when its 95 % interval does not hold zero."""
    quoted = comparisons[0]
    reached = f"{percent(quoted.values[OWN].value)} %"
    if not quoted.differences:
        what = "without a baseline, so nothing to be better than" if facts.pretrained else "from random weights"
        return {"level": "alone", "text": f"{reached} of the test images are told rightly, {what}."}
    baseline, gap = next(iter(quoted.differences.items()))
    level = "better" if gap.low > 0 else "worse" if gap.high < 0 else "even"
    other = "the same network " + ("with random weights" if config.frozen else "trained from scratch")
    opening = {"better": "Better than", "worse": "Worse than", "even": "No clear difference from"}[level]
    return {
        "level": level,
        "text": f"{opening} {other}: {reached} against {percent(quoted.values[baseline].value)} %, a difference of "
        f"{signed(gap.value)} points (95 %: {signed(gap.low)} to {signed(gap.high)}).",
    }


def _notes(config: FinetuneConfig, quoted: Accuracy, *, alongside: bool) -> list[str]:
    notes = [
        "Accuracies are those of the weights after the last step"
        + (", averaged over the run" if config.ema else "")
        + "; no epoch was chosen by its accuracy.",
        "Intervals are 95 % and cover the choice of test images only, not another seed: Wilson for accuracies, "
        "Newcombe for differences (a little wide, as both networks see the same images).",
    ]
    if alongside:
        kept = "" if config.optim.layer_decay is None else " but layer-wise decay, which is for pretrained layers"
        notes.append(
            "The baseline is the same network from random weights, with the same images, steps, augmentation, seed "
            f"and all other settings{kept}. It had no pretraining, so it also had less compute in all."
        )
    if config.label_fraction is not None:
        notes.append(f"Trained on {100 * config.label_fraction:.3g} % of the labels of each class, chosen by the seed.")
    if config.frozen:
        notes.append("The classifier alone was trained; all other weights stayed as they were.")
    if quoted.skipped:
        shown = ", ".join(map(clean, quoted.skipped[:5])) + (", ..." if len(quoted.skipped) > 5 else "")
        notes.append(f"{len(quoted.skipped)} test images could not be decoded and were left out: {shown}")
    return notes


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value, in reading order."""
    run = document["run"]
    seconds, fraction = run["seconds"], run["label_fraction"]
    known = [
        ("Target", run["target"] + ("" if run["pretrained"] else ", random weights")),
        ("Model", run["model"]),
        ("Parameters", f"{run['parameters'] / 1e6:.2f} million"),
        ("Input", "{} x {} pixels".format(*run["input_size"])),
        ("Data", run["data"]),
        ("Classes", str(len(document["classes"]))),
        (
            "Training images",
            f"{run['train_images']:,}" + (f" ({100 * fraction:.3g} % of the labels)" if fraction else ""),
        ),
        ("Test images", f"{run['test_images']:,}"),
        ("Epochs", f"{run['epochs']:g}"),
        ("Steps", f"{run['steps']:,} of {run['batch_size']:,} images"),
        ("Took", str(timedelta(seconds=round(seconds))) if seconds is not None else ""),
        ("Device", run["device"]),
        ("Seed", str(run["seed"])),
        ("Date", run["date"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in document["versions"].items())),
    ]
    return [(name, value) for name, value in known if value]
