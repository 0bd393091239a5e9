"""TokenCut: finds one object in an image by a normalized cut of the graph of its patches (Wang et al., CVPR 2022).

arXiv 2202.11539, repository github.com/YangtaoWANG95/TokenCut. It uses features only, without any training.

Shapes: (gh, gw) positions, L = gh gw, C channels. Boxes are (left, top, right, bottom); right and bottom are exclusive.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy import ndimage

Floats = npt.NDArray[np.floating]
_EPS = 1e-5
"""Weight of an edge between dissimilar positions; more than 0, so that the graph is connected."""


class NormalizedCut(NamedTuple):
    """The object found in an image."""

    box: tuple[int, int, int, int]
    """Bounding box, in positions of the grid."""
    object: npt.NDArray[np.bool_]
    """(gh, gw): the object's positions."""
    vector: npt.NDArray[np.float64]
    """(gh, gw): second smallest generalized eigenvector, larger on the object's side; all 0 if nothing can be cut."""
    value: float
    """Its eigenvalue: near 0 for two separate groups, near 1 for a single group."""


def cut(features: Floats, tau: float = 0.2) -> NormalizedCut:
    """Cuts the positions of `features` (C, gh, gw) into object and background, and returns the main object.

    Edges W have weight 1 between positions with cosine similarity above `tau`, and 1e-5 elsewhere; y is the second
    smallest solution of (D - W) y = λ D y, with D the degrees. The seed is the position of largest |y|. The object is
    the 4-connected component around the seed, among positions on the same side of y's mean. If all positions are alike,
    the object is the entire image.
    """
    grid = features.shape[1:]
    rows = features.reshape(len(features), -1).T.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1)
    # bipartition of the graph
    weights = np.where(rows @ rows.T > tau, 1.0, _EPS)
    vector, value = second_eigenvector(weights)
    seed = int(np.abs(vector).argmax())
    vector = vector if vector[seed] >= vector.mean() else -vector  # an eigenvector has no sign
    foreground = (vector > vector.mean()).reshape(grid)
    if not foreground.any():  # a constant vector: nothing was cut
        foreground[:] = True
    # connected component of the seed, and its box
    components, _ = ndimage.label(foreground)
    found = components == components.flat[seed]
    down, across = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return NormalizedCut(box, found, vector.reshape(grid), value)


def second_eigenvector(weights: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Second smallest solution (y, λ) of (D - W) y = λ D y, for symmetric W (L, L) > 0 with row sums D; y^T D y = 1.

    If all weights are equal, every y is a solution, and the result is 0 with λ = 1.
    """
    count = len(weights)
    if count < 2 or np.ptp(weights) == 0:
        return np.zeros(count), 1.0
    # symmetric form: z = D^½ y is an eigenvector of D^-½ W D^-½ with eigenvalue 1 - λ; float64, since float32 cannot
    # separate the two smallest solutions of groups that only edges of 1e-5 connect
    scale = 1 / np.sqrt(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(weights * scale[:, None] * scale, subset_by_index=[count - 2, count - 2])
    return scale * vectors[:, 0], float(1 - values[0])


def component_boxes(mask: npt.NDArray[np.uint8], ignore: int = 255) -> Floats:
    """Boxes (N, 4), in pixels, around the 8-connected components of each class except background 0 of a mask (H, W).

    Touching objects of one class give one box, and an object in two pieces gives two.
    """
    boxes = [
        (across.start, down.start, across.stop, down.stop)
        for value in np.setdiff1d(np.unique(mask), [0, ignore])
        for down, across in ndimage.find_objects(ndimage.label(mask == value, structure=np.ones((3, 3)))[0])
    ]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def intersection_over_union(box: Floats, others: Floats) -> npt.NDArray[np.float64]:
    """IoU of one box (4,) with each of `others` (N, 4): (N,)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - common
    found: npt.NDArray[np.float64] = common / np.maximum(union, 1e-12)
    return found
