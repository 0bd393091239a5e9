"""Names of OBoW's parameters and buffers in the authors' files (valeoai/obow, ResNet)."""

from __future__ import annotations

from collections.abc import Iterable

_BACKBONES = {"backbone": "feature_extractor", "teacher": "feature_extractor_teacher"}
_STEM = {"conv1": "Conv", "bn1": "bn"}
_QUEUE = {
    "words": "_embedding",
    "pointer": "_embedding_ptr",
    "batches": "_track_num_batches",
    "distance": "_min_distance_mean",
}


def reference_names(own: Iterable[str]) -> dict[str, str]:
    """The authors' name → our name, for the names `own` in the state dict of an `OBoW`; others are left out."""
    # in their files only: `_alpha` and `_iteration` (here the momentum follows from the progress) and
    # `linear_classifier.*` (see `OBoW`)
    return {theirs: name for name in own if (theirs := _theirs(name)) is not None}


def _theirs(name: str) -> str | None:
    """Our name → the authors' name; None if they have no such tensor."""
    match name.split("."):
        case [("backbone" | "teacher") as backbone, "model", ("conv1" | "bn1") as layer, kind]:
            return f"{_BACKBONES[backbone]}._feature_blocks.0.{_STEM[layer]}.{kind}"
        case [("backbone" | "teacher") as backbone, "model", layer, *rest] if layer.startswith("layer"):
            return ".".join([_BACKBONES[backbone], "_feature_blocks", layer.removeprefix("layer"), *rest])
        case ["heads", level, layer, kind]:
            return f"bow_predictor.layers_w.{level}.b{level}_{layer}.{kind}"
        case ["vocabularies", level, buffer]:
            return f"bow_extractor.bow_extractor.{level}.{_QUEUE[buffer]}"
        case ["scale"]:
            return "bow_predictor.scale"
    return None
