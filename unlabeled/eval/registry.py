"""Name → evaluator class, and its settings in ``evaluate``. A new evaluator is one line here, its file and its test."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pydantic import ValidationError

from unlabeled.eval.base import Cut, Evaluator, EvaluatorConfig, Measure
from unlabeled.eval.embedding import check_method
from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.config.schema import EvaluateConfig
from unlabeled.ssl.core.errors import ConfigError, nearest
from unlabeled.ssl.core.registry import Registry
from unlabeled.ssl.data.source import ImageSource

EVALUATORS: dict[str, str] = {
    "knn": "unlabeled.eval.evaluators.knn:KnnEvaluator",
    "linear": "unlabeled.eval.evaluators.linear:LinearEvaluator",
    "logistic": "unlabeled.eval.evaluators.logistic:LogisticEvaluator",
    "few_shot": "unlabeled.eval.evaluators.few_shot:FewShotEvaluator",
    "low_label": "unlabeled.eval.evaluators.low_label:LowLabelEvaluator",
    "cluster": "unlabeled.eval.evaluators.cluster:ClusterEvaluator",
    "retrieval": "unlabeled.eval.evaluators.retrieval:RetrievalEvaluator",
    "duplicates": "unlabeled.eval.evaluators.duplicates:DuplicatesEvaluator",
    "segmentation": "unlabeled.eval.evaluators.segmentation:SegmentationEvaluator",
    "objects": "unlabeled.eval.evaluators.objects:ObjectsEvaluator",
    "spectrum": "unlabeled.eval.evaluators.spectrum:SpectrumEvaluator",
    "invariance": "unlabeled.eval.evaluators.invariance:InvarianceEvaluator",
    "layers": "unlabeled.eval.evaluators.layers:LayersEvaluator",
    "corruption": "unlabeled.eval.evaluators.corruption:CorruptionEvaluator",
}
"""In the order of the report; those of other packages follow."""

GROUP = "unlabeled.evaluators"
"""Entry-point group in which installed packages name their evaluators."""

REGISTRY = Registry("evaluate.evaluators", "an evaluator", group=GROUP, targets=EVALUATORS)


def register_evaluator(name: str, target: str) -> None:
    """Adds evaluator `name` as ``"module:Class"``. Raises ConfigError when the name is taken, by a setting too."""
    if name in EvaluateConfig.model_fields:
        raise ConfigError(f"evaluate.evaluators: {name!r} is a setting of evaluate; give {target} another name")
    REGISTRY.register(name, target)


def evaluator_names() -> list[str]:
    """All evaluators in the order of the report: built in, registered, and from installed packages."""
    return REGISTRY.names()


def evaluator_origin(name: str) -> str:
    """Who brings evaluator `name`: "built in", a distribution and its version, or the module that registered it."""
    return REGISTRY.origin(name)


def evaluator_class(name: str) -> type[Evaluator]:
    """The class of evaluator `name`, imported on demand.

    Raises ConfigError naming the nearest known ones, or saying why a plugin's evaluator cannot be imported; and for a
    class that calls itself something else, since what it yields would stand under that.
    """
    found: type[Evaluator] = REGISTRY.load(name)
    own = getattr(found, "name", None)
    if own != name:
        raise ConfigError(
            f"evaluate.evaluators: {name!r} is the class {found.__name__}, whose name is {own!r}; give both one name"
        )
    return found


def evaluator_config(evaluate: EvaluateConfig, name: str) -> EvaluatorConfig:
    """The settings of evaluator `name` in `evaluate`, or its defaults. Raises ConfigError in one line."""
    model = evaluator_class(name).Config
    try:
        return model.model_validate((evaluate.model_extra or {}).get(name, {}))
    except ValidationError as error:
        raise ConfigError(explain(error, model, prefix=f"evaluate.{name}")) from None


def build_evaluator(evaluate: EvaluateConfig, name: str) -> Evaluator:
    """Evaluator `name` with its settings in `evaluate`."""
    return evaluator_class(name)(evaluator_config(evaluate, name))


def chosen_evaluators(evaluate: EvaluateConfig) -> list[str]:
    """Those that `evaluate` asks for, in the order of the report. Raises ConfigError for an unknown one."""
    if evaluate.evaluators == "all":
        return evaluator_names()
    for name in evaluate.evaluators:
        evaluator_class(name)
    return [name for name in evaluator_names() if name in evaluate.evaluators]


def build_evaluators(evaluate: EvaluateConfig) -> list[Evaluator]:
    """Those that `evaluate` asks for, with their settings, in the order of the report."""
    return [build_evaluator(evaluate, name) for name in chosen_evaluators(evaluate)]


def settle(
    evaluate: EvaluateConfig,
    *,
    given: Collection[str] | None = None,
    also: Collection[str] = (),
    field: str = "evaluate.evaluators",
) -> EvaluateConfig:
    """`evaluate` with the whole settings of every evaluator that will run, checked before anything is computed.

    `given`: what the user set in it, of which everything must have an effect, unlike a recipe's; None: all there is.
    `also`: evaluators that run whether they are chosen or not. `field`: the setting that chooses. Raises ConfigError,
    in one line, for unknown evaluators and settings, impossible values, and settings of evaluators that do not run.
    """
    sections, names = evaluate.model_extra or {}, evaluator_names()
    for name in sections:
        if name not in names:
            near = nearest(name, [*type(evaluate).model_fields, *names])
            raise ConfigError(f"evaluate.{name}: there is no such setting in evaluate; {near}")
    runs = {*chosen_evaluators(evaluate), *also, *(["knn"] if evaluate.every > 0 else [])}  # knn: during the run
    for name in sections if given is None else [name for name in sections if name in given]:
        if name not in runs:
            raise ConfigError(
                f"evaluate.{name}: {_first(sections[name])} has no effect, {name} is not among the evaluators; add it "
                f"to {field}, or remove evaluate.{name}"
            )
    check_method(evaluate.embedding)
    whole = {name: evaluator_config(evaluate, name) for name in names if name in runs or name in sections}
    for name, config in whole.items():
        evaluator_class(name)(config)  # which refuses what types cannot exclude
    return evaluate.model_copy(update=whole)


def check_sources(evaluate: EvaluateConfig, train: ImageSource, test: ImageSource) -> None:
    """Raises DataError for data that an evaluator which was chosen by name cannot judge, before anything is
    computed."""
    if evaluate.evaluators != "all":  # of all of them those that cannot judge the data are passed over, with a note
        for evaluator in build_evaluators(evaluate):
            evaluator.check_sources(train, test)


def looks_at_sources(evaluate: EvaluateConfig) -> bool:
    """Whether an evaluator that was chosen asks something of the data beside labels."""
    return any(type(one).check_sources is not Evaluator.check_sources for one in build_evaluators(evaluate))


def _first(section: object) -> str:
    """The first setting of a section as it is written: ``ways=3``."""
    pairs = section.model_dump(exclude_unset=True) if isinstance(section, EvaluatorConfig) else section
    if isinstance(pairs, dict) and pairs:
        key, value = next(iter(pairs.items()))
        return f"{key}={value}"
    return f"{pairs}"


def measure_of(metric: str) -> Measure | None:
    """What ``evaluator/key`` or ``evaluator/key@64`` in a user's words, or in a file from before values said so, is.

    None for values that no table shows and for unknown evaluators. Everywhere else a value has its `Measure` with it.
    """
    name, _, key = metric.partition("/")
    key, _, part = key.partition("@")
    length = part.removeprefix("pca")
    if name not in evaluator_names() or (part and not length.isdigit()):
        return None
    found = evaluator_class(name).measure(key)
    return found if found is None or not part else replace(found, cut=Cut(int(length), part.startswith("pca")))
