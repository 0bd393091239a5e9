"""The report as data: the contents of report.json, and of report.md and report.html apart from images."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.eval.comparison import TITLES, as_row, compare, summarize
from unlabeled.eval.embedding import Embedding
from unlabeled.eval.environment import versions
from unlabeled.eval.notes import skipped_images
from unlabeled.eval.registry import evaluator_class, evaluator_names
from unlabeled.eval.results import EncoderResults, Results
from unlabeled.eval.size_curve import SizeCurve
from unlabeled.report.sections import evaluator_sections, general_notes
from unlabeled.report.size_table import size_section
from unlabeled.report.summary import RunSummary
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.core.renamed import with_renamed_keys

SCHEMA = 3

Row = Mapping[str, Any]


def report_document(
    run: RunSummary,
    results: Results | None,
    metrics: Sequence[Row] | None,
    images: Sequence[str] = (),
    sizes: SizeCurve | None = None,
) -> dict[str, Any]:
    """Returns the report as JSON values. Fractions are 0..1, times in seconds, non-finite numbers null.

    ``schema``      3; increases when a key changes its meaning or is removed.
    ``run``         the fields of `RunSummary`.
    ``summary``     ``level`` (better, even, worse, mixed, alone: no baselines, none: no results), ``text``,
                    ``details``.
    ``comparison``  one entry per accuracy, the headline metrics (``headline``) first: ``metric``, ``label``, ``values``
                    (encoder → ``value``, ``low``, ``high``: 95 % interval, the evaluator's own or Wilson's) and
                    ``differences`` (baseline → this backbone minus the baseline, same keys, Newcombe's interval).
    ``evaluators``  one entry per evaluator: ``name``, ``title``, ``rows`` (as in ``comparison``, with ``unit``:
                    accuracy, percent, number, ``better``: higher, lower, null, and ``cut``: null, 64 for the first 64
                    features, pca64 for as many components; limits are null without an interval, ``differences`` is
                    empty for plain numbers), ``notes``, ``arrays`` (the plotted ones: key → encoder → nested lists, up
                    to 2,500 numbers), ``images`` (encoder → keys).
    ``results``     null, or ``encoders`` (name → ``title``, ``metrics``, ``notes``, ``seconds``, ``dimension``),
                    ``headline``, ``classes``, ``train_images``, ``test_images``, ``majority``, ``skipped``,
                    ``seeds``, ``hardware``, ``seconds``, ``recalibrated`` (training images on which batch-norm
                    statistics were recomputed; 0: none).
    ``embedding``   null, or ``points`` (n, 2) of test images in a plane, their ``labels``, ``method``, ``caution``.
    ``maps``        names of the images of the backbone's feature maps.
    ``training``    null, or ``rows``, ``first`` and ``last`` (rows of metrics.jsonl) and ``online`` ([epoch or step,
                    kNN accuracy] during the run).
    ``sizes``       null, or the measured sizes of an elastic run: ``rows``, smallest first (``kind``: extracted or
                    alone, ``title``, ``width``, ``depths``, ``parameters``, ``macs``, ``recalibrated``, ``seconds``,
                    ``values`` and ``random`` as in ``comparison``, ``front``: metrics in which this size is better
                    than every smaller one), ``headline``, ``pixels``, ``stored`` (sizes in the run), ``measured``.
    ``images``      names of the task's images.
    ``notes``       how the numbers were obtained.
    """
    document: dict[str, Any] = _plain(
        {
            "schema": SCHEMA,
            "versions": versions(),
            "run": asdict(run),
            "summary": asdict(summarize(results)),
            "comparison": [as_row(comparison) for comparison in compare(results)] if results else [],
            "evaluators": evaluator_sections(results) if results else [],
            "results": _results_of(results) if results else None,
            "embedding": _embedding(results.embedding) if results and results.embedding else None,
            "maps": list(results.maps) if results else [],
            "training": training_summary(metrics or ()),
            "sizes": size_section(sizes) if sizes is not None else None,
            "images": list(images),
            "notes": _notes(run, results),
        }
    )
    return document


def write_json(document: Mapping[str, Any], file: Path) -> None:
    """Writes what `report_document` returned as strict JSON."""
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_report(file: Path) -> dict[str, Any]:
    """Reads a report.json of any schema and returns it in the form of the current one.

    Raises DataError when the file cannot be read or is not a report.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"report: {file} cannot be read ({error}); write it again with `unlabeled evaluate`") from None
    found = document.get("schema") if isinstance(document, dict) else None
    if found not in (1, 2, SCHEMA):
        raise DataError(
            f"report: {file} has schema {found}, this version reads 1 to {SCHEMA}; write it again with "
            "`unlabeled evaluate`"
        )
    try:
        if found == 1:
            document = _second_schema(document)
        return _third_schema(document) if found < SCHEMA else dict(document)
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"report: {file} is not a report of schema {found}; write it again with `unlabeled evaluate`"
        ) from None


def _second_schema(document: dict[str, Any]) -> dict[str, Any]:
    """Converts schema 1, which had accuracies only and kept the linear probe's confusion in ``evidence``.

    Intervals and sentences stay as they were written.
    """
    confusion = document["evidence"].pop("confusion") if document["evidence"] else None
    sections: dict[str, dict[str, Any]] = {}
    for row in document["comparison"]:
        name, row = row["metric"].partition("/")[0], {**row, "unit": "accuracy", "better": "higher"}
        # schema 1 did not store titles, and the evaluator's plugin may no longer be installed
        title = evaluator_class(name).title if name in evaluator_names() else name
        # `pictures` is the key of schema 2; `_third_schema` renames it next
        empty = {"name": name, "title": title, "rows": [], "notes": [], "arrays": {}, "pictures": {}}
        sections.setdefault(name, empty)["rows"].append({**row, "cut": None})
    if confusion is not None and "linear" in sections:
        sections["linear"]["arrays"] = {"confusion": {"backbone": confusion}}
    comparison = [{**row, "unit": "accuracy", "better": "higher"} for row in document["comparison"]]
    new = {"comparison": comparison, "evaluators": list(sections.values()), "embedding": None, "maps": []}
    return {**document, **new}


def _third_schema(document: dict[str, Any]) -> dict[str, Any]:
    """Converts schema 2, which used other names for some keys."""
    # the order matters: the sentence inside `verdict` was called `summary`, which is now the name of the section
    names = {"verdict": "summary", "evidence": "results", "pictures": "images"}
    new: dict[str, Any] = with_renamed_keys(document, names) | {"schema": SCHEMA}
    new["summary"] = with_renamed_keys(new["summary"], {"summary": "text"})
    new["evaluators"] = [with_renamed_keys(section, names) for section in new["evaluators"]]
    if new["results"] is not None:
        counts = {"train_pictures": "train_images", "test_pictures": "test_images"}
        new["results"] = with_renamed_keys(new["results"], counts)
        for encoder in new["results"]["encoders"].values():
            encoder["metrics"] = {_OLD_METRIC.sub("images", key): value for key, value in encoder["metrics"].items()}
    if new.get("sizes") is not None:
        new["sizes"] = with_renamed_keys(new["sizes"], {"held": "stored"})
    return new


_OLD_METRIC = re.compile(r"(?<=/)pictures$")


def training_summary(rows: Sequence[Row]) -> dict[str, Any] | None:
    """First and last training row, and the online kNN curve; None if no row has a loss."""
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return None
    return {"rows": len(trained), "first": dict(trained[0]), "last": dict(trained[-1]), "online": online_curve(rows)}


def online_curve(rows: Sequence[Row]) -> list[list[float]]:
    """[epoch (or step), accuracy] of the kNN evaluations during the run; k = 20 if it was evaluated."""
    keys = [key for row in rows for key in row if key.startswith("eval/knn/")]
    if not keys:
        return []
    key = "eval/knn/k20" if "eval/knn/k20" in keys else keys[0]  # else the first k of the settings
    return [[float(row.get("epoch", row.get("step", 0))), float(row[key])] for row in rows if key in row]


def clean(text: str) -> str:
    """Replaces control characters and lone surrogates: file names may contain them, UTF-8 and HTML may not."""
    return "".join(
        "\ufffd" if unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\n\t" else mark for mark in text
    )


def _results_of(results: Results) -> dict[str, Any]:
    return {
        "encoders": {name: _encoder(name, encoder) for name, encoder in results.encoders.items()},
        "headline": results.headline,
        "classes": results.classes,
        "train_images": results.train_images,
        "test_images": results.test_images,
        "majority": results.majority,
        "skipped": results.skipped,
        "seeds": results.seeds,
        "hardware": results.hardware,
        "seconds": results.seconds,
        "recalibrated": results.recalibrated,
    }


def _encoder(name: str, encoder: EncoderResults) -> dict[str, Any]:
    return {
        "title": TITLES.get(name, name),
        "metrics": encoder.metrics,
        "notes": encoder.notes,
        "seconds": encoder.seconds,
        "dimension": encoder.dimension,
    }


def _embedding(embedding: Embedding) -> dict[str, Any]:
    # three decimals are finer than a pixel of the figure, and keep the file small
    points = [[round(float(value), 3) for value in point] for point in embedding.points]
    return {
        "points": points, "labels": embedding.labels, "method": embedding.method, "caution": embedding.caution
    }  # fmt: skip


def _notes(run: RunSummary, results: Results | None) -> list[str]:
    notes = ["Weights are from the last step; no epoch was selected by its accuracy."] if run.epochs else []
    if results is None:
        return notes
    probe = results.encoders["backbone"].metrics  # the settings that the linear probe selected are among them
    notes.append(
        "The backbone is frozen. Unless a note says otherwise, features are its pooled output, and images are not "
        "augmented."
    )
    # each note below is written only if the evaluator it describes ran
    known = results.encoders["backbone"].measures
    for quoted in [known[metric] for metric in results.headline if metric in known]:
        if quoted.evaluator == "knn" and (point := quoted.measure.point) is not None:
            fixed = f"{point.axis} = {point.at:g} was fixed in advance"
            notes.append(f"{fixed}; results for other values of {point.axis} are listed but were not selected from.")
    if "linear/top1" in probe:
        notes.append(
            "The linear probe selected its learning rate and weight decay on a hold-out of the training split. It was "
            "then retrained on the full training split and evaluated once on the test split."
        )
    if "linear/lr" in probe:
        notes.append(
            f"For this backbone, the linear probe selected learning rate {probe['linear/lr']:g} and weight decay "
            f"{probe['linear/weight_decay']:g}."
        )
    notes += [
        "Baselines go through the same evaluators with the same hyperparameter search: raw pixels (at most 32 x 32), "
        f"and the same architecture with random weights (seed {results.seeds.get('random weights', 0)}).",
        "95 % intervals account for the choice of test images only, not for the pretraining seed. Accuracies use "
        "Wilson intervals unless the evaluator provides its own; differences use Newcombe intervals, which are "
        "slightly too wide because all encoders see the same images.",
    ]
    if results.recalibrated:
        notes.append(
            f"Running statistics of batch norms were recomputed on {results.recalibrated:,} unmasked training images, "
            "without labels, for the backbone and for random weights alike."
        )
    for split, names in results.skipped.items():
        if names:
            notes.append(skipped_images(split, names))
    return [*notes, *general_notes(results)]  # notes of an evaluator are in its own section


def _plain(value: Any) -> Any:
    """`value` as JSON types: clean strings, lists, None for non-finite numbers."""
    if isinstance(value, Mapping):
        return {clean(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):  # JSON has no NaN or infinity
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return clean(str(value))
