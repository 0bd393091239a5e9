"""Similarity of a backbone's layers, by linear CKA (Kornblith et al. 2019): to each other and to random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from unlabeled.eval.base import Evaluator, EvaluatorConfig, FloatArray, IntArray, Measure, Value
from unlabeled.eval.encoded_dataset import EncodedDataset, Loading, random_twin
from unlabeled.eval.evaluators.spectrum import sample_rows
from unlabeled.eval.features.extract import extract_features
from unlabeled.eval.metrics import Array, cka_map
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import ImageSource, Subset


@dataclass(frozen=True)
class LayerSimilarity:
    """Linear CKA of each layer of one backbone with each layer of another."""

    values: Array
    """float64 (L1, L2)."""
    first: tuple[str, ...]
    """Names of the L1 layers of the first backbone."""
    second: tuple[str, ...]
    """Names of the L2 layers of the second backbone."""


_RANDOM = Measure("CKA between the features and those of random weights", "number", None)


class LayersConfig(EvaluatorConfig):
    """Similarity (debiased linear CKA) between the layers of the backbone, and to those of random weights."""

    images: int = Field(1024, ge=4)
    """Training images to use, drawn with the seed. [images]"""


class LayersEvaluator(Evaluator):
    """Similarity of the backbone's layers to each other and to those of random weights (debiased linear CKA).

    Layers are the feature maps of all stages or blocks, averaged over positions, and the pooled features. The random
    weights are drawn separately from those of the baseline, so for the baseline the second map shows the similarity of
    two random models. Their batch norms keep the initial statistics.

    Yields ``cka`` float64 (L, L); ``cka_random`` float64 (L, L), with the backbone in rows and random weights in
    columns; ``names`` str (L,); and ``random``, the CKA between the pooled features and those of random weights.
    """

    name: ClassVar = "layers"
    title: ClassVar = "Layer similarity"
    needs: ClassVar = "backbone"
    Config: ClassVar = LayersConfig

    def __init__(self, config: LayersConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _RANDOM if key == "random" else None

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        backbone, train = dataset.require_backbone(), dataset.features.train
        if not backbone.stages:
            yield "note", f"{backbone.name} has no feature maps, so its layers cannot be compared"
            return
        readable = np.arange(len(train)) if train.indices is None else train.indices
        rows = readable[sample_rows(len(readable), self.config.images, "layers", dataset.seed)]
        source, loading = dataset.require_sources()[0], dataset.loading
        layers = layer_features(backbone, source, rows, loading)
        yield "cka", cka_map(list(layers.values()), list(layers.values()))
        yield "names", np.array(list(layers))
        try:
            twin = random_twin(backbone, derive("layers", dataset.seed))
        except ConfigError as error:
            yield "note", f"not compared with random weights: {error}"
            return
        random = layer_features(twin, source, rows, loading)
        values = cka_map(list(layers.values()), list(random.values()))
        yield "cka_random", values
        yield "random", _RANDOM.of(float(values[-1, -1]))  # the pooled features are the last layer


def cka_between(
    first: Backbone,
    second: Backbone,
    source: ImageSource,
    *,
    images: int = 1024,
    seed: int = 0,
    loading: Loading | None = None,
) -> LayerSimilarity:
    """Debiased linear CKA between all layers of two backbones, of any architectures or runs, on the same images.

    `images` of `source` are drawn with `seed`; each backbone receives them at its own input size. Raises DataError if a
    backbone has no feature maps, or if fewer than four images can be decoded.
    """
    rows = sample_rows(len(source), images, "layers", seed)
    loading = loading or Loading()
    found = [layer_features(backbone, source, rows, loading) for backbone in (first, second)]
    return LayerSimilarity(cka_map(*(list(one.values()) for one in found)), tuple(found[0]), tuple(found[1]))


def layer_features(backbone: Backbone, source: ImageSource, rows: IntArray, loading: Loading) -> dict[str, FloatArray]:
    """Features of every layer for the images `rows` of `source`: layer name → float32 (N, C).

    These are the feature maps, averaged over positions, and last the ``pooled`` features. Raises DataError if the
    backbone has no feature maps.
    """
    if not backbone.stages:
        raise DataError(f"evaluate: {backbone.name} has no feature maps, so its layers cannot be compared")
    subset = Subset(source, torch.from_numpy(rows))
    found = extract_features(
        backbone, subset, outputs=_all_layers, named="layers", batch_size=loading.batch_size, workers=loading.workers,
        device=loading.device, precision=loading.precision, cache=loading.cache, together=False,
    )  # fmt: skip
    # one pass gives all layers as columns of one matrix, which the cache holds as one file
    edges = np.cumsum([stage.channels for stage in backbone.stages])
    return dict(zip(layer_names(backbone), np.split(found.features, edges, axis=1), strict=True))


def layer_names(backbone: Backbone) -> tuple[str, ...]:
    """timm's names of the feature maps (``layer1``, ``blocks.0``), followed by ``pooled``."""
    info = getattr(backbone.model, "feature_info", [])
    listed = cast(list[dict[str, Any]], info if isinstance(info, list) else info.info)
    names = [str(one.get("module") or "") for one in listed]
    if len(set(names)) != len(backbone.stages) or not all(names):  # a custom model may leave names out
        names = [f"map {number}" for number in range(1, len(backbone.stages) + 1)]
    return (*names, "pooled")


def _all_layers(backbone: Backbone, images: Tensor) -> Tensor:
    maps = backbone.maps(images, range(len(backbone.stages)))
    return torch.cat([*(one.mean(dim=(2, 3)) for one in maps), backbone.pooled(images)], dim=1)
