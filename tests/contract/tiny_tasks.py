"""Settings that make each registered task small."""

from __future__ import annotations

from typing import Any

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
    "poa": {
        "locals": 2,
        "local_size": 32,
        "prototypes": [32, 64],
        "hidden": 32,
        "bottleneck": 16,
        "patches_from": 0,
        "koleo_weight": 0,
    },
    "simclr": {"hidden": 32, "dim": 16},
    "spark": {"decoder": {"width": 32}},
    "vicreg": {"hidden": 32, "dim": 16},
}
"""Settings that make a task small; a task that is not here runs with its defaults."""
