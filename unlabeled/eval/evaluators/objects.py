"""Object discovery: whether features locate an object without any training (TokenCut)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import draw_bounding_boxes

from unlabeled.eval.base import Estimate, Evaluator, EvaluatorConfig, Measure, Value
from unlabeled.eval.dense.dense_features import DenseFeatures, sample_indices
from unlabeled.eval.dense.tiles import tiled
from unlabeled.eval.dense.tokencut import component_boxes, cut, intersection_over_union
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.features.extract import Resize
from unlabeled.eval.intervals import wilson
from unlabeled.ssl.core.errors import ConfigError, DataError, UnlabeledError
from unlabeled.ssl.core.seeds import derive
from unlabeled.ssl.data.source import DecodeError, ImageSource, MaskSource, annotated_boxes

Boxes = npt.NDArray[np.float32]
_HIT = 0.5
"""Smallest IoU at which a box counts as found."""
_TILE = 224
"""Side of the images in the report. [pixels]"""
_TRUE, _FOUND = (255, 255, 255), (255, 140, 0)


_MEASURES = {
    "corloc": Measure("CorLoc, TokenCut", "percent"),
    "iou": Measure("best IoU, TokenCut", "percent"),
    "whole": Measure("CorLoc of a box around the entire image", "percent"),
}


class ObjectsConfig(EvaluatorConfig):
    """Finds the main object of an image without training, by cutting the graph of its patches in two (TokenCut)."""

    level: int | None = None
    """Feature map to use, by number; null: the keys of the last attention block, or the deepest map that is fine
    enough."""
    images: int = Field(1000, ge=1)
    """Use at most this many test images. [images]"""
    tau: float = Field(0.2, ge=-1, lt=1)
    """Cosine similarity above which two patches are connected."""
    native: bool = False
    """Use images at their own size, padded to whole patches, as published. The backbone must accept any size (for
    vision transformers: backbone.kwargs={dynamic_img_size: true})."""
    examples: int = Field(12, ge=1)
    """Test images to show in the report. [images]"""


class ObjectsEvaluator(Evaluator):
    """Fraction of test images in which TokenCut finds an object: its box and a true one have an IoU of at least 0.5.

    This fraction is called CorLoc. Features are the keys of the last attention block, which worked best in the paper,
    or, for other backbones, the deepest feature map that is fine enough, minus its mean over the image. Images are
    resized to the backbone's input size, so that all encoders receive the same; with ``native`` they keep their size
    and are padded to whole patches, as published. True boxes are the annotated ones, or else surround the connected
    components of masks; images with neither are left out.

    Yields ``corloc`` and ``iou`` (mean over images of the best IoU with a true box) with intervals; ``whole``, the
    CorLoc of a box around the entire image; ``images``, the number of evaluated images; an image ``examples``; and
    notes. Raises DataError if no image has a true box.
    """

    name: ClassVar = "objects"
    title: ClassVar = "Object discovery"
    needs: ClassVar = "images"
    captions: ClassVar = {"examples": "true boxes: thin, white; predicted box: thick, orange"}
    Config: ClassVar = ObjectsConfig

    def __init__(self, config: ObjectsConfig) -> None:
        self.config = config

    @classmethod
    def measure(cls, key: str) -> Measure | None:
        return _MEASURES.get(key)

    def run(self, dataset: EncodedDataset) -> Iterator[tuple[str, Value]]:
        test = dataset.require_sources()[1]
        dense = DenseFeatures(dataset, self.name, self.config.level, keys=True)
        indices = sample_indices(len(test), self.config.images, derive("objects", dataset.seed))
        overlaps: list[float] = []
        frame_hits: list[bool] = []
        examples: list[Tensor] = []
        for scenes in _scenes(test, indices, None if self.config.native else dense.size, dataset):
            evaluated = [scene for scene in scenes if len(scene.boxes)]
            for scene, box in zip(evaluated, self._found(dense, evaluated), strict=True):
                overlaps.append(float(intersection_over_union(box, scene.boxes).max()))
                height, width = scene.size
                frame = np.array([0, 0, width, height], dtype=np.float32)
                frame_hits.append(bool(intersection_over_union(frame, scene.boxes).max() >= _HIT))
                if len(examples) < self.config.examples:
                    examples.append(drawn_boxes(scene.image, scene.size, scene.boxes, box))
        if not overlaps:
            raise DataError(
                "evaluate.data: no test image has a box or a mask with an object; give data with boxes or masks"
            )
        hits = float(np.mean([overlap >= _HIT for overlap in overlaps]))
        yield "corloc", _MEASURES["corloc"].of(Estimate(hits, *wilson(hits, len(overlaps))))
        yield "iou", _MEASURES["iou"].of(_mean(overlaps))
        yield "whole", _MEASURES["whole"].of(float(np.mean(frame_hits)))
        yield "images", len(overlaps)
        yield "examples", tiled([examples[start : start + 4] for start in range(0, len(examples), 4)])
        if len(overlaps) < len(indices):
            missing = len(indices) - len(overlaps)
            yield "note", f"{missing} of {len(indices)} test images have no true box or cannot be decoded"
        if dataset.backbone is not None:
            keys = "features are the keys of the last attention block"
            yield "note", keys if dense.keys else dense.note or "features are those of the last feature map"

    def _found(self, dense: DenseFeatures, scenes: Sequence[Scene]) -> Iterator[Boxes]:
        """The predicted box of each of `scenes`, in pixels of the original image."""
        if not scenes:
            return
        if not self.config.native:
            for scene, features in zip(scenes, dense(torch.stack([one.image for one in scenes])), strict=True):
                yield self._box(features, scene.size, scene, center=dense.maps)
            return
        # one by one: images of different sizes make no batch
        step = dense.backbone.size_step()
        for scene in scenes:
            pad = (-scene.size[0] % step[0], -scene.size[1] % step[1])
            padded = (scene.size[0] + pad[0], scene.size[1] + pad[1])
            if padded != dense.size and (reason := dense.backbone.refuses(padded)) is not None:
                raise ConfigError(
                    f"evaluate.objects.native: {dense.backbone.name} cannot take {padded[0]}x{padded[1]} ({reason}); "
                    "set false, or backbone.kwargs={dynamic_img_size: true} if the model supports it"
                )
            yield self._box(dense(scene.image[None], pad)[0], padded, scene, center=dense.maps)

    def _box(self, features: Tensor, covered: tuple[int, int], scene: Scene, center: bool) -> Boxes:
        """The predicted box from features (C, gh, gw) that cover (h, w) pixels, clipped to the image."""
        if center:  # values after a ReLU are all positive, so uncentered cosines would all exceed tau
            features = features - features.mean(dim=(1, 2), keepdim=True)
        (rows, columns), (height, width) = features.shape[1:], scene.size
        box = np.array(cut(features.cpu().numpy(), self.config.tau).box, dtype=np.float32)
        box *= np.tile([covered[1] / columns, covered[0] / rows], 2).astype(np.float32)
        return np.minimum(box, np.array([width, height, width, height], dtype=np.float32))


class Scene(NamedTuple):
    """A test image with the boxes of its objects."""

    image: Tensor
    """uint8 (3, h, w), as the backbone receives it."""
    size: tuple[int, int]
    """(H, W) of the original image; boxes are in its pixels."""
    boxes: Boxes
    """(N, 4), true boxes."""


def _scenes(
    source: ImageSource, indices: Sequence[int], size: tuple[int, int] | None, dataset: EncodedDataset
) -> Iterator[list[Scene]]:
    """Batches of the images `indices`, resized to `size` (None: at their own size); undecodable images are left out."""
    load = dataset.loading
    loader: DataLoader[Scene | UnlabeledError | None] = DataLoader(
        _Scenes(source, indices, Resize(size) if size is not None else None),
        batch_size=min(load.batch_size, 64),
        num_workers=load.workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    for items in loader:
        # raised here: an exception in a worker would lose its type and its one line
        if error := next((item for item in items if isinstance(item, UnlabeledError)), None):
            raise error
        yield [item for item in items if item is not None]


class _Scenes(Dataset["Scene | UnlabeledError | None"]):
    """Scenes; an item is None if it cannot be decoded, or an error for the main process to raise."""

    def __init__(
        self, source: ImageSource, indices: Sequence[int], transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Scene | UnlabeledError | None:
        index = self.indices[position]
        try:
            image = self.source.read(index)
            boxes = true_boxes(self.source, index)
        except DecodeError:
            return None
        except UnlabeledError as error:
            return error
        size = (image.shape[1], image.shape[2])
        return Scene(image if self.transform is None else self.transform(image), size, boxes)


def true_boxes(source: ImageSource, index: int) -> Boxes:
    """Annotated boxes of image `index`, or else boxes around the components of its mask; (0, 4) if it has neither."""
    boxes = annotated_boxes(source, index)
    if boxes is not None:
        return boxes.numpy().astype(np.float32)
    if isinstance(source, MaskSource):
        return component_boxes(source.mask(index).numpy())
    return np.zeros((0, 4), dtype=np.float32)


def drawn_boxes(image: Tensor, size: tuple[int, int], true: Boxes, found: Boxes) -> Tensor:
    """The image as a square uint8 (3, 224, 224), with true boxes thin and white and the predicted one thick and orange.

    Boxes are in pixels of an image of `size` (H, W).
    """
    scale = np.array([size[1], size[0], size[1], size[0]], dtype=np.float32) / _TILE
    tile = Resize((_TILE, _TILE))(image)
    for boxes, color, width in ((true, _TRUE, 1), (found[None], _FOUND, 3)):
        tile = draw_bounding_boxes(tile, torch.from_numpy(boxes / scale).clamp(0, _TILE - 1), colors=color, width=width)
    return tile


def _mean(values: Sequence[float]) -> Estimate:
    """Mean with a normal 95 % interval, clipped to 0..1."""
    mean = float(np.mean(values))
    half = 1.96 * float(np.std(values)) / len(values) ** 0.5
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
