"""Parameters of a sub-network as slices of the full backbone's parameters.

Along each axis, a slice takes the first entries of each of `groups` equal groups: one group for most axes; three for
the rows of a joint projection to queries, keys and values, where a plain prefix would contain queries only; four for
the columns of Swin's patch merging, whose inputs are four neighbors side by side; two for gated units.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Slice(NamedTuple):
    """How a parameter or buffer of a sub-network follows from the full backbone's."""

    shape: tuple[int, ...]
    """Shape of the slice."""
    groups: tuple[int, ...]
    """Number of equal groups along each axis; the first entries of each group are taken."""
    scale: float = 1.0
    """Factor on the values. For weights it is the number of full inputs divided by that of sliced inputs (alpha in the
    paper), so that a sum over fewer inputs keeps its magnitude. The paper scales the input, which is equivalent."""

    def of(self, full: Tensor) -> Tensor:
        """The slice of `full`, in its graph; `full` itself if nothing is left out."""
        if full.shape == self.shape and self.scale == 1:
            return full
        return cast(Tensor, _Sliced.apply(full, self))

    def fits(self, full: Tensor) -> bool:
        """Whether `full` has such a slice."""
        axes = zip(self.shape, self.groups, full.shape, strict=False)
        return len(self.shape) == full.ndim and all(
            own <= length and own % groups == length % groups == 0 for own, groups, length in axes
        )


class _Sliced(torch.autograd.Function):
    """Slices with one copy forward and one backward; narrow, index and multiply would copy once per axis."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, slice_: Slice) -> Tensor:
        ctx.slice, ctx.shape = slice_, full.shape
        view = _view(full, slice_)
        copy = view.clone(memory_format=torch.contiguous_format) if slice_.scale == 1 else view * slice_.scale
        return copy.reshape(slice_.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        slice_: Slice = ctx.slice
        # entries outside of the slice get a gradient of zero, not None
        full = gradients[0].new_zeros(ctx.shape)
        view = _view(full, slice_)
        torch.mul(gradients[0].reshape(view.shape), slice_.scale, out=view)  # writes through the view into `full`
        return full, None


def _view(full: Tensor, slice_: Slice) -> Tensor:
    """A view of `full`: axes of several groups are split into (groups, rest), and all are narrowed to the slice."""
    view, axis = full, 0
    for length, groups, own in zip(full.shape, slice_.groups, slice_.shape, strict=True):
        # (n,) → (groups, n / groups): narrowing the second axis then keeps the first entries of each group
        if groups > 1:
            view = view.reshape(*view.shape[:axis], groups, length // groups, *view.shape[axis + 1 :])
            axis += 1
        if own < length:
            view = view.narrow(axis, 0, own // groups)
        axis += 1
    return view
