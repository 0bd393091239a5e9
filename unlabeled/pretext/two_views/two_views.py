"""Code that SimCLR, BYOL and VICReg share: two augmented crops of each image, their embedding, and `visualize`.

Shapes: B images, D channels of the projection. A batch holds ``views``, uint8 (B, 2, 3, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from unlabeled.pretext.common.drawing import RIGHT, WRONG, enlarged, framed, tiled
from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.common.views import ColorConfig, Colors, Fraction, Probability, RandomCrop
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, PretextTask, StepOutput, TaskConfig

_SMALL = 64
"""Largest side of a view, in pixels, that `blur: auto` does not blur."""
_SHOWN = 8
"""Number of images that `visualize` shows."""
_FRAME = 6
"""Width of the frame around the view that was found, in pixels."""


class FirstColors(ColorConfig):
    """Color augmentation of BYOL's first view (arXiv 2006.07733, table 6): always blurred."""

    blur: Probability = 1.0


class SecondColors(ColorConfig):
    """Color augmentation of BYOL's second view (arXiv 2006.07733, table 6): rarely blurred, sometimes solarized."""

    blur: Probability = 0.1
    solarize: Probability = 0.2


class TwoViewsConfig(TaskConfig):
    """Settings of the two views.

    Each task declares `first` and `second` with its own types, so that settings that you leave out keep its defaults.
    """

    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest fraction of the image area that a view covers. [fraction]"""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    blur: Literal["auto"] | bool = "auto"
    """Whether views are blurred, as often as `first` and `second` say. auto: only views of more than 64 pixels (SimCLR,
    appendix B.9, does not blur CIFAR's images)."""
    first: ColorConfig = ColorConfig()
    """Color augmentation of the first view."""
    second: ColorConfig = ColorConfig()
    """Color augmentation of the second view."""

    @model_validator(mode="after")
    def _ordered(self) -> TwoViewsConfig:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)} begins above its end; give [smallest, largest]")
        return self


class TwoViews:
    """Two independent random crops of one image, each with its own color augmentation."""

    def __init__(self, config: TwoViewsConfig, size: tuple[int, int]) -> None:
        self.crop = RandomCrop(
            size, scale=config.crop_scale, flip=config.flip, interpolation=v2.InterpolationMode.BICUBIC
        )
        blurred = max(size) > _SMALL if config.blur == "auto" else config.blur
        sharp = {} if blurred else {"blur": 0.0}
        self.colors = [Colors(colors.model_copy(update=sharp)) for colors in (config.first, config.second)]

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → ``views``, uint8 (2, 3, h, w)."""
        return {"views": torch.stack([colors(self.crop(image).image) for colors in self.colors])}


class TwoViewTask(PretextTask):
    """Base of the tasks that compare the pooled, projected features of two views; a subclass sets `projector`."""

    Config: ClassVar[type[TaskConfig]] = TwoViewsConfig
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    synced_statistics: ClassVar[bool] = True
    config: TwoViewsConfig
    projector: nn.Module

    def __init__(self, config: TwoViewsConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled())

    @classmethod
    def views(cls, config: TwoViewsConfig, backbone: Backbone) -> Views:
        return TwoViews(config, backbone.input_size)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``views`` uint8 (B, 2, 3, h, w) → the first and the second views, normalized (B, 3, h, w) each.

        Raises ConfigError for a single image, since batch norm and the losses compare images.
        """
        first, second = batch["views"].unbind(1)
        if len(first) < 2:
            name = type(self).__name__
            raise ConfigError(f"batch_size: {name} got 1 image; give at least 2 to each process and micro-step")
        return self.backbone.normalize(first), self.backbone.normalize(second)

    def embed(self, images: Tensor) -> Tensor:
        """Normalized (B, 3, h, w) → projections (B, D)."""
        projections: Tensor = self.projector(self.backbone(images))
        return projections

    def output(self, loss: Tensor, first: Tensor, second: Tensor) -> StepOutput:
        """The step's output. `first` and `second` (B, D) are what the loss compared; logs their mean cosine."""
        first, second = widened(first.detach()), widened(second.detach())
        return StepOutput(loss, {"similarity": F.cosine_similarity(first, second).mean()}, features=first)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``views``: one row per image (the first 8): both views, and the second view that is nearest to the first.

        Its frame is green if it belongs to the same image, else red.
        """
        views = batch["views"][:_SHOWN]
        with modes_kept(self):
            self.eval()
            first, second = (
                F.normalize(widened(self.embed(self.backbone.normalize(view))), dim=1) for view in views.unbind(1)
            )
        nearest = (first @ second.T).argmax(1)
        correct = nearest == torch.arange(len(views), device=nearest.device)
        tiles = enlarged(torch.stack([views[:, 0], views[:, 1], views[nearest, 1]], 1).cpu())  # (B, 3 columns, 3, h, w)
        for row, is_own in zip(tiles, correct.tolist(), strict=True):
            inner = row[2, :, _FRAME:-_FRAME, _FRAME:-_FRAME]  # the frame covers the edge, so all tiles have one size
            row[2] = framed(inner, _FRAME, RIGHT if is_own else WRONG)
        return {"views": tiled(tiles.flatten(0, 1), 3)}


def exactly(loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
    """`loss(*features)`, computed in at least float32."""
    # autocast would compute similarities in half precision, whatever the type of the features
    with torch.autocast(features[0].device.type, enabled=False):
        return loss(*(widened(one) for one in features))
