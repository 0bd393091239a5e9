"""What a checkpoint holds of a run in progress, and when one is due."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from unlabeled.ssl.core.distributed import world_size
from unlabeled.ssl.core.errors import CheckpointError, first_line
from unlabeled.ssl.train.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from unlabeled.ssl.train.monitor import Meter

logger = logging.getLogger(__name__)


class Saver:
    """Saves and restores model, optimizer, loss scale and meter; under FSDP their full, unsharded state.

    Nothing else is needed: rates, data order and all randomness are functions of the step.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        optimizer: Any,
        every_steps: int,
        total_steps: int,
        keep: int,
    ) -> None:
        self.folder = folder / "checkpoints"
        self.every_steps, self.total_steps, self.keep = every_steps, total_steps, keep
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        """Whether parameters are split over ranks (FSDP)."""

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0 or step == self.total_steps

    def newest(self) -> Path | None:
        return last_checkpoint(self.folder)

    def save(self, step: int, meter: Meter) -> None:
        """Writes checkpoint `step` from the main process. Raises CheckpointError, on every rank, when that fails."""
        model, optimizer = self.whole_model(), self._whole_optimizer()
        scaler = self._accelerator.scaler
        state = {
            "step": step,
            "world": self._accelerator.num_processes,
            "meter": meter.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        failure: CheckpointError | None = None
        if self._accelerator.is_main_process:
            try:
                save_checkpoint(self.folder, step, model=model, optimizer=optimizer, state=state, keep=self.keep)
            except CheckpointError as error:
                failure = error
        if (shared := self._share(failure)) is not None:
            raise shared

    def load(self, path: Path, meter: Meter) -> int:
        """Restores everything from checkpoint `path` and returns its step."""
        model, optimizer, state = load_checkpoint(path)
        try:
            if self.sharded:
                options = StateDictOptions(full_state_dict=True, strict=True)
                set_model_state_dict(self._model, dict[str, Any](model), options=options)
                set_optimizer_state_dict(self._model, self._optimizer.optimizer, optimizer, options=options)
            else:
                self._accelerator.unwrap_model(self._model).load_state_dict(model)
                self._optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint: {path} does not fit this run ({first_line(error)}); choose another out="
            ) from None
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        meter.load_state_dict(state["meter"])
        if state["world"] != self._accelerator.num_processes:
            logger.warning(
                "resumed with %d processes instead of %d: the same images per step, but other random numbers",
                self._accelerator.num_processes,
                state["world"],
            )
        return int(state["step"])

    def whole_model(self) -> dict[str, Any]:
        """The task's state dict, gathered on the main process if it is sharded; all ranks must call it."""
        if self.sharded:
            return get_model_state_dict(self._model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        state: dict[str, Any] = self._accelerator.unwrap_model(self._model).state_dict()
        return state

    def _whole_optimizer(self) -> dict[str, Any]:
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_optimizer_state_dict(self._model, self._optimizer.optimizer, options=options)
        state: dict[str, Any] = self._optimizer.state_dict()
        return state

    def _share(self, failure: CheckpointError | None) -> CheckpointError | None:
        """The main process's failure, on every rank, so that all stop together."""
        if world_size() == 1:
            return failure
        carried = [failure]
        dist.broadcast_object_list(carried, src=0)
        return carried[0]
