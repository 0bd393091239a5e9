"""Every registered task on the smallest backbone that can do it."""

from __future__ import annotations

from typing import Any

import torch

from unlabeled.pretext.base import PretextTask
from unlabeled.pretext.registry import create_task, task_class
from unlabeled.ssl.backbone import Backbone, create_backbone
from unlabeled.testing import pictures, views_batch

__all__ = ["BACKBONES", "SMALL", "pictures", "tiny_backbone", "tiny_task", "views_batch"]

SMALL: dict[str, dict[str, Any]] = {
    "byol": {"hidden": 32, "dim": 16},
    "context": {"widths": [32, 32]},
    "convmae": {"decoder": {"dim": 32, "depth": 2, "heads": 2}},
    "dino": {"locals": 2, "local_size": 32, "head": {"prototypes": 64, "hidden": 32, "bottleneck": 16}},
    "fcmae": {"decoder": {"dim": 16}},
    "ibot": {"locals": 2, "local_size": 32, "head": {"prototypes": 64, "hidden": 32, "bottleneck": 16}},
    "mae": {"decoder": {"dim": 32, "depth": 2, "heads": 2}},
    "obow": {"words": 32, "image_crops": {"number": 1}, "patches": {"number": 2, "size": 32}},
    "pixcontrast": {"hidden_dim": 32, "feature_dim": 16},
    "pixpro": {"hidden_dim": 32, "feature_dim": 16, "instance_weight": 1.0},
    "simclr": {"hidden": 32, "dim": 16},
    "spark": {"decoder": {"width": 32}},
    "vicreg": {"hidden": 32, "dim": 16},
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
