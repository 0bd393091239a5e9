"""The registry of tasks, from name to class. A new built-in task needs one line here, its own file, and a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, MissingCapabilityError
from unlabeled.ssl.core.registry import Registry
from unlabeled.ssl.task import PretextTask, TaskConfig

TASKS: dict[str, str] = {
    "byol": "unlabeled.pretext.two_views.byol:BYOL",
    "context": "unlabeled.pretext.predictive.context:Context",
    "convmae": "unlabeled.pretext.masked_image.convmae:ConvMAE",
    "dino": "unlabeled.pretext.self_distillation.dino:DINO",
    "fcmae": "unlabeled.pretext.masked_image.fcmae:FCMAE",
    "ibot": "unlabeled.pretext.self_distillation.ibot:IBOT",
    "mae": "unlabeled.pretext.masked_image.mae:MAE",
    "multi": "unlabeled.pretext.mixture.multi:Multi",
    "obow": "unlabeled.pretext.obow.task:OBoW",
    "pixcontrast": "unlabeled.pretext.dense_contrast.pixcontrast:PixContrast",
    "pixpro": "unlabeled.pretext.dense_contrast.pixpro:PixPro",
    "poa": "unlabeled.pretext.self_distillation.poa:POA",
    "rotation": "unlabeled.pretext.predictive.rotation:Rotation",
    "simclr": "unlabeled.pretext.two_views.simclr:SimCLR",
    "simmim": "unlabeled.pretext.masked_image.simmim:SimMIM",
    "spark": "unlabeled.pretext.masked_image.spark:SparK",
    "vicreg": "unlabeled.pretext.two_views.vicreg:VICReg",
}


GROUP = "unlabeled.tasks"
"""Entry-point group under which installed packages register their tasks."""

REGISTRY = Registry("task", "a pretext task", group=GROUP, targets=TASKS)


def register_task(name: str, target: str) -> None:
    """Registers `target` (``"module:Class"``) as task `name`. Raises ConfigError if the name is taken."""
    REGISTRY.register(name, target)


def task_names() -> list[str]:
    """All task names: built-in ones, registered ones, and those of installed packages (see `GROUP`)."""
    return sorted(REGISTRY.names())


def task_origin(name: str) -> str:
    """Where task `name` comes from: "built in", a distribution and its version, or the module that registered it."""
    return REGISTRY.origin(name)


def task_class(name: str) -> type[PretextTask]:
    """Imports and returns the class of task `name`.

    Raises ConfigError that lists the most similar known names, or that says why a plugin's task cannot be imported.
    """
    found: type[PretextTask] = REGISTRY.load(name)
    return found


def task_config(settings: Mapping[str, Any]) -> TaskConfig:
    """Validates ``{"name": ..., **fields}`` with the task's `Config`. Raises ConfigError with a one-line message."""
    fields = {key: value for key, value in settings.items() if key != "name"}
    cls = task_class(str(settings.get("name")))
    try:
        return cls.Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(explain(error, cls.Config, prefix="task")) from None


def create_task(settings: Mapping[str, Any], backbone: Backbone) -> PretextTask:
    """Builds the task that `settings` (``{"name": ..., **fields}``) describes around `backbone`.

    Raises CapabilityError if the backbone is missing a capability that the task requires; the message lists the tasks
    that do work with it.
    """
    cls, config = task_class(str(settings["name"])), task_config(settings)
    try:
        return cls(config, backbone)
    except MissingCapabilityError as error:
        # the list of alternatives is added here, because backbones know nothing of the registry
        alternatives = ", ".join(tasks_for(backbone)) or "none of the installed tasks"
        raise CapabilityError(f"{error}; it can do: {alternatives}") from None


def tasks_for(backbone: Backbone) -> list[str]:
    """Names of the tasks for which `backbone` has all required capabilities."""

    def supported(task: str) -> bool:
        try:
            return not any(backbone.missing_reason(capability) for capability in task_class(task).requires)
        except ConfigError:  # a plugin's task that cannot be imported must not hide the others
            return False

    return [task for task in task_names() if supported(task)]


class Recipes(Mapping[str, Mapping[str, Any]]):
    """Maps a task name to the settings that ``task=NAME`` selects. A task is imported when its name is looked up."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        recipe = task_class(name).recipe
        return {**recipe, "task": {**recipe.get("task", {}), "name": name}}

    def __iter__(self) -> Iterator[str]:
        return iter(task_names())

    def __len__(self) -> int:
        return len(task_names())
