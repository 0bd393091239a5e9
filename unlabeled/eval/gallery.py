"""Test images next to their nearest training images, which shows what the features consider similar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from unlabeled.eval.base import FeatureSet, FeatureSplit, FloatArray, IntArray
from unlabeled.ssl.core.renamed import OldNames
from unlabeled.ssl.data.source import ImageSource

_PIXELS = 112
"""Longer side of a thumbnail."""


@dataclass(frozen=True)
class Thumbnail:
    """A small image with its label and name."""

    image: Tensor
    """uint8 (3, h, w)."""
    label: int
    name: str
    """Its description in the source, such as a file name."""
    similarity: float | None = None
    """Cosine similarity to the query; None for the query itself."""


@dataclass(frozen=True)
class GalleryRow(OldNames, neighbours="neighbors"):
    """A test image and its nearest training images, most similar first."""

    query: Thumbnail
    neighbors: tuple[Thumbnail, ...]


def nearest_gallery(
    data: FeatureSet,
    neighbors: IntArray,
    similarities: FloatArray,
    sources: tuple[ImageSource, ImageSource],
    *,
    rows: int = 8,
    columns: int = 5,
    seed: int = 0,
) -> tuple[GalleryRow, ...]:
    """`rows` test images, each with its `columns` nearest training images.

    `neighbors` int64 (N, k) are rows of the training split, `similarities` float32 (N, k) their cosines; `sources` is
    (train, test).
    """
    train, test = sources
    # drawn at random, so that nobody can choose flattering examples
    drawn = np.sort(np.random.default_rng(seed).permutation(len(data.test))[:rows])
    return tuple(
        GalleryRow(
            _thumbnail(test, data.test, int(row)),
            tuple(
                _thumbnail(train, data.train, int(near), float(cosine))
                for near, cosine in zip(neighbors[row, :columns], similarities[row, :columns], strict=True)
            ),
        )
        for row in drawn
    )


def _thumbnail(source: ImageSource, split: FeatureSplit, row: int, similarity: float | None = None) -> Thumbnail:
    index = row if split.indices is None else int(split.indices[row])
    return Thumbnail(shrunk(source.read(index), _PIXELS), int(split.labels[row]), source.describe(index), similarity)


def shrunk(image: Tensor, longest: int) -> Tensor:
    """Shrinks an image uint8 (3, H, W) to a longer side of `longest` pixels; smaller images are returned unchanged."""
    height, width = image.shape[-2:]
    if max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    small: Tensor = tv.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return small
