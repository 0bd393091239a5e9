"""The networks and sizes that the masked tasks are measured at: those of the papers, and toys that test the harness."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Model:
    """One task on one backbone."""

    title: str
    task: dict[str, Any]
    backbone: str
    batch: int
    """Images of a step."""
    size: int = 224
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the backbone."""
    channels_last: bool = False
    """Whether our side runs in that memory layout."""
    toy: dict[str, Any] = field(default_factory=dict)
    """What replaces the above at toy size."""

    def small(self) -> Model:
        """The same task at a size that runs in milliseconds."""
        return replace(self, batch=2, **self.toy)


_TOY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
_TOY_CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}

MODELS: dict[str, Model] = {
    "mae_vit_b": Model(
        "MAE, ViT-B/16",
        {"name": "mae"},
        "vit_base_patch16_224",
        batch=16,
        toy={
            "size": 32,
            "kwargs": _TOY_VIT,
            "task": {"name": "mae", "decoder": {"dim": 16, "depth": 2, "heads": 2}},
        },
    ),
    "convmae_b": Model(
        "ConvMAE-B",
        {"name": "convmae"},
        "convmae_base",
        batch=8,
        toy={
            "size": 64,
            "kwargs": {"dims": (8, 12, 16), "depths": (1, 2, 2), "num_heads": 2},
            "task": {"name": "convmae", "decoder": {"dim": 16, "depth": 2, "heads": 2}},
        },
    ),
    "spark_convnext_t": Model(
        "SparK, ConvNeXt-T",
        {"name": "spark"},
        "convnext_tiny",
        batch=8,
        channels_last=True,
        toy={"size": 64, "kwargs": _TOY_CONVNEXT, "task": {"name": "spark", "decoder": {"width": 32}}},
    ),
    "spark_resnet50": Model(
        "SparK, ResNet-50",
        {"name": "spark"},
        "resnet50",
        batch=8,
        channels_last=True,
        toy={
            "size": 64,
            "kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
            "task": {"name": "spark", "decoder": {"width": 32}},
        },
    ),
    "fcmae_convnextv2_t": Model(
        "FCMAE, ConvNeXt V2-T",
        {"name": "fcmae"},
        "convnextv2_tiny",
        batch=16,
        channels_last=True,
        toy={"size": 64, "kwargs": _TOY_CONVNEXT, "task": {"name": "fcmae", "decoder": {"dim": 16}}},
    ),
}
