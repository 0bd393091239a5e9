"""Checkpoints that are either complete or absent.

A checkpoint is a folder ``checkpoints/step_00000120`` with ``model.safetensors`` (parameters and buffers of the task),
``optimizer.pt`` and ``state.json``. It is written under a temporary name, flushed to disk, and renamed; then the file
``checkpoints/last`` is updated to name it. A crash at any time leaves the previous checkpoint intact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlabeled.ssl.core.errors import CheckpointError, first_line
from unlabeled.ssl.core.files import flush, write_atomically

_PREFIX = "step_"


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint `step` under `folder` and removes all but the newest `keep`; returns its path.

    Raises CheckpointError if it cannot be written; earlier checkpoints are then still in place.
    """
    target, partial = folder / f"{_PREFIX}{step:08d}", folder / f".partial_{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_unshared(model), partial / "model.safetensors")
        torch.save(dict(optimizer), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(dict(state)))
        # the order matters: content on disk, then the name, then the pointer, so that `last` never names a torso
        for path in partial.iterdir():
            flush(path)
        if target.exists():  # the same step, written again after a resume from an earlier checkpoint
            shutil.rmtree(target)
        partial.rename(target)
        write_atomically(folder / "last", target.name)
        flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: step {step} could not be written to {folder} ({first_line(error)}); "
            "make room or choose another out=, then run the same command again: it resumes from the last checkpoint"
        ) from None
    _prune(folder, keep)  # after `last` names the new one
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(model, optimizer, state) of the checkpoint folder `path`. Raises CheckpointError if it cannot be read."""
    try:
        # to the CPU: a checkpoint of one device must load on any other
        model = load_file(path / "model.safetensors")
        optimizer: dict[str, Any] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except Exception as error:  # a damaged file raises anything from SafetensorError to pickle's errors
        others = [other.name for other in complete(path.parent) if other != path]
        remedy = (
            f"write '{others[-1]}' into {path.parent / 'last'} to continue from there"
            if others
            else "start again in another out="
        )
        raise CheckpointError(f"checkpoint: {path} cannot be read ({first_line(error)}); {remedy}") from None
    return model, optimizer, state


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``last`` names, or the newest complete one if ``last`` is missing; None without checkpoints.

    Raises CheckpointError if ``last`` names a checkpoint that does not exist.
    """
    pointer = folder / "last"
    if pointer.is_file():
        named = folder / pointer.read_text().strip()
        if not named.is_dir():
            raise CheckpointError(f"checkpoint: {pointer} names {named.name}, which is missing; correct or delete it")
        return named
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    # zero-padded step numbers sort by name
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, since safetensors refuses tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _prune(folder: Path, keep: int) -> None:
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for partial in folder.glob(".partial_*"):
        shutil.rmtree(partial, ignore_errors=True)
