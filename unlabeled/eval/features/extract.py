"""Feature extraction: one deterministic pass over a source, divided among processes and cached on disk.

Shapes: B images of a batch, N images of a source, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from unlabeled.eval.base import FeatureSplit, IntArray
from unlabeled.eval.features.cache import cache_key, data_identity, load_split, save_split, weights_identity
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.distributed import rank, world_size
from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.source import DecodeError, ImageSource

Precision = Literal["fp32", "bf16", "fp16"]
Encode = Callable[[Tensor], Tensor]
Outputs = Callable[[Backbone, Tensor], Tensor]
"""(backbone, normalized images (B, 3, h, w)) → (B, F)."""
ImageTransform = Callable[[Tensor], Tensor]
"""uint8 (3, H, W) → uint8 (3, h, w), deterministic; its `repr` identifies it in the cache."""
ImageBatch = tuple[Tensor, "Tensor | None", list[int]]
"""Indices (B,), images uint8 (B, 3, h, w) or None if none can be decoded, and the indices of undecodable images."""

_MARGIN = 256 / 224
"""Size to which images are resized before the center crop, relative to the crop; the usual ratio for ImageNet."""
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of autocast."""


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform: uint8 (3, H, W) of any size → uint8 (3, h, w), deterministic.

    The usual protocol: bicubic resize to 256/224 of `size`, then a center crop. Images that are no larger than that on
    both sides are resized to `size` without a crop, so that small images lose nothing; a 32 x 32 image stays unchanged
    at size 32.
    """

    size: tuple[int, int]
    """(h, w) in pixels."""

    def __call__(self, image: Tensor) -> Tensor:
        (height, width), (h, w) = image.shape[-2:], self.size
        if height <= h * _MARGIN and width <= w * _MARGIN:
            return _resize(image, self.size)
        scale = max(h * _MARGIN / height, w * _MARGIN / width)
        covering = (max(h, round(height * scale)), max(w, round(width * scale)))
        center: Tensor = tv.center_crop(_resize(image, covering), list(self.size))
        return center


@dataclass(frozen=True)
class Resize:
    """Bicubic resize without a crop: uint8 (3, H, W) → uint8 (3, h, w); the aspect ratio may change."""

    size: tuple[int, int]

    def __call__(self, image: Tensor) -> Tensor:
        return _resize(image, self.size)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    resized: Tensor = tv.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized


def extract_features(
    backbone: Backbone,
    source: ImageSource,
    *,
    size: int | tuple[int, int] | None = None,
    transform: ImageTransform | None = None,
    outputs: Outputs | None = None,
    named: str = "pooled",
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    precision: Precision = "fp32",
    together: bool = True,
) -> FeatureSplit:
    """Features of every readable image, float32 (N, F), in the order of `source`.

    `size`: input size in pixels; None: that of the backbone. `transform`: replaces `EvalTransform` of `size`.
    `outputs`: computes other features than the pooled ones; `named` then identifies them in the cache. `cache`: folder
    in which features are stored, by weights, transform, outputs, data and precision. `together`: under
    torch.distributed, each process encodes a slice of the images and all receive all features; every process must call.

    Undecodable images are left out and named in `FeatureSplit.skipped`. Module modes and the global random state do not
    change. Raises DataError if no image can be decoded.
    """
    pixels = (size, size) if isinstance(size, int) else size or backbone.input_size
    device, transform = torch.device(device), transform or EvalTransform(pixels)
    ranks = (rank(), world_size()) if together else (0, 1)

    def encode(images: Tensor) -> Tensor:
        return encode_batch(backbone, images, outputs, device, precision)

    def compute() -> FeatureSplit:
        backbone.to(device)
        with evaluating(backbone):
            return _encode_all(encode, source, transform, batch_size, workers, ranks)

    if cache is None:
        return compute()
    key = cache_key(
        weights=weights_identity(backbone),
        transform=repr(transform),
        data=data_identity(source),
        precision=precision,
        # only if given, so that files from before this argument existed are still found
        **({} if outputs is None else {"outputs": named}),
    )
    return _cached(cache / f"{key}.safetensors", compute, ranks)


def encode_batch(
    backbone: Backbone, images: Tensor, outputs: Outputs | None, device: torch.device, precision: Precision
) -> Tensor:
    """Encodes images uint8 (B, 3, h, w) to float32 (B, F) on `device`: pooled features, or `outputs`."""
    images = images.to(device, non_blocking=True)
    with torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32"):
        images = backbone.normalize(images)
        return (backbone.pooled(images) if outputs is None else outputs(backbone, images)).float()


def raw_pixels(
    source: ImageSource, *, size: int = 32, batch_size: int = 256, workers: int = 0, cache: Path | None = None
) -> FeatureSplit:
    """The raw-pixels baseline: images of at most `size` x `size` pixels in 0..1, flattened to float32 (N, 3hw).

    All images get the size of the first readable one, limited to `size` on each side.
    """
    transform = Resize(pixel_size(source, size))

    def compute() -> FeatureSplit:
        return _encode_all(_flat, source, transform, batch_size, workers, (rank(), world_size()))

    if cache is None:
        return compute()
    key = cache_key(weights="pixels", transform=repr(transform), data=data_identity(source))
    return _cached(cache / f"{key}.safetensors", compute, (rank(), world_size()))


def _flat(images: Tensor) -> Tensor:
    """uint8 (B, 3, h, w) → (B, 3hw) in 0..1."""
    return images.flatten(1).float() / 255


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts `module` into evaluation mode for the block; afterwards each submodule has its previous mode."""
    # not train(): frozen submodules of a model in training are in evaluation mode
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def is_main_process() -> bool:
    """Whether this process is the first one, or the only one."""
    return rank() == 0


class _Images(Dataset[tuple[int, Tensor | None]]):
    """The images `indices` of a source, transformed; None for an image that cannot be decoded."""

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Tensor], indices: Sequence[int]) -> None:
        self.source, self.transform, self.indices = source, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None]:
        index = self.indices[position]
        try:
            return index, self.transform(self.source.read(index))
        except DecodeError:
            return index, None


def load_images(
    source: ImageSource,
    transform: Callable[[Tensor], Tensor],
    indices: Sequence[int],
    *,
    batch_size: int,
    workers: int,
) -> Iterable[ImageBatch]:
    """A loader of the images `indices` of `source`, in this order, transformed to one size."""
    return DataLoader(
        _Images(source, transform, indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without it, a loader draws from the global generator, which disturbs training
    )


def _collate(items: list[tuple[int, Tensor | None]]) -> ImageBatch:
    good = [(index, image) for index, image in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([index for index, _ in good]), images, [index for index, image in items if image is None]


@torch.inference_mode()
def _encode_all(
    encode: Encode,
    source: ImageSource,
    transform: ImageTransform,
    batch_size: int,
    workers: int,
    ranks: tuple[int, int],
) -> FeatureSplit:
    """Encodes this process's slice of the source, and joins the slices of all processes."""
    own, world = ranks
    share = range(len(source) * own // world, len(source) * (own + 1) // world)
    loader = load_images(source, transform, share, batch_size=batch_size, workers=workers)
    features: list[Tensor] = []
    indices: list[Tensor] = []
    undecodable: list[int] = []
    for batch_indices, images, failed in loader:
        undecodable.extend(failed)
        if images is not None:
            features.append(encode(images).cpu())
            indices.append(batch_indices)
    # a process without a readable image still takes part in gathering, with zero rows
    rows = torch.cat(features) if features else torch.zeros(0, 0)
    row_indices = torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
    if world > 1:
        rows, row_indices, undecodable = _gather(rows, row_indices, undecodable)
    return _split(source, rows, row_indices.numpy(), undecodable)


def _split(source: ImageSource, rows: Tensor, indices: IntArray, undecodable: list[int]) -> FeatureSplit:
    """Adds labels and the names of undecodable images to the features `rows` (N, F)."""
    if len(rows) == 0:
        raise DataError(f"evaluate.data: none of the {len(source)} images can be decoded; run `unlabeled doctor`")
    labels = source.labels()
    all_labels = np.full(len(source), -1) if labels is None else labels.cpu().numpy()
    skipped = tuple(source.describe(index) for index in undecodable)
    return FeatureSplit(rows.numpy(), all_labels[indices].astype(np.int64), indices, skipped)


def _gather(rows: Tensor, indices: Tensor, undecodable: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Joins the consecutive slices of all processes, on every process."""
    slices: list[tuple[int, int, list[int]]] = [(0, 0, [])] * world_size()
    dist.all_gather_object(slices, (len(rows), rows.shape[1], undecodable))
    # a process without a readable image has width 0 and takes that of the others
    counts, width = [count for count, _, _ in slices], max(width for _, width, _ in slices)
    joined = _gather_tensor(rows.reshape(len(rows), width), counts)
    return joined, _gather_tensor(indices, counts), [index for _, _, own in slices for index in own]


def _gather_tensor(own: Tensor, counts: list[int]) -> Tensor:
    """Concatenates the tensors `own` (counts[rank], ...) of all processes."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros(max(counts), *own.shape[1:], dtype=own.dtype, device=device)  # all_gather needs equal shapes
    padded[: len(own)] = own.to(device)
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    return torch.cat([tensor[:count].cpu() for tensor, count in zip(received, counts, strict=True)])


def _cached(file: Path, compute: Callable[[], FeatureSplit], ranks: tuple[int, int]) -> FeatureSplit:
    """The features in `file`, or else those of `compute`, which are written to it."""
    found = load_split(file)
    own, world = ranks
    if world > 1:  # all or none: a process that computed alone would wait for the others forever
        hits: list[bool] = [False] * world
        dist.all_gather_object(hits, found is not None)
        found = found if all(hits) else None
    if found is not None:
        return found
    split = compute()
    if own == 0:
        save_split(file, split)
    if world > 1:
        dist.barrier()
    return split


def pixel_size(source: ImageSource, largest: int = 32) -> tuple[int, int]:
    """(h, w) of the raw-pixels baseline: the size of the first readable image, limited to `largest` on each side."""
    for index in range(len(source)):
        try:
            height, width = source.read(index).shape[-2:]
        except DecodeError:
            continue
        return min(height, largest), min(width, largest)
    raise DataError(f"evaluate.data: none of the {len(source)} images can be decoded; run `unlabeled doctor`")
