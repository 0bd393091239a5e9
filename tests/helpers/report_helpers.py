"""A made-up run and its results, for tests of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from unlabeled.eval.base import Cut, Measure, Point
from unlabeled.eval.embedding import Embedding
from unlabeled.eval.gallery import GalleryRow, Thumbnail
from unlabeled.eval.results import EncoderResults, EvaluatorInfo, Metric, Results
from unlabeled.report.summary import RunSummary

RUN = RunSummary(
    title="a run", backbone="vit", data="digits", parameters=1_234_567, device="cpu", seed=3,
    config="task:\n  name: mae\n", task="mae", epochs=10, steps=400, images=51200, seconds=3725, commit="abc1234",
)  # fmt: skip


KNOWN = {
    "k10": Measure("kNN, k = 10", point=Point("kNN", "k", 10)),
    "k20": Measure("kNN, k = 20", point=Point("kNN", "k", 20)),
    "top1": Measure("linear probe"),
}


def results(
    knn: tuple[float, float, float] = (0.8, 0.6, 0.5),
    linear: tuple[float, float, float] = (0.9, 0.7, 0.6),
    *,
    count: int = 1000,
    classes: tuple[str, ...] = ("cat", "dog", "owl"),
) -> Results:
    names = ("backbone", "pixels", "random")
    confusion = np.full((len(classes), len(classes)), 10) + 80 * np.eye(len(classes), dtype=int)
    encoders = {name: EncoderResults({}, {"linear/confusion": confusion}, (), {"features": 1.0}, 32) for name in names}
    for name, k, p in zip(names, knn, linear, strict=True):
        measured(encoders[name], "knn", {"k10": k, "k20": k})
        measured(encoders[name], "linear", {"top1": p, "lr": 0.1, "weight_decay": 0.0})
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    row = GalleryRow(
        Thumbnail(image, 0, f"{classes[0]}/query.png"),
        (Thumbnail(image, 0, f"{classes[0]}/right.png", 0.99), Thumbnail(image, 1, f"{classes[1]}/wrong.png", 0.5)),
    )
    return Results(
        encoders=encoders, headline=("knn/k20", "linear/top1"), classes=classes,
        test_labels=np.zeros(count, dtype=np.int64), train_images=5000, test_images=count, majority=0.34,
        skipped={"train": (), "test": ("bad.png",)}, seeds={"random weights": 7}, hardware={"device": "cpu"},
        gallery=(row,), seconds=12.5,
        evaluators={"knn": EvaluatorInfo("Nearest neighbors"), "linear": EvaluatorInfo("Linear probe")},
    )  # fmt: skip


TITLE = "</h2><script>title()</script>"
"""Title of an evaluator that tries to inject HTML."""
MEASURES = {
    **{
        f"{kind}_{severity}": Measure(f"{kind}, severity {severity}", point=Point(kind, "severity", severity))
        for kind in ("noise", "blur")
        for severity in (1, 3, 5)
    },
    "leak": Measure("<i>leak</i> | share", "percent", "lower"),
    "rank": Measure("rank", "number"),
    "slope": Measure("slope", "number", None),
    "shots5": Measure("5-way 5-shot", "percent"),
}
"""Measures of every kind."""


def measured(encoder: EncoderResults, evaluator: str, values: Mapping[str, float], cut: Cut | None = None) -> None:
    """Adds values of `evaluator` to `encoder`, with descriptions where there are any."""
    described = {**MEASURES, **KNOWN}
    for key, value in values.items():
        metric = f"{evaluator}/{key}" + (f"@{cut}" if cut else "")
        encoder.metrics[metric] = value
        if key in described:
            encoder.measures[metric] = Metric(evaluator, key, replace(described[key], cut=cut))


def with_made_up(found: Results, encoders: tuple[str, ...] = ("backbone", "pixels", "random")) -> Results:
    """`found` with the values of another evaluator, notes, arrays, images, maps and an embedding."""
    values = {"backbone": 0.9, "pixels": 0.5, "random": 0.4}
    for name in encoders:
        encoder, value = found.encoders[name], values[name]
        for kind in ("noise", "blur"):
            measured(encoder, "made_up", {f"{kind}_{severity}": value - severity / 20 for severity in (1, 3, 5)})
        measured(encoder, "made_up", {"leak": 1 - value, "rank": 1234.5 * value, "slope": -value})
        measured(encoder, "made_up", {"shots5": value, "hidden": 1.0})
        encoder.intervals["made_up/shots5"] = (value - 0.01, value + 0.02)
        encoder.arrays.update(
            {
                "made_up/singular_values": np.linspace(1, 0, 32) * value,
                "made_up/cka": np.full((3, 3), value),
                "made_up/names": np.array(["<svg onload=x()>", "two", "three"]),
                "made_up/predictions": np.zeros(5),
            }
        )
        encoder.images["made_up/pairs"] = torch.zeros(3, 8, 16, dtype=torch.uint8)
        notes = ("made_up: said of all <script>note()</script>", *(["made_up: of one"] if name == "pixels" else []))
        found.encoders[name] = replace(encoder, notes=notes)
    points = Embedding(np.arange(8, dtype=np.float32).reshape(4, 2), np.array([0, 1, 1, 2]), "PCA of 4", "Mind.")
    evaluators = {**found.evaluators, "made_up": EvaluatorInfo(TITLE)}
    return replace(
        found, evaluators=evaluators, embedding=points, maps={"attention": torch.zeros(3, 8, 16, dtype=torch.uint8)}
    )
