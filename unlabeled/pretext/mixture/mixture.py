"""Settings of a mixture: its tasks, the weights of their losses, and which images each task receives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from unlabeled.pretext.mixture.balance import Weight
from unlabeled.pretext.registry import task_config
from unlabeled.ssl.config.messages import explain
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.task import TaskConfig

_DEFAULT = ({"name": "rotation"}, {"name": "simmim"})
"""The default mixture: two tasks that work with nearly every backbone."""
_EXAMPLE = "[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]"
_OWN = re.compile(r"^task(?=:)|\btask(?=\.[a-z])|(?<=setting in )task(?=;)")
"""Where error messages of a task name its settings, as if it were the only one."""


class TaskEntry(TaskConfig):
    """One task of a mixture; in a configuration, the task's own settings are written next to these."""

    name: str
    """Name of the task."""
    weight: Weight = 1.0
    """Weight of the task's loss: a number, or {start: 1, end: 0, schedule: cosine, over: [0, 0.5]} for a weight that
    changes over the run."""
    portion: float = Field(1.0, gt=0)
    """Share of the images of a batch, relative to the other tasks; for batch=split."""
    settings: SerializeAsAny[TaskConfig]
    """Any setting of the task itself, such as mask_ratio."""


class MultiConfig(TaskConfig):
    """Settings of a mixture of tasks."""

    tasks: tuple[TaskEntry, ...] = Field(default_factory=lambda: _entries(_DEFAULT))
    """Two or more tasks: names, or mappings such as {name: mae, weight: 1, mask_ratio: 0.6}. A bare name has weight
    1."""
    batch: Literal["shared", "split"] = "shared"
    """shared: every task receives every image, and a step costs as much as one step of each task together. split: each
    task receives its own share of the images (see `portion`), and a step costs about as much as that of a single
    task."""
    balance: Literal["fixed", "gradient_norm"] = "fixed"
    """fixed: use the weights as given. gradient_norm: rescale them so that the gradients at the shared parameters of
    the backbone are as strong as the weights say."""
    balance_every: int = Field(20, ge=1)
    """Optimizer steps between measurements of gradient norms; each costs one backward pass per task. [steps]"""
    balance_momentum: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the running mean of the measured norms."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _read(cls, given: Any) -> tuple[TaskEntry, ...]:
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{given!r} is no list; write task.tasks={_EXAMPLE}")
        if len(given) < 2:
            raise ValueError(f"{len(given)} of them make no mixture; give at least two, such as {_EXAMPLE}")
        return _entries(given)

    def labels(self) -> list[str]:
        """The label of each task in this mixture: its name, with ``_2``, ``_3``, ... for repeated names."""
        labels: list[str] = []
        for entry in self.tasks:
            earlier = sum(entry.name == other.name for other in self.tasks[: len(labels)])
            labels.append(f"{entry.name}_{earlier + 1}" if earlier else entry.name)
        return labels


def _entries(given: Any) -> tuple[TaskEntry, ...]:
    return tuple(_entry(position, one) for position, one in enumerate(given))


def _entry(position: int, given: Any) -> TaskEntry:
    """Reads one entry of `MultiConfig.tasks`. Raises ConfigError that names ``task.tasks[position]``."""
    where = f"task.tasks[{position}]"
    if isinstance(given, TaskEntry):
        return given
    fields = {"name": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise ConfigError(f"{where}: {given!r} does not name a task; write {{name: rotation, weight: 1}}")
    if fields["name"] == "multi":
        raise ConfigError(f"{where}.name: a mixture cannot hold a mixture; list the inner one's tasks")
    # `weight` and `portion` belong to the mixture; all other settings go to the task's own `Config`
    own = {key: value for key, value in fields.items() if key in ("weight", "portion")}
    with named_in_errors(where):
        settings = task_config({key: value for key, value in fields.items() if key not in own})
    try:
        return TaskEntry.model_validate({"name": fields["name"], "settings": settings, **own})
    except ValidationError as error:
        raise ConfigError(explain(error, TaskEntry, prefix=where)) from None


@contextmanager
def named_in_errors(where: str) -> Iterator[None]:
    """Within this context, errors of a task name its settings by their position in the mixture, `where`."""
    try:
        yield
    except (ConfigError, CapabilityError) as error:
        raise type(error)(_OWN.sub(where, str(error))) from error
