"""``unlabeled matrix``: which task runs on which architecture, found out by running each pair once.

A cell says *runs* when one forward and one backward pass of the task, with its default settings, on the smallest
network of the module gave a finite loss and a finite gradient for each parameter that is to be trained; *cannot* when
the task refused the network with a CapabilityError; *fault* when anything else happened, which is a bug.
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
"""Pixels tried, in this order, for a network that the table does not have; then its own size."""
_IMAGES = 2


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
            raise ValueError(f"{out} is no Markdown file; give a name such as docs/reference/matrix.md")
        return out


class MatrixEntry(NamedTuple):
    """What happened to one task on one network."""

    status: Literal["runs", "cannot", "fault"]
    reason: str = ""


@dataclass
class Matrix:
    """Cells by module and task, and the network that stands for each module."""

    timm: str = timm.__version__
    networks: dict[str, str] = field(default_factory=dict)
    """Module → name of the network, its size and arguments."""
    cells: dict[str, dict[str, MatrixEntry]] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return sorted({task for row in self.cells.values() for task in row})

    def having(self, status: str) -> list[tuple[str, str, str]]:
        """(module, task, reason) of all cells of `status`."""
        rows = sorted(self.cells.items())
        return [
            (module, task, cell.reason) for module, row in rows for task, cell in row.items() if cell.status == status
        ]

    def dumps(self) -> str:
        """JSON with one line per module."""
        rows = [
            f"    {json.dumps(module)}: "
            + json.dumps({"network": self.networks[module], **{task: list(row[task]) for task in sorted(row)}})
            for module, row in sorted(self.cells.items())
        ]
        return f'{{\n  "timm": {json.dumps(self.timm)},\n  "modules": {{\n' + ",\n".join(rows) + "\n  }\n}\n"

    @classmethod
    def loads(cls, text: str) -> Matrix:
        """The inverse of `dumps`."""
        stored = json.loads(text)
        networks = {module: row.pop("network") for module, row in stored["modules"].items()}
        cells = {
            module: {task: MatrixEntry(*cell) for task, cell in row.items()}
            for module, row in stored["modules"].items()
        }
        return cls(stored["timm"], networks, cells)

    @classmethod
    def stored_with(cls, page: Path) -> Matrix:
        """The cells of the page `page`; none when it does not exist.

        Raises ConfigError when they cannot be read, or are of another timm than the installed one.
        """
        file = page.with_suffix(".json")
        if not file.is_file():
            return cls()
        again = "run all cells again, without task= and module="
        try:
            stored = cls.loads(file.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"out: {file} does not hold the cells of a matrix ({error}); {again}") from None
        if stored.timm != timm.__version__:
            raise ConfigError(f"out: {file} is of timm {stored.timm}, this is {timm.__version__}; {again}")
        return stored


def matrix_config(overrides: Sequence[str]) -> MatrixRun:
    """The settings of the command. Raises ConfigError, in one line, for a word that is not one of them."""
    values = {override.key_or_group: _value(override) for override in parse(overrides)}
    for name in ("task", "module"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    run = validate(values, MatrixRun)
    for task in run.task or ():
        task_class(task)
    known = timm.list_modules()
    for module in run.module or ():
        if module not in known:
            raise ConfigError(f"module: {module!r} is not an architecture module of timm; {nearest(module, known)}")
    return run


def _value(override: Override) -> Any:
    return (
        [str(value) for value in override.sweep_string_iterator()] if override.is_sweep_override() else override.value()
    )


def measure(run: MatrixRun, progress: Callable[[Sequence[str]], Iterator[str]] = iter) -> Matrix:
    """Runs the cells that `run` asks for, and adds those of its page that it does not ask for.

    `progress` passes the modules on and may tell of them. Raises ConfigError when the page cannot be added to.
    """
    partial = run.task is not None or run.module is not None
    matrix = Matrix.stored_with(run.out) if partial and run.out is not None else Matrix()
    tasks = list(run.task or task_names())
    for module in progress(list(run.module or timm.list_modules())):
        network = architecture(module)
        torch.manual_seed(run.seed)
        backbone = create_backbone(network["name"], size=network["size"], **network.get("kwargs", {}))
        matrix.networks[module] = _shown(network)
        matrix.cells.setdefault(module, {}).update({task: try_task(task, backbone, run.seed) for task in tasks})
        del backbone
        gc.collect()
    return matrix


def architecture(module: str) -> dict[str, Any]:
    """A small network of `module`: ``{"name": ..., "size": pixels, "kwargs": {...}}`` for `create_backbone`."""
    table: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text())
    known = table.get(module)
    return known if known is not None and timm.is_model(known["name"]) else _smallest(module)


def _smallest(module: str) -> dict[str, Any]:
    """The network of `module` with the fewest parameters, at the smallest size that it takes."""
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
    """One forward and backward pass of `task` on a copy of `backbone`."""
    kind = task_class(task)
    try:
        backbone.require(kind.requires, task=kind.__name__)
        return _step({"name": task, **kind.small_settings}, copy.deepcopy(backbone), seed)
    except CapabilityError as error:
        return MatrixEntry("cannot", _short(str(error)))
    except Exception as error:  # whatever it is, it is a result: told in the table and to be mended
        return MatrixEntry("fault", f"{type(error).__name__}: {first_line(error)}")


def _step(settings: Mapping[str, Any], backbone: Backbone, seed: int) -> MatrixEntry:
    torch.manual_seed(seed)
    task = create_task(settings, backbone).train()
    views = type(task).views(task_config(settings), backbone)
    height, width = backbone.input_size
    images = torch.randint(0, 256, (_IMAGES, 3, height + 8, width + 8), dtype=torch.uint8)
    seen = [views(image) for image in images]
    batch: dict[str, Tensor] = {key: torch.stack([view[key] for view in seen]) for key in seen[0]}
    loss = task(batch).loss
    if not bool(loss.isfinite()):
        return MatrixEntry("fault", f"its loss is {loss.item()}")
    loss.backward()
    for label, parameter in task.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.isfinite().all())):
            return MatrixEntry("fault", f"{label} gets {'no' if parameter.grad is None else 'an infinite'} gradient")
    return MatrixEntry("runs")


def _short(message: str) -> str:
    """The reason inside the one-line message of a CapabilityError."""
    if match := re.search(r"it lacks \w+ \((.*)\)(?:; it can do|$)", message):
        return match.group(1)
    return re.sub(r"^backbone: \S+ cannot (do \w+|be elastic): ", "", message).split("; it can do")[0]


def _shown(network: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in network.get("kwargs", {}).items())
    size = network["size"] if isinstance(network["size"], int) else "x".join(str(side) for side in network["size"])
    return f"{network['name']} at {size} px" + (f" ({arguments})" if arguments else "")
