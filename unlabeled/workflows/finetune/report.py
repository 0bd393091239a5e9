"""Writes the report of fine-tuning: report.json for programs, report.md for terminals, report.html to read."""

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
from unlabeled.eval.notes import skipped_images
from unlabeled.report.document import clean, training_summary, write_json
from unlabeled.report.figures import comparison_figure, confusion_figure, training_curves
from unlabeled.report.page import environment
from unlabeled.report.summary import DEBUG_NOTE, count_parameters, name_backbone, name_data
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.train.monitor import read_metrics
from unlabeled.workflows.finetune.accuracy import Accuracy
from unlabeled.workflows.finetune.config import FinetuneConfig
from unlabeled.workflows.finetune.data import LabeledImages

SCHEMA = 2

OWN = "backbone"
"""Key of the fine-tuned model, as in the report of an evaluation."""

_LARGEST_CONFUSION = 50
"""Up to this many classes, report.json includes the confusion matrix."""


@dataclass(frozen=True)
class Facts:
    """Facts about a run, as opposed to its accuracies."""

    title: str
    """Title of the target."""
    pretrained: bool
    """Whether training started from trained weights."""
    backbone: Backbone
    train: LabeledImages
    test: LabeledImages
    steps: int
    seconds: float | None
    """Wall-clock time of fine-tuning; None for a resumed run, which was not timed as a whole."""
    device: str


def write_report(
    config: FinetuneConfig, facts: Facts, own: Mapping[str, Accuracy], alongside: Mapping[str, Accuracy] | None
) -> tuple[Path, str]:
    """Writes ``report/report.{json,md,html}`` into the run folder; returns the path of the HTML file and its summary.

    `own` and `alongside` (the baseline) map the name of a set of weights to its accuracy, the headline one first. The
    JSON file is described in `finetune_document`. The HTML page is self-contained and works offline.
    """
    folder = config.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"": read_metrics(config.out / "metrics.jsonl")}
    if alongside is not None:  # its curves get a prefix in their titles
        rows[f"{_title(_baseline(config))}: "] = read_metrics(config.out / "scratch" / "metrics.jsonl")
    comparisons = compare(config, own, alongside)
    document = finetune_document(config, facts, own, comparisons) | {"training": training_summary(rows[""])}
    write_json(document, folder / "report.json")
    headline = next(iter(own.values()))
    figures = {
        "comparison": comparison_figure(comparisons),
        "confusion": confusion_figure(headline.confusion, facts.test.classes, "classifier"),
        "curves": [(prefix + title, svg) for prefix, row in rows.items() for title, svg in training_curves(row)],
    }
    titles = {name: _title(name) for name in comparisons[0].values}
    context = {**document, "facts": _facts(document), "titles": titles, "figures": figures}
    for kind in ("md", "html"):
        template = environment(html=kind == "html").get_template(f"finetune.{kind}.j2")
        (folder / f"report.{kind}").write_text(template.render(context), "utf-8")
    return folder / "report.html", document["summary"]["text"]


def finetune_document(
    config: FinetuneConfig, facts: Facts, own: Mapping[str, Accuracy], comparisons: list[Comparison]
) -> dict[str, Any]:
    """Returns the report as JSON values. Fractions are 0..1, times in seconds.

    ``schema``, ``kind`` (finetune), ``versions``, ``run`` (what was trained, on what, for how long), ``summary``
    (``level``: better, even, worse, alone; ``text``), ``comparison`` (as in the report of an evaluation; encoders are
    ``backbone`` and the baseline), ``classes``, ``majority`` (test accuracy of always guessing the most common training
    class), ``confusion`` (true class by predicted class; null for more than 50 classes), ``notes``.
    """
    backbone, labels = facts.backbone, facts.test.labels
    headline = next(iter(own.values()))
    most_common = torch.bincount(facts.train.labels, minlength=len(facts.train.classes)).argmax()
    return {
        "schema": SCHEMA,
        "kind": "finetune",
        "versions": versions(),
        "run": {
            "title": clean(f"{facts.title}: {'linear classifier' if config.frozen else 'fine-tuned'}"),
            "target": clean(config.target),
            "pretrained": facts.pretrained,
            "model": clean(name_backbone(backbone)),
            "parameters": count_parameters(backbone),
            "input_size": list(backbone.input_size),
            "data": clean(name_data(config.data)),
            "label_fraction": config.label_fraction,
            "train_images": len(facts.train),
            "test_images": headline.images,
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
        # the class is chosen on the training split, as a classifier without features would do
        "majority": float((labels == most_common).float().mean()),
        "confusion": headline.confusion.tolist() if len(facts.test.classes) <= _LARGEST_CONFUSION else None,
        "notes": _notes(config, headline, alongside=len(comparisons[0].values) > 1),
    }


def compare(
    config: FinetuneConfig, own: Mapping[str, Accuracy], alongside: Mapping[str, Accuracy] | None
) -> list[Comparison]:
    """Compares the top-1 and top-5 accuracy of each set of weights with the baseline's; the first is the headline."""
    found: list[Comparison] = []
    baseline = _baseline(config)
    for weights, accuracy in own.items():
        for metric, value in accuracy.values.items():
            values, gaps = {OWN: value}, {}
            if alongside is not None:
                # the same kind of weights: averaged with averaged, last step with last step
                other = alongside[weights].values[metric]
                values[baseline] = other
                # Newcombe's interval for equal numbers of images: both models are tested on the same ones
                gap = difference(value.value, other.value, accuracy.images)
                gaps[baseline] = Estimate(value.value - other.value, *gap)
            label = f"top-{metric.removeprefix('top')}" + (f", {weights}" if len(own) > 1 else "")
            found.append(Comparison(f"{metric}/{weights}", label, not found, values, gaps))
    return found


def _baseline(config: FinetuneConfig) -> str:
    return "random" if config.frozen else "from scratch"  # a frozen random backbone is not trained at all


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _summary(config: FinetuneConfig, facts: Facts, comparisons: list[Comparison]) -> dict[str, str]:
    """The first sentence of the report. A difference is clear if its 95 % interval does not include zero."""
    headline = comparisons[0]
    reached = f"{percent(headline.values[OWN].value)} %"
    if not headline.differences:
        context = "There is no baseline to compare with" if facts.pretrained else "Trained from random weights"
        return {"level": "alone", "text": f"{reached} of the test images are predicted correctly. {context}."}
    baseline, gap = next(iter(headline.differences.items()))
    level = "better" if gap.low > 0 else "worse" if gap.high < 0 else "even"
    other = "the same model " + ("with random weights" if config.frozen else "trained from scratch")
    opening = {"better": "Better than", "worse": "Worse than", "even": "No clear difference from"}[level]
    return {
        "level": level,
        "text": f"{opening} {other}: {reached} versus {percent(headline.values[baseline].value)} %, a difference of "
        f"{signed(gap.value)} percentage points (95 %: {signed(gap.low)} to {signed(gap.high)}).",
    }


def _notes(config: FinetuneConfig, headline: Accuracy, *, alongside: bool) -> list[str]:
    notes = [DEBUG_NOTE] if config.debug else []
    notes += [
        "Weights are from the last step"
        + (", averaged over the run" if config.ema else "")
        + "; no epoch was selected by its accuracy.",
        "95 % intervals account for the choice of test images only, not for the seed. Accuracies use Wilson intervals; "
        "differences use Newcombe intervals, which are slightly too wide because both models see the same images.",
    ]
    if alongside:
        kept = "" if config.optim.layer_decay is None else " except layer-wise decay, which is meant for trained layers"
        notes.append(
            "The baseline is the same model trained from random weights, with the same images, number of steps, "
            f"augmentation, seed and all other settings{kept}. Without pretraining, its total compute is lower."
        )
    if config.label_fraction is not None:
        notes.append(
            f"Trained on {100 * config.label_fraction:.3g} % of the labels of each class, drawn with the seed."
        )
    if config.frozen:
        notes.append("Only the classifier was trained; the backbone was frozen.")
    if headline.skipped:
        notes.append(skipped_images("test", list(map(clean, headline.skipped))))
    return notes


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every known fact about the run, in reading order."""
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
        ("Training time", str(timedelta(seconds=round(seconds))) if seconds is not None else ""),
        ("Device", run["device"]),
        ("Seed", str(run["seed"])),
        ("Date", run["date"]),
        ("Versions", ", ".join(f"{name} {number}" for name, number in document["versions"].items())),
    ]
    return [(name, value) for name, value in known if value]
