"""Every registered task on the smallest backbone that can do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unlabeled.pretext.base import PretextTask
from unlabeled.pretext.registry import create_task, task_class
from unlabeled.ssl.backbone import Backbone, create_backbone

SMALL: dict[str, dict[str, Any]] = {
    "convmae": {"decoder": {"dim": 32, "depth": 2, "heads": 2}},
    "fcmae": {"decoder": {"dim": 16}},
    "mae": {"decoder": {"dim": 32, "depth": 2, "heads": 2}},
    "pixcontrast": {"hidden_dim": 32, "feature_dim": 16},
    "pixpro": {"hidden_dim": 32, "feature_dim": 16, "instance_weight": 1.0},
    "spark": {"decoder": {"width": 32}},
}
"""Settings that make a task small; a task that is not here runs with its defaults."""

BACKBONES: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    ("convmae_small", {"size": 32, "patch_size": (2, 2, 2), "dims": (8, 12, 32), "depths": (1, 1, 2), "num_heads": 2}),
    ("convnext_atto", {"size": 64, "dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}),
]
"""Without batch norm, so that halves of a batch add up to the whole."""


def tiny_backbone(task: str) -> Backbone:
    torch.manual_seed(0)
    for name, arguments in BACKBONES:
        backbone = create_backbone(name, **arguments)
        if all(backbone.lacks(capability) is None for capability in task_class(task).requires):
            return backbone
    raise AssertionError(f"no tiny backbone can do {task}")


def tiny_task(name: str) -> PretextTask:
    torch.manual_seed(1)
    return create_task({"name": name, **SMALL.get(name, {})}, tiny_backbone(name))


def pictures(count: int = 4) -> list[Tensor]:
    """uint8 pictures of different sizes and content."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(40 + 8 * (i % 3), 56 - 8 * (i % 2)) for i in range(count)]
    return [torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8) for shape in shapes]


def views_batch(task: PretextTask, count: int = 4) -> dict[str, Tensor]:
    views = type(task).views(task.config, task.backbone)
    torch.manual_seed(5)
    return {name: torch.stack(tensors) for name, tensors in _columns([views(picture) for picture in pictures(count)])}


def _columns(rows: list[dict[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    return [(name, [row[name] for row in rows]) for name in rows[0]]
