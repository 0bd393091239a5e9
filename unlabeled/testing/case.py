"""The task under check, rebuilt for every rule on the smallest backbone that can do it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from unlabeled.pretext.registry import task_class
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.messages import explain, in_short
from unlabeled.ssl.data.loader import seeded
from unlabeled.ssl.task import PretextTask, TaskConfig

TINY_BACKBONES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vit_tiny_patch16_224", {"size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    ("convnext_atto", {"size": 64, "dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}),
    ("convmae_small", {"size": 32, "patch_size": (2, 2, 2), "dims": (8, 12, 32), "depths": (1, 1, 2), "num_heads": 2}),
)
"""timm names and arguments of the backbones to choose from, in this order. None of them has batch norm."""

IMAGES = 4
"""Images per batch; even, because some rules halve it."""


class ContractError(AssertionError):
    """A rule of a contract is broken. The message names the rule, what was found, and the remedy."""


def require(kept: bool | Tensor, found: str, remedy: str) -> None:
    """Raises ContractError unless the rule is `kept`."""
    if not kept:
        raise ContractError(f"{found}; {remedy}")


def listed(names: list[str]) -> str:
    """The first three of `names`, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def checked_class(given: Any, noun: str) -> Any:
    """`given` if it is a class with settings. Raises ContractError for an instance or any other class."""
    possible = isinstance(given, type) and hasattr(given, "Config")
    require(possible, f"{in_short(given)} is not a class with a Config", f"give the class of {noun}, or its name")
    return given


@dataclass(frozen=True)
class TaskCase:
    """A task class, its settings (as given and validated) and a backbone, which is copied before every use."""

    name: str
    cls: type[PretextTask]
    settings: Mapping[str, Any]
    config: TaskConfig
    backbone: Backbone

    @classmethod
    def of(
        cls,
        task: str | type[PretextTask],
        *,
        settings: Mapping[str, Any] | None = None,
        backbone: Backbone | None = None,
    ) -> TaskCase:
        """`task`: a registered name or the class itself; `backbone` None: the first of `TINY_BACKBONES` that can do it.

        Raises ContractError when the settings do not fit or no tiny backbone can do the task, and ConfigError for a
        name that is not registered.
        """
        found = task_class(task) if isinstance(task, str) else checked_class(task, "a task")
        name = task if isinstance(task, str) else task.__name__
        given = dict(settings or {})
        try:
            config = found.Config.model_validate(given)
        except ValidationError as error:
            raise ContractError(f"{name}: settings: {explain(error, found.Config)}") from None
        return cls(name, found, given, config, backbone if backbone is not None else tiny_backbone(found))

    def task(self, seed: int = 0) -> PretextTask:
        """A new task in training mode. Its own parameters depend on `seed`; the backbone's do not."""
        backbone = copy.deepcopy(self.backbone)  # so that one rule cannot leave its weights to the next
        with seeded(seed):
            return self.cls(self.config, backbone).train()

    def batch(self, task: PretextTask, seed: int = 0) -> dict[str, Tensor]:
        """A batch as the loader gives it: the views of `IMAGES` images, (B, ...) each, and ``index`` (B,)."""
        return {**views_batch(task, seed=seed), "index": torch.arange(IMAGES)}


def tiny_backbone(cls: type[PretextTask]) -> Backbone:
    """The first of `TINY_BACKBONES` with the capabilities that `cls` needs. Raises ContractError if none has them."""
    for name, arguments in TINY_BACKBONES:
        with seeded(0):
            backbone = create_backbone(name, **arguments)
        if all(backbone.missing_reason(capability) is None for capability in cls.requires):
            return backbone
    needs = ", ".join(sorted(cls.requires))
    raise ContractError(f"{cls.__name__}: no tiny backbone has {needs}; give one: check_task(..., backbone=...)")


def images(count: int = IMAGES, seed: int = 3) -> list[Tensor]:
    """`count` noise images, uint8 (3, H, W) of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40 + 8 * (i % 3), 56 - 8 * (i % 2)) for i in range(count)]
    return [torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8) for shape in shapes]


def views_batch(task: PretextTask, count: int = IMAGES, seed: int = 5) -> dict[str, Tensor]:
    """The views that `task` makes of `count` images, (B, ...) each."""
    views = type(task).views(task.config, task.backbone)
    with seeded(seed):
        samples = [views(image) for image in images(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
