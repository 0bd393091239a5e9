"""Fine-tuning as a task for the training engine. Unlike a pretext task, it gets labels in its batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.layer_index import decay_applies
from unlabeled.ssl.data.loader import seeded
from unlabeled.ssl.task import Batch, NamedParameter, PretextTask, StepOutput, TaskConfig
from unlabeled.workflows.finetune.classifier import classifier_parameters, logits_of
from unlabeled.workflows.finetune.config import AugmentConfig
from unlabeled.workflows.finetune.data import PlainTransform, TrainTransform, train_transform


class FinetuneTask(TaskConfig):
    """Settings of `Finetune`; they are documented in `unlabeled.workflows.finetune.config`."""

    classes: int
    augment: AugmentConfig | None = None
    smoothing: float = 0.0
    frozen: bool = False
    ema: float | None = None


class Finetune(PretextTask):
    """Trains a classifier with cross-entropy, mixup, CutMix, random erasing, label smoothing and averaged weights.

    This is the recipe of DeiT, BEiT and MAE (arXiv 2012.12877, 2106.08254, 2111.06377). `backbone` comes from
    `unlabeled.workflows.finetune.classifier.create_classifier_backbone`. The batch has ``image``, uint8 (B, 3, h, w),
    and ``label``, int64 (B,).
    """

    Config = FinetuneTask
    config: FinetuneTask

    def __init__(self, config: FinetuneTask, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self._head = classifier_parameters(backbone)
        if config.frozen:
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(name in self._head)
        self._mix = _mixup(config)
        self.ema: ModelEmaV3 | None = None
        if config.ema is not None:
            self.ema = ModelEmaV3(backbone, decay=config.ema, use_warmup=True).requires_grad_(False)
        # number of averaging steps: a buffer to be stored in checkpoints, and a Python number to avoid a device sync
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._updates: int | None = None

    @classmethod
    def views(cls, config: Any, backbone: Backbone) -> TrainTransform | PlainTransform:
        """See `PretextTask.views`."""
        return train_transform(config.augment, backbone)

    def train(self, mode: bool = True) -> Finetune:
        """Sets the mode of the task; a frozen backbone stays in eval mode."""
        super().train(mode)
        # frozen parameters are not enough: train mode would update batch-norm statistics and apply dropout
        if self.config.frozen:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch) -> StepOutput:
        """Cross-entropy over the batch; logs the training accuracy unless labels are mixed."""
        images, labels = self.backbone.normalize(batch["image"]), batch["label"]
        if self.config.augment is not None:
            images, targets = self.mixed(images, labels)
        else:
            targets = labels
        logits = logits_of(self.backbone, images).float()
        if targets.dim() > 1:  # mixed labels, which timm's Mixup has already smoothed
            return StepOutput(F.cross_entropy(logits, targets), {})
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.smoothing)
        return StepOutput(loss, {"accuracy": (logits.detach().argmax(1) == targets).float().mean()})

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Applies random erasing, then mixup or CutMix, in place.

        Returns images (B, 3, h, w) and targets, (B, classes) or, without mixing, (B,).
        """
        augment = self.config.augment
        assert augment is not None, "called only with augmentation"
        # timm draws from the generators of Python and numpy: seed them from torch's, which checkpoints restore
        with seeded(int(torch.randint(2**31, ()))):
            if augment.erase:
                images = RandomErasing(augment.erase, mode="pixel", device=images.device)(images)
            if self._mix is None:
                return images, labels
            mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed

    def after_step(self, progress: float) -> None:
        """Updates the averaged weights."""
        if self.ema is None:
            return
        updates = cast(Tensor, self.updates)
        self._updates = (int(updates) if self._updates is None else self._updates) + 1
        updates.add_(1)
        self.ema.update(self.backbone, step=self._updates)

    def encoder(self) -> Backbone:
        """The model to test and export: the averaged weights if ``ema`` is set."""
        return self.backbone if self.ema is None else cast(Backbone, self.ema.module)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """Yields the parameters with their layer index; the classifier is one layer past the last block.

        Biases, norms and parameters that the timm model exempts (tokens, position embeddings) have no weight decay.
        """
        model = cast(Any, self.backbone.model)
        exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        layers, last = self.backbone.parameter_layers(), self.backbone.depth + 1
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                decay = decay_applies(name, parameter.shape) and name.removeprefix("model.") not in exempt
                yield NamedParameter(f"backbone.{name}", parameter, decay, last if name in self._head else layers[name])


def _mixup(config: FinetuneTask) -> Mixup | None:
    augment = config.augment
    if augment is None or not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=config.smoothing, num_classes=config.classes)
