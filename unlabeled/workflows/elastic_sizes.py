"""How good each size of an elastic run is: ``unlabeled evaluate RUN sizes=...``.

Each sub-network is evaluated as any network is, frozen, beside the same network with random weights; raw pixels are
those of the run's own evaluation. A size is written to ``RUN/sizes.json`` as soon as it is measured, so that the same
command goes on where it was stopped.
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
"""Training and test split."""

_DIGESTS = ("weights", "data")
"""Settings of which only a hash is kept."""

log = logging.getLogger(__name__)


class Alone(NamedTuple):
    """A network of one size, trained by itself."""

    title: str
    folder: Path
    backbone: Backbone


@dataclass(frozen=True)
class SizePlan:
    """What is to be measured."""

    folder: Path
    """The run's."""
    whole: ElasticRun
    sizes: tuple[SubSize, ...]
    versus: tuple[Alone, ...]


class _Network(NamedTuple):
    """One line of the plan."""

    kind: Literal["extracted", "alone"]
    title: str
    size: SubSize
    weights: str
    build: Callable[[], Backbone]
    work: Path | None
    """Where its features are, if they are kept."""


def plan_sizes(run: EvaluateRun, folder: Path, whole: ElasticRun, versus: Sequence[Alone]) -> SizePlan:
    """What `run` asks for. Raises ConfigError, before anything is computed, for sizes and networks that do not fit."""
    assert run.sizes is not None, "sizes were asked for"
    family = whole.elastic.family
    for title, _, backbone in versus:
        if type(backbone.model) is not family.kind:
            raise ConfigError(
                f"versus: {title} is of the family {type(backbone.model).__name__}, the sizes of "
                f"{family.kind.__name__}; give runs of that family"
            )
    return SizePlan(folder, whole, tuple(choose_sizes(whole.elastic, run.sizes)), tuple(versus))


def measure_sizes(
    plan: SizePlan, run: EvaluateRun, sources: Sources, results: Results, device: torch.device
) -> SizeCurve:
    """Evaluates what `plan` names and ``sizes.json`` does not hold yet; `results` is that of the run as a whole.

    Raises ConfigError when ``sizes.json`` was measured under other settings.
    """
    curve = _begun(plan, run, sources, results)
    baseline = run.evaluate.baselines is True or "random" in (run.evaluate.baselines or ())
    networks = list(_networks(plan, curve.settings["weights"]))
    for number, network in enumerate(networks, start=1):
        wants_random = baseline and network.kind == "extracted"
        known = curve.find(network.kind, network.title)
        if known is not None and known.weights == network.weights and (known.random or not wants_random):
            continue
        result = _measure(network, run, sources, device, wants_random=wants_random)
        curve = curve.adding(result)
        write_curve(plan.folder, curve)
        log.info("%s (%d of %d): %s", network.title, number, len(networks), _said(result, curve))
    return curve


def _networks(plan: SizePlan, weights: str) -> Iterator[_Network]:
    for size in plan.sizes:
        work = plan.folder if size == plan.whole.elastic.full else None  # of the run's own evaluation
        yield _Network("extracted", str(size), size, weights, partial(extract, plan.whole, size), work)
    for alone in plan.versus:
        size = plan.whole.elastic.family.read(alone.backbone.model)
        digest = file_digest(alone.folder / WEIGHTS)
        yield _Network("alone", alone.title, size, digest, partial(_itself, alone.backbone), None)


def _itself(backbone: Backbone) -> Backbone:
    return backbone


def _measure(
    network: _Network, run: EvaluateRun, sources: Sources, device: torch.device, *, wants_random: bool
) -> SizeResult:
    backbone = network.build()
    cost = cost_of(backbone)
    config = run.evaluate.model_copy(
        update={"baselines": ("random",) if wants_random else False, "evaluators": ("knn", "linear"), "prefixes": ()}
        | {"embedding": None, "maps": 0}
    )
    results = evaluate_backbone(
        backbone, *sources, config, work=network.work, device=device, seed=run.seed, workers=run.workers,
        masked_statistics=bool(batch_norms(backbone)),  # those of the whole network are not its own
    )  # fmt: skip
    assert results is not None, "one process evaluates"
    return SizeResult(
        kind=network.kind,
        title=network.title,
        width=network.size.width,
        depths=network.size.depths,
        parameters=cost.parameters,
        macs=cost.macs,
        metrics=_accuracies(results.encoders["backbone"]),
        random=_accuracies(results.encoders.get("random")),
        recalibrated=results.recalibrated,
        seconds=round(results.seconds, 2),
        weights=network.weights,
    )


def _begun(plan: SizePlan, run: EvaluateRun, sources: Sources, results: Results) -> SizeCurve:
    """What is measured already under these settings, or an empty curve."""
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
            sizes=len(plan.whole.elastic.sizes),
            pixels=pixels,
        )
    for key in [*settings, *begun.settings]:
        there, here = begun.settings.get(key), settings.get(key)
        if there != here:
            what = f"other {key}" if key in _DIGESTS else f"{_short(there)}, here it is {_short(here)}"
            raise ConfigError(
                f"{key}: {plan.folder / FILE} holds {len(begun.results)} sizes measured with {what}; give the same, or "
                "move that file away"
            )
    return begun.model_copy(update={"pixels": pixels or begun.pixels})


def _settings(plan: SizePlan, run: EvaluateRun, sources: Sources) -> dict[str, Any]:
    """What the numbers depend on, as JSON gives it back."""
    evaluate = run.evaluate
    settings = {
        "weights": file_digest(plan.folder / WEIGHTS),
        "elastic": plan.whole.elastic.config.model_dump(mode="json"),
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


def _said(result: SizeResult, curve: SizeCurve) -> str:
    parts = [
        f"{curve.label(metric)} {percent(result.metrics[metric])} %"
        + (f" (random weights {percent(result.random[metric])} %)" if metric in result.random else "")
        for metric in curve.headline
        if metric in result.metrics
    ]
    return ", ".join([*parts, f"{result.seconds:.0f} s"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def size_table(run: str | Path) -> Group:
    """``unlabeled sizes RUN``: every size that the run at `run` holds, its cost, and what was measured of it."""
    whole = outline_elastic(run)
    return render_terminal(costs_of(whole.elastic, whole.backbone), read_curve(Path(run)))
