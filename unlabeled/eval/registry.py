"""Evaluators by name, and their settings in ``evaluate``.

To add a built-in evaluator, write its file and its test, and add a line to `EVALUATORS`.
"""

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
"""Name → ``module:Class``, in the order of the report; evaluators of other packages follow."""

GROUP = "unlabeled.evaluators"
"""Entry-point group through which installed packages add evaluators."""

REGISTRY = Registry("evaluate.evaluators", "an evaluator", group=GROUP, targets=EVALUATORS)


def register_evaluator(name: str, target: str) -> None:
    """Registers evaluator `name` as ``"module:Class"``.

    Raises ConfigError if another evaluator or a setting of ``evaluate`` has this name.
    """
    if name in EvaluateConfig.model_fields:
        raise ConfigError(f"evaluate.evaluators: {name!r} is a setting of evaluate; give {target} another name")
    REGISTRY.register(name, target)


def evaluator_names() -> list[str]:
    """Names of all evaluators in the order of the report: built-in ones, registered ones, those of other packages."""
    return REGISTRY.names()


def evaluator_origin(name: str) -> str:
    """Where evaluator `name` comes from: "built in", a distribution and its version, or the registering module."""
    return REGISTRY.origin(name)


def evaluator_class(name: str) -> type[Evaluator]:
    """The class of evaluator `name`, imported on demand.

    Raises ConfigError for an unknown name (suggesting known ones), for a plugin that cannot be imported, and for a
    class with a different `name`.
    """
    found: type[Evaluator] = REGISTRY.load(name)
    own = getattr(found, "name", None)
    if own != name:  # its metrics and settings would be filed under the other name
        raise ConfigError(
            f"evaluate.evaluators: {name!r} is the class {found.__name__}, whose name is {own!r}; give both one name"
        )
    return found


def evaluator_config(evaluate: EvaluateConfig, name: str) -> EvaluatorConfig:
    """The settings of evaluator `name` in `evaluate`, or its defaults. Raises ConfigError for invalid ones."""
    model = evaluator_class(name).Config
    try:
        return model.model_validate((evaluate.model_extra or {}).get(name, {}))
    except ValidationError as error:
        raise ConfigError(explain(error, model, prefix=f"evaluate.{name}")) from None


def build_evaluator(evaluate: EvaluateConfig, name: str) -> Evaluator:
    """Creates evaluator `name` with its settings from `evaluate`."""
    return evaluator_class(name)(evaluator_config(evaluate, name))


def chosen_evaluators(evaluate: EvaluateConfig) -> list[str]:
    """Names of the selected evaluators, in the order of the report. Raises ConfigError for unknown ones."""
    if evaluate.evaluators == "all":
        return evaluator_names()
    for name in evaluate.evaluators:
        evaluator_class(name)  # raises ConfigError
    return [name for name in evaluator_names() if name in evaluate.evaluators]


def build_evaluators(evaluate: EvaluateConfig) -> list[Evaluator]:
    """Creates the evaluators that `evaluate` selects, with their settings, in the order of the report."""
    return [build_evaluator(evaluate, name) for name in chosen_evaluators(evaluate)]


def settle(
    evaluate: EvaluateConfig,
    *,
    given: Collection[str] | None = None,
    also: Collection[str] = (),
    field: str = "evaluate.evaluators",
) -> EvaluateConfig:
    """Fills in and checks the settings of every evaluator that will run, before anything is computed.

    `given`: names of the sections that the user set; None: all sections. A section that the user set must have an
    effect; one from a recipe need not. `also`: evaluators that run even if they are not selected. `field`: the setting
    that selects evaluators, for messages. Raises ConfigError, in one line, for unknown evaluators and settings, invalid
    values, and settings of evaluators that do not run.
    """
    # each evaluator's section is an extra field: the schema does not know the evaluators of plugins
    sections, names = evaluate.model_extra or {}, evaluator_names()
    for name in sections:
        if name not in names:
            near = nearest(name, [*type(evaluate).model_fields, *names])
            raise ConfigError(f"evaluate.{name}: there is no such setting in evaluate; {near}")
    # with evaluate.every, kNN also runs during training
    runs = {*chosen_evaluators(evaluate), *also, *(["knn"] if evaluate.every > 0 else [])}
    for name in sections if given is None else [name for name in sections if name in given]:
        if name not in runs:
            raise ConfigError(
                f"evaluate.{name}: {_first(sections[name])} has no effect, {name} is not among the evaluators; add it "
                f"to {field}, or remove evaluate.{name}"
            )
    check_method(evaluate.embedding)
    configs = {name: evaluator_config(evaluate, name) for name in names if name in runs or name in sections}
    for name, config in configs.items():
        evaluator_class(name)(config)  # the constructor refuses values that types cannot exclude
    return evaluate.model_copy(update=configs)


def check_sources(evaluate: EvaluateConfig, train: ImageSource, test: ImageSource) -> None:
    """Raises DataError if an evaluator that was selected by name cannot use the data, before anything is computed."""
    if evaluate.evaluators != "all":  # with "all", evaluators that cannot use the data are skipped with a note
        for evaluator in build_evaluators(evaluate):
            evaluator.check_sources(train, test)


def looks_at_sources(evaluate: EvaluateConfig) -> bool:
    """Whether a selected evaluator requires more of the data than labels, such as masks."""
    return any(type(one).check_sources is not Evaluator.check_sources for one in build_evaluators(evaluate))


def _first(section: object) -> str:
    """The first setting of a section as a user writes it: ``ways=3``."""
    pairs = section.model_dump(exclude_unset=True) if isinstance(section, EvaluatorConfig) else section
    if isinstance(pairs, dict) and pairs:
        key, value = next(iter(pairs.items()))
        return f"{key}={value}"
    return f"{pairs}"


def measure_of(metric: str) -> Measure | None:
    """Describes ``evaluator/key`` or ``evaluator/key@64``, from a user's settings or from an old report.

    None for values that no table shows and for unknown evaluators. New results store the `Measure` of each value.
    """
    name, _, key = metric.partition("/")
    key, _, suffix = key.partition("@")
    length = suffix.removeprefix("pca")
    if name not in evaluator_names() or (suffix and not length.isdigit()):
        return None
    found = evaluator_class(name).measure(key)
    return found if found is None or not suffix else replace(found, cut=Cut(int(length), suffix.startswith("pca")))
