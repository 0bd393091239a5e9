"""The feature cache on disk: files named by a hash of everything that the features depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unlabeled.eval.base import FeatureSplit
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.data.source import DecodeError, ImageSource

_SAMPLED = 16
"""Number of images whose pixels enter the identity of a source; reading all of them would take too long."""

log = logging.getLogger(__name__)


def cache_key(**values: Any) -> str:
    """Hash of the keyword arguments (JSON-like values), as a hexadecimal file name."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def weights_identity(backbone: Backbone) -> str:
    """Hash of every tensor of the backbone and of its construction, such as its pooling."""
    digest = hashlib.sha256()
    # YAML gives lists where an exported backbone has tuples
    kwargs = sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in backbone.kwargs.items())
    built = (backbone.name, kwargs, backbone.mean, backbone.std)
    digest.update(repr((*built, type(backbone.model).__qualname__)).encode())
    if backbone.custom:  # its code has no name or version, so its output for a fixed input identifies it
        digest.update(repr((backbone.origin, backbone.model)).encode() + _features_of_noise(backbone))
    for name, value in backbone.state_dict().items():
        # as bytes, since numpy has no bfloat16
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(array.numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _features_of_noise(backbone: Backbone) -> bytes:
    """The pooled features of a fixed noise image."""
    device = next((tensor.device for tensor in backbone.buffers()), torch.device("cpu"))
    noise = torch.randn(1, 3, *backbone.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    with modes_kept(backbone.model):
        return backbone.eval().pooled(noise).cpu().numpy().tobytes()


def data_identity(source: ImageSource) -> str:
    """Hash of a source: its settings, split, image names and labels, and the pixels of a few of its images."""
    digest = hashlib.sha256(type(source).__qualname__.encode())
    digest.update(repr((getattr(source, "config", None), getattr(source, "split", None), source.classes)).encode())
    for index in range(len(source)):
        digest.update(source.describe(index).encode(errors="replace") + b"\0")
    labels = source.labels()
    if labels is not None:
        digest.update(labels.cpu().numpy().tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int)):
        digest.update(_pixels(source, int(index)))
    return digest.hexdigest()


def _pixels(source: ImageSource, index: int) -> bytes:
    try:
        image = source.read(index)
    except DecodeError:
        return b"unreadable"
    return repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()


def load_split(file: Path) -> FeatureSplit | None:
    """The cached features in `file`; None if it does not exist or is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("features", "labels", "indices")}
            skipped = json.loads((opened.metadata() or {})["skipped"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        log.warning("cached features in %s are damaged (%s) and will be recomputed", file, error)
        return None
    return FeatureSplit(tensors["features"], tensors["labels"], tensors["indices"], tuple(skipped))


def save_split(file: Path, split: FeatureSplit) -> None:
    """Writes `split` to `file` atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    indices = np.arange(len(split)) if split.indices is None else split.indices
    tensors: Mapping[str, Any] = {
        "features": np.ascontiguousarray(split.features),
        "labels": np.ascontiguousarray(split.labels),
        "indices": np.ascontiguousarray(indices),
    }
    # a process that is killed, or another one that reads, must not meet a partial file
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(dict(tensors), str(partial), metadata={"skipped": json.dumps(split.skipped)})
    os.replace(partial, file)
