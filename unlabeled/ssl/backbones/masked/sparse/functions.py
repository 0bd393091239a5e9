"""Rules for the functions of torch that the code of blocks calls on masked maps, by name.

A function without a rule is refused: nothing that could mix visible and masked places, or count masked ones, passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unlabeled.ssl.backbones.masked.sparse.convolution import convolve, on_dense
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap, NoRuleError, OrderError

Function = Callable[..., Any]
Rule = Callable[[Function, str, tuple[Any, ...], dict[str, Any]], Any]


def apply_function(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``__torch_function__`` of a masked map does. Raises NoRuleError for a function without a rule."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property, such as x.shape
        return _property(func, args[0])
    if name in _METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return _in_place(name, args, kwargs)
    rule = _RULES.get(name.removeprefix("__").removesuffix("__"))
    if rule is None:
        if name in _REARRANGING:
            raise OrderError(f"{name} puts its places into another order")
        raise NoRuleError(f"{name} has no masked form")
    return rule(func, name, args, kwargs)


def _property(func: Any, x: MaskedMap) -> Any:
    name = func.__self__.__name__
    if name in {"requires_grad", "is_leaf", "grad_fn"}:
        return getattr(x.stored, name)
    if name in {"T", "mT", "data"}:
        raise NoRuleError(f"{name} has no masked form")
    with torch._C.DisableTorchFunctionSubclass():
        return func(x)


def _in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """``x.add_(y)``: as ``x + y``, then `x` itself holds the result."""
    x = args[0]
    if not isinstance(x, MaskedMap):
        raise NoRuleError(f"{name} of a plain tensor by a masked map has no masked form")
    plain = getattr(torch, name[:-1], None)
    if plain is None:
        raise NoRuleError(f"{name} has no masked form")
    result: MaskedMap = apply_function(plain, args, kwargs)
    x.stored = result.stored
    return x


def _pointwise(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """Functions of each place by itself: they run on either storage. Plain operands must be the same at all places."""
    first = _first_map(args)
    maps = [one for one in _flat(args) if isinstance(one, MaskedMap)]
    if any(one.cells is not first.cells or one.factor != first.factor or one.last != first.last for one in maps):
        raise NoRuleError(f"{name} of maps of different masks or sizes has no masked form")
    result: MaskedMap = first.from_shown(func(*_storages(args, first), **kwargs))
    name = name.strip("_")
    zero = name in _ZERO_STAYS or (name in _SUMS and all(isinstance(one, MaskedMap) for one in _flat(args)))
    return result if zero else result.zeroed()


def _statistic(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """Functions that normalize by statistics over places: they see the visible ones only."""
    x: MaskedMap = args[0]
    rest = args[1:]
    if x.last:
        raise NoRuleError(f"{name} of a map with channels last has no masked form")
    if x.unmasked:
        return x.from_shown(func(x.stored, *rest, **kwargs))
    return x.with_gathered(func(x.gathered(), *rest, **kwargs))


def _reduction(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Over both spatial axes: over visible places, a plain tensor. Over channels: a map, place by place."""
    x: MaskedMap = args[0]
    given = kwargs.get("dim", args[1] if len(args) > 1 and name != "norm" else args[2] if len(args) > 2 else None)
    if given is None:
        raise NoRuleError(f"{name} over everything has no masked form")
    axes = {axis % 4 for axis in ((given,) if isinstance(given, int) else given)}
    if axes == set(x.spatial_axes):
        tensor: Tensor = func(x.as_shown(gathered=not x.unmasked), *args[1:], **kwargs)
        return tensor
    keeps = kwargs.get("keepdim", bool(args[2]) if len(args) > 2 and name != "norm" else False)
    if axes == {x.channel_axis} and keeps:
        result = func(x.as_shown(), *args[1:], **kwargs)
        return x.from_shown(result if isinstance(result, Tensor) else result[0]).zeroed()
    raise NoRuleError(f"{name} over axes {sorted(axes)} has no masked form")


def _adaptive_pool(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: MaskedMap = args[0]
    size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
    if x.last or size not in (1, (1, 1), [1, 1]):
        raise NoRuleError(f"{name} to {size} places has no masked form")
    pooled: Tensor = func(x.as_shown(gathered=not x.unmasked), *args[1:], **kwargs)
    return pooled


def _concatenate(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    maps = list(args[0])
    axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    first = _first_map(maps)
    if axis % 4 != first.channel_axis:
        raise NoRuleError(f"{name} along axis {axis} has no masked form")
    return _pointwise(lambda *parts: torch.cat(parts, axis), "cat", tuple(maps), {})


def _split(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[MaskedMap, ...]:
    x: MaskedMap = args[0]
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if axis % 4 != x.channel_axis:
        raise NoRuleError(f"{name} along axis {axis} has no masked form")
    return tuple(x.from_shown(part) for part in func(x.as_shown(), *args[1:], **kwargs))


def _select(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """``x[:, a:b]``: a range of channels."""
    x: MaskedMap = args[0]
    index = args[1]
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        position = index.index(Ellipsis)
        index = (*index[:position], *[slice(None)] * (5 - len(index)), *index[position + 1 :])
    unmasked = all(one == slice(None) for axis, one in enumerate(index) if axis != x.channel_axis)
    if not unmasked or not all(isinstance(one, slice) for one in index):
        raise NoRuleError("taking a part of the places of a map has no masked form")
    return x.from_shown(x.as_shown()[index])


def _permute(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    x: MaskedMap = args[0]
    given = kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
    order = tuple(axis % 4 for axis in given)
    if order != ((0, 3, 1, 2) if x.last else (0, 2, 3, 1)):
        raise NoRuleError(f"permute to {order} has no masked form")
    return MaskedMap(x.stored, x.cells, x.factor, is_gathered=x.is_gathered, last=not x.last)


def _contiguous(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    x: MaskedMap = args[0]
    return x


def _conv2d(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    return convolve(*args, **kwargs)


def _spatial(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    x, *rest = args
    return on_dense(x, lambda dense: func(dense, *rest, **kwargs))


def _pad(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """Zeros around a map, for the spatial layer that comes next."""
    x: MaskedMap = args[0]
    mode, value = kwargs.get("mode", "constant"), kwargs.get("value")
    if x.last or x.border is not None or mode != "constant" or value:
        raise NoRuleError("pad other than with zeros around a map has no masked form")
    return x.with_border(tuple(kwargs.get("pad", args[1] if len(args) > 1 else ())))


def _interpolate(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MaskedMap:
    """Nearest neighbors stay inside their cell when the map grows by whole numbers."""
    if kwargs.get("mode", "nearest") != "nearest":
        raise NoRuleError(f"interpolation ({kwargs['mode']}) mixes cells")
    return _spatial(func, name, args, kwargs)


def _fresh(func: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``x.new_empty(size)``: a plain tensor."""
    tensor: Tensor = func(args[0].stored, *args[1:], **kwargs)
    return tensor


def _flat(args: Any) -> list[Any]:
    return [one for arg in args for one in (_flat(arg) if isinstance(arg, (list, tuple)) else [arg])]


def _first_map(args: Any) -> MaskedMap:
    return next(one for one in _flat(args) if isinstance(one, MaskedMap))


def _storages(args: tuple[Any, ...], first: MaskedMap) -> list[Any]:
    """Operands as the storage of `first` needs them."""
    return [_storage(one, first) if isinstance(one, Tensor) else one for one in args]


def _storage(operand: Tensor, first: MaskedMap) -> Tensor:
    if isinstance(operand, MaskedMap):
        if operand.is_gathered == first.is_gathered:
            return operand.as_shown()
        gathered = operand.gathered() if first.is_gathered else operand.dense()
        return gathered.permute(0, 2, 3, 1) if first.last else gathered
    if not first.is_gathered or operand.ndim < 2:
        return operand
    axes = [axis - 4 for axis in first.spatial_axes]
    if any(operand.ndim >= -axis and operand.shape[axis] > 1 for axis in axes):
        unmasked = torch.broadcast_to(operand, first.shape)  # a table of the unmasked map, such as positions
        dense = unmasked.permute(0, 3, 1, 2) if first.last else unmasked
        gathered = MaskedMap.from_dense(dense, first.cells, first.factor).gathered()
        return gathered.permute(0, 2, 3, 1) if first.last else gathered
    return operand


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METADATA = _names(
    """size dim numel nelement stride is_floating_point is_contiguous __len__ is_complex get_device __hash__ is_sparse
    element_size __repr__ __format__ is_inference"""
)
_REARRANGING = _names("reshape view flatten transpose unfold fold roll unflatten unbind")
_ZERO_STAYS = _names(
    """relu relu6 gelu silu mish hardswish hardtanh tanh leaky_relu prelu elu selu celu softsign softshrink abs neg
    clone to float half bfloat16 double type dropout dropout2d alpha_dropout mul rmul square sqrt sin tan sign cat
    detach clamp_min rms_norm erf"""
)
"""Functions that give 0 for 0, so that a dense map needs no masking afterwards."""
_SUMS = _names("add sub radd")
_POINTWISE = _ZERO_STAYS | _names(
    """add radd sub rsub subtract div truediv rtruediv pow rpow rdiv sigmoid hardsigmoid logsigmoid softplus exp log
    reciprocal rsqrt cos clamp clip clamp_max where addcmul lerp layer_norm linear softmax log_softmax threshold
    normalize logaddexp maximum minimum multiply"""
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(["batch_norm", "group_norm", "instance_norm"], _statistic),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "norm", "var", "std", "logsumexp", "max", "min"], _reduction),
    **dict.fromkeys(["adaptive_avg_pool2d", "adaptive_max_pool2d"], _adaptive_pool),
    **dict.fromkeys(["cat", "concat", "concatenate"], _concatenate),
    **dict.fromkeys(["chunk", "split", "split_with_sizes", "tensor_split"], _split),
    **dict.fromkeys(["max_pool2d", "avg_pool2d", "_max_pool2d", "boolean_dispatch"], _spatial),
    **dict.fromkeys(["new_empty", "new_zeros", "new_ones", "new_tensor", "new_full"], _fresh),
    "getitem": _select,
    "permute": _permute,
    "contiguous": _contiguous,
    "conv2d": _conv2d,
    "interpolate": _interpolate,
    "pad": _pad,
}
