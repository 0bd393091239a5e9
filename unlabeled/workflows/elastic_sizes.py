"""``unlabeled evaluate RUN sizes=...``: evaluates each size of an elastic run.

Each sub-network is evaluated frozen, like any backbone, and compared with the same architecture with random weights.
The results of raw pixels come from the evaluation of the full-size model. Each size is written to ``RUN/sizes.json`` as
soon as it is measured, so that the same command continues after an interruption.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Group

from unlabeled.eval.comparison import percent
from unlabeled.eval.features.cache import cache_key, data_identity
from unlabeled.eval.features.recalibrate import batch_norms
from unlabeled.eval.registry import evaluator_config
from unlabeled.eval.results import EncoderResults, Results
from unlabeled.eval.runner import evaluate_backbone
from unlabeled.eval.size_curve import FILE, SizeCurve, SizeResult, file_digest, load_curve, read_curve, write_curve
from unlabeled.report.size_table import render_terminal
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic import SubSize
from unlabeled.ssl.backbones.elastic.cost import cost_of, costs_of
from unlabeled.ssl.backbones.weights import WEIGHTS
from unlabeled.ssl.config.schema import EvaluateRun
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.source import ImageSource, limited
from unlabeled.workflows.export import ElasticRun, choose_sizes, extract, outline_elastic

Sources = tuple[ImageSource, ImageSource]
"""(training split, test split)."""

_DIGESTS = ("weights", "data")
"""Settings that are stored as a hash, which means nothing to people."""

log = logging.getLogger(__name__)


class Alone(NamedTuple):
    """A model of a single size, trained on its own, to compare with."""

    title: str
    folder: Path
    backbone: Backbone


@dataclass(frozen=True)
class SizePlan:
    """What to measure."""

    folder: Path
    """The run folder."""
    elastic_run: ElasticRun
    sizes: tuple[SubSize, ...]
    versus: tuple[Alone, ...]


class _Entry(NamedTuple):
    """One model to measure: a size of the run, or a run trained alone."""

    kind: Literal["extracted", "alone"]
    title: str
    size: SubSize
    weights: str
    build: Callable[[], Backbone]
    work: Path | None
    """Where its features are cached; None: they are not."""


def plan_sizes(run: EvaluateRun, folder: Path, elastic_run: ElasticRun, versus: Sequence[Alone]) -> SizePlan:
    """Resolves the sizes that `run` requests.

    Raises ConfigError, before anything is computed, for sizes that the run does not have, or other runs that cannot be
    compared with them.
    """
    assert run.sizes is not None, "called only if sizes are requested"
    family = elastic_run.elastic.family
    for title, _, backbone in versus:
        if type(backbone.model) is not family.kind:
            raise ConfigError(
                f"versus: {title} is of the family {type(backbone.model).__name__}, the sizes are of "
                f"{family.kind.__name__}; give runs of that family"
            )
    return SizePlan(folder, elastic_run, tuple(choose_sizes(elastic_run.elastic, run.sizes)), tuple(versus))


def measure_sizes(
    plan: SizePlan, run: EvaluateRun, sources: Sources, results: Results, device: torch.device
) -> SizeCurve:
    """Evaluates everything in `plan` that ``sizes.json`` does not contain yet, and returns the size curve.

    `results` are those of the full-size model. Raises ConfigError if ``sizes.json`` was measured with other settings.
    """
    curve = _begun(plan, run, sources, results)
    # baselines: true, false or a list of names
    baseline = run.evaluate.baselines is True or "random" in (run.evaluate.baselines or ())
    entries = list(_entries(plan, curve.settings["weights"]))
    for number, entry in enumerate(entries, start=1):
        wants_random = baseline and entry.kind == "extracted"
        known = curve.find(entry.kind, entry.title)
        # measured by an earlier call, unless that one had no baseline
        if known is not None and known.weights == entry.weights and (known.random or not wants_random):
            continue
        result = _measure(entry, run, sources, device, wants_random=wants_random)
        curve = curve.adding(result)
        write_curve(plan.folder, curve)
        log.info("%s (%d of %d): %s", entry.title, number, len(entries), _accuracy_line(result, curve))
    return curve


def _entries(plan: SizePlan, weights: str) -> Iterator[_Entry]:
    for size in plan.sizes:
        # the full size has just been evaluated in the run folder: its features are read back
        work = plan.folder if size == plan.elastic_run.elastic.full else None
        yield _Entry("extracted", str(size), size, weights, partial(extract, plan.elastic_run, size), work)
    for alone in plan.versus:
        size = plan.elastic_run.elastic.family.read(alone.backbone.model)
        digest = file_digest(alone.folder / WEIGHTS)
        yield _Entry("alone", alone.title, size, digest, partial(_itself, alone.backbone), None)


def _itself(backbone: Backbone) -> Backbone:
    return backbone


def _measure(
    entry: _Entry, run: EvaluateRun, sources: Sources, device: torch.device, *, wants_random: bool
) -> SizeResult:
    backbone = entry.build()  # one at a time: memory for a single size is enough
    cost = cost_of(backbone)
    config = run.evaluate.model_copy(
        # pixels do not depend on the size; maps and embeddings are for the report of the full size
        update={"baselines": ("random",) if wants_random else False, "evaluators": ("knn", "linear"), "prefixes": ()}
        | {"embedding": None, "maps": 0}
    )
    results = evaluate_backbone(
        backbone, *sources, config, work=entry.work, device=device, seed=run.seed, workers=run.workers,
        masked_statistics=bool(batch_norms(backbone)),  # statistics of the full size are not valid for this one
    )  # fmt: skip
    assert results is not None, "only ranks other than the first get None"
    return SizeResult(
        kind=entry.kind,
        title=entry.title,
        width=entry.size.width,
        depths=entry.size.depths,
        parameters=cost.parameters,
        macs=cost.macs,
        metrics=_accuracies(results.encoders["backbone"]),
        random=_accuracies(results.encoders.get("random")),
        recalibrated=results.recalibrated,
        seconds=round(results.seconds, 2),
        weights=entry.weights,
    )


def _begun(plan: SizePlan, run: EvaluateRun, sources: Sources, results: Results) -> SizeCurve:
    """The curve measured so far with these settings, or an empty one. Raises ConfigError for other settings."""
    settings = _settings(plan, run, sources)
    pixels = _accuracies(results.encoders.get("pixels"))
    begun = load_curve(plan.folder)
    if begun is None:
        known = results.encoders["backbone"].measures
        return SizeCurve(
            settings=settings,
            headline=results.headline,
            labels={metric: known[metric].measure.text for metric in results.headline},
            train_images=results.train_images,
            test_images=results.test_images,
            sizes=len(plan.elastic_run.elastic.sizes),
            pixels=pixels,
        )
    for key in [*settings, *begun.settings]:
        there, here = begun.settings.get(key), settings.get(key)
        if there != here:
            difference = f"other {key}" if key in _DIGESTS else f"{_short(there)}, here it is {_short(here)}"
            raise ConfigError(
                f"{key}: {plan.folder / FILE} has {len(begun.results)} sizes measured with {difference}; use the same "
                "value, or move that file away"
            )
    # without the pixels baseline in this call, keep the values of an earlier one
    return begun.model_copy(update={"pixels": pixels or begun.pixels})


def _settings(plan: SizePlan, run: EvaluateRun, sources: Sources) -> dict[str, Any]:
    """Everything that the accuracies depend on, as JSON types, so that it compares equal to what is stored."""
    evaluate = run.evaluate
    settings = {
        "weights": file_digest(plan.folder / WEIGHTS),
        "elastic": plan.elastic_run.elastic.config.model_dump(mode="json"),
        "seed": run.seed,
        "evaluate.limit": evaluate.limit,
        "evaluate.knn": evaluator_config(evaluate, "knn").model_dump(mode="json"),
        "evaluate.linear": evaluator_config(evaluate, "linear").model_dump(mode="json"),
        "evaluate.recalibrate": evaluate.recalibrate,
        "evaluate.recalibrate_images": evaluate.recalibrate_images,
        "data": cache_key(parts=[data_identity(limited(source, evaluate.limit)) for source in sources]),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _accuracies(encoder: EncoderResults | None) -> dict[str, float]:
    if encoder is None:
        return {}
    shown = encoder.measures.items()
    return {metric: encoder.metrics[metric] for metric, one in shown if one.measure.unit == "accuracy"}


def _accuracy_line(result: SizeResult, curve: SizeCurve) -> str:
    accuracies = [
        f"{curve.label(metric)} {percent(result.metrics[metric])} %"
        + (f" (random weights {percent(result.random[metric])} %)" if metric in result.random else "")
        for metric in curve.headline
        if metric in result.metrics
    ]
    return ", ".join([*accuracies, f"{result.seconds:.0f} s"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def size_table(run: str | Path) -> Group:
    """``unlabeled sizes RUN``: a table of every size in the run, its cost, and its accuracies if measured."""
    backbone, elastic = outline_elastic(run)
    return render_terminal(costs_of(elastic, backbone), read_curve(Path(run)))
