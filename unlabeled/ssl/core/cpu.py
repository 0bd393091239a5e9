"""Kernels that some CPUs have faster ways to than the ones torch chooses by itself.

Two cases, both measured on AMD processors with AVX-512 (``benchmarks/masked.py``):

- Linear layers in float32. torch gives float32 products on x86 to Intel's MKL, which on other makers' processors leaves
  AVX-512 unused and then reaches half of what oneDNN does (convolutions and half precision go to oneDNN anyway). The
  numbers are the same up to the order of summation.
- Attention in bfloat16. torch's blocked kernel, written for Intel's matrix tiles, takes two to five times as long as
  two batched products around a softmax. These round the scores to bfloat16, as unfused attention does everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def cpu_kernels(device: torch.device, wanted: bool | None = None) -> AbstractContextManager[Any]:
    """A context in which the kernels above are used where they are faster on `device`; else one of no effect.

    `wanted` True or False decides instead. Backward passes may run outside of the context.
    """
    return _Kernels() if (_faster_on(device) if wanted is None else wanted and _available()) else nullcontext()


def matrix_product(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The faster way on `device` from x (M, K) and y (N, K), float32, to x yᵀ (M, N); without gradients.

    Each may be contiguous or the transpose of a contiguous matrix. (oneDNN takes a thousand times as long for others.)
    """
    return (lambda x, y: _product(x, y, None)) if _faster_on(device) else F.linear


def _available() -> bool:
    return bool(cast(Any, torch.backends.mkldnn).is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _faster_on(device: torch.device) -> bool:
    if (
        device.type != "cpu"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not cast(Any, torch.backends.mkl).is_available()
    ):
        return False
    listing = Path("/proc/cpuinfo")
    return listing.is_file() and "AuthenticAMD" in listing.read_text(errors="replace") and _available()


class _Kernels(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _is_plain_product(*args):
            return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is F.scaled_dot_product_attention and _is_half_attention(*args, **(kwargs or {})):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_plain_product(x: Tensor, weight: Tensor, *_: Any) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    """x (..., K), weight (N, K) and bias (N,) or None → (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), gradient = cast(tuple[Tensor, Tensor], ctx.saved_tensors), gradients[0]
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if of_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) times the transpose of (N, K)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_half_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether an attention is to be computed in bfloat16, and `_attention` can."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or dropout_p or is_causal or enable_gqa:
        return False
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and query.dtype != torch.float64
    return query.dtype == torch.bfloat16


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    scale: float | None = None,
    **__: Any,
) -> Tensor:
    """Queries (..., N, d), keys (..., M, d), values (..., M, D), bias broadcast to (..., N, M) → (..., N, D)."""
    query, key, value = (one.bfloat16() for one in (query, key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask.bfloat16()
    return scores.softmax(-1) @ value
