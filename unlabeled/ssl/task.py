"""The contract of a pretext task.

Legend of shapes used in all tasks: B images, L tokens or patches, K visible ones, D channels, (gh, gw) grid.
A mask says *visible* (True) inside this package; other polarities are converted at the edges.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.elastic.config import ElasticConfig
from unlabeled.ssl.backbones.layer_index import decay_applies
from unlabeled.ssl.core.errors import CheckpointError
from unlabeled.ssl.core.renamed import rename_attributes
from unlabeled.ssl.data.views import Views

Batch = Mapping[str, Tensor]
Recipe = Mapping[str, Any]
"""Settings of a run as its ``config.yaml`` has them, such as ``{"optim": {"lr": 1e-3}, "epochs": 100}``."""
FloatImages = Literal["unit", "bytes", "normalized"]
"""Floating images of values 0..1, of 0..255, or normalized with the backbone's mean and deviation."""


class StepOutput(NamedTuple):
    """Result of one forward pass. A NamedTuple, since Accelerate casts these to float32 under autocast."""

    loss: Tensor
    """Scalar, mean over the local batch."""
    logs: dict[str, Tensor]
    """Detached scalars worth a curve, by name."""
    features: Tensor | None = None
    """Detached (N, D) of different images, as the loss compares them; watched for collapse (see
    `unlabeled.ssl.train.collapse`). None: the task cannot collapse."""


class NamedParameter(NamedTuple):
    """One trainable parameter and what the optimizer needs to know of it."""

    name: str
    parameter: nn.Parameter
    decay: bool
    """Whether weight decay applies."""
    layer: int
    """Depth for layer-wise learning-rate decay: 0 is the stem, `depth + 1` the heads and everything new."""


class Paper(NamedTuple):
    """The publication that introduced a task."""

    title: str
    year: int
    """Of the conference or journal; of the preprint where there is no other."""
    url: str
    """Such as ``https://arxiv.org/abs/2111.06377``."""


class TaskConfig(BaseModel):
    """Base of each task's settings. Unknown keys are refused; defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_NAMES_ONCE = {"per_picture": "per_image", "float_pictures": "float_images", "load_official": "load_reference"}
"""What version 0.1.0 called the attributes of a task; packages that set them still work."""


class PretextTask(nn.Module):
    """A pretext task around a backbone.

    A subclass is built as ``Task(config, backbone)``, sets `Config`, `requires` and `views`, and implements `forward`.
    It keeps the network that evaluation and export receive as ``self.backbone``, freezes (``requires_grad_(False)``)
    every parameter that its loss does not reach, and keeps all state that a resumed run needs in `state_dict()`.
    All randomness of `forward` comes from `draw`, which uses torch's global generator of the input's device (the engine
    seeds it anew for each micro-step and rank); ``forward(batch, **draw)`` fixes it.
    """

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    paper: ClassVar[Paper | None] = None
    """Where the task was published; None: nowhere."""
    good_for: ClassVar[str] = ""
    """When to choose the task, in one clause, as ``unlabeled tasks`` shows it."""
    recipe: ClassVar[Recipe] = {}
    """What ``task=NAME`` sets of a run, above the defaults and below a recipe's file and the user's words."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Names of the backbone capabilities that the task needs (see `unlabeled.ssl.backbones.backbone`)."""
    masked_statistics: ClassVar[bool] = False
    """Whether the backbone's batch norms collect their running statistics on masked images only; evaluation then
    estimates them anew on whole ones (see `unlabeled.eval.features.recalibrate`)."""

    synced_statistics: ClassVar[bool] = False
    """Whether batch norms take the statistics of all ranks' images together, as published."""
    per_image: ClassVar[bool] = True
    """Whether the loss is a mean over images, each by itself. False: the images of a batch are compared with each
    other, so that a step in several micro-steps is not the step of the whole batch."""
    float_images: ClassVar[FloatImages] = "unit"
    """What `forward` takes floating images for. A curriculum (`unlabeled.ssl.train.curriculum`) gives them as
    such."""
    small_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings that fit small networks of any kind and small images, where the defaults do not; for the matrix of
    tasks and architectures."""
    collapse_remedy: ClassVar[str] = "lower optim.lr, lengthen schedule.warmup_epochs, or raise batch_size"
    """What to change when the features collapse; part of the warning."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rename_attributes(cls, _NAMES_ONCE)
        if vars(cls).get("float_images") == "normalised":
            cls.float_images = "normalized"

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        super().__init__()
        backbone.require(self.requires, task=type(self).__name__)
        self.config = config
        self.backbone = backbone

    @classmethod
    def views(cls, config: Any, backbone: Backbone) -> Views:
        """Image, uint8 (3, H, W) of any size → dict of tensors of fixed shape (uint8 where they are images).

        Runs in loader workers under a generator seeded for each image and epoch; the result must pickle.
        """
        raise NotImplementedError

    @classmethod
    def masks_statistics(cls, config: Any) -> bool:
        """`masked_statistics` under these settings; a task that is made of others looks it up in them."""
        return cls.masked_statistics

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Everything random in one forward pass, by the keyword under which `forward` takes it; (B, ...) each."""
        return {}

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """The whole loss of one local batch. No logging, no optimizer, no process-group set-up here."""
        raise NotImplementedError

    def train_only(self, reached: Container[str]) -> None:
        """Freezes the backbone's parameters whose names (relative to it) are not `reached` by the loss."""
        for name, parameter in self.backbone.named_parameters():
            if name not in reached:
                parameter.requires_grad_(False)

    def fixed(self) -> set[str]:
        """Names of the backbone's parameters (relative to it) whose values the method prescribes and does not train,
        though its loss reaches them; other tasks beside it must not train them either."""
        return set()

    def before_step(self, progress: float) -> None:
        """Takes back gradients of a step, after its last backward pass and before they are clipped.

        `progress` as `after_step` had it last; 0 in the first step.
        """

    def after_step(self, progress: float) -> None:
        """Moves EMA teachers, queues, vocabularies; once an optimizer step, `progress` in [0, 1]."""

    def size_step(self) -> tuple[int, int] | None:
        """Multiples (h, w) that sides of images must be when a curriculum makes them smaller (see
        `unlabeled.ssl.train.curriculum`); None: they must have the backbone's size."""
        return self.backbone.size_step()

    def require_size(self, size: tuple[int, int]) -> None:
        """Raises ConfigError when images of `size` (h, w), multiples of `size_step`, are too small for the task."""

    def encoder(self) -> Backbone:
        """The backbone that evaluation and export receive."""
        return self.backbone

    def elastic(self) -> ElasticConfig | None:
        """Which sizes the network of `encoder` was trained to hold (see `unlabeled.ssl.backbones.elastic`); None: its
        own alone.

        The run's export keeps it, so that ``unlabeled export``, ``sizes`` and ``evaluate`` know the sizes of a run.
        """
        return None

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """Every trainable parameter with its labels.

        The default: no decay for one-dimensional tensors and biases (the rule of timm 0.3.2), layers of the backbone
        in the order of its modules, everything outside the backbone one layer past its last.
        """
        layers = self.backbone.parameter_layers()
        head = self.backbone.depth + 1
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = decay_applies(name, parameter.shape)
                layer = layers.get(name.removeprefix("backbone."), head) if name.startswith("backbone.") else head
                yield NamedParameter(name, parameter, decay, layer)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """Images for people, name → uint8 (3, H, W): reconstructions, predictions, crops with their geometry."""
        return {}

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads the original authors' checkpoint layout; returns (missing, unexpected) names.

        Raises CheckpointError when the task has no such layout or the tensors do not fit.
        """
        raise CheckpointError(f"task: {type(self).__name__} has no reference checkpoint layout")

    def load_official(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """The old name of `load_reference`."""
        return self.load_reference(state)
