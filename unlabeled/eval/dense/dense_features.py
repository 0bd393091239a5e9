"""Dense features of images, and labels for the same positions from masks.

Images are resized to the backbone's input size (bicubic, without keeping the aspect ratio), and masks likewise (nearest
pixel). So nothing is cropped, and the positions of image and mask match.

Shapes: B images of (h, w) pixels, (gh, gw) positions, C channels, K classes including the background.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from unlabeled.eval.dense.attention import key_map
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.features.extract import AUTOCAST, Resize, evaluating
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.level_map import LevelMap
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, DataError, UnlabeledError
from unlabeled.ssl.data.source import DecodeError, ImageSource, MaskSource

IGNORE = 255
"""Mask value of pixels that are not evaluated."""
_CELLS = 14
"""Positions along the shorter side that a map should have, for images of the usual size (224)."""
_CELLS_SMALL = 8
"""The same for small images."""
_STRIDE = 16
"""A stride that is always fine enough. [pixels]"""
_PIXELS = 16
"""Largest side of a patch in the raw-pixels baseline; larger patches are shrunk to it."""


def fine_level(backbone: Backbone) -> int:
    """Index of the deepest map that is fine enough, or of the deepest among the finest maps if none is.

    Fine enough means 14 positions along the shorter side; for smaller images a stride of 16, but at least 8 positions.
    """
    side = min(backbone.input_size)
    positions = [side / stage.stride for stage in backbone.stages]
    enough = min(max(positions), max(_CELLS_SMALL, min(_CELLS, math.ceil(side / _STRIDE))))
    return max(index for index, count in enumerate(positions) if count >= enough)


class DenseFeatures:
    """Computes dense features: uint8 images (B, 3, h, w) → float32 (B, C, gh, gw), on the dataset's device.

    For a backbone these are its map `level` (None: `fine_level`), with the final norm if it is the last one. With
    `keys` and no `level`, they are the keys of the last attention block, if there is one and no finer map is needed.
    For raw pixels, they are the normalized pixels of each patch, on the grid of the backbone under evaluation.

    Raises CapabilityError for a backbone without maps, ConfigError for a level that it does not have, and DataError if
    only features are available.
    """

    def __init__(
        self, dataset: EncodedDataset, evaluator: str, level: int | None = None, *, keys: bool = False
    ) -> None:
        backbone = dataset.backbone or dataset.size_like
        if backbone is None:
            raise DataError(f"evaluate: {evaluator} needs dense features, but only pooled ones are available")
        if (reason := backbone.missing_reason("dense_map")) is not None:
            raise CapabilityError(
                f"backbone: {backbone.name} has no feature maps ({reason}); remove {evaluator} from evaluate.evaluators"
            )
        count = len(backbone.stages)
        if level is not None and not -count <= level < count:
            raise ConfigError(
                f"evaluate.{evaluator}.level: {backbone.name} has no map {level}; give {-count} to {count - 1} or null"
            )
        self.backbone, self.pixels = backbone, dataset.backbone is None
        self.device, self.precision = dataset.device, dataset.loading.precision
        self.level = LevelMap(backbone, fine_level(backbone) if level is None else level, task=evaluator)
        # keys lie on the grid of the last map, which must be the one that is fine enough
        self.keys = keys and level is None and not self.pixels and self.level.index == count - 1
        self.size = backbone.input_size
        self._grids = {self.size: self.level.grid}

    @torch.no_grad()
    def __call__(self, images: Tensor, pad: tuple[int, int] = (0, 0)) -> Tensor:
        """`pad`: rows and columns to add at the bottom and on the right, filled with the mean color."""
        self.backbone.to(self.device)
        with (
            evaluating(self.backbone),
            torch.autocast(self.device.type, AUTOCAST[self.precision], enabled=self.precision != "fp32"),
        ):
            normal = self.backbone.normalize(images.to(self.device, non_blocking=True))
            normal = F.pad(normal, (0, pad[1], 0, pad[0]))  # after normalization, 0 is the mean color
            found = (self._patches(normal) if self.pixels else self._features(normal)).float()
        if not bool(found.isfinite().all()):
            raise DataError(
                "evaluate: the feature map is NaN or infinite; the backbone's weights have diverged, go back to an "
                "earlier checkpoint or lower optim.lr"
            )
        return found

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (gh, gw) of positions for images of `size` (h, w)."""
        if size not in self._grids:
            self._grids[size] = self.level.grid_of(self.backbone, size)
        return self._grids[size]

    @property
    def maps(self) -> bool:
        """Whether the features are a feature map, and neither keys (known after the first batch) nor pixels."""
        return not self.keys and not self.pixels

    @property
    def note(self) -> str | None:
        """Which map was used, as a note for the report; None if it is the last one."""
        count, index, (rows, columns) = len(self.backbone.stages), self.level.index, self.level.grid
        if index == count - 1:
            return None
        return (
            f"features are those of map {index + 1} of {count} ({rows} x {columns} positions); deeper maps are coarser"
        )

    def _features(self, images: Tensor) -> Tensor:
        if not self.keys:
            return self.level(self.backbone, images)
        found = key_map(self.backbone, lambda: self.level(self.backbone, images))
        self.keys = found is not None  # depends on the backbone, not on the images: later batches need not try again
        return self._features(images) if found is None else found

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) → (B, 3 p q, gh, gw): the pixels of each patch, averaged to at most 16 x 16."""
        size = cast("tuple[int, int]", tuple(images.shape[-2:]))
        grid = self.grid_of(size)
        # patches of p x q pixels: the image is first resized so that they fill it exactly
        p, q = (min(max(1, round(side / count)), _PIXELS) for side, count in zip(size, grid, strict=True))
        even = F.interpolate(images, (grid[0] * p, grid[1] * q), mode="area")
        return F.unfold(even, (p, q), stride=(p, q)).view(len(images), -1, *grid)


class MaskedBatch(NamedTuple):
    """A batch of images with their masks, at the backbone's input size."""

    indices: list[int]
    """Index of each image in the source."""
    images: Tensor
    """uint8 (B, 3, h, w)."""
    masks: Tensor
    """uint8 (B, h, w)."""


def masked_batches(
    source: ImageSource, size: tuple[int, int], indices: Sequence[int], dataset: EncodedDataset
) -> Iterator[MaskedBatch]:
    """Batches of the images `indices` of `source` with masks, resized to `size`; undecodable images are left out.

    Mask values are renumbered to the classes of ``dataset.features``. Raises DataError for a source without masks, for
    a mask with another size than its image, and for values that are not a class.
    """
    masked = _Masked(with_masks(source), size, indices, mask_values(source, dataset.features.classes))
    load = dataset.loading
    options = {"batch_size": load.batch_size, "num_workers": load.workers, "generator": torch.Generator()}
    for items in DataLoader(masked, collate_fn=list, **options):  # type: ignore[arg-type]
        # raised here: an exception in a worker would lose its type and its one line
        if error := next((item for item in items if isinstance(item, UnlabeledError)), None):
            raise error
        if good := [item for item in items if item is not None]:
            numbers, images, masks = zip(*good, strict=True)
            yield MaskedBatch(list(numbers), torch.stack(images), torch.stack(masks))


def with_masks(source: ImageSource) -> MaskSource:
    """`source`, typed as a source with masks. Raises DataError if it has none."""
    if not isinstance(source, MaskSource):
        raise DataError(
            "evaluate.data: the data has no masks; give data=voc or data=shapes, or remove the evaluators that need "
            "masks"
        )
    return source


def mask_values(source: ImageSource, classes: Sequence[str]) -> Tensor:
    """Table int64 (256,) that maps mask values of `source` to the numbering of `classes`.

    0 is background, c + 1 is class c of `classes`, 255 is ignored, and -1 marks values that are not a class.
    """
    table = torch.full((256,), -1)
    table[0], table[IGNORE] = 0, IGNORE
    for value, name in enumerate((source.classes or ())[: IGNORE - 1], start=1):
        table[value] = classes.index(name) + 1 if name in classes else -1
    return table


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a mask uint8 (H, W) to `size` (h, w), with the value of the nearest pixel."""
    found: Tensor = tv.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return found[0]


class _Masked(Dataset["tuple[int, Tensor, Tensor] | UnlabeledError | None"]):
    """Images with masks; an item is None if it cannot be decoded, or an error for the main process to raise."""

    def __init__(self, source: MaskSource, size: tuple[int, int], indices: Sequence[int], values: Tensor) -> None:
        self.source, self.size, self.indices, self.values = source, size, indices, values

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor, Tensor] | UnlabeledError | None:
        index = self.indices[position]
        try:
            image, mask = self.source.read(index), self.source.mask(index)
            return index, Resize(self.size)(image), self._mask(index, mask, tuple(image.shape[-2:]))
        except DecodeError:
            return None
        except UnlabeledError as error:
            return error

    def _mask(self, index: int, mask: Tensor, size: tuple[int, ...]) -> Tensor:
        name = self.source.describe(index)
        if tuple(mask.shape) != size:
            sizes = " and ".join(f"{h}x{w}" for h, w in (size, mask.shape))
            raise DataError(f"evaluate.data: image and mask of {name} are {sizes} pixels; they must have the same size")
        labels = self.values[mask.long()]
        if bool((labels < 0).any()):
            value = int(mask[labels < 0][0])
            raise DataError(f"evaluate.data: the mask of {name} has value {value}, which is not one of the classes")
        return resized_mask(labels.to(torch.uint8), self.size)


def position_labels(masks: Tensor, grid: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """Soft labels of each position, from masks uint8 (B, h, w).

    Returns the fraction of each class among the labeled pixels, float32 (B, gh, gw, K), which sums to 1, or to 0 if no
    pixel is labeled; and the fraction of labeled pixels, float32 (B, gh, gw). A pixel belongs to the position that
    contains its center.
    """
    batch, height, width = masks.shape
    rows, columns = (
        ((torch.arange(side) + 0.5) * count / side).long()
        for side, count in zip((height, width), grid, strict=True)
    )  # fmt: skip
    # one histogram over (image, position, class), where class K counts the ignored pixels
    position = (rows[:, None] * grid[1] + columns) + torch.arange(batch)[:, None, None] * (grid[0] * grid[1])
    value = torch.where(masks == IGNORE, classes, masks.long())
    cells = batch * grid[0] * grid[1]
    counts = torch.bincount((position * (classes + 1) + value).flatten(), minlength=cells * (classes + 1))
    counts = counts.view(batch, *grid, classes + 1).float()
    labeled = counts[..., :classes].sum(dim=3)
    fractions = counts[..., :classes] / labeled.clamp(min=1)[..., None]
    return fractions, labeled / counts.sum(dim=3).clamp(min=1)


def sample_indices(count: int, size: int, seed: int) -> list[int]:
    """A random sample of `size` indices below `count`, ascending; all of them if there are no more."""
    chosen = np.random.default_rng(seed).permutation(count)[:size]
    return [int(number) for number in np.sort(chosen)]
