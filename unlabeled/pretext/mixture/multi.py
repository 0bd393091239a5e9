"""Several tasks at once: one backbone, and a loss that is the weighted sum of theirs.

    unlabeled pretrain task=multi 'task.tasks=[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]' ...

Each task is the same as when it runs alone, but all share one `Backbone` object. Each has its own views of an image,
its own forward pass, heads and state. Mixtures of pretext tasks: Doersch, Zisserman, "Multi-task Self-Supervised Visual
Learning", ICCV 2017, arXiv 1708.07860 (where each task also has its own batches). Keys start with the label of the task
that they belong to: batches hold ``mae/image``, logs ``mae/loss``.
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
from unlabeled.pretext.mixture.balance import Ramp, balanced, gradient_norms, split_images, weight_at
from unlabeled.pretext.mixture.mixture import MultiConfig, named_in_errors
from unlabeled.pretext.registry import task_class
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, NamedParameter, Paper, PretextTask, Recipe, StepOutput, TaskConfig
from unlabeled.ssl.train.collapse import DEVIATION, INFORMATION

logger = logging.getLogger(__name__)


class MultiViews:
    """The views of every task, from the same image, under ``{label}/{key}``."""

    def __init__(self, views: dict[str, Views]) -> None:
        self.views = views

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        return {f"{label}/{key}": value for label, views in self.views.items() for key, value in views(image).items()}


class Multi(PretextTask):
    """Trains one backbone on several tasks at once, with a weighted sum of their losses.

    Submodules: `backbone` and `tasks`. Buffers: `weights` (N,) for the next step and, if balanced, `norms` (N,) and
    the number of `steps`.

    A parameter of the backbone is trained if the loss of any task trains it, unless a task prescribes its value (like
    MAE's fixed positions). If tasks reinitialize the backbone (MAE), the last of them has the final say. Weight decay
    and layer of the backbone's parameters are those that the first task gives them.

    Batch norms collect running statistics over the images of all tasks. The collapse alarm watches the features of the
    first task that could collapse.
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
    """Several tasks on one backbone: not a paper's recipe, but one that suits most tasks. Other tasks, with their
    weights: task=multi 'task.tasks=[{name: mae, weight: 1}, {name: rotation, weight: 0.2}]' A weight can be {start:
    0, end: 1, schedule: cosine, over: [0, 0.5]}; see unlabeled/pretext/mixture/mixture.py."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled", "dense_map"})
    """Of the default tasks; an instance requires what its own tasks require."""
    config: MultiConfig
    weights: Tensor
    norms: Tensor
    steps: Tensor

    def __init__(self, config: MultiConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that one of the tasks cannot use, and ConfigError for settings that do
        not fit it; both name the entry of ``task.tasks``."""
        # each task checks its own requirements; via `__dict__`, as these are class variables for type checkers
        self.__dict__["requires"] = frozenset[str]()
        super().__init__(config, backbone)
        built, self._shared = _build_all(config, backbone)
        self.tasks = nn.ModuleDict(built)
        # the backbone is a submodule of the mixture only, so that checkpoints hold it once
        for task in built.values():
            _lend(task, backbone)
        self.__dict__.update(_combined(list(built.values())))
        self.register_buffer("weights", self._weights_at(0.0))
        if config.balance == "gradient_norm":
            self.register_buffer("norms", torch.zeros(len(built)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            cast(Any, self).register_load_state_dict_post_hook(_recall_steps)
        self._steps = 0  # a copy of `steps`, since reading a buffer would wait for the device
        self._measured: Tensor | None = None
        self._splits: dict[tuple[int, torch.device], list[Tensor]] = {}
        if config.batch == "shared" and any(entry.portion != 1 for entry in config.tasks):
            logger.warning("task.tasks: portion has no effect while each task sees all images; set task.batch=split")
        images = "all images" if config.batch == "shared" else "its own share of the images"
        logger.info(
            "multi: %s, each with its own views and so its own forward pass through %s, over %s",
            ", ".join(built), backbone.name, images,
        )  # fmt: skip

    @classmethod
    def views(cls, config: MultiConfig, backbone: Backbone) -> Views:
        entries = zip(config.labels(), config.tasks, strict=True)
        return MultiViews({label: task_class(entry.name).views(entry.settings, backbone) for label, entry in entries})

    @classmethod
    def masks_statistics(cls, config: MultiConfig) -> bool:
        return any(task_class(entry.name).masks_statistics(entry.settings) for entry in config.tasks)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """What each task draws, under ``{label}/{key}``; always for all images, even if they are split."""
        drawn = {label: task.draw(self._batch_of(label, batch)) for label, task in self._each()}
        return {f"{label}/{key}": value for label, values in drawn.items() for key, value in values.items()}

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """The weighted sum of the tasks' losses; logs each task's loss and logs under ``{label}/{key}``."""
        split, draw = self._split(batch), draw or self.draw(batch)
        # run each task on its own views, of all images or of its share
        outputs: dict[str, StepOutput] = {}
        for position, (label, task) in enumerate(self._each()):
            images = None if split is None else split[position]
            outputs[label] = task(self._batch_of(label, batch, images), **_of_task(label, draw, images))
        # from time to time, measure how strong the losses' gradients are; `after_step` uses the result
        losses = [widened(output.loss) for output in outputs.values()]
        if self._measures():
            self._measured = gradient_norms(losses, self._shared_parameters())
        # sum the losses with the weights of this step
        loss = (self.weights * torch.stack(losses)).sum()
        features = next((output.features for output in outputs.values() if output.features is not None), None)
        return StepOutput(loss, self._logs(outputs), features)

    def before_step(self, progress: float) -> None:
        for _, task in self._each():
            task.before_step(progress)

    def after_step(self, progress: float) -> None:
        for _, task in self._each():
            task.after_step(progress)
        # the weights of the next step
        weights = self._weights_at(progress).to(self.weights)
        if self.config.balance == "gradient_norm":
            self._steps += 1
            self.steps.fill_(self._steps)
            if self._measured is not None:
                self._update_norms(self._measured.to(self.norms))
                self._measured = None
            # not balanced before the first measurement; `where` rather than `if`, which would wait for the device
            weights = torch.where((self.norms > 0).all(), balanced(weights, self.norms), weights)
        self.weights.copy_(weights)

    def size_step(self) -> tuple[int, int] | None:
        """The least common multiple of the tasks' steps; None if one of the tasks needs the full size."""
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
        """Every trainable parameter with the labels from its task; for the backbone, from the first task."""
        rules: dict[int, NamedParameter] = {}
        # in reverse, so that the first task has the last word
        for _, task in reversed(list(self._each())):
            with self._with_backbone(task):
                rules |= {id(named.parameter): named for named in task.parameter_groups()}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield rules[id(parameter)]._replace(name=name)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """The images of each task, ``{label}/{name}``."""
        found: dict[str, Tensor] = {}
        for label, task in self._each():
            with self._with_backbone(task):
                shown = task.visualize(self._batch_of(label, batch))
            found |= {f"{label}/{name}": image for name, image in shown.items()}
        return found

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Raises CheckpointError, as a mixture has no reference checkpoints."""
        raise CheckpointError(
            f"reference: a mixture ({', '.join(self.tasks)}) has no reference checkpoints; start from the weights of a "
            "backbone with backbone.checkpoint=FILE"
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the task. Raises ConfigError with ``balance: gradient_norm``."""
        if self.config.balance != "fixed":  # measuring gradients needs the graph twice
            raise ConfigError(
                "task.balance: gradient_norm cannot measure inside a compiled model; "
                "set engine.compile=false or task.balance=fixed"
            )
        super().compile(*args, **kwargs)

    def _each(self) -> Iterator[tuple[str, PretextTask]]:
        return cast(Iterator[tuple[str, PretextTask]], iter(self.tasks.items()))

    def _batch_of(self, label: str, batch: Batch, images: Tensor | None = None) -> dict[str, Tensor]:
        """The batch of one task: its own views, and entries of no task (``index``); of some `images`, or of all."""
        common = {key: value for key, value in batch.items() if "/" not in key}
        own = {**common, **_of_task(label, batch)}
        # a curriculum gives images as 0..1 to a mixture; convert them for tasks that expect them normalized
        if cast(PretextTask, self.tasks[label]).float_images == "normalized":
            own = {key: self.backbone.normalize(one) if _unit(one) else one for key, one in own.items()}
        return own if images is None else {key: value.index_select(0, images) for key, value in own.items()}

    @contextmanager
    def _with_backbone(self, task: PretextTask) -> Iterator[None]:
        """Within this context, `task` has the backbone as a submodule, as if it were the only task."""
        task.backbone = self.backbone
        try:
            yield
        finally:
            _lend(task, self.backbone)

    def _split(self, batch: Batch) -> list[Tensor] | None:
        """Indices of the images that each task receives; None: all. Raises ConfigError if there are too few images."""
        if self.config.batch == "shared":
            return None
        first = next(iter(batch.values()))
        key = (len(first), first.device)
        if key not in self._splits:  # kept on the device, to copy indices there only once
            split = split_images([entry.portion for entry in self.config.tasks], len(first))
            if not all(split):
                raise ConfigError(
                    f"task.batch: {len(first)} images of a process cannot be split over {len(split)} tasks in these "
                    "portions; raise batch_size or set task.batch=shared"
                )
            self._splits[key] = [torch.tensor(images, device=first.device) for images in split]
        return self._splits[key]

    def _weights_at(self, progress: float) -> Tensor:
        """The configured weights (N,) at `progress` of the run, before balancing."""
        return torch.tensor([weight_at(entry.weight, progress) for entry in self.config.tasks])

    def _measures(self) -> bool:
        """Whether this forward pass measures gradients: the first micro-step of every `balance_every`-th step."""
        wanted = self.config.balance == "gradient_norm" and self._steps % self.config.balance_every == 0
        return wanted and self._measured is None and self.training and torch.is_grad_enabled()

    def _shared_parameters(self) -> list[Tensor]:
        """The backbone's parameters that all tasks train. Raises ConfigError under FSDP."""
        own = dict(self.backbone.named_parameters())
        parameters: list[Tensor] = [own[name] for name in self._shared]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ConfigError(
                "task.balance: gradient_norm needs unsharded parameters, but FSDP shards them; set task.balance=fixed"
            )
        return parameters

    def _update_norms(self, measured: Tensor) -> None:
        """Updates the running mean `norms`; measurements that are not finite are ignored."""
        # norms start at 0, so the first measurement replaces them
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
        for metric in (INFORMATION, DEVIATION):  # the lowest value without a label, for the collapse alarm
            found = [output.logs[metric] for output in outputs.values() if metric in output.logs]
            logs |= {metric: torch.stack(found).min()} if found else {}
        return logs


def _of_task(label: str, tensors: Mapping[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of one task, without its label in their keys; of some `images`, or of all."""
    own = {key.removeprefix(f"{label}/"): value for key, value in tensors.items() if key.startswith(f"{label}/")}
    return own if images is None else {key: value.index_select(0, images) for key, value in own.items()}


def _unit(tensor: Tensor) -> bool:
    """Whether `tensor` holds images with values 0..1, which come from a curriculum."""
    return tensor.is_floating_point() and tensor.ndim > 3 and tensor.shape[-3] == 3


def _lend(task: PretextTask, backbone: Backbone) -> None:
    """Makes `backbone` a plain attribute of `task`, no longer a submodule."""
    del task._modules["backbone"]
    task.__dict__["backbone"] = backbone


def _build_all(config: MultiConfig, backbone: Backbone) -> tuple[dict[str, PretextTask], list[str]]:
    """The tasks by label, and the names of the backbone's parameters that all of them train."""
    free = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    trained: dict[str, set[str]] = {}
    fixed: set[str] = set()

    def build(position: int) -> tuple[PretextTask, bool]:
        """The task, and whether it reinitialized the backbone."""
        entry = config.tasks[position]
        before = [parameter.detach().clone() for parameter in backbone.parameters()]
        # undo what an earlier task froze, to see what this one trains
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(free[name])
        with named_in_errors(f"task.tasks[{position}]"):
            task = task_class(entry.name)(entry.settings, backbone)
        trained[labels[position]] = {name for name, one in backbone.named_parameters() if one.requires_grad}
        fixed.update(task.fixed())
        return task, not all(map(torch.equal, before, backbone.parameters()))

    labels = config.labels()
    found = [build(position) for position in range(len(labels))]
    # a task may hold a copy of the backbone (a momentum teacher): build those again that came before the last task that
    # reinitialized it
    last = max((position for position, (_, redrew) in enumerate(found) if redrew), default=0)
    built = {
        label: build(position)[0] if position < last and not found[position][1] else found[position][0]
        for position, label in enumerate(labels)
    }
    # train what any task trains
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name not in fixed and any(name in names for names in trained.values()))
    shared = [name for name in free if all(name in names for names in trained.values())]
    return built, shared


def _combined(tasks: list[PretextTask]) -> dict[str, Any]:
    """Class attributes of a task, combined over several tasks."""
    remedies = dict.fromkeys(task.collapse_remedy for task in tasks)
    usual = PretextTask.collapse_remedy  # too general to list next to the specific ones
    return {
        "requires": frozenset[str]().union(*(task.requires for task in tasks)),
        "masked_statistics": any(task.masked_statistics for task in tasks),
        "synced_statistics": any(task.synced_statistics for task in tasks),
        "per_image": all(task.per_image for task in tasks),
        "collapse_remedy": "; ".join(one for one in remedies if one != usual) or usual,
    }


def _recall_steps(task: nn.Module, _: Any) -> None:
    """Hook after loading a state dict: copies the buffer `steps` to `_steps`."""
    multi = cast(Multi, task)
    multi._steps = int(multi.steps)
