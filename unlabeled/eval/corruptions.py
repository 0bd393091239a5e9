"""Common image corruptions in five severities, after ImageNet-C (Hendrycks & Dietterich 2019, 1903.12261).

Strengths are the authors' own for images of 224 pixels (ImageNet-C) and of 32 pixels (CIFAR-10-C; repository
hendrycks/robustness). For sizes in between they are interpolated on a log scale of the smaller side; smaller and larger
images use those of the nearer end, except that blur grows with larger images. Departures: the result is not compressed
with JPEG a second time, values are rounded instead of truncated, and blur reflects at the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import functional as tv

from unlabeled.eval.features.extract import ImageTransform
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import ImageSource

CorruptionName = Literal["gaussian_noise", "gaussian_blur", "jpeg", "brightness", "contrast", "pixelate"]

_SMALL, _LARGE = 32, 224


class _Kind(NamedTuple):
    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    """(image (3, H, W) in 0..1, strength, generator) → image; values outside 0..1 are clamped later."""
    small: tuple[float, ...]
    """Strength of severities 1 to 5 for images of 32 pixels."""
    large: tuple[float, ...]
    """The same for 224 pixels."""


def corrupt(image: Tensor, name: CorruptionName, severity: int, seed: int) -> Tensor:
    """Applies corruption `name` at `severity` 1 to 5 to an image uint8 (3, H, W); `seed` fixes the noise."""
    generator = torch.Generator().manual_seed(seed)
    changed = _KINDS[name].apply(image.float() / 255, strength(name, severity, min(image.shape[-2:])), generator)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


def strength(name: CorruptionName, severity: int, side: int) -> float:
    """Parameter of the corruption for `severity` and an image with a smaller side of `side` pixels.

    gaussian_noise: standard deviation, for values in 0..1 · gaussian_blur: standard deviation in pixels · jpeg: quality
    · brightness: added to V of HSV · contrast: factor of the distance from the mean · pixelate: factor of each side.
    """
    kind = _KINDS[name]
    within = min(max(side, _SMALL), _LARGE)
    weight = math.log(within / _SMALL) / math.log(_LARGE / _SMALL)  # 0 at 32 pixels, 1 at 224
    found: float = kind.small[severity - 1] ** (1 - weight) * kind.large[severity - 1] ** weight
    # blur is measured in pixels: it must grow with the image, or a large one would stay sharp
    return found * max(1.0, side / _LARGE) if name == "gaussian_blur" else found


@dataclass
class CorruptedSource:
    """A source with the images `indices` of another source, resized by `prepare` and then corrupted; without labels.

    Reading an image twice gives the same result: the noise depends on `seed`, the corruption and the image's index.
    """

    source: ImageSource
    indices: Sequence[int]
    prepare: ImageTransform
    name: CorruptionName
    severity: int
    seed: int
    classes: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        position = int(self.indices[index])
        # the severity does not enter the seed: all severities of an image have the same noise, only stronger
        seed = derive("corruption", self.seed, self.name, position)
        return corrupt(self.prepare(self.source.read(position)), self.name, self.severity, seed)

    def labels(self) -> Tensor | None:
        return None

    def describe(self, index: int) -> str:
        # the feature cache identifies images by this text, so it names all that shapes the pixels
        position = int(self.indices[index])
        return f"{self.source.describe(position)}, {self.name} {self.severity}, {self.prepare!r}, seed {self.seed}"


def _gaussian_noise(image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return image + deviation * torch.randn(image.shape, generator=generator)


def _gaussian_blur(image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    # 4 deviations, as scipy's filter; reflection at the border needs an image larger than the radius
    radius = min(math.ceil(4 * deviation), min(image.shape[-2:]) - 1)
    blurred: Tensor = tv.gaussian_blur(image, kernel_size=[2 * radius + 1] * 2, sigma=[deviation] * 2)
    return blurred


def _jpeg(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    coded = encode_jpeg((image * 255).round().to(torch.uint8), quality=round(quality))
    decoded: Tensor = decode_jpeg(coded)
    return decoded.float() / 255


def _brightness(image: Tensor, added: float, generator: torch.Generator) -> Tensor:
    value = image.amax(dim=0, keepdim=True)  # V of HSV; equal scaling of all channels keeps hue and saturation
    brighter = (value + added).clamp(max=1)
    # a black pixel has no hue to keep and becomes gray
    return torch.where(value > 0, image / value.clamp(min=1e-6) * brighter, brighter)


def _contrast(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = image.mean(dim=(1, 2), keepdim=True)
    return (image - mean) * factor + mean


def _pixelate(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    coarse = [max(1, int(height * factor)), max(1, int(width * factor))]
    small = functional.interpolate(image[None], size=coarse, mode="area")
    return functional.interpolate(small, size=[height, width], mode="nearest-exact")[0]


_KINDS: dict[CorruptionName, _Kind] = {
    "gaussian_noise": _Kind(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": _Kind(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "jpeg": _Kind(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "brightness": _Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": _Kind(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
}
