"""Faster CPU kernels than those that torch chooses by default.

Two cases, both measured on AMD processors with AVX-512 (``benchmarks/masked.py``):

- Linear layers in float32. On x86, torch passes float32 products to Intel's MKL, which does not use AVX-512 on other
  vendors' processors and then reaches half the speed of oneDNN. (Convolutions and half precision use oneDNN anyway.)
  The results are the same up to the order of summation.
- Attention in bfloat16. torch's blocked kernel is written for Intel's matrix tiles and takes two to five times as long
  as two batched products around a softmax. The latter round the scores to bfloat16, as unfused attention always does.
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
    """Context manager that enables the kernels above if they are faster on `device`, and otherwise does nothing.

    Set `wanted` to True or False to decide yourself. Backward passes may run outside the context.
    """
    return _Kernels() if (_faster_on(device) if wanted is None else wanted and _available()) else nullcontext()


def matrix_product(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the fastest function on `device` from x (M, K) and y (N, K), float32, to x yᵀ (M, N), without gradients.

    Each input must be contiguous or the transpose of a contiguous matrix.
    """
    # oneDNN takes a thousand times as long for any other memory layout
    return (lambda x, y: _product(x, y, None)) if _faster_on(device) else F.linear


def _available() -> bool:
    # `_linear_pointwise` is private and may be missing from other builds of torch
    return bool(cast(Any, torch.backends.mkldnn).is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _faster_on(device: torch.device) -> bool:
    if (
        device.type != "cpu"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not cast(Any, torch.backends.mkl).is_available()
    ):
        return False
    # Linux only: elsewhere the vendor is unknown, and torch's own choice stands
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.is_file() and "AuthenticAMD" in cpu_info.read_text(errors="replace") and _available()


class _Kernels(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # everything that is not one of the two cases passes through unchanged
        if func is F.linear and not kwargs and _is_plain_product(*args):
            return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is F.scaled_dot_product_attention and _is_half_attention(*args, **(kwargs or {})):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_plain_product(x: Tensor, weight: Tensor, *_: Any) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    # under autocast the product is bfloat16, and the compiler chooses kernels itself
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
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])  # (..., N) -> (M, N)
        return (
            _product(gradient, weight.t(), None) if for_x else None,
            _product(flat.t(), x.reshape(-1, x.shape[-1]).t(), None) if for_weight else None,
            flat.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), plus bias (N,) → (..., N)."""
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
    """Whether an attention call runs in bfloat16 and uses only options that `_attention` supports."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or dropout_p or is_causal or enable_gqa:
        return False
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # `_attention` adds masks, so they must be numbers
        return False
    if torch.is_autocast_enabled("cpu"):
        # autocast converts any floating input except float64
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
    query, key, value = (tensor.bfloat16() for tensor in (query, key, value))
    # scaling the queries is cheaper than scaling the (N, M) scores
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask.bfloat16()
    return scores.softmax(-1) @ value
