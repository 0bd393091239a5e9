"""Images to features of places, and masks to labels of the same places.

The whole image is resized to the network's size, bicubic, whatever its aspect, and its mask with it by the nearest
pixel. So nothing is cut off, and places of image and mask are the same.

Shapes: B images of (h, w) pixels, (gh, gw) places, C channels, K classes with the background.
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
"""Value of a mask's pixels that no measure counts."""
_CELLS = 14
"""Places along the shorter side that a map should have, for images of usual size (224)."""
_CELLS_SMALL = 8
"""The same for small images."""
_STRIDE = 16
"""Pixels per place that are fine enough in any case."""
_PIXELS = 16
"""Longest side of a place in the baseline of raw pixels; larger places are shrunk to it."""


def fine_level(backbone: Backbone) -> int:
    """The deepest map with enough places along the shorter side, or the deepest of the finest maps if none has.

    Enough is 14; for smaller images what a stride of 16 leaves of them, and at least 8.
    """
    side = min(backbone.input_size)
    positions = [side / stage.stride for stage in backbone.stages]
    enough = min(max(positions), max(_CELLS_SMALL, min(_CELLS, math.ceil(side / _STRIDE))))
    return max(index for index, count in enumerate(positions) if count >= enough)


class DenseFeatures:
    """uint8 images (B, 3, h, w) → one vector per place, float32 (B, C, gh, gw) on the subject's device.

    For a network, its map `level` (None: `fine_level`), the last one after the final norm; with `keys` and no `level`
    the keys of its last attention block, where it has one. For raw pixels, the normalized pixels of each place of the
    judged network's map.

    Raises CapabilityError for a network without maps, ConfigError for a level that it does not have.
    """

    def __init__(
        self, dataset: EncodedDataset, evaluator: str, level: int | None = None, *, keys: bool = False
    ) -> None:
        network = dataset.backbone or dataset.size_like
        if network is None:
            raise DataError(f"evaluate: {evaluator} looks at places, and there are features alone; give a network")
        if (reason := network.missing_reason("dense_map")) is not None:
            raise CapabilityError(
                f"backbone: {network.name} has no feature maps ({reason}); leave {evaluator} out of evaluate.evaluators"
            )
        count = len(network.stages)
        if level is not None and not -count <= level < count:
            raise ConfigError(
                f"evaluate.{evaluator}.level: {network.name} has no map {level}; give {-count} to {count - 1} or null"
            )
        self.network, self.pixels = network, dataset.backbone is None
        self.device, self.precision = dataset.device, dataset.loading.precision
        self.level = LevelMap(network, fine_level(network) if level is None else level, task=evaluator)
        self.keys = keys and level is None and not self.pixels and self.level.index == count - 1
        self.size = network.input_size
        self._grids = {self.size: self.level.grid}

    @torch.no_grad()
    def __call__(self, images: Tensor, pad: tuple[int, int] = (0, 0)) -> Tensor:
        """`pad`: rows and columns of zeros (the mean color) that are added below and on the right."""
        self.network.to(self.device)
        with (
            evaluating(self.network),
            torch.autocast(self.device.type, AUTOCAST[self.precision], enabled=self.precision != "fp32"),
        ):
            normal = self.network.normalize(images.to(self.device, non_blocking=True))
            normal = F.pad(normal, (0, pad[1], 0, pad[0]))
            found = (self._patches(normal) if self.pixels else self._features(normal)).float()
        if not bool(found.isfinite().all()):
            raise DataError(
                "evaluate: the feature map is NaN or infinite; the backbone's weights have diverged, go back to an "
                "earlier checkpoint or lower optim.lr"
            )
        return found

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Places (gh, gw) for images of `size` (h, w)."""
        if size not in self._grids:
            self._grids[size] = self.level.grid_of(self.network, size)
        return self._grids[size]

    @property
    def maps(self) -> bool:
        """Whether the features are those of a map: neither keys (known after the first images) nor pixels."""
        return not self.keys and not self.pixels

    @property
    def note(self) -> str | None:
        """Says which map was taken, where that was a choice."""
        count, index, (rows, columns) = len(self.network.stages), self.level.index, self.level.grid
        if index == count - 1:
            return None
        return f"places are those of map {index + 1} of {count}, {rows} x {columns}; deeper maps are coarser"

    def _features(self, images: Tensor) -> Tensor:
        if not self.keys:
            return self.level(self.network, images)
        found = key_map(self.network, lambda: self.level(self.network, images))
        self.keys = found is not None  # a network keeps them or does not, whatever the images
        return self._features(images) if found is None else found

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) → (B, 3 p q, gh, gw): each place's own pixels, averaged to at most 16 x 16."""
        size = cast("tuple[int, int]", tuple(images.shape[-2:]))
        grid = self.grid_of(size)
        p, q = (min(max(1, round(side / count)), _PIXELS) for side, count in zip(size, grid, strict=True))
        even = F.interpolate(images, (grid[0] * p, grid[1] * q), mode="area")
        return F.unfold(even, (p, q), stride=(p, q)).view(len(images), -1, *grid)


class MaskedBatch(NamedTuple):
    """Images with their masks, at the network's size."""

    indices: list[int]
    """Index of each in the source."""
    images: Tensor
    """uint8 (B, 3, h, w)."""
    masks: Tensor
    """uint8 (B, h, w)."""


def masked_batches(
    source: ImageSource, size: tuple[int, int], indices: Sequence[int], dataset: EncodedDataset
) -> Iterator[MaskedBatch]:
    """The images `indices` of `source` with masks, resized whole to `size`, but for those that cannot be decoded.

    Masks have the classes of ``dataset.features``. Raises DataError for a source without masks, for a mask of another
    size than its image, and for values that are no class.
    """
    masked = _Masked(with_masks(source), size, indices, mask_values(source, dataset.features.classes))
    load = dataset.loading
    options = {"batch_size": load.batch_size, "num_workers": load.workers, "generator": torch.Generator()}
    for items in DataLoader(masked, collate_fn=list, **options):  # type: ignore[arg-type]
        if error := next((item for item in items if isinstance(item, UnlabeledError)), None):
            raise error
        if good := [item for item in items if item is not None]:
            numbers, images, masks = zip(*good, strict=True)
            yield MaskedBatch(list(numbers), torch.stack(images), torch.stack(masks))


def with_masks(source: ImageSource) -> MaskSource:
    """`source` as one with masks. Raises DataError when it has none."""
    if not isinstance(source, MaskSource):
        raise DataError(
            "evaluate.data: the data has no masks; give data=voc or data=shapes, or leave out the evaluators "
            "that look at them"
        )
    return source


def mask_values(source: ImageSource, classes: Sequence[str]) -> Tensor:
    """int64 (256,): value in a mask of `source` → 0 for background, c + 1 for class c of `classes`, 255; else -1."""
    table = torch.full((256,), -1)
    table[0], table[IGNORE] = 0, IGNORE
    for value, name in enumerate((source.classes or ())[: IGNORE - 1], start=1):
        table[value] = classes.index(name) + 1 if name in classes else -1
    return table


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (H, W) → (h, w): at each pixel the value of the nearest one."""
    found: Tensor = tv.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return found[0]


class _Masked(Dataset["tuple[int, Tensor, Tensor] | UnlabeledError | None"]):
    """Images and masks; None stands for what cannot be decoded, an error for the main process to raise."""

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
            shown = " and ".join(f"{h}x{w}" for h, w in (size, mask.shape))
            raise DataError(f"evaluate.data: image and mask of {name} are {shown} pixels; they must be of one size")
        known = self.values[mask.long()]
        if bool((known < 0).any()):
            value = int(mask[known < 0][0])
            raise DataError(f"evaluate.data: the mask of {name} has value {value}, which is none of the classes")
        return resized_mask(known.to(torch.uint8), self.size)


def position_labels(masks: Tensor, grid: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    """What each place shows: (shares of the classes, float32 (B, gh, gw, K); known part of it, float32 (B, gh, gw)).

    Of masks uint8 (B, h, w). Shares are those among the known pixels and sum to 1, or to 0 where none is known. A pixel
    belongs to the place in which its center lies.
    """
    batch, height, width = masks.shape
    rows, columns = (
        ((torch.arange(side) + 0.5) * count / side).long()
        for side, count in zip((height, width), grid, strict=True)
    )  # fmt: skip
    position = (rows[:, None] * grid[1] + columns) + torch.arange(batch)[:, None, None] * (grid[0] * grid[1])
    value = torch.where(masks == IGNORE, classes, masks.long())
    cells = batch * grid[0] * grid[1]
    counts = torch.bincount((position * (classes + 1) + value).flatten(), minlength=cells * (classes + 1))
    counts = counts.view(batch, *grid, classes + 1).float()
    known = counts[..., :classes].sum(dim=3)
    shares = counts[..., :classes] / known.clamp(min=1)[..., None]
    return shares, known / counts.sum(dim=3).clamp(min=1)


def drawn(count: int, wanted: int, seed: int) -> list[int]:
    """Ascending numbers of `wanted` of `count` things, or of all."""
    chosen = np.random.default_rng(seed).permutation(count)[:wanted]
    return [int(number) for number in np.sort(chosen)]
