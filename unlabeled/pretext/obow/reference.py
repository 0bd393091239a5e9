"""Names of OBoW's parameters and buffers in the files of its authors (valeoai/obow, ResNet)."""

from __future__ import annotations

from collections.abc import Iterable

_NETWORKS = {"backbone": "feature_extractor", "teacher": "feature_extractor_teacher"}
_STEM = {"conv1": "Conv", "bn1": "bn"}
_QUEUE = {
    "words": "_embedding",
    "pointer": "_embedding_ptr",
    "batches": "_track_num_batches",
    "distance": "_min_distance_mean",
}


def reference_names(own: Iterable[str]) -> dict[str, str]:
    """Their name → ours, for the names `own` of an OBoW's state. Tensors without a counterpart of theirs are left out.

    Theirs without a counterpart here: ``_alpha`` and ``_iteration`` (the momentum is a function of the progress) and
    ``linear_classifier.*`` (see `OBoW`).
    """
    return {theirs: name for name in own if (theirs := _theirs(name)) is not None}


def _theirs(name: str) -> str | None:
    match name.split("."):
        case [("backbone" | "teacher") as network, "model", ("conv1" | "bn1") as part, kind]:
            return f"{_NETWORKS[network]}._feature_blocks.0.{_STEM[part]}.{kind}"
        case [("backbone" | "teacher") as network, "model", layer, *rest] if layer.startswith("layer"):
            return ".".join([_NETWORKS[network], "_feature_blocks", layer.removeprefix("layer"), *rest])
        case ["heads", level, part, kind]:
            return f"bow_predictor.layers_w.{level}.b{level}_{part}.{kind}"
        case ["vocabularies", level, part]:
            return f"bow_extractor.bow_extractor.{level}.{_QUEUE[part]}"
        case ["scale"]:
            return "bow_predictor.scale"
    return None
