"""The settings of a mixture of tasks: which ones, how much each counts, and who sees which images."""

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

_ALIKE = ({"name": "rotation"}, {"name": "simmim"})
"""The default mixture: two tasks that nearly every network can do."""
_EXAMPLE = "[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]"
_OWN = re.compile(r"^task(?=:)|\btask(?=\.[a-z])|(?<=setting in )task(?=;)")
"""Where the messages of a task that stands alone name its settings."""


class Part(TaskConfig):
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

    tasks: tuple[Part, ...] = Field(default_factory=lambda: _parts(_ALIKE))
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
    def _read(cls, given: Any) -> tuple[Part, ...]:
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{given!r} is no list; write task.tasks={_EXAMPLE}")
        if len(given) < 2:
            raise ValueError(f"{len(given)} of them make no mixture; give at least two, such as {_EXAMPLE}")
        return _parts(given)

    def labels(self) -> list[str]:
        """The name of each task in this mixture: its own, with ``_2``, ``_3`` from the second of that name on."""
        labels: list[str] = []
        for part in self.tasks:
            again = sum(part.name == other.name for other in self.tasks[: len(labels)])
            labels.append(f"{part.name}_{again + 1}" if again else part.name)
        return labels


def _parts(given: Any) -> tuple[Part, ...]:
    return tuple(_part(position, one) for position, one in enumerate(given))


def _part(position: int, given: Any) -> Part:
    """One entry of `MultiConfig.tasks`. Raises ConfigError, in one line that names ``task.tasks[position]``."""
    where = f"task.tasks[{position}]"
    if isinstance(given, Part):
        return given
    fields = {"name": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise ConfigError(f"{where}: {given!r} does not name a task; write {{name: rotation, weight: 1}}")
    if fields["name"] == "multi":
        raise ConfigError(f"{where}.name: a mixture cannot hold a mixture; list the inner one's tasks")
    own = {key: value for key, value in fields.items() if key in ("weight", "portion")}
    with named_in_errors(where):
        settings = task_config({key: value for key, value in fields.items() if key not in own})
    try:
        return Part.model_validate({"name": fields["name"], "settings": settings, **own})
    except ValidationError as error:
        raise ConfigError(explain(error, Part, prefix=where)) from None


@contextmanager
def named_in_errors(where: str) -> Iterator[None]:
    """Names the settings of one task by where they stand, in the errors that it raises."""
    try:
        yield
    except (ConfigError, CapabilityError) as error:
        raise type(error)(_OWN.sub(where, str(error))) from error
