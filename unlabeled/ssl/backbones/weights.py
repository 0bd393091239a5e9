"""Backbones on disk: plain timm weights that load anywhere, and weights of others that load here.

An export is two files: ``backbone.safetensors``, the state dict of the timm model, and ``backbone.json``, what is
needed to build it, so that ``timm.create_model(name, checkpoint_path=".../backbone.safetensors", **kwargs)`` works
without this package; or the same two under another name. Nothing that could run code is ever unpickled.
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
"""Where others keep the state dict inside their checkpoint, in the order in which it is looked for."""
_PREFIXES = ("module", "_orig_mod", "backbone", "encoder", "encoder_q", "base_encoder", "model", "teacher", "network")
"""What others wrap around the network."""


class LoadReport(NamedTuple):
    """What became of each tensor."""

    loaded: list[str]
    """Names of the backbone that were filled."""
    missing: list[str]
    """Names of the backbone that the file does not have; they keep their values."""
    unexpected: list[str]
    """Names of the file, as they stand there, that the backbone has no place for, such as a classifier's."""
    reshaped: list[str]
    """Names among `loaded` whose tensors were resampled to another shape, such as position tables."""


class Description(NamedTuple):
    """What the JSON file of an export says."""

    name: str
    kwargs: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    elastic: ElasticConfig | None
    """Which sizes the network holds, if it was trained to hold some."""
    module: str | None
    """``package.module:Class`` of a network that has no timm name."""

    def build(self) -> Backbone:
        """The network with random weights.

        Raises ConfigError for a network that only Python can build, and for arguments that timm does not take.
        """
        how = "build it as it was, and give it: unlabeled.load_backbone(path, module), or backbone=module from Python"
        if self.name == CUSTOM:
            raise ConfigError(f"it is a module of your own ({self.module or 'of an unknown class'}); {how}")
        if (field := objects_in(self.kwargs, "kwargs")) is not None:
            raise ConfigError(f"{field} is an object of Python, which no file holds; {how}")
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.kwargs.items()
        }
        backbone = create_backbone(self.name, size=self.size, **arguments)
        backbone.set_statistics(self.mean, self.std)
        return backbone


def export_backbone(
    backbone: Backbone, path: str | Path, *, elastic: ElasticConfig | None = None, classes: Sequence[str] | None = None
) -> Path:
    """Writes the two files, each atomically; returns the weights' path.

    `path` is a folder (made if need be), or the name of the weights, ``x.safetensors``, beside which lies ``x.json``.
    `elastic` says which sizes the network holds, `classes` what the outputs of a classifier are. The description of a
    network that only Python can build says how to load it. Raises CheckpointError when the disk refuses.
    """
    weights, beside = export_files(path)
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
    # clones, since safetensors refuses tensors that share memory
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(weights, lambda file: save_file(state, file, metadata={"format": "pt"}))
        replace_atomically(beside, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: the backbone cannot be written ({first_line(error)})") from error
    return weights


def _how_to_load(backbone: Backbone, file: str, classes: Sequence[str] | None) -> str:
    """Python that loads the weights `file` of a network that no file can build."""
    if classes is not None:
        made = f"network = unlabeled.create_classifier(module, classes={len(classes)})"
        return f"build a {backbone.origin} as it was, as `module`; {made}; unlabeled.load_weights(network, '{file}')"
    return f"build a {backbone.origin} as it was, as `module`; unlabeled.load_weights(module, '{file}')"


def export_files(path: str | Path) -> tuple[Path, Path]:
    """(weights, description) of an export at `path`, a folder or the name of the weights."""
    path = Path(path)
    if path.suffix == Path(WEIGHTS).suffix and not path.is_dir():
        return path, path.with_suffix(".json")
    return path / WEIGHTS, path / DESCRIPTION


def describe(path: str | Path) -> Description:
    """What the export at `path` says of itself. Raises CheckpointError when there is none or it cannot be read."""
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
    """Builds and fills the backbone at `path`: a run's folder, or what `export_backbone` wrote.

    Raises CheckpointError when the files are missing, unreadable, or do not fit each other.
    """
    file = export_files(path)[1]
    try:
        backbone = describe(path).build()
    except ConfigError as error:
        raise CheckpointError(f"{file}: the backbone cannot be built again: {error}") from error
    fill_whole(backbone, path)
    return backbone


def fill_whole(backbone: Backbone, path: str | Path) -> None:
    """Fills `backbone` with the export at `path`, which has to be of this very network.

    Raises CheckpointError when a tensor is missing, left over, or does not fit.
    """
    weights, file = export_files(path)
    report = load_weights(backbone, weights)
    if faults := report.missing + report.unexpected:
        raise CheckpointError(f"{weights}: does not fit {file.name} in {len(faults)} tensors: {faults[0]}")


def load_weights(backbone: Backbone | nn.Module, path: str | Path) -> LoadReport:
    """Fills `backbone`, or a bare module, from a run folder, a safetensors file or a PyTorch file of tensors (.pth).

    Unwraps what others wrap around a state dict (``model``, ``teacher``, ``module.``, ``encoder.``) and lets timm
    convert foreign layouts and resample positions to the backbone's size.

    Raises CheckpointError when the file is missing or unreadable, when a tensor does not fit, and when not a single
    name does.
    """
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"backbone: {in_short(backbone)} is no nn.Module; build it, and give that")
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    return fill_backbone(backbone, read_tensors(file), str(file))


def fill_backbone(backbone: Backbone | nn.Module, content: State, file: str) -> LoadReport:
    """`load_weights` for tensors that are in memory already; messages name them `file`."""
    model: nn.Module = backbone.model if isinstance(backbone, Backbone) else backbone
    own = not isinstance(backbone, Backbone) or backbone.custom
    called = backbone.name if isinstance(backbone, Backbone) else type(model).__name__
    target = model.state_dict()
    prefix = _prefix(content, target)
    found = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    converted = _convert(found, model)
    state = _without_classifier(converted, model)
    loaded = [name for name in target if name in state]
    if not loaded:
        names = ", ".join(list(content)[:3])
        remedy = "build it as it was" if own else "check backbone.name"
        raise CheckpointError(f"{file}: no tensor ({names}, ...) belongs to {called}; {remedy}")
    for name in loaded:
        ours, theirs = list(target[name].shape), list(state[name].shape)
        if ours != theirs:
            fault = f"{name} has shape {theirs}, {called} needs {ours}"
            remedy = "build it as it was" if own else "check backbone.name, size and kwargs"
            raise CheckpointError(f"{file}: {fault}; {remedy}")
    with modes_kept(model):  # forgets what was computed from the old weights
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
    """The tensors of `file` under their names there, out of whatever container they lie in."""
    if not file.is_file():
        raise CheckpointError(
            f"{file}: there is no such file; give a file of weights or a run folder that holds {WEIGHTS}"
        )
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # settings that many scripts store; inert
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: not a file of tensors, or damaged ({first_line(error, 120)}); save the bare state dict, best as "
            "safetensors"
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors by name; give a state dict")
    return tensors


def _prefix(content: State, target: Mapping[str, Tensor]) -> str:
    """The wrapping, such as ``module.encoder.``, under which most of the backbone's names stand in the file."""
    hits: Counter[str] = Counter()
    for name in content:
        prefix = ""
        while True:
            if name.removeprefix(prefix) in target:
                hits[prefix] += 1
            word, dot, _ = name.removeprefix(prefix).partition(".")
            if not dot or word not in _PREFIXES:
                break
            prefix += word + dot
    if hits:
        return hits.most_common(1)[0][0]
    return "module." if all(name.startswith("module.") for name in content) else ""


def _convert(found: State, model: nn.Module) -> State:
    """`found` as timm's own converter for this architecture makes it, where that fits the backbone better.

    The converter sees once the tensors with the backbone's names (it resamples positions, and reads tokens of other
    methods as a sign of a foreign layout) and once all of them (it renames foreign layouts).
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
    for given in ({name: tensor for name, tensor in found.items() if name in target}, found):
        try:
            converted = convert(dict(given), model)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError):
            continue  # it presumes its authors' layout; what does not fit without it is reported by name
        rest = {} if given is found else {name: tensor for name, tensor in found.items() if name not in target}
        options.append({name: tensor for name, tensor in converted.items() if isinstance(tensor, Tensor)} | rest)
    return max(options, key=fit)


def _without_classifier(state: State, model: nn.Module) -> State:
    """Leaves out a classifier for other classes than the backbone has."""
    target = model.state_dict()
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ([named] if isinstance(named, str) else named))
    return {
        name: tensor
        for name, tensor in state.items()
        if not (heads and name.startswith(heads) and name in target and target[name].shape != tensor.shape)
    }


def _used(name: str, prefix: str, state: State, converted: State, target: Mapping[str, Tensor]) -> bool:
    """Whether the file's tensor `name` went into the backbone, under its own name or the one a converter gave it."""
    short = name.removeprefix(prefix)
    return name.startswith(prefix) and (short not in converted or (short in state and short in target))
