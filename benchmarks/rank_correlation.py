"""Do label-free measures rank encoders as their accuracy does? Rank correlation with kNN over many runs.

    python -m benchmarks.rank_correlation runs/*_resnet18 data=parquet data.path=cifar10
    python -m benchmarks.rank_correlation --checkpoints runs/simclr data=digits evaluate.limit=1000

Each run folder gives its exported backbone and, with ``--checkpoints``, the encoders of its older checkpoints. Features
that a run has cached are used and nothing is written into its folder. Words with ``=`` are those of ``unlabeled
evaluate``. Prints two Markdown tables: the measures of each encoder, and their rank correlations with the accuracy.

Encoders of one run are not independent, and RankMe is meant for one family of methods (Garrido et al. 2023,
2210.02885).
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from scipy import stats

from benchmarks.timing import begun, table_head
from unlabeled.eval.metrics import clid
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.pretext.registry import task_class, task_config
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.weights import load_backbone
from unlabeled.ssl.config.composition import validate
from unlabeled.ssl.config.schema import BackboneConfig, EvaluateRun, PretrainConfig
from unlabeled.ssl.core.errors import CheckpointError, ConfigError, first_line
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource
from unlabeled.ssl.train.checkpoint import complete
from unlabeled.ssl.train.run_folder import read_config
from unlabeled.workflows.evaluate import evaluate_config
from unlabeled.workflows.pretrain import build_task

EVALUATORS = ("knn", "spectrum", "invariance")
"""What is measured of each run."""

log = logging.getLogger(__name__)

MEASURES = {
    "spectrum/rankme": "RankMe",
    "spectrum/effective_rank": "effective rank",
    "spectrum/alpha": "distance of α-ReQ from 1",
    "spectrum/dimension": "intrinsic dimension",
    "spectrum/learnability": "cluster learnability",
    "clid": "CLID",
    "spectrum/uniformity": "uniformity",
    "invariance/lidar": "LiDAR",
    "invariance/alignment": "alignment",
}
_EXPECTED = {"spectrum/alpha": "-", "spectrum/uniformity": "-", "invariance/alignment": "-"}
"""The sign that the measure's authors lead one to expect, where it is not +."""

Values = Mapping[str, float]


class Encoder(NamedTuple):
    """One network to be measured."""

    name: str
    backbone: Backbone
    masked_statistics: bool
    """Whether its batch norms saw masked images only."""


class RankCorrelation(NamedTuple):
    """How alike two rankings of the same `encoders` are."""

    encoders: int
    spearman: float
    low: float
    """95 % interval of Spearman's ρ."""
    high: float
    spearman_p: float
    kendall: float
    kendall_p: float


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    """Spearman's ρ and Kendall's τ-b with two-sided p-values; all NaN for fewer than four or where one is constant.

    The interval is Fisher's, with the variance of Bonett & Wright 2000 (Psychometrika 65): (1 + ρ² / 2) / (n - 3). Of
    so few encoders it is rough.
    """
    count = len(first)
    if count < 4 or len(set(first)) < 2 or len(set(second)) < 2:
        return RankCorrelation(count, *[math.nan] * 6)
    spearman, kendall = stats.spearmanr(first, second), stats.kendalltau(first, second)
    rho = float(spearman.statistic)
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    center = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    return RankCorrelation(
        count, rho, math.tanh(center - half), math.tanh(center + half), float(spearman.pvalue),
        float(kendall.statistic), float(kendall.pvalue),
    )  # fmt: skip


def encoders_of(folder: Path, *, checkpoints: bool) -> Iterator[Encoder]:
    """The exported backbone of a run and, if asked for, the encoders of all checkpoints but the newest."""
    backbone = load_backbone(folder)
    config = validate(read_config(folder / "config.yaml"), PretrainConfig)
    masked = task_class(config.task["name"]).masks_statistics(task_config(config.task))
    yield Encoder(folder.name, backbone, masked)
    for step in complete(folder / "checkpoints")[:-1] if checkpoints else ():
        yield Encoder(f"{folder.name}, {step.name.replace('_', ' ')}", _encoder_at(config, step), masked)


def _encoder_at(config: PretrainConfig, step: Path) -> Backbone:
    # its weights come from the checkpoint; where the run once took them from may be gone
    plain = BackboneConfig.model_validate(config.backbone.model_dump() | {"pretrained": False, "checkpoint": None})
    with torch.random.fork_rng(devices=[]):
        task = build_task(config.model_copy(update={"backbone": plain, "reference": None}))
    try:
        task.load_state_dict(load_file(step / "model.safetensors"))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{step}: does not fit the run's config.yaml ({first_line(error)})") from error
    return task.encoder()


def measured(encoder: Encoder, sources: tuple[ImageSource, ImageSource], run: EvaluateRun, work: Path) -> Values:
    """``evaluator/key`` → value, kNN among them."""
    settings = run.evaluate.model_copy(update={"evaluators": EVALUATORS, "baselines": False, "prefixes": ()})
    results = evaluate_backbone(
        encoder.backbone, *sources, settings, work=work, seed=run.seed, workers=run.workers,
        masked_statistics=encoder.masked_statistics,
    )  # fmt: skip
    assert results is not None, "one process evaluates"
    found = results.encoders["backbone"].metrics
    return {"accuracy": found[results.headline[0]], **found}


def link_cached(folder: Path, work: Path) -> None:
    """Makes the features that a run has cached readable under ``work/features``; what is new is written there alone."""
    cache = work / "features"
    cache.mkdir(parents=True, exist_ok=True)
    for file in (folder / "features").glob("*.safetensors"):
        if not (cache / file.name).exists():
            (cache / file.name).symlink_to(file.resolve())


def tables(found: Mapping[str, Values]) -> list[str]:
    """Lines of both tables, from encoder → values."""
    rows = {name: dict(values) for name, values in found.items()}
    parts = {name: row for name, row in rows.items() if {"spectrum/learnability", "spectrum/dimension"} <= set(row)}
    scores = clid(
        [row["spectrum/learnability"] for row in parts.values()], [row["spectrum/dimension"] for row in parts.values()]
    )
    for row, score in zip(parts.values(), scores, strict=True):
        row["clid"] = float(score)
    lines = table_head(["encoder", "kNN, %", *(_title(key) for key in MEASURES)])
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        cells = [name, f"{100 * row['accuracy']:.1f}"]
        cells += [f"{row[key]:.3g}" if key in row else "–" for key in MEASURES]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *table_head(["measure", "expected", "Spearman (95 %)", "p", "Kendall", "p", "encoders"])]
    return lines + [_line(key, title, rows) for key, title in MEASURES.items()]


def _title(key: str) -> str:
    return "α-ReQ" if key == "spectrum/alpha" else MEASURES[key]


def _line(key: str, title: str, rows: Mapping[str, Values]) -> str:
    pairs = [(row[key], row["accuracy"]) for row in rows.values() if key in row]
    values = [abs(value - 1) if key == "spectrum/alpha" else value for value, _ in pairs]
    one = rank_correlation(values, [accuracy for _, accuracy in pairs])
    cells = [title, _EXPECTED.get(key, "+")]
    if math.isnan(one.spearman):
        cells += ["–"] * 4
    else:
        cells += [f"{one.spearman:.2f} ({one.low:.2f} to {one.high:.2f})", f"{one.spearman_p:.2g}"]
        cells += [f"{one.kendall:.2f}", f"{one.kendall_p:.2g}"]
    return f"| {' | '.join([*cells, str(one.encoders)])} |"


def main(words: list[str] | None = None) -> list[str]:
    """Measures all encoders and prints the tables; returns their lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_correlation", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="RUN|setting=value")
    parser.add_argument("--checkpoints", action="store_true", help="the runs' older checkpoints as well")
    parser.add_argument("--cache", type=Path, default=Path("runs/rank_correlation"), help="folder of new features")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(words)
    begun("cpu", options.threads)
    folders = [Path(word) for word in options.words if "=" not in word]
    if not folders:
        raise ConfigError("RUN: not given; name the folders of finished runs")
    settings = [word for word in options.words if "=" in word]
    run = evaluate_config("runs", [*settings, f"evaluate.evaluators=[{','.join(EVALUATORS)}]"])
    if run.data is None:
        raise ConfigError("data: not given; all runs are measured on the same labeled data, such as data=digits")
    sources = open_source(run.data, "train"), open_source(run.data, "test")
    found: dict[str, Values] = {}
    for folder in folders:
        link_cached(folder, options.cache)
        for encoder in encoders_of(folder, checkpoints=options.checkpoints):
            found[encoder.name] = measured(encoder, sources, run, options.cache)
            log.info("%s: kNN %.3f", encoder.name, found[encoder.name]["accuracy"])
    lines = tables(found)
    for line in lines:
        log.info("%s", line)
    return lines


if __name__ == "__main__":
    main()
