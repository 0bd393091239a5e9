"""What turns an image of a source into what a task sees of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Views = Callable[[Tensor], dict[str, Tensor]]
"""Image, uint8 (3, H, W) of any size → tensors of fixed shape by name."""
