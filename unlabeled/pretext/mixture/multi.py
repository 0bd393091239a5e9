"""Several tasks at once: one backbone, one loss that is the weighted sum of theirs.

    unlabeled pretrain task=multi 'task.tasks=[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]' ...

Each task is the one that stands alone under its name, around the same `Backbone` object: with its own views of the
same image, its own forward pass, head and state. Mixtures of pretext tasks: Doersch, Zisserman, "Multi-task
Self-Supervised Visual Learning", ICCV 2017, arXiv 1708.07860 (which also gives each task its own batches). What belongs
to a task has its label and a slash before it: batches hold ``mae/image``, logs ``mae/loss``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.mixture.balance import Ramp, balanced, gradient_norms, split_rows, weight_at
from unlabeled.pretext.mixture.mixture import MultiConfig, named_in_errors
from unlabeled.pretext.registry import task_class
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, NamedParameter, Paper, PretextTask, Recipe, StepOutput, TaskConfig
from unlabeled.ssl.train.collapse import DEVIATION, INFORMATION

logger = logging.getLogger(__name__)


class MultiViews:
    """The views of every task, of the same image: ``{label}/{key}``."""

    def __init__(self, views: dict[str, Views]) -> None:
        self.views = views

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {f"{label}/{key}": value for label, views in self.views.items() for key, value in views(image).items()}


class Multi(PretextTask):
    """Trains one backbone on several tasks at once, with a weighted sum of their losses.

    Submodules: `backbone` and `tasks`; buffers: the `weights` (N,) of the step to
    come and, where these are balanced, `norms` (N,) and the number of `steps`.

    A parameter of the backbone is trained when the loss of any task trains it, unless a task prescribes its value (the
    fixed positions of MAE). Tasks that draw the backbone's weights anew (MAE) do so for all, the last of them for good.
    Decay and layer of the backbone's parameters are those that the first task gives them.

    The running statistics of batch norms are those of all tasks' images together. Of tasks that could collapse, the
    first one's features are watched.
    """

    Config: ClassVar[type[TaskConfig]] = MultiConfig
    paper = Paper("Multi-task Self-Supervised Visual Learning", 2017, "https://arxiv.org/abs/1708.07860")
    good_for = "combining the strengths of tasks, such as a masked one with one that compares views"
    recipe: ClassVar[Recipe] = {
        "task": {"tasks": [{"name": "rotation", "weight": 1}, {"name": "simmim", "weight": 1}]},
        "optim": {
            "name": "adamw",
            "lr": 1.5e-4,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 40},
    }
    """Several tasks on one backbone; no paper's recipe, but one that suits most of them. Other tasks, with their
    weights: task=multi 'task.tasks=[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]' A weight can be {start:
    0, end: 1, schedule: cosine, over: [0, 0.5]}; see unlabeled/pretext/mixture/mixture.py."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled", "dense_map"})
    """Of the default tasks; that of an instance is what its own tasks need."""
    config: MultiConfig
    weights: Tensor
    norms: Tensor
    steps: Tensor

    def __init__(self, config: MultiConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that one of the tasks cannot use and ConfigError, naming the place in
        ``task.tasks``, for settings that do not fit it."""
        self.__dict__["requires"] = frozenset[str]()  # each task asks for its own, by its own name
        super().__init__(config, backbone)
        built, self._shared = _build_all(config, backbone)
        self.tasks = nn.ModuleDict(built)
        for task in built.values():
            _lend(task, backbone)
        self.__dict__.update(_combined(list(built.values())))
        self.register_buffer("weights", self._given(0.0))
        if config.balance == "gradient_norm":
            self.register_buffer("norms", torch.zeros(len(built)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            cast(Any, self).register_load_state_dict_post_hook(_recall_steps)
        self._steps = 0  # `steps`, where reading it does not wait for the device
        self._measured: Tensor | None = None
        self._rows: dict[tuple[int, torch.device], list[Tensor]] = {}
        if config.batch == "shared" and any(part.portion != 1 for part in config.tasks):
            logger.warning("task.tasks: portion has no effect while each task sees all images; set task.batch=split")
        seen = "all images" if config.batch == "shared" else "its own part of the images"
        logger.info(
            "multi: %s, each with views of its own and so a forward pass of its own through %s, over %s",
            ", ".join(built), backbone.name, seen,
        )  # fmt: skip

    @classmethod
    def views(cls, config: MultiConfig, backbone: Backbone) -> Views:
        parts = zip(config.labels(), config.tasks, strict=True)
        return MultiViews({label: task_class(part.name).views(part.settings, backbone) for label, part in parts})

    @classmethod
    def masks_statistics(cls, config: MultiConfig) -> bool:
        return any(task_class(part.name).masks_statistics(part.settings) for part in config.tasks)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``{label}/{key}`` for what each task draws, for all images also where these are split."""
        drawn = {label: task.draw(self._seen(label, batch)) for label, task in self._each()}
        return {f"{label}/{key}": value for label, values in drawn.items() for key, value in values.items()}

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """The weighted sum of the tasks' losses; each one's loss and logs as ``{label}/{key}``."""
        rows, draw = self._rows_of(batch), draw or self.draw(batch)
        outputs: dict[str, StepOutput] = {}
        for position, (label, task) in enumerate(self._each()):
            own = None if rows is None else rows[position]
            outputs[label] = task(self._seen(label, batch, own), **_of(label, draw, own))
        losses = [widened(output.loss) for output in outputs.values()]
        if self._measures():
            self._measured = gradient_norms(losses, self._shared_parameters())
        loss = (self.weights * torch.stack(losses)).sum()
        features = next((output.features for output in outputs.values() if output.features is not None), None)
        return StepOutput(loss, self._logs(outputs), features)

    def before_step(self, progress: float) -> None:
        for _, task in self._each():
            task.before_step(progress)

    def after_step(self, progress: float) -> None:
        for _, task in self._each():
            task.after_step(progress)
        weights = self._given(progress).to(self.weights)
        if self.config.balance == "gradient_norm":
            self._steps += 1
            self.steps.fill_(self._steps)
            if self._measured is not None:
                self._follow(self._measured.to(self.norms))
                self._measured = None
            weights = torch.where((self.norms > 0).all(), balanced(weights, self.norms), weights)
        self.weights.copy_(weights)

    def size_step(self) -> tuple[int, int] | None:
        """The least that suits all tasks; None where one of them needs the full size."""
        steps = [task.size_step() for _, task in self._each()]
        found = [step for step in steps if step is not None]
        if len(found) < len(steps):
            return None
        return math.lcm(*(height for height, _ in found)), math.lcm(*(width for _, width in found))

    def require_size(self, size: tuple[int, int]) -> None:
        for position, (_, task) in enumerate(self._each()):
            with named_in_errors(f"task.tasks[{position}]"):
                task.require_size(size)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """Every trainable parameter under the rule of its task; the backbone's under that of the first one."""
        rules: dict[int, NamedParameter] = {}
        for _, task in reversed(list(self._each())):
            with self._whole(task):
                rules |= {id(named.parameter): named for named in task.parameter_groups()}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield rules[id(parameter)]._replace(name=name)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """The images of each task, ``{label}/{name}``."""
        found: dict[str, Tensor] = {}
        for label, task in self._each():
            with self._whole(task):
                shown = task.visualize(self._seen(label, batch))
            found |= {f"{label}/{name}": image for name, image in shown.items()}
        return found

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Raises CheckpointError: a mixture has no official files."""
        raise CheckpointError(
            f"reference: a mixture ({', '.join(self.tasks)}) has no reference checkpoints; start from the weights of a "
            "network with backbone.checkpoint=FILE"
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError with balanced weights, whose measurement needs the graph twice."""
        if self.config.balance != "fixed":
            raise ConfigError(
                "task.balance: gradient_norm cannot measure inside a compiled network; "
                "set engine.compile=false or task.balance=fixed"
            )
        super().compile(*args, **kwargs)

    def _each(self) -> Iterator[tuple[str, PretextTask]]:
        return cast(Iterator[tuple[str, PretextTask]], iter(self.tasks.items()))

    def _seen(self, label: str, batch: Batch, rows: Tensor | None = None) -> dict[str, Tensor]:
        """The batch as one task knows it: its own views, and what belongs to none (``index``)."""
        common = {key: value for key, value in batch.items() if "/" not in key}
        seen = {**common, **_of(label, batch)}
        if cast(PretextTask, self.tasks[label]).float_images == "normalized":
            seen = {key: self.backbone.normalize(one) if _unit(one) else one for key, one in seen.items()}
        return seen if rows is None else {key: value.index_select(0, rows) for key, value in seen.items()}

    @contextmanager
    def _whole(self, task: PretextTask) -> Iterator[None]:
        """`task` as it stands alone, with the backbone among its modules."""
        task.backbone = self.backbone
        try:
            yield
        finally:
            _lend(task, self.backbone)

    def _rows_of(self, batch: Batch) -> list[Tensor] | None:
        """Which images of the batch each task sees; None: all. Raises ConfigError when there are too few."""
        if self.config.batch == "shared":
            return None
        first = next(iter(batch.values()))
        key = (len(first), first.device)
        if key not in self._rows:
            dealt = split_rows([part.portion for part in self.config.tasks], len(first))
            if not all(dealt):
                raise ConfigError(
                    f"task.batch: {len(first)} images of a process cannot be split over {len(dealt)} tasks in these "
                    "portions; raise batch_size or set task.batch=shared"
                )
            self._rows[key] = [torch.tensor(rows, device=first.device) for rows in dealt]
        return self._rows[key]

    def _given(self, progress: float) -> Tensor:
        """Weights (N,) as they are asked for when `progress` of the run is done."""
        return torch.tensor([weight_at(part.weight, progress) for part in self.config.tasks])

    def _measures(self) -> bool:
        """Whether this forward pass measures gradients: the first micro-step of every `balance_every`-th step."""
        wanted = self.config.balance == "gradient_norm" and self._steps % self.config.balance_every == 0
        return wanted and self._measured is None and self.training and torch.is_grad_enabled()

    def _shared_parameters(self) -> list[Tensor]:
        own = dict(self.backbone.named_parameters())
        parameters: list[Tensor] = [own[name] for name in self._shared]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ConfigError(
                "task.balance: gradient_norm needs whole parameters, which FSDP does not keep; set task.balance=fixed"
            )
        return parameters

    def _follow(self, measured: Tensor) -> None:
        """Moves the running `norms`; the first measurement is taken as it is, one that is not finite is left out."""
        moved = torch.where(self.norms > 0, measured.lerp(self.norms, self.config.balance_momentum), measured)
        self.norms.copy_(torch.where(measured.isfinite().all(), moved, self.norms))

    def _logs(self, outputs: Mapping[str, StepOutput]) -> dict[str, Tensor]:
        logs: dict[str, Tensor] = {}
        balancing = self.config.balance == "gradient_norm"
        for position, (label, output) in enumerate(outputs.items()):
            logs[f"{label}/loss"] = output.loss.detach()
            logs |= {f"{label}/{key}": value for key, value in output.logs.items()}
            if balancing or isinstance(self.config.tasks[position].weight, Ramp):
                logs[f"{label}/weight"] = self.weights[position].clone()
            if balancing:
                logs[f"{label}/grad_norm"] = self.norms[position].clone()
        for figure in (INFORMATION, DEVIATION):  # the lowest one under its plain name, for the alarm
            found = [output.logs[figure] for output in outputs.values() if figure in output.logs]
            logs |= {figure: torch.stack(found).min()} if found else {}
        return logs


def _of(label: str, given: Mapping[str, Tensor], rows: Tensor | None = None) -> dict[str, Tensor]:
    """What belongs to one task, under the keys that it knows; of `rows` only."""
    own = {key.removeprefix(f"{label}/"): value for key, value in given.items() if key.startswith(f"{label}/")}
    return own if rows is None else {key: value.index_select(0, rows) for key, value in own.items()}


def _unit(tensor: Tensor) -> bool:
    """Whether it holds images of 0..1 values, as a curriculum makes them."""
    return tensor.is_floating_point() and tensor.ndim > 3 and tensor.shape[-3] == 3


def _lend(task: PretextTask, backbone: Backbone) -> None:
    """`task.backbone` stays what it is, but no longer as a module of the task: the mixture has it once."""
    del task._modules["backbone"]
    task.__dict__["backbone"] = backbone


def _build_all(config: MultiConfig, backbone: Backbone) -> tuple[dict[str, PretextTask], list[str]]:
    """The tasks by label, and the names of the backbone's parameters that all of them train.

    A task that was built before another one drew the backbone's weights anew is built again, since it may hold a copy
    (a momentum teacher).
    """
    free = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    trained: dict[str, set[str]] = {}
    fixed: set[str] = set()

    def build(position: int) -> tuple[PretextTask, bool]:
        part = config.tasks[position]
        before = [parameter.detach().clone() for parameter in backbone.parameters()]
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(free[name])
        with named_in_errors(f"task.tasks[{position}]"):
            task = task_class(part.name)(part.settings, backbone)
        trained[labels[position]] = {name for name, one in backbone.named_parameters() if one.requires_grad}
        fixed.update(task.fixed())
        return task, not all(map(torch.equal, before, backbone.parameters()))

    labels = config.labels()
    found = [build(position) for position in range(len(labels))]
    last = max((position for position, (_, redrew) in enumerate(found) if redrew), default=0)
    built = {
        label: build(position)[0] if position < last and not found[position][1] else found[position][0]
        for position, label in enumerate(labels)
    }
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name not in fixed and any(name in names for names in trained.values()))
    shared = [name for name in free if all(name in names for names in trained.values())]
    return built, shared


def _combined(tasks: list[PretextTask]) -> dict[str, Any]:
    """What a task says of itself in class attributes, of several together."""
    remedies = dict.fromkeys(task.collapse_remedy for task in tasks)
    usual = PretextTask.collapse_remedy
    return {
        "requires": frozenset[str]().union(*(task.requires for task in tasks)),
        "masked_statistics": any(task.masked_statistics for task in tasks),
        "synced_statistics": any(task.synced_statistics for task in tasks),
        "per_image": all(task.per_image for task in tasks),
        "collapse_remedy": "; ".join(one for one in remedies if one != usual) or usual,
    }


def _recall_steps(task: nn.Module, _: Any) -> None:
    """After a state dict was loaded."""
    multi = cast(Multi, task)
    multi._steps = int(multi.steps)
