"""A feature map of which only the visible places exist: what a network in its masked form computes with.

timm's blocks add, concatenate, permute and scale their maps in their own code. So that this code runs unchanged, a
`MaskedMap` is a tensor to it: of the shape of the whole map, with the mask inside. Each function of torch that it meets
has a rule in `unlabeled.ssl.backbones.masked.sparse.functions`, or is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.ssl.backbones.masked.sparse.gathering import Cells, Factor, gather_tokens, scatter_tokens
from unlabeled.ssl.core.errors import CapabilityError


class NoRuleError(CapabilityError):
    """An operation that has no masked form."""


class OrderError(NoRuleError):
    """An operation after which places no longer lie as in a map."""


class MaskedMap(torch.Tensor):
    """A map (B, C, H, W), or (B, H, W, C) after a permute, that is defined at visible places only.

    It is stored in one of two ways. *Dense*: all positions, exactly zero at masked ones. *Gathered*: only the visible
    positions, as (B, C, R, 1) in the order of `unlabeled.ssl.backbones.masked.sparse.gathering`. The gathered form is
    itself a map of one column, so pointwise layers and layers that take statistics over positions run on it unchanged.

    Attributes: `stored` (the tensor itself), `cells`, `factor` (positions per cell), `is_gathered`, `last` (whether its
    shape is B, H, W, C), and `border` (zeros that the next spatial layer adds around it, as ``F.pad`` takes them; a map
    with a border supports nothing else).
    """

    stored: Tensor
    cells: Cells
    factor: Factor
    is_gathered: bool
    last: bool
    border: tuple[int, ...] | None

    @staticmethod
    def __new__(
        cls, storage: Tensor, cells: Cells, factor: Factor, *, is_gathered: bool, last: bool = False
    ) -> MaskedMap:
        """`storage`: (B, C, H, W) with zeros at masked places, or (B, C, R, 1) when `is_gathered`."""
        batch, channels = storage.shape[:2]
        height, width = cells.size(factor)
        shape = (batch, height, width, channels) if last else (batch, channels, height, width)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=storage.dtype, device=storage.device)
        made.stored, made.cells, made.factor, made.is_gathered, made.last = storage, cells, factor, is_gathered, last
        made.border = None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # everything is done in __new__
        pass

    @classmethod
    def from_dense(cls, dense: Tensor, cells: Cells, factor: Factor) -> MaskedMap:
        """From a map (B, C, H, W) with anything at masked places, stored as `cells` says for `factor`."""
        if cells.gathers(factor):
            return cls.from_tokens(gather_tokens(dense, cells, factor), cells, factor)
        return cls(zeroed(dense, cells, factor), cells, factor, is_gathered=False)

    @classmethod
    def from_tokens(cls, tokens: Tensor, cells: Cells, factor: Factor) -> MaskedMap:
        """From the visible places (B, R, C), stored as `cells` says for `factor`."""
        if cells.gathers(factor):
            return cls(tokens.transpose(1, 2).unsqueeze(-1), cells, factor, is_gathered=True)
        return cls(scatter_tokens(tokens, cells, factor), cells, factor, is_gathered=False)

    def with_border(self, border: tuple[int, ...]) -> MaskedMap:
        """The same map with `border`."""
        copied = MaskedMap(self.stored, self.cells, self.factor, is_gathered=self.is_gathered)
        copied.border = border
        return copied

    def dense(self) -> Tensor:
        """(B, C, H, W), zero at masked places, with its border."""
        dense = self.stored
        if self.is_gathered:
            dense = scatter_tokens(dense.squeeze(-1).transpose(1, 2), self.cells, self.factor)
        return dense if self.border is None else F.pad(dense, self.border)

    def tokens(self) -> Tensor:
        """The visible places, (B, R, C)."""
        return self.gathered().squeeze(-1).transpose(1, 2)

    def gathered(self) -> Tensor:
        """The visible places as a map of one column, (B, C, R, 1)."""
        storage = self._without_border()
        if self.is_gathered:
            return storage
        return gather_tokens(storage, self.cells, self.factor).transpose(1, 2).unsqueeze(-1)

    def as_shown(self, *, gathered: bool = False) -> Tensor:
        """What is stored (or the strip) with its axes in the order that this map shows."""
        tensor = self.gathered() if gathered else self._without_border()
        return tensor.permute(0, 2, 3, 1) if self.last else tensor

    def _without_border(self) -> Tensor:
        if self.border is not None:
            raise NoRuleError("a padded map is for a spatial layer only")
        return self.stored

    def from_shown(self, tensor: Tensor) -> MaskedMap:
        """A map at the same places that stores `tensor`, which has its axes as this map shows them."""
        storage = tensor.permute(0, 3, 1, 2) if self.last else tensor
        return MaskedMap(storage, self.cells, self.factor, is_gathered=self.is_gathered, last=self.last)

    def with_gathered(self, gathered: Tensor) -> MaskedMap:
        """A map at the same places, shown as this one, from a strip with its axes as this map shows them."""
        gathered = gathered.permute(0, 3, 1, 2) if self.last else gathered
        if self.is_gathered:
            return MaskedMap(gathered, self.cells, self.factor, is_gathered=True, last=self.last)
        dense = scatter_tokens(gathered.squeeze(-1).transpose(1, 2), self.cells, self.factor)
        return MaskedMap(dense, self.cells, self.factor, is_gathered=False, last=self.last)

    def zeroed(self) -> MaskedMap:
        """The same map with zeros at masked places, where a function may have left something else."""
        if self.is_gathered or self.cells.full:
            return self
        storage = zeroed(self.stored, self.cells, self.factor)
        return MaskedMap(storage, self.cells, self.factor, is_gathered=False, last=self.last)

    @property
    def unmasked(self) -> bool:
        """Whether it is the ordinary map: nothing is masked, and it is stored as such."""
        return self.cells.full and not self.is_gathered

    @property
    def channel_axis(self) -> int:
        return 3 if self.last else 1

    @property
    def spatial_axes(self) -> tuple[int, int]:
        return (1, 2) if self.last else (2, 3)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from unlabeled.ssl.backbones.masked.sparse.functions import apply_function  # its rules build MaskedMaps

        return apply_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub leaves out the function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} reached the storage of a masked map without a rule")


def zeroed(dense: Tensor, cells: Cells, factor: Factor) -> Tensor:
    """(B, C, H, W) with zeros at masked places, whatever stood there (also NaN)."""
    return dense if cells.full else torch.where(cells.active(factor), dense, 0.0)
