"""The training steps of masked image models as their authors' code executes them, on the parameters of our own tasks.

Each module has one function ``original_loss(task, images, noise)``: the loss of `task` for normalized images
(B, 3, H, W) under the masks that `noise` (B, L) makes, the same number as ``task({"image": images}, noise=noise)``.
Only the way there differs: dense maps where ours has rows, attention without a fused kernel, every token to the end.
They were written from the papers' method and from measurements, not from the authors' sources.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from unlabeled.ssl.task import PretextTask

OriginalLoss = Callable[[PretextTask, Tensor, Tensor], Tensor]


def original_loss(task: str) -> OriginalLoss:
    """The original execution of the task of that name."""
    found: OriginalLoss = importlib.import_module(f"benchmarks.originals.{task}").original_loss
    return found
