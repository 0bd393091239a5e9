"""The settings of ``unlabeled finetune``.

The defaults are those used by MAE's authors to fine-tune ViT-B on ImageNet (FINETUNE.md in
github.com/facebookresearch/mae; the paper, arXiv 2111.06377, has others for its TensorFlow code), scaled to the batch
size, and without stochastic depth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from unlabeled.ssl.config.base import Arguments, Section
from unlabeled.ssl.config.schema import BackboneConfig, OptimConfig, RunConfig, ScheduleConfig, Size

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    """What changes in the target's network when it becomes a classifier."""

    size: Size | None = None
    """Side of the images that the network receives, one number or [height, width]; null: as in the target. Position
    embeddings are resampled where timm does so. [pixels]"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Largest rate of stochastic depth; the rate grows with depth (MAE: 0.1 for ViT-B, 0.2 for ViT-L)."""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments of timm.create_model that replace those of the target, such as {global_pool: avg}."""


class AugmentConfig(Section):
    """Augmentation of training images, by timm's transforms."""

    crop: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest fraction of the image area that a crop covers. [fraction]"""
    flip: Probability = 0.5
    """Probability of a horizontal flip; set it to 0 for digits and letters."""
    auto: str | None = "rand-m9-mstd0.5-inc1"
    """timm's string for RandAugment or AutoAugment; null: neither."""
    jitter: float = Field(0.0, ge=0)
    """Brightness, contrast and saturation change by up to this fraction; needs augment.auto=null. [fraction]"""
    erase: Probability = 0.25
    """Probability that a rectangle of the image is replaced by noise (random erasing)."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup, which averages images and their labels in pairs; 0: off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix, which pastes a rectangle from another image; 0: off. If both are on, each batch uses one of
    them, with equal probability."""

    @model_validator(mode="after")
    def _crop_is_ordered(self) -> AugmentConfig:
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop {list(self.crop)} is not possible; give the smaller fraction first")
        if self.auto is not None and self.jitter:  # timm ignores color_jitter if auto_augment is set
            raise ValueError("jitter has no effect with auto; set augment.auto=null, or remove jitter")
        return self


class AccuracyConfig(Section):
    """How accuracy on the test split is measured."""

    every: float = Field(0.0, ge=0)
    """Time between measurements on the test split, for a curve only; 0: at the end only. [epochs]"""
    batch_size: int = Field(256, ge=1)
    """Images per batch on the test split. [images]"""
    limit: int | None = Field(None, ge=1)
    """Use at most this many test images, chosen by a fixed shuffle; null: all. [images]"""


class FinetuneOptim(OptimConfig):
    """As in pretraining, with the learning rate and layer-wise decay of fine-tuning."""

    lr: float = Field(5e-4, gt=0)
    layer_decay: float | None = Field(0.65, gt=0, le=1)


class FinetuneSchedule(ScheduleConfig):
    """As in pretraining, with a short warmup."""

    warmup_epochs: float = Field(5.0, ge=0)
    min_lr: float = Field(1e-6, ge=0)


class FinetuneConfig(RunConfig):
    """Trains a run, a timm model or a weights file into a classifier on labeled data."""

    target: str
    """What to fine-tune: a run folder, the name of a timm model, or a weights file (which also needs backbone.name).
    Typed without target=."""
    backbone: BackboneConfig | None = None
    """For a weights file: the network that the weights belong to."""
    pretrained: bool = True
    """For a timm name: load its published weights."""
    scratch: bool = False
    """Train from random weights instead of the target's."""
    baseline: bool = True
    """Then train the same network from random weights for as many steps, in OUT/scratch, with the same settings but
    without layer-wise decay."""
    model: ModelConfig = ModelConfig()
    frozen: bool = False
    """Train only the classifier, on frozen features."""
    label_fraction: float | None = Field(None, gt=0, le=1)
    """Use this fraction of the images of each class, such as 0.01 or 0.1, drawn with engine.seed; null: all.
    [fraction]"""
    augment: AugmentConfig | None = AugmentConfig()
    """null: no augmentation; images are prepared as in testing."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing: fraction of each label that is spread evenly over all classes. [fraction]"""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, which is then tested and exported; smaller in the first steps. null: no
    average."""
    optim: FinetuneOptim = FinetuneOptim()
    schedule: FinetuneSchedule = FinetuneSchedule()
    evaluate: AccuracyConfig = AccuracyConfig()
    out: Path = Path("runs/finetune")
    """Run folder."""
