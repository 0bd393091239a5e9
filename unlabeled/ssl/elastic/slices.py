"""Parameters of a sub-network as slices of those of the whole network.

Along each axis a slice takes the first part of each of `groups` equal parts: one group for most axes; three for the
rows of a joint projection to queries, keys and values, of which a plain prefix would take queries alone; four for the
columns of Swin's patch merging, whose input are four neighbours side by side; two for gated units.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Slice(NamedTuple):
    """How a parameter of a sub-network follows from one of the whole network."""

    source: str
    """Its name there."""
    shape: tuple[int, ...]
    """Of the slice."""
    groups: tuple[int, ...]
    """Equal parts of each axis, of each of which the first part is taken."""
    scale: float
    """What the values are multiplied by: for weights the number of whole over that of sliced inputs (alpha in the
    paper), so that a sum over fewer inputs keeps its size. The paper scales the input, which is the same."""

    def of(self, whole: Tensor) -> Tensor:
        """The slice of `whole`, in its graph; `whole` itself where nothing is left out."""
        if tuple(whole.shape) == self.shape and self.scale == 1:
            return whole
        return cast(Tensor, _Sliced.apply(whole, self))


class _Sliced(torch.autograd.Function):
    """One copy forward and one backward, whatever the number of axes."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, part: Slice) -> Tensor:
        ctx.part, ctx.shape = part, whole.shape
        return (_view(whole, part) * part.scale).reshape(part.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        part: Slice = ctx.part
        whole = gradients[0].new_zeros(ctx.shape)
        view = _view(whole, part)
        torch.mul(gradients[0].reshape(view.shape), part.scale, out=view)
        return whole, None


def _view(whole: Tensor, part: Slice) -> Tensor:
    """`whole` with each axis split into (groups, rest), and the rest narrowed to what is taken."""
    split = [
        length for groups, size in zip(part.groups, whole.shape, strict=True) for length in (groups, size // groups)
    ]
    view = whole.reshape(split) if not whole.is_contiguous() else whole.view(split)
    for axis, (groups, size) in enumerate(zip(part.groups, part.shape, strict=True)):
        view = view.narrow(2 * axis + 1, 0, size // groups)
    return view
