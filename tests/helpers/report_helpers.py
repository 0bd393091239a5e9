"""A run and its evidence, made up, for tests of the report."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from unlabeled.eval.base import Measure
from unlabeled.eval.embedding import Embedding
from unlabeled.eval.gallery import GalleryRow, Thumbnail
from unlabeled.eval.results import EncoderEvidence, Evidence
from unlabeled.report.summary import RunSummary

RUN = RunSummary(
    title="a run", backbone="vit", data="digits", parameters=1_234_567, device="cpu", seed=3,
    config="task:\n  name: mae\n", task="mae", epochs=10, steps=400, images=51200, seconds=3725, commit="abc1234",
)  # fmt: skip


def evidence(
    knn: tuple[float, float, float] = (0.8, 0.6, 0.5),
    linear: tuple[float, float, float] = (0.9, 0.7, 0.6),
    *,
    count: int = 1000,
    classes: tuple[str, ...] = ("cat", "dog", "owl"),
) -> Evidence:
    names = ("backbone", "pixels", "random")
    confusion = np.full((len(classes), len(classes)), 10) + 80 * np.eye(len(classes), dtype=int)
    encoders = {
        name: EncoderEvidence(
            {"knn/k10": k, "knn/k20": k, "linear/top1": p, "linear/lr": 0.1, "linear/weight_decay": 0.0},
            {"linear/confusion": confusion},
            (),
            {"features": 1.0},
            32,
        )
        for name, k, p in zip(names, knn, linear, strict=True)
    }
    picture = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    row = GalleryRow(
        Thumbnail(picture, 0, f"{classes[0]}/query.png"),
        (Thumbnail(picture, 0, f"{classes[0]}/right.png", 0.99), Thumbnail(picture, 1, f"{classes[1]}/wrong.png", 0.5)),
    )
    return Evidence(
        encoders=encoders, headline=("knn/k20", "linear/top1"), classes=classes,
        test_labels=np.zeros(count, dtype=np.int64), train_pictures=5000, test_pictures=count, majority=0.34,
        skipped={"train": (), "test": ("bad.png",)}, seeds={"random weights": 7}, hardware={"device": "cpu"},
        gallery=(row,), seconds=12.5,
    )  # fmt: skip


class MadeUp:
    """An evaluator of measures of every kind, with a title that tries to leave the page."""

    name: ClassVar = "made_up"
    title: ClassVar = "</h2><script>title()</script>"
    needs: ClassVar = "features"

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        if found := re.fullmatch(r"(noise|blur)_(\d)", key):
            return Measure(f"{found[1]}, severity {found[2]}")
        known = {
            "shots5": Measure("5-way 5-shot", "percent"),
            "leak": Measure("<i>leak</i> | share", "percent", "lower"),
            "rank": Measure("rank", "number"),
            "slope": Measure("slope", "number", None),
        }
        return known.get(key)


def with_made_up(found: Evidence, encoders: tuple[str, ...] = ("backbone", "pixels", "random")) -> Evidence:
    """`found` with values of `MadeUp`, notes, arrays, pictures, maps and points for the plane."""
    values = {"backbone": 0.9, "pixels": 0.5, "random": 0.4}
    for name in encoders:
        encoder, value = found.encoders[name], values[name]
        for kind in ("noise", "blur"):
            encoder.metrics.update({f"made_up/{kind}_{severity}": value - severity / 20 for severity in (1, 3, 5)})
        encoder.metrics.update({"made_up/leak": 1 - value, "made_up/rank": 1234.5 * value, "made_up/slope": -value})
        encoder.metrics.update({"made_up/shots5": value, "made_up/hidden": 1.0})
        encoder.intervals["made_up/shots5"] = (value - 0.01, value + 0.02)
        encoder.arrays.update(
            {
                "made_up/singular_values": np.linspace(1, 0, 32) * value,
                "made_up/cka": np.full((3, 3), value),
                "made_up/names": np.array(["<svg onload=x()>", "two", "three"]),
                "made_up/predictions": np.zeros(5),
            }
        )
        encoder.pictures["made_up/pairs"] = torch.zeros(3, 8, 16, dtype=torch.uint8)
        said = ("made_up: said of all <script>note()</script>", *(["made_up: of one"] if name == "pixels" else []))
        found.encoders[name] = replace(encoder, notes=said)
    points = Embedding(np.arange(8, dtype=np.float32).reshape(4, 2), np.array([0, 1, 1, 2]), "PCA of 4", "Mind.")
    return replace(found, embedding=points, maps={"attention": torch.zeros(3, 8, 16, dtype=torch.uint8)})
