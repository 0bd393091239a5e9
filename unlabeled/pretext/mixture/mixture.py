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
    """One task of a mixture: in a configuration, its own fields stand beside these."""

    name: str
    weight: Weight = 1.0
    """Of its loss in the sum: a number, or {start, end, schedule: linear | cosine, over: [0, 1]} over the run."""
    portion: float = Field(1.0, gt=0)
    """Of the images of a batch, in proportion to the other tasks'; for `batch: split`."""
    settings: SerializeAsAny[TaskConfig]
    """The task's own."""


class MultiConfig(TaskConfig):
    """Settings of a mixture of tasks."""

    tasks: tuple[Part, ...] = Field(default_factory=lambda: _parts(_ALIKE))
    """Two or more of {name: ..., weight: ..., and the task's own fields}. A bare name means weight 1."""
    batch: Literal["shared", "split"] = "shared"
    """shared: each task sees every image, and a step costs what the single steps cost together. split: each task sees
    its own part of the images (see `portion`), and a step costs about what one task's does; the loader makes the
    views of all tasks of each image all the same."""
    balance: Literal["fixed", "gradient_norm"] = "fixed"
    """fixed: the weights as they are given. gradient_norm: scaled such that, at the parameters of the backbone that all
    tasks train, the weighted gradients are as strong as the weights say, their sum unchanged."""
    balance_every: int = Field(20, ge=1)
    """Optimizer steps between measurements, each of which costs one backward pass through every task."""
    balance_momentum: float = Field(0.9, ge=0, lt=1)
    """Of the running mean of the measured norms."""

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
