"""Every setting of ``unlabeled finetune``.

Defaults are those with which MAE's authors fine-tune ViT-B on ImageNet (FINETUNE.md of github.com/facebookresearch/mae;
arXiv 2111.06377 has others for its TensorFlow code), for a batch of any size; stochastic depth is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from unlabeled.ssl.config.base import Arguments, Section
from unlabeled.ssl.config.schema import BackboneConfig, OptimConfig, RunConfig, ScheduleConfig, Size

Part = Annotated[float, Field(gt=0, le=1)]
Chance = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    """What is changed of the target's network when it becomes a classifier."""

    size: Size | None = None
    """Pixels of the images that it sees, one number or [height, width]; None: as the target. Positions are resampled
    where timm does so."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Largest rate of stochastic depth, which grows with depth (MAE: 0.1 for ViT-B, 0.2 for ViT-L)."""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments for ``timm.create_model``, over those of the target, such as ``{global_pool: avg}``."""


class AugmentConfig(Section):
    """What is done to training images, by timm's transforms."""

    crop: tuple[Part, Part] = (0.08, 1.0)
    """Smallest and largest part of the image's area that a crop takes."""
    flip: Chance = 0.5
    """Probability of a mirrored image; 0 for digits and letters."""
    auto: str | None = "rand-m9-mstd0.5-inc1"
    """timm's word for RandAugment or AutoAugment; None: neither."""
    jitter: float = Field(0.0, ge=0)
    """Brightness, contrast and saturation change by up to this part; without `auto` only."""
    erase: Chance = 0.25
    """Probability that a rectangle of the image becomes noise (random erasing)."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup: batches are averaged with themselves in reverse, labels too; 0: off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix: a rectangle comes from the other image; 0: off. With both, either has half of the batches."""

    @model_validator(mode="after")
    def _crop_is_ordered(self) -> AugmentConfig:
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop {list(self.crop)} is not possible; give the smaller part first")
        if self.auto is not None and self.jitter:
            raise ValueError("jitter has no effect beside auto; set augment.auto=null, or leave jitter out")
        return self


class AccuracyConfig(Section):
    """How the test split is read."""

    every: float = Field(0.0, ge=0)
    """Epochs between measurements on the test split, for a curve only; 0: at the end alone."""
    batch_size: int = Field(256, ge=1)
    limit: int | None = Field(None, ge=1)
    """Largest number of test images, chosen by a fixed shuffle."""


class FinetuneOptim(OptimConfig):
    """As in pretraining, with the rate and the layer-wise decay of fine-tuning."""

    lr: float = Field(5e-4, gt=0)
    layer_decay: float | None = Field(0.65, gt=0, le=1)


class FinetuneSchedule(ScheduleConfig):
    """As in pretraining, with a short warm-up."""

    warmup_epochs: float = Field(5.0, ge=0)
    min_lr: float = Field(1e-6, ge=0)


class FinetuneConfig(RunConfig):
    """``unlabeled finetune TARGET``: a run folder, a timm name or a weights file, and labeled data."""

    target: str
    """A run folder, a timm model name, or a file of weights (which also needs `backbone.name`)."""
    backbone: BackboneConfig | None = None
    """Of a file of weights: the network that they belong to."""
    pretrained: bool = True
    """For a timm name: load its published weights."""
    scratch: bool = False
    """Train from random weights instead of the target's."""
    baseline: bool = True
    """After pretrained weights, train the same network from random ones for as many steps, in ``out/scratch``: without
    layer-wise decay, which is for layers that have learned something, and else under the same settings."""
    model: ModelConfig = ModelConfig()
    frozen: bool = False
    """Train the classifier alone, on features that stay as they are."""
    label_fraction: float | None = Field(None, gt=0, le=1)
    """Use this part of each class, such as 0.01 or 0.1, chosen under `engine.seed`; None: all."""
    augment: AugmentConfig | None = AugmentConfig()
    """None: images as in testing."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing: this part of each label is spread over all classes."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, lower in the first steps, which then is what is tested and exported;
    None: none."""
    optim: FinetuneOptim = FinetuneOptim()
    schedule: FinetuneSchedule = FinetuneSchedule()
    evaluate: AccuracyConfig = AccuracyConfig()
    out: Path = Path("runs/finetune")
    """The run folder."""
