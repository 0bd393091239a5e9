"""A run and its evidence, made up, for tests of the report."""

from __future__ import annotations

import numpy as np
import torch

from unlabeled.eval.report.gallery import GalleryRow, Thumbnail
from unlabeled.eval.report.summary import RunSummary
from unlabeled.eval.suite import EncoderEvidence, Evidence

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
