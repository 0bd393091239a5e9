"""Models passed in from Python: whether they can be trained, a copy to train, and how a run folder records them.

Training starts from the weights of the model you pass. A task reinitializes none of them unless a setting says so, and
frozen parameters stay frozen. The run trains a copy, so that the same call starts (or resumes) from the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from unlabeled.ssl.backbones.backbone import CUSTOM, Backbone
from unlabeled.ssl.backbones.weights import describe, export_files, fill_strictly
from unlabeled.ssl.config.schema import BackboneConfig
from unlabeled.ssl.core.distributed import gather_lists, world_size
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError, first_line
from unlabeled.ssl.core.plain import plain

_LAZY = (UninitializedParameter, UninitializedBuffer)

log = logging.getLogger(__name__)


def adopt(given: nn.Module, *, alongside: str | Path | None = None) -> Backbone:
    """A copy of `given`, an ``nn.Module`` with timm's methods or a `Backbone`, on the CPU and ready to be trained.

    `alongside` is an export that the weights of a bare module will be loaded from; its image size and statistics then
    apply. Raises CapabilityError for a module that cannot be trained or copied, and ConfigError for one that does not
    take images of its size.
    """
    backbone = given if isinstance(given, Backbone) else None
    model = getattr(given, "_orig_mod", given) if backbone is None else backbone.model  # unwraps torch.compile
    name = type(model).__name__ if backbone is None else backbone.name
    _check_tensors(model, name)
    if backbone is None:
        described = describe(alongside) if alongside is not None and export_files(alongside)[1].is_file() else None
        size, mean, std = (described.size, described.mean, described.std) if described else (None, None, None)
        backbone = Backbone(model, size=size, mean=mean, std=std)
        log.info("backbone: %s as passed in, on images of %dx%d", name, *backbone.input_size)
    try:
        own = copy.deepcopy(backbone)
    except Exception as error:  # __deepcopy__ and __reduce__ may raise anything
        raise CapabilityError(f"backbone: {name} cannot be copied ({first_line(error)})") from error
    own.trained = True  # even if its weights are random: a task must not reinitialize what the caller built
    return own.cpu()


def load_into(given: nn.Module, path: str | Path) -> Backbone:
    """A copy of `given` with the weights of the export at `path`, which must come from the same architecture.

    Raises what `adopt` raises, and CheckpointError when the files are missing or do not fit the model.
    """
    return fill_adopted(adopt(given, alongside=path), path)


def fill_adopted(backbone: Backbone, path: str | Path) -> Backbone:
    """`backbone` with the weights and the image statistics of the export at `path`."""
    described = describe(path)
    backbone.set_statistics(described.mean, described.std)
    fill_strictly(backbone, path)
    return backbone


def record(backbone: Backbone) -> BackboneConfig:
    """The `backbone` section of the settings of a run whose backbone was passed in from Python."""
    return BackboneConfig(
        name=CUSTOM if backbone.custom else backbone.name,
        size=backbone.input_size,
        kwargs=plain(backbone.kwargs),
        module=backbone.origin,
        fingerprint=fingerprint(backbone),
    )


def fingerprint(backbone: Backbone) -> str:
    """Hash of the names and shapes of all tensors, and of the image size, mean and standard deviation."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in backbone.model.state_dict().items()]
    # no values: a resumed run must find the same fingerprint after training
    hashed = repr((shapes, backbone.input_size, backbone.mean, backbone.std))
    return hashlib.sha256(hashed.encode()).hexdigest()[:16]


def require_given(config: BackboneConfig, given: Backbone | None) -> None:
    """Raises ConfigError if `config` describes a model that only Python can build, and none was passed in."""
    if given is None and (config.module or config.fingerprint):
        raise ConfigError(
            f"backbone.module: {config.module} is a model that was passed from Python; pass it again, "
            "unlabeled.pretrain(backbone=module, ...), or leave backbone.module and backbone.fingerprint out"
        )


def require_same_weights(backbone: Backbone) -> None:
    """Raises ConfigError, on all ranks, if ranks were passed models with different weights; all ranks must call it."""
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in backbone.model.state_dict().values():
        # bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(set(gather_lists([digest.hexdigest()]))) > 1:
        raise ConfigError(
            f"backbone: {backbone.name} has different weights in each process; "
            "call torch.manual_seed before you build it"
        )


def require_same_module(out: Path, there: dict[str, Any], here: BackboneConfig | None) -> None:
    """Raises CheckpointError if the run in `out`, with settings `there`, was passed another model than `here`."""
    old = there.get("backbone") or {}
    module, old_fingerprint = old.get("module"), old.get("fingerprint")
    if module is None:
        return
    if here is None or here.module is None:
        raise CheckpointError(
            f"out: {out} holds a run of {module}, a model that was passed from Python; pass it again "
            "(backbone=module, or as the target of finetune), or choose another out="
        )
    if here.module != module:
        raise CheckpointError(f"out: {out} holds a run of {module}, not of {here.module}; choose another out=")
    if here.fingerprint != old_fingerprint:
        raise CheckpointError(
            f"out: {out} holds a run of a {module} with other tensors, size, mean or std; build it as it was, or "
            "choose another out="
        )


def _check_tensors(model: Any, name: str) -> None:
    """Raises CapabilityError unless all tensors have values, are on one device, in float32, and can be saved."""
    if not isinstance(model, nn.Module):
        return  # `Backbone` raises for it
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    if lazy := [key for key, tensor in tensors.items() if isinstance(tensor, _LAZY)]:
        raise CapabilityError(f"backbone: {name} has no shape for {lazy[0]} yet; pass one image through it first")
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise CapabilityError(f"backbone: {name} has no values for {empty[0]} (device meta); build it on the CPU")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise CapabilityError(f"backbone: {name} is spread over devices ({', '.join(devices)}); call .cpu() on it")
    if other := [
        key for key, one in model.named_parameters() if one.is_floating_point() and one.dtype != torch.float32
    ]:
        raise CapabilityError(f"backbone: {name}'s {other[0]} is {tensors[other[0]].dtype}; call .float() on it")
    # extra state (get_extra_state) may be any object, which safetensors cannot store
    if odd := [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise CapabilityError(
            f"backbone: {name}'s state_dict() has {odd[0]}, which is not a tensor; keep extra state elsewhere"
        )
