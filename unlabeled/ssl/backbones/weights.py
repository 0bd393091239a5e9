"""Backbones on disk: exported timm weights that load anywhere, and weights of other projects that load here.

An export is two files: ``backbone.safetensors``, the state dict of the timm model, and ``backbone.json``, the arguments
to build it, so that ``timm.create_model(name, checkpoint_path=".../backbone.safetensors", **kwargs)`` works without
this package. Both may have another name. Nothing is unpickled that could run code.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import CUSTOM, Backbone, create_backbone
from unlabeled.ssl.backbones.elastic.config import ElasticConfig
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.config.messages import in_short
from unlabeled.ssl.core.errors import CheckpointError, ConfigError, first_line
from unlabeled.ssl.core.files import replace_atomically
from unlabeled.ssl.core.plain import objects_in, plain

WEIGHTS = "backbone.safetensors"
DESCRIPTION = "backbone.json"

State = dict[str, Tensor]

_CONTAINERS = ("state_dict", "model", "module", "teacher", "student", "network")
"""Keys that hold the state dict inside the checkpoints of other projects, tried in this order."""
_PREFIXES = ("module", "_orig_mod", "backbone", "encoder", "encoder_q", "base_encoder", "model", "teacher", "network")
"""Names of attributes that wrap the backbone in other projects, and so begin its tensors' names."""


class LoadReport(NamedTuple):
    """What happened to each tensor."""

    loaded: list[str]
    """Backbone tensors that were filled."""
    missing: list[str]
    """Backbone tensors that are not in the file; they keep their values."""
    unexpected: list[str]
    """Tensors of the file, by their names there, that the backbone does not have, such as a classifier's."""
    reshaped: list[str]
    """Tensors among `loaded` that were resampled to another shape, such as position tables."""


class Description(NamedTuple):
    """The contents of an export's JSON file."""

    name: str
    kwargs: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    elastic: ElasticConfig | None
    """Settings of the sub-networks, for a backbone trained as elastic."""
    module: str | None
    """``package.module:Class`` of a model without a timm name."""

    def build(self) -> Backbone:
        """The backbone with random weights.

        Raises ConfigError for a model that only Python can build, and for arguments that timm does not take.
        """
        how = "build it as it was, and pass it: unlabeled.load_backbone(path, module), or backbone=module from Python"
        if self.name == CUSTOM:
            raise ConfigError(f"it is a module of your own ({self.module or 'of an unknown class'}); {how}")
        if (field := objects_in(self.kwargs, "kwargs")) is not None:
            raise ConfigError(f"{field} is a Python object, which a file cannot hold; {how}")
        # JSON has no tuples, and some timm models require them
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.kwargs.items()
        }
        backbone = create_backbone(self.name, size=self.size, **arguments)
        backbone.set_statistics(self.mean, self.std)
        return backbone


def export_backbone(
    backbone: Backbone, path: str | Path, *, elastic: ElasticConfig | None = None, classes: Sequence[str] | None = None
) -> Path:
    """Writes the weights and their description, each atomically; returns the path of the weights.

    `path` is a folder (created if needed) or the name of the weights, ``x.safetensors``, with ``x.json`` next to it.
    `elastic` records the sizes of an elastic backbone, `classes` the names of a classifier's outputs. For a model that
    only Python can build, the description explains how to load it. Raises CheckpointError when writing fails.
    """
    weights, description_file = export_files(path)
    kwargs = plain(backbone.kwargs)
    description: dict[str, Any] = {
        "name": CUSTOM if backbone.custom else backbone.name,
        "kwargs": kwargs,
        "size": list(backbone.input_size),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "embed_dim": backbone.embed_dim,
        "versions": {package: version(package) for package in ("timm", "torch", "safetensors")},
    }
    if elastic is not None:
        description["elastic"] = elastic.model_dump(mode="json")
    if classes is not None:
        description["classes"] = list(classes)
    if backbone.custom or objects_in(kwargs, "kwargs") is not None:
        description |= {"module": backbone.origin, "load": _how_to_load(backbone, weights.name, classes)}
    text = json.dumps(description, indent=2) + "\n"
    # clones, since safetensors rejects tensors that share memory
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(weights, lambda file: save_file(state, file, metadata={"format": "pt"}))
        replace_atomically(description_file, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: the backbone cannot be written ({first_line(error)})") from error
    return weights


def _how_to_load(backbone: Backbone, file: str, classes: Sequence[str] | None) -> str:
    """Instructions to load the weights `file` of a model that no file can build."""
    if classes is not None:
        build = f"model = unlabeled.create_classifier(module, classes={len(classes)})"
        return f"build a {backbone.origin} as it was, as `module`; {build}; unlabeled.load_weights(model, '{file}')"
    return f"build a {backbone.origin} as it was, as `module`; unlabeled.load_weights(module, '{file}')"


def export_files(path: str | Path) -> tuple[Path, Path]:
    """(weights, description) of an export at `path`, which is a folder or the name of the weights file."""
    path = Path(path)
    if path.suffix == Path(WEIGHTS).suffix and not path.is_dir():
        return path, path.with_suffix(".json")
    return path / WEIGHTS, path / DESCRIPTION


def describe(path: str | Path) -> Description:
    """Reads the description of the export at `path`. Raises CheckpointError if it is missing or cannot be read."""
    _, file = export_files(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Description(
            name=str(found["name"]),
            kwargs=dict(found["kwargs"]),
            size=(int(found["size"][0]), int(found["size"][1])),
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            elastic=ElasticConfig.model_validate(found["elastic"]) if found.get("elastic") else None,
            module=found.get("module"),
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no {file.name}; give a run folder or an exported backbone") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a description of a backbone ({type(error).__name__}: {first_line(error)})"
        ) from error


def load_backbone(path: str | Path) -> Backbone:
    """Builds the backbone at `path`, a run folder or an export, and loads its weights.

    Raises CheckpointError when the files are missing, unreadable, or do not match each other.
    """
    file = export_files(path)[1]
    try:
        backbone = describe(path).build()
    except ConfigError as error:
        raise CheckpointError(f"{file}: the backbone cannot be rebuilt: {error}") from error
    fill_strictly(backbone, path)
    return backbone


def fill_strictly(backbone: Backbone, path: str | Path) -> None:
    """Loads the export at `path` into `backbone`, which must be of the same architecture.

    Raises CheckpointError when a tensor is missing, left over, or of another shape.
    """
    weights, file = export_files(path)
    report = load_weights(backbone, weights)
    if faults := report.missing + report.unexpected:
        raise CheckpointError(f"{weights}: does not fit {file.name} in {len(faults)} tensors: {faults[0]}")


def load_weights(backbone: Backbone | nn.Module, path: str | Path) -> LoadReport:
    """Loads weights into `backbone`, or a bare module, from a run folder, a safetensors file or a PyTorch file (.pth).

    Unwraps what other projects wrap around a state dict (``model``, ``teacher``, ``module.``, ``encoder.``) and lets
    timm convert foreign layouts and resample positions to the backbone's size.

    Raises CheckpointError when the file is missing or unreadable, when a tensor has another shape, and when no tensor
    belongs to the backbone.
    """
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"backbone: {in_short(backbone)} is not an nn.Module; build it, and give that")
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    return fill_backbone(backbone, read_tensors(file), str(file))


def fill_backbone(backbone: Backbone | nn.Module, content: State, file: str) -> LoadReport:
    """`load_weights` for tensors that are already in memory; `file` is their source, for messages."""
    model: nn.Module = backbone.model if isinstance(backbone, Backbone) else backbone
    custom = not isinstance(backbone, Backbone) or backbone.custom
    model_name = backbone.name if isinstance(backbone, Backbone) else type(model).__name__
    # unwrap, convert, and drop a classifier of another size
    target = model.state_dict()
    prefix = _prefix(content, target)
    found = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    converted = _convert(found, model)
    state = _without_classifier(converted, model)
    loaded = [name for name in target if name in state]
    # a file that fits in no name, or in no shape, is the wrong file: nothing has been loaded yet
    if not loaded:
        names = ", ".join(list(content)[:3])
        remedy = "build it as it was" if custom else "check backbone.name"
        raise CheckpointError(f"{file}: no tensor ({names}, ...) belongs to {model_name}; {remedy}")
    for name in loaded:
        ours, theirs = list(target[name].shape), list(state[name].shape)
        if ours != theirs:
            fault = f"{name} has shape {theirs}, {model_name} needs {ours}"
            remedy = "build it as it was" if custom else "check backbone.name, size and kwargs"
            raise CheckpointError(f"{file}: {fault}; {remedy}")
    with modes_kept(model):  # entering train mode clears tables that were computed from the old weights
        # not strict: a method's checkpoint may leave the last norm or the head out, and the report lists them
        model.load_state_dict({name: state[name] for name in loaded}, strict=False)
    if isinstance(backbone, Backbone):
        backbone.trained = True
    return LoadReport(
        loaded=loaded,
        missing=[name for name in target if name not in state],
        unexpected=[name for name in content if not _used(name, prefix, state, converted, target)],
        reshaped=[name for name in loaded if name in found and found[name].shape != state[name].shape],
    )


def read_tensors(file: Path) -> State:
    """The tensors in `file`, by name, taken out of any container such as ``state_dict`` or ``model``."""
    if not file.is_file():
        raise CheckpointError(
            f"{file}: there is no such file; give a file of weights or a run folder that holds {WEIGHTS}"
        )
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # many scripts store their settings so; inert
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: not a file of tensors, or damaged ({first_line(error, 120)}); save the bare state dict, best as "
            "safetensors"
        ) from error
    # containers may be nested, such as {"model": {"state_dict": ...}}
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{file}: holds no named tensors; give a state dict")
    return tensors


def _prefix(content: State, target: Mapping[str, Tensor]) -> str:
    """The prefix, such as ``module.encoder.``, that most of the backbone's tensors have in the file."""
    hits: Counter[str] = Counter()
    for name in content:
        prefix = ""
        # try the name with each further wrapper removed
        while True:
            if name.removeprefix(prefix) in target:
                hits[prefix] += 1
            wrapper, dot, _ = name.removeprefix(prefix).partition(".")
            if not dot or wrapper not in _PREFIXES:
                break
            prefix += wrapper + dot
    if hits:
        return hits.most_common(1)[0][0]
    # foreign layouts have no name in common with the backbone before `_convert` renames them
    return "module." if all(name.startswith("module.") for name in content) else ""


def _convert(found: State, model: nn.Module) -> State:
    """`found` after timm's own converter for this architecture, if that makes more tensors fit the backbone.

    The converter runs twice: on the tensors with the backbone's names, to resample positions (it would take a method's
    extra tokens for a foreign layout), and on all of them, to rename foreign layouts.
    """
    target = model.state_dict()
    convert: Callable[[State, Any], State] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )

    def fit(state: State) -> int:
        return sum(name in state and state[name].shape == tensor.shape for name, tensor in target.items())

    if convert is None or fit(found) == len(target):
        return found
    options = [found]
    for attempt in ({name: tensor for name, tensor in found.items() if name in target}, found):
        try:
            converted = convert(dict(attempt), model)  # a copy: some converters change their argument
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError):
            continue  # it expects its authors' layout; tensors that do not fit are reported by name later
        rest = {} if attempt is found else {name: tensor for name, tensor in found.items() if name not in target}
        options.append({name: tensor for name, tensor in converted.items() if isinstance(tensor, Tensor)} | rest)
    return max(options, key=fit)  # of equals the first, so unchanged tensors win


def _without_classifier(state: State, model: nn.Module) -> State:
    """`state` without a classifier that has another number of classes than the backbone's."""
    target = model.state_dict()
    # timm names one classifier, or several for models with a distillation head
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ([named] if isinstance(named, str) else named))
    return {
        name: tensor
        for name, tensor in state.items()
        if not (heads and name.startswith(heads) and name in target and target[name].shape != tensor.shape)
    }


def _used(name: str, prefix: str, state: State, converted: State, target: Mapping[str, Tensor]) -> bool:
    """Whether the file's tensor `name` was loaded, under its own name or one that a converter gave it."""
    short = name.removeprefix(prefix)
    return name.startswith(prefix) and (short not in converted or (short in state and short in target))
