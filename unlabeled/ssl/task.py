"""The interface of a pretext task.

Shapes in all tasks: B images, L tokens or patches, K visible tokens, D channels, (gh, gw) grid of patches.
In masks, True means *visible* throughout this package; other conventions are converted where they come in.
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
"""Settings of a run, nested as in its ``config.yaml``, such as ``{"optim": {"lr": 1e-3}, "epochs": 100}``."""
FloatImages = Literal["unit", "bytes", "normalized"]
"""Value range of floating-point images: 0..1, 0..255, or normalized with the backbone's mean and standard deviation."""


class StepOutput(NamedTuple):
    """Result of one forward pass."""

    # a NamedTuple rather than a dataclass: Accelerate converts the outputs of a model to float32 under autocast, and
    # knows tuples and mappings only
    loss: Tensor
    """Scalar, mean over the local batch."""
    logs: dict[str, Tensor]
    """Detached scalars to log, by name."""
    features: Tensor | None = None
    """Detached features (N, D) of different images, as the loss compares them, which the run watches for collapse (see
    `unlabeled.ssl.train.collapse`). None: the task cannot collapse."""


class NamedParameter(NamedTuple):
    """One trainable parameter and what the optimizer needs to know about it."""

    name: str
    parameter: nn.Parameter
    decay: bool
    """Whether weight decay applies."""
    layer: int
    """Depth for layer-wise learning-rate decay: 0 for the stem, `depth + 1` for heads and everything else outside the
    backbone."""


class Paper(NamedTuple):
    """The publication that introduced a task."""

    title: str
    year: int
    """Year of the conference or journal, or of the preprint if the paper was published nowhere else."""
    url: str
    """Such as ``https://arxiv.org/abs/2111.06377``."""


class TaskConfig(BaseModel):
    """Base class of each task's settings. Unknown keys are refused; defaults are those of the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_OLD_ATTRIBUTES = {"per_picture": "per_image", "float_pictures": "float_images", "load_official": "load_reference"}
"""Attribute names of version 0.1.0 → present ones; plugins that set the old ones still work."""


class PretextTask(nn.Module):
    """A pretext task around a backbone.

    A subclass sets `Config` and `requires`, implements `views` and `forward`, and is created as
    ``Task(config, backbone)``. It keeps the backbone that evaluation and export receive as ``self.backbone``, freezes
    (``requires_grad_(False)``) every parameter that its loss does not reach, and keeps all state that a resumed run
    needs in `state_dict()`. All randomness of `forward` comes from `draw`, which uses torch's global generator of the
    input's device; ``forward(batch, **draw)`` repeats a pass with the same random numbers.
    """

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    paper: ClassVar[Paper | None] = None
    """Publication that introduced the task; None if there is none."""
    good_for: ClassVar[str] = ""
    """When to choose the task, in one clause that ``unlabeled tasks`` shows."""
    recipe: ClassVar[Recipe] = {}
    """Settings of the run that ``task=NAME`` implies. They override the defaults; recipe files and the user's settings
    override them."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Names of the backbone capabilities that the task needs (see `unlabeled.ssl.backbones.backbone`)."""
    masked_statistics: ClassVar[bool] = False
    """Whether the backbone's batch norms collect their running statistics on masked images only; evaluation then
    recomputes them on unmasked images (see `unlabeled.eval.features.recalibrate`)."""

    synced_statistics: ClassVar[bool] = False
    """Whether batch norms compute their statistics over the images of all ranks, as the method's authors do."""
    per_image: ClassVar[bool] = True
    """Whether the loss is a mean of independent losses per image. False: the images of a batch are compared with each
    other, so that several micro-steps differ from one step on the full batch."""
    float_images: ClassVar[FloatImages] = "unit"
    """Value range in which `forward` expects images that are not uint8, as a curriculum passes them (see
    `unlabeled.ssl.train.curriculum`)."""
    small_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings for small backbones of any kind and small images, if the defaults do not fit them; used by the matrix of
    tasks and architectures."""
    captions: ClassVar[Mapping[str, str]] = {}
    """Name of an image of `visualize` → what its colors and marks mean; the report shows it with the image."""
    collapse_remedy: ClassVar[str] = "lower optim.lr, lengthen schedule.warmup_epochs, or raise batch_size"
    """What to change when the features collapse; the warning ends with it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rename_attributes(cls, _OLD_ATTRIBUTES)
        if vars(cls).get("float_images") == "normalised":  # the spelling of version 0.1.0
            cls.float_images = "normalized"

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        super().__init__()
        backbone.require(self.requires, task=type(self).__name__)
        self.config = config
        self.backbone = backbone

    @classmethod
    def views(cls, config: Any, backbone: Backbone) -> Views:
        """Returns the transform of a single image, uint8 (3, H, W) of any size, to a dict of tensors of fixed shape.

        Images in that dict should be uint8. The transform must be picklable: it runs in loader workers, with random
        generators that are seeded for each image and epoch.
        """
        raise NotImplementedError

    @classmethod
    def masks_statistics(cls, config: Any) -> bool:
        """`masked_statistics` for the settings `config`."""
        return cls.masked_statistics  # a task that combines others overrides this, since it depends on which ones

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """All random numbers of one forward pass: keyword of `forward` → tensor (B, ...)."""
        # the engine seeds the generator for each micro-step and rank, so nothing has to be stored for a resume
        return {}

    def forward(self, batch: Batch, *args: Any, **draw: Any) -> StepOutput:
        """Computes the loss of one local batch. Logging, optimizer and process group are up to the engine."""
        raise NotImplementedError

    def train_only(self, reached: Container[str]) -> None:
        """Freezes all parameters of the backbone except those named in `reached` (names relative to the backbone)."""
        # DDP fails on parameters that require a gradient and never get one
        for name, parameter in self.backbone.named_parameters():
            if name not in reached:
                parameter.requires_grad_(False)

    def fixed(self) -> set[str]:
        """Names (relative to the backbone) of parameters that the method keeps at prescribed values although its loss
        reaches them. Tasks that are trained together with this one must not train them either."""
        return set()

    def before_step(self, progress: float) -> None:
        """Called after the last backward pass of a step and before clipping: cancel or change gradients here.

        `progress` is the one of the previous `after_step`, and 0 in the first step.
        """

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step: update EMA teachers, queues and vocabularies here. `progress` in [0, 1]."""

    def size_step(self) -> tuple[int, int] | None:
        """When a curriculum makes images smaller, their sides must be multiples of these (h, w); None: their size
        cannot change."""
        return self.backbone.size_step()

    def require_size(self, size: tuple[int, int]) -> None:
        """Raises ConfigError if images of `size` (h, w), multiples of `size_step`, are too small for the task."""

    def encoder(self) -> Backbone:
        """The backbone that evaluation and export receive."""
        return self.backbone

    def elastic(self) -> ElasticConfig | None:
        """The sizes that the backbone was trained to contain (see `unlabeled.ssl.backbones.elastic`); None: only its
        own. They are stored with the exported backbone."""
        return None

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """Every trainable parameter, with whether it decays and its layer.

        By default one-dimensional tensors and biases do not decay (the rule of timm 0.3.2), layers follow the order of
        the backbone's modules, and everything outside the backbone comes one layer after its last.
        """
        layers = self.backbone.parameter_layers()
        head = self.backbone.depth + 1
        # the order is that of named_parameters: optimizer states in checkpoints depend on it
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = decay_applies(name, parameter.shape)
                layer = layers.get(name.removeprefix("backbone."), head) if name.startswith("backbone.") else head
                yield NamedParameter(name, parameter, decay, layer)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """Images to look at, name → uint8 (3, H, W): reconstructions, predictions, crops with their geometry."""
        return {}

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads a checkpoint in the layout of the method's authors; returns the (missing, unexpected) names.

        Raises CheckpointError if the task does not support such a layout or the tensors do not fit.
        """
        raise CheckpointError(f"task: {type(self).__name__} has no reference checkpoint layout")

    def load_official(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Old name of `load_reference`."""
        return self.load_reference(state)
