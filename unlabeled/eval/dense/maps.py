"""Dense features as images: principal components of the map, attention, and similarity to one position.

Shapes: B images of (h, w) pixels, (gh, gw) positions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.eval.dense.attention import class_attention
from unlabeled.eval.dense.dense_features import fine_level
from unlabeled.eval.dense.simpool import SimPool
from unlabeled.eval.dense.tiles import enlarged, heat, stretched, tiled
from unlabeled.eval.features.extract import Resize, evaluating
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.level_map import LevelMap

CAPTIONS = {
    "pca": "first three principal components of the feature map over all images, as red, green and blue",
    "attention": "attention of the class token in the last block, averaged over its heads; bright: much attention",
    "pooling": "attention of the mean feature to each position (SimPool without training); bright: much attention",
    "similarity": "cosine similarity of each position to the marked one; bright: similar",
}
"""Key of `map_images` → caption; there is either ``attention`` or ``pooling``."""


@torch.no_grad()
def map_images(
    backbone: Backbone,
    images: Tensor,
    *,
    device: torch.device | str = "cpu",
    foreground: float | None = None,
    position: tuple[float, float] = (0.5, 0.5),
) -> dict[str, Tensor]:
    """Visualizes the dense features of `images` uint8 (B, 3, h, w): key of `CAPTIONS` → uint8 (3, H, W).

    Each result has two rows, the images and the visualization. Images of another size are resized to the backbone's
    input size. `foreground`: threshold, 0..1, on the first principal component, which is larger inside of images than
    at their borders; positions below it are black. `position`: (down, across), 0..1, of the position that all others
    are compared with.

    The map is the last one, after the final norm, or the deepest that is fine enough. A backbone without a class token
    gives ``pooling`` instead of ``attention``. Raises CapabilityError for a backbone without maps.
    """
    backbone.require({"dense_map"}, task="images of its feature map")
    images = torch.stack([Resize(backbone.input_size)(image) for image in images.cpu()])
    level, last = (LevelMap(backbone, index, task="images") for index in (fine_level(backbone), -1))
    backbone.to(device)
    with evaluating(backbone):
        normal = backbone.normalize(images.to(device))
        maps = level(backbone, normal).float().cpu()
        attention = class_attention(backbone, lambda: last(backbone, normal))
    name = "pooling" if attention is None else "attention"
    if attention is None:
        attention = SimPool.untrained(maps.shape[1]).attention(maps)
    rows, columns = maps.shape[2:]
    down, across = (min(int(at * count), count - 1) for at, count in zip(position, (rows, columns), strict=True))
    attention = stretched(attention.float().cpu(), (1, 2))  # each image by itself
    similarities = similarity(maps, (down, across))
    colors = (components(maps, foreground) * 255).round().to(torch.uint8)
    size = images.shape[2:]
    marked = torch.stack([_marked(image, (down, across), (rows, columns)) for image in images])
    return {
        "pca": tiled([list(images), [enlarged(one, size) for one in colors]]),
        name: tiled([list(images), [heat(one, image) for one, image in zip(attention, images, strict=True)]]),
        "similarity": tiled(
            [list(marked), [heat(one, image) for one, image in zip(similarities, images, strict=True)]]
        ),
    }


def components(maps: Tensor, foreground: float | None = None) -> Tensor:
    """First three principal components of maps (B, C, gh, gw), each scaled to 0..1 over all images: (B, 3, gh, gw).

    The sign of the first one is such that it is larger inside of the images than at their borders. With `foreground`,
    positions whose first component is not above it are 0, and the components are recomputed on the others (as in Oquab
    et al., DINOv2, 2023, arXiv 2304.07193, figure 1).
    """
    batch, _, rows, columns = maps.shape
    positions = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
    border = torch.ones(batch, rows, columns, dtype=torch.bool, device=maps.device)
    border[:, 1:-1, 1:-1] = False
    border = border.flatten()
    found = _principal(positions)
    inside, outside = found[~border, 0], found[border, 0]
    if len(inside) and float(inside.mean()) < float(outside.mean()):
        found[:, 0] = -found[:, 0]
    found = stretched(found, (0,))
    if foreground is not None:
        kept = found[:, 0] > foreground
        found = torch.zeros_like(found)
        if bool(kept.any()):
            found[kept] = stretched(_principal(positions[kept]), (0,))
    return found.float().view(batch, rows, columns, 3).permute(0, 3, 1, 2)


def similarity(maps: Tensor, position: tuple[int, int]) -> Tensor:
    """Cosine similarity of each position of maps (B, C, gh, gw) to `position` (row, column), >= 0: (B, gh, gw)."""
    unit = F.normalize(maps, dim=1)
    return (unit * unit[:, :, position[0], position[1], None, None]).sum(dim=1).clamp(min=0)


def _principal(rows: Tensor) -> Tensor:
    """Scores (N, 3) of the first three principal components of float64 (N, C); 0 for missing ones."""
    centered = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    basis = vectors.flip(1)[:, :3]  # eigh sorts ascending
    # the sign of a component is arbitrary: the largest loading sets it, so that colors are reproducible
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    found = centered @ (basis * largest.sign())
    return F.pad(found, (0, 3 - found.shape[1]))


def _marked(image: Tensor, position: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The image uint8 (3, h, w) with one position of its `grid` filled with red."""
    top, left, bottom, right = (
        round((at + end) * side / count)
        for end in (0, 1)
        for at, side, count in zip(position, image.shape[1:], grid, strict=True)
    )
    marked = image.clone()
    # at least one pixel, for grids finer than the image
    marked[:, top : max(bottom, top + 1), left : max(right, left + 1)] = torch.tensor([255, 0, 0])[:, None, None]
    return marked.to(torch.uint8)
