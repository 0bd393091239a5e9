"""Parameters of a sub-network as slices of those of the whole network.

Along each axis a slice takes the first part of each of `groups` equal parts: one group for most axes; three for the
rows of a joint projection to queries, keys and values, of which a plain prefix would take queries alone; four for the
columns of Swin's patch merging, whose input are four neighbors side by side; two for gated units.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Slice(NamedTuple):
    """How a parameter or buffer of a sub-network follows from the whole network's."""

    shape: tuple[int, ...]
    """Of the slice."""
    groups: tuple[int, ...]
    """Equal parts of each axis, of each of which the first part is taken."""
    scale: float = 1.0
    """What the values are multiplied by: for weights the number of whole over that of sliced inputs (alpha in the
    paper), so that a sum over fewer inputs keeps its size. The paper scales the input, which is the same."""

    def of(self, whole: Tensor) -> Tensor:
        """The slice of `whole`, in its graph; `whole` itself where nothing is left out."""
        if whole.shape == self.shape and self.scale == 1:
            return whole
        return cast(Tensor, _Sliced.apply(whole, self))

    def fits(self, whole: Tensor) -> bool:
        """Whether `whole` has such a slice."""
        axes = zip(self.shape, self.groups, whole.shape, strict=False)
        return len(self.shape) == whole.ndim and all(
            own <= length and own % groups == length % groups == 0 for own, groups, length in axes
        )


class _Sliced(torch.autograd.Function):
    """One copy forward and one backward, whatever the number of axes."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, part: Slice) -> Tensor:
        ctx.part, ctx.shape = part, whole.shape
        view = _view(whole, part)
        copy = view.clone(memory_format=torch.contiguous_format) if part.scale == 1 else view * part.scale
        return copy.reshape(part.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        part: Slice = ctx.part
        whole = gradients[0].new_zeros(ctx.shape)
        view = _view(whole, part)
        torch.mul(gradients[0].reshape(view.shape), part.scale, out=view)
        return whole, None


def _view(whole: Tensor, part: Slice) -> Tensor:
    """`whole` with the axes of several groups split into (groups, rest), and all narrowed to what is taken."""
    view, axis = whole, 0
    for length, groups, own in zip(whole.shape, part.groups, part.shape, strict=True):
        if groups > 1:
            view = view.reshape(*view.shape[:axis], groups, length // groups, *view.shape[axis + 1 :])
            axis += 1
        if own < length:
            view = view.narrow(axis, 0, own // groups)
        axis += 1
    return view
