"""TokenCut: one object of an image, found by cutting the graph of its places in two (Wang et al., CVPR 2022).

arXiv 2202.11539, repository github.com/YangtaoWANG95/TokenCut. Nothing is trained, nothing but features is looked at.

Shapes: (gh, gw) places, L = gh gw, C channels. Boxes are left, top, right, bottom; right and bottom lie outside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy import ndimage

Floats = npt.NDArray[np.floating]
_EPS = 1e-5
"""Weight of the edge between places that are not alike."""


class NormalizedCut(NamedTuple):
    """The object of one image."""

    box: tuple[int, int, int, int]
    """In places."""
    object: npt.NDArray[np.bool_]
    """(gh, gw): the component of the seed."""
    vector: npt.NDArray[np.float64]
    """(gh, gw): the second smallest generalized eigenvector, positive at the seed; 0 where there is nothing to cut."""
    value: float
    """Its eigenvalue: near 0 for two groups that share nothing, near 1 for one group."""


def cut(features: Floats, tau: float = 0.2) -> NormalizedCut:
    """Cuts the places of `features` (C, gh, gw) in two and keeps what is connected to the strongest.

    Places of cosine above `tau` are joined by 1, others by 1e-5 (W); y is the second smallest solution of
    (D - W) y = λ D y with D the degrees. The side of y's mean on which |y| is largest is the object's, and of it the
    4-connected component around that place. Where all places are alike the object is the whole image.
    """
    grid = features.shape[1:]
    rows = features.reshape(len(features), -1).T.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1)
    weights = np.where(rows @ rows.T > tau, 1.0, _EPS)
    vector, value = second_eigenvector(weights)
    seed = int(np.abs(vector).argmax())
    vector = vector if vector[seed] >= vector.mean() else -vector
    foreground = (vector > vector.mean()).reshape(grid)
    if not foreground.any():  # a constant vector
        foreground[:] = True
    components, _ = ndimage.label(foreground)
    found = components == components.flat[seed]
    down, across = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return NormalizedCut(box, found, vector.reshape(grid), value)


def second_eigenvector(weights: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Second smallest (y, λ) of (D - W) y = λ D y for symmetric W (L, L) > 0, D its row sums; y has y^T D y = 1.

    Through the symmetric form: z = D^½ y is an eigenvector of D^-½ W D^-½ to 1 - λ, in float64, since two groups that
    are joined by 1e-5 alone are one solution in float32. Zeros where all weights are equal: any y would do.
    """
    count = len(weights)
    if count < 2 or np.ptp(weights) == 0:
        return np.zeros(count), 1.0
    scale = 1 / np.sqrt(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(weights * scale[:, None] * scale, subset_by_index=[count - 2, count - 2])
    return scale * vectors[:, 0], float(1 - values[0])


def component_boxes(mask: npt.NDArray[np.uint8], ignore: int = 255) -> Floats:
    """Boxes (N, 4), in pixels, around the 8-connected components of each class of a mask (H, W), background 0 excepted.

    Objects of one class that touch are one; an object in two parts is two.
    """
    boxes = [
        (across.start, down.start, across.stop, down.stop)
        for value in np.setdiff1d(np.unique(mask), [0, ignore])
        for down, across in ndimage.find_objects(ndimage.label(mask == value, structure=np.ones((3, 3)))[0])
    ]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def intersection_over_union(box: Floats, others: Floats) -> npt.NDArray[np.float64]:
    """Of one box (4,) with each of `others` (N, 4): (N,)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - common
    found: npt.NDArray[np.float64] = common / np.maximum(union, 1e-12)
    return found
