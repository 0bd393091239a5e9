"""Labeled images for fine-tuning, and their augmentation."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize as timm_posterize
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from unlabeled.eval.features.extract import EvalTransform
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import ImageSource, Subset, limited
from unlabeled.workflows.finetune.config import AugmentConfig, FinetuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabeledImages:
    """One labeled split."""

    source: ImageSource
    labels: Tensor
    """int64 (N,), in [0, len(classes))."""
    classes: tuple[str, ...]
    """The classes of the training split; the test split uses the same numbering."""

    def __len__(self) -> int:
        return len(self.labels)


def open_labeled(config: FinetuneConfig) -> tuple[LabeledImages, LabeledImages]:
    """Opens the labeled (training, test) images, with the training images reduced to ``label_fraction``.

    Raises DataError for a split without labels, a single class, test classes that are not training classes, and a
    fraction that leaves a class without images.
    """
    train, test = (open_source(config.data, split) for split in ("train", "test"))
    classes = _classes(train, "training")  # the numbering of both splits
    images = _labeled(train, classes, "training")
    if len(present := torch.bincount(images.labels).nonzero()) < 2:
        raise DataError(
            f"data: all training images are of class {classes[int(present[0])]!r}; give data with at least two classes"
        )
    if config.label_fraction is not None:
        indices = stratified(images.labels, classes, config.label_fraction, config.engine.seed)
        images = LabeledImages(Subset(images.source, indices), images.labels[indices], classes)
    return images, _labeled(limited(test, config.evaluate.limit), classes, "test")


def stratified(labels: Tensor, classes: tuple[str, ...], fraction: float, seed: int) -> Tensor:
    """Draws `fraction` of the images of each class with `seed`, and returns their sorted indices, int64 (M,).

    With the same seed, the images of a smaller fraction are a subset of those of a larger one. Raises DataError if a
    class is left without images.
    """
    random = np.random.default_rng(derive("labels", seed))
    chosen = []
    for label in torch.bincount(labels).nonzero().flatten().tolist():
        # permute, then cut: this makes the subsets nested
        members = random.permutation(torch.nonzero(labels == label).flatten().numpy())
        count = round(fraction * len(members))
        if count == 0:
            raise DataError(
                f"label_fraction: {fraction:g} leaves none of the {len(members)} images of class {classes[label]!r}; "
                f"give {1 / len(members):.2g} or more"
            )
        chosen.append(members[:count])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _classes(source: ImageSource, split: str) -> tuple[str, ...]:
    if source.classes is None or source.labels() is None:
        raise DataError(
            f"data: the {split} split has no labels; use one subfolder per class, set data.label_column, or give other "
            "data"
        )
    return tuple(source.classes)


def _labeled(source: ImageSource, classes: tuple[str, ...], split: str) -> LabeledImages:
    """The images of `source` that have a label, with labels numbered as in `classes`."""
    names, labels = _classes(source, split), source.labels()
    assert labels is not None, "a source with classes has labels"
    if len(labels) and int(labels.max()) >= len(names):
        raise DataError(
            f"data: {split} label {int(labels.max())} is not among the {len(names)} classes; correct the labels"
        )
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(
            f"data: {split} class {unknown[0]!r} is not among the {len(classes)} training classes; add it or "
            "remove its images"
        )
    indices = torch.nonzero(labels >= 0).flatten()  # -1: no label
    if len(indices) == 0:
        raise DataError(f"data: no image of the {split} split has a label; give other data")
    if len(indices) < len(labels):
        missing = len(labels) - len(indices)
        logger.info("data: skipping %d of %d %s images that have no label", missing, len(labels), split)
        source = Subset(source, indices)
    # the splits may number their classes differently; names decide
    numbers = torch.tensor([classes.index(name) for name in names])
    return LabeledImages(source, numbers[labels[indices]], classes)


class TrainTransform:
    """Augments an image with timm's crop, flip and RandAugment: uint8 (3, H, W) → ``{"image": uint8 (3, h, w)}``.

    Raises ConfigError for an `auto` that timm cannot parse.
    """

    def __init__(self, config: AugmentConfig, size: tuple[int, int], mean: tuple[float, ...]) -> None:
        try:
            # use_prefetcher: the result is uint8, as in pretraining, and is normalized on the device
            self._transform = create_transform(
                (3, *size), is_training=True, scale=config.crop, hflip=config.flip, color_jitter=config.jitter or None,
                auto_augment=config.auto, interpolation="bicubic", mean=mean, use_prefetcher=True,
            )  # fmt: skip
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"augment.auto: {config.auto!r} is not a policy of timm ({str(error) or type(error).__name__}); "
                "give one such as rand-m9-mstd0.5-inc1, or null"
            ) from error
        # replace timm's posterize inside RandAugment ("ops") and AutoAugment ("policy", a list of lists)
        for step in self._transform.transforms:
            for operation in getattr(step, "ops", None) or itertools.chain(*getattr(step, "policy", ())):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Draws from the global generators of torch, numpy and Python, which the loader seeds for each image."""
        return {"image": self._transform(tv.to_pil_image(image))}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize keeps 0 bits at the highest magnitude, which Pillow 13 rejects; before, the result was black."""
    return timm_posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class PlainTransform:
    """Prepares an image as in testing, without augmentation."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._transform = EvalTransform(size)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → ``{"image": uint8 (3, h, w)}``."""
        return {"image": self._transform(image)}


def train_transform(config: AugmentConfig | None, backbone: Backbone) -> TrainTransform | PlainTransform:
    """The transform of training images for `backbone`."""
    if config is None:
        return PlainTransform(backbone.input_size)
    return TrainTransform(config, backbone.input_size, backbone.mean)
