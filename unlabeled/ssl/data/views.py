"""The type of a task's views: the transform of an image of a source into the input of the task."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Views = Callable[[Tensor], dict[str, Tensor]]
"""Function from an image, uint8 (3, H, W) of any size, to tensors of fixed shape by name."""
