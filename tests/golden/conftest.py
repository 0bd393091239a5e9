"""Golden pairs: numbers that the authors' own code gave, as ``NAME.json`` and ``NAME.safetensors``.

They lie beside this file; the environment variable UNLABELED_GOLDEN_DIR names another folder of the same form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Golden:
    """One pair. `used` collects the names that a test has looked at, so that none is forgotten."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    used: set[str]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with ``prefix/``, without it."""
        return {name.removeprefix(f"{prefix}/"): self[name] for name in self.tensors if name.startswith(f"{prefix}/")}

    def unused(self) -> list[str]:
        return sorted(set(self.tensors) - self.used)

    def assert_close(self, name: str, actual: Tensor, tolerance: float) -> None:
        """Integers equal; floats: largest absolute difference at most `tolerance` of the largest absolute value."""
        assert_close(name, actual, self[name], tolerance)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual = actual.detach().cpu()
    assert tuple(actual.shape) == tuple(expected.shape), f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{name}: integers differ"
        return
    scale = expected.abs().max().item()
    distance = (actual.double() - expected.double()).abs().max().item()
    assert distance <= tolerance * scale, f"{name}: off by {distance:.3e}, largest value {scale:.3e}"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loads a pair by its name."""
    folder = Path(os.environ.get("UNLABELED_GOLDEN_DIR") or Path(__file__).parent)

    def load(name: str) -> Golden:
        meta = json.loads((folder / f"{name}.json").read_text())
        return Golden(meta, load_file(folder / f"{name}.safetensors"), set())

    return load
