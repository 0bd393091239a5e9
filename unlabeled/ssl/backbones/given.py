"""Networks that are given from Python: what can be trained, a copy of it, and what a run's folder says of it.

A given network is taken as it is: its weights are where training starts, a task draws none of them anew unless it is
told to, and parameters that are frozen stay frozen. The run works on a copy, so that the same call again starts (or
goes on) from the same weights.
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
from unlabeled.ssl.backbones.weights import describe, export_files, fill_whole
from unlabeled.ssl.config.schema import BackboneConfig
from unlabeled.ssl.core.distributed import gather_lists, world_size
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError, first_line
from unlabeled.ssl.core.plain import plain

_LAZY = (UninitializedParameter, UninitializedBuffer)

log = logging.getLogger(__name__)


def adopt(given: nn.Module, *, alongside: str | Path | None = None) -> Backbone:
    """A copy of `given`, an ``nn.Module`` with timm's surface or a `Backbone`, on the CPU and ready to be trained.

    `alongside`: an export whose weights a bare module is to receive; it then sees images of the size that is named
    there. Raises CapabilityError, in one line, for a module that cannot be trained or copied, ConfigError for one that
    does not take images of its size.
    """
    backbone = given if isinstance(given, Backbone) else None
    model = getattr(given, "_orig_mod", given) if backbone is None else backbone.model  # what torch.compile wraps
    name = type(model).__name__ if backbone is None else backbone.name
    _check_tensors(model, name)
    if backbone is None:
        described = describe(alongside) if alongside is not None and export_files(alongside)[1].is_file() else None
        size, mean, std = (described.size, described.mean, described.std) if described else (None, None, None)
        backbone = Backbone(model, size=size, mean=mean, std=std)
        log.info("backbone: %s as it is given, on images of %dx%d", name, *backbone.input_size)
    try:
        own = copy.deepcopy(backbone)
    except Exception as error:  # __deepcopy__ and __reduce__ raise whatever they like
        raise CapabilityError(f"backbone: {name} cannot be copied ({first_line(error)})") from error
    own.trained = True
    return own.cpu()


def load_into(given: nn.Module, path: str | Path) -> Backbone:
    """A copy of `given` with the weights of the export at `path`, which were trained in such a network.

    Raises what `adopt` raises, and CheckpointError when the files are missing or do not fit the network.
    """
    return fill_adopted(adopt(given, alongside=path), path)


def fill_adopted(backbone: Backbone, path: str | Path) -> Backbone:
    """`backbone` with the weights of the export at `path` and the statistics of the images that are named there."""
    described = describe(path)
    backbone.set_statistics(described.mean, described.std)
    fill_whole(backbone, path)
    return backbone


def record(backbone: Backbone) -> BackboneConfig:
    """What the settings of a run say of a network that is given."""
    return BackboneConfig(
        name=CUSTOM if backbone.custom else backbone.name,
        size=backbone.input_size,
        kwargs=plain(backbone.kwargs),
        module=backbone.origin,
        fingerprint=fingerprint(backbone),
    )


def fingerprint(backbone: Backbone) -> str:
    """Hash of the names and shapes of all tensors, and of the size, mean and deviation of the images."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in backbone.model.state_dict().items()]
    seen = repr((shapes, backbone.input_size, backbone.mean, backbone.std))
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def require_given(config: BackboneConfig, given: Backbone | None) -> None:
    """Raises ConfigError when `config` is of a network that only Python can build, and it is not given."""
    if given is None and (config.module or config.fingerprint):
        raise ConfigError(
            f"backbone.module: {config.module} is a network that was given from Python; give it again, "
            "unlabeled.pretrain(backbone=module, ...), or leave backbone.module and backbone.fingerprint out"
        )


def require_same_weights(backbone: Backbone) -> None:
    """Raises ConfigError, on all ranks, when processes were given networks with other weights; all must call it."""
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in backbone.model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if len(set(gather_lists([digest.hexdigest()]))) > 1:
        raise ConfigError(
            f"backbone: {backbone.name} has other weights in each process; call torch.manual_seed before it is built"
        )


def require_same_module(out: Path, there: dict[str, Any], here: BackboneConfig | None) -> None:
    """Raises CheckpointError when the run in `out`, of settings `there`, was given another network than `here`."""
    old = there.get("backbone") or {}
    module, print_ = old.get("module"), old.get("fingerprint")
    if module is None:
        return
    if here is None or here.module is None:
        raise CheckpointError(
            f"out: {out} holds a run of {module}, a network that was given from Python; give it again "
            "(backbone=module, or as the target of finetune), or choose another out="
        )
    if here.module != module:
        raise CheckpointError(f"out: {out} holds a run of {module}, not of {here.module}; choose another out=")
    if here.fingerprint != print_:
        raise CheckpointError(
            f"out: {out} holds a run of a {module} with other tensors, size, mean or std; build it as it was, or "
            "choose another out="
        )


def _check_tensors(model: Any, name: str) -> None:
    """Raises CapabilityError unless all weights are there, on one device, in float32, and can be written."""
    if not isinstance(model, nn.Module):
        return  # `Backbone` says so
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    if lazy := [key for key, tensor in tensors.items() if isinstance(tensor, _LAZY)]:
        raise CapabilityError(f"backbone: {name} has no shape for {lazy[0]} yet; pass one image through it first")
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise CapabilityError(f"backbone: {name} has no values for {empty[0]} (device meta); build it on the CPU")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise CapabilityError(f"backbone: {name} lies on several devices ({', '.join(devices)}); call .cpu() on it")
    if other := [
        key for key, one in model.named_parameters() if one.is_floating_point() and one.dtype != torch.float32
    ]:
        raise CapabilityError(f"backbone: {name}'s {other[0]} is {tensors[other[0]].dtype}; call .float() on it")
    if odd := [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise CapabilityError(f"backbone: {name}'s state_dict() has {odd[0]}, no tensor; keep extra state elsewhere")
