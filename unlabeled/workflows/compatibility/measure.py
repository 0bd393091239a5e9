"""``unlabeled matrix``: finds out which task runs on which architecture, by running each pair once.

Each pair is tried with the smallest model of the architecture and the default settings of the task. The result is
*runs* if a forward and a backward pass give a finite loss and a finite gradient for every trainable parameter, *cannot*
if the task rejects the backbone with a CapabilityError, and *fault* if anything else happens, which is a bug.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from hydra.core.override_parser.types import Override
from pydantic import field_validator
from torch import Tensor

from unlabeled.pretext.registry import create_task, task_class, task_config, task_names
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.config.base import Section
from unlabeled.ssl.config.composition import parse, validate
from unlabeled.ssl.core.errors import CapabilityError, ConfigError, first_line, nearest

_TABLE = Path(__file__).with_name("architectures.json")
_SIZES = (64, 96, 128)
"""Input sizes in pixels, tried in this order for a model that is not in the table; the last resort is its own size."""
_IMAGES = 2
"""Batch size: contrastive losses and batch norms need more than one image."""


class MatrixRun(Section):
    """Tries every task on every architecture of timm and tabulates what runs on what."""

    task: tuple[str, ...] | None = None
    """Tasks to try, one name or a list; null: all."""
    module: tuple[str, ...] | None = None
    """timm's architecture modules to try, such as vision_transformer, one name or a list; null: all."""
    out: Path | None = None
    """Markdown page to write, with its cells as JSON next to it. With `task` or `module`, the other cells of an
    existing page are kept."""
    seed: int = 0
    """Seed of weights and images."""

    @field_validator("out")
    @classmethod
    def _is_a_page(cls, out: Path | None) -> Path | None:
        if out is not None and out.suffix != ".md":
            raise ValueError(f"{out} is not a Markdown file; give a name such as docs/reference/matrix.md")
        return out


class MatrixEntry(NamedTuple):
    """Result of one task on one architecture."""

    status: Literal["runs", "cannot", "fault"]
    reason: str = ""
    """Why it does not run."""


@dataclass
class Matrix:
    """The entries by module and task, and the model that represents each module."""

    timm: str = timm.__version__
    networks: dict[str, str] = field(default_factory=dict)
    """Module → name of the model that was tried, its input size and arguments."""
    entries: dict[str, dict[str, MatrixEntry]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """All tasks that have an entry, sorted."""
        return sorted({task for row in self.entries.values() for task in row})

    def having(self, status: str) -> list[tuple[str, str, str]]:
        """(module, task, reason) of all entries with `status`."""
        return [
            (module, task, entry.reason)
            for module, row in sorted(self.entries.items())
            for task, entry in row.items()
            if entry.status == status
        ]

    def dumps(self) -> str:
        """JSON with one line per module, so that diffs are readable."""
        rows = [
            f"    {json.dumps(module)}: "
            + json.dumps({"network": self.networks[module], **{task: list(row[task]) for task in sorted(row)}})
            for module, row in sorted(self.entries.items())
        ]
        return f'{{\n  "timm": {json.dumps(self.timm)},\n  "modules": {{\n' + ",\n".join(rows) + "\n  }\n}\n"

    @classmethod
    def loads(cls, text: str) -> Matrix:
        """The inverse of `dumps`."""
        stored = json.loads(text)
        networks = {module: row.pop("network") for module, row in stored["modules"].items()}
        entries = {
            module: {task: MatrixEntry(*entry) for task, entry in row.items()}
            for module, row in stored["modules"].items()
        }
        return cls(stored["timm"], networks, entries)

    @classmethod
    def stored_with(cls, page: Path) -> Matrix:
        """The matrix stored with `page`; empty if there is none.

        Raises ConfigError if it cannot be read, or was measured with another version of timm.
        """
        file = page.with_suffix(".json")
        if not file.is_file():
            return cls()
        remedy = "measure all entries again, without task= and module="
        try:
            stored = cls.loads(file.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"out: {file} is not a stored matrix ({error}); {remedy}") from None
        if stored.timm != timm.__version__:
            raise ConfigError(f"out: {file} is for timm {stored.timm}, installed is {timm.__version__}; {remedy}")
        return stored


def matrix_config(overrides: Sequence[str]) -> MatrixRun:
    """Returns the validated settings of ``unlabeled matrix``. Raises ConfigError."""
    values = {override.key_or_group: _value(override) for override in parse(overrides)}
    for name in ("task", "module"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    run = validate(values, MatrixRun)
    for task in run.task or ():
        task_class(task)  # raises for an unknown name
    known = timm.list_modules()
    for module in run.module or ():
        if module not in known:
            raise ConfigError(f"module: {module!r} is not an architecture module of timm; {nearest(module, known)}")
    return run


def _value(override: Override) -> Any:
    # task=mae,rotation is a sweep in hydra's grammar; here it is a list
    return (
        [str(value) for value in override.sweep_string_iterator()] if override.is_sweep_override() else override.value()
    )


def measure(run: MatrixRun, progress: Callable[[Sequence[str]], Iterator[str]] = iter) -> Matrix:
    """Tries the pairs that `run` requests, and keeps the other entries of its page.

    `progress` wraps the iteration over modules, for example to display it. Raises ConfigError if the existing page
    cannot be extended.
    """
    partial = run.task is not None or run.module is not None
    matrix = Matrix.stored_with(run.out) if partial and run.out is not None else Matrix()
    tasks = list(run.task or task_names())
    for module in progress(list(run.module or timm.list_modules())):
        model = architecture(module)
        torch.manual_seed(run.seed)
        backbone = create_backbone(model["name"], size=model["size"], **model.get("kwargs", {}))
        matrix.networks[module] = _shown(model)
        matrix.entries.setdefault(module, {}).update({task: try_task(task, backbone, run.seed) for task in tasks})
        del backbone
        gc.collect()  # modules with reference cycles would otherwise pile up over a hundred architectures
    return matrix


def architecture(module: str) -> dict[str, Any]:
    """A small model of `module`: ``{"name": ..., "size": pixels, "kwargs": {...}}`` for `create_backbone`."""
    table: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text())
    known = table.get(module)
    # another version of timm may have dropped the model
    return known if known is not None and timm.is_model(known["name"]) else _smallest(module)


def _smallest(module: str) -> dict[str, Any]:
    """The model of `module` with the fewest parameters, at the smallest of `_SIZES` that it accepts."""
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name, num_classes=0).parameters())
    name = min(sizes, key=lambda name: (sizes[name], name))
    for size in _SIZES:
        try:
            create_backbone(name, size=size)
        except ConfigError:
            continue
        return {"name": name, "size": size}
    return {"name": name, "size": create_backbone(name).input_size}


def try_task(task: str, backbone: Backbone, seed: int = 0) -> MatrixEntry:
    """Runs one forward and backward pass of `task` on a copy of `backbone`."""
    kind = task_class(task)
    try:
        backbone.require(kind.requires, task=kind.__name__)
        return _step({"name": task, **kind.small_settings}, copy.deepcopy(backbone), seed)
    except CapabilityError as error:
        return MatrixEntry("cannot", _short(str(error)))
    except Exception as error:  # any other exception is a bug; it is listed in the table, and the others are tried
        return MatrixEntry("fault", f"{type(error).__name__}: {first_line(error)}")


def _step(settings: Mapping[str, Any], backbone: Backbone, seed: int) -> MatrixEntry:
    torch.manual_seed(seed)
    task = create_task(settings, backbone).train()
    views = type(task).views(task_config(settings), backbone)
    height, width = backbone.input_size
    # a little larger than the input, so that views have something to crop
    images = torch.randint(0, 256, (_IMAGES, 3, height + 8, width + 8), dtype=torch.uint8)
    samples = [views(image) for image in images]
    batch: dict[str, Tensor] = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    loss = task(batch).loss
    if not bool(loss.isfinite()):
        return MatrixEntry("fault", f"the loss is {loss.item()}")
    loss.backward()
    for label, parameter in task.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.isfinite().all())):
            return MatrixEntry("fault", f"{label} gets {'no' if parameter.grad is None else 'an infinite'} gradient")
    return MatrixEntry("runs")


def _short(message: str) -> str:
    """Extracts the reason from the one-line message of a CapabilityError."""
    if match := re.search(r"it (?:lacks|is missing) \w+ \((.*)\)(?:; it can do|$)", message):
        return match.group(1)
    return re.sub(r"^backbone: \S+ cannot (do \w+|be elastic): ", "", message).split("; it can do")[0]


def _shown(model: dict[str, Any]) -> str:
    """``vit_tiny_patch16_224 at 32 px (patch_size=8)``."""
    arguments = ", ".join(f"{key}={value}" for key, value in model.get("kwargs", {}).items())
    size = model["size"] if isinstance(model["size"], int) else "x".join(str(side) for side in model["size"])
    return f"{model['name']} at {size} px" + (f" ({arguments})" if arguments else "")
