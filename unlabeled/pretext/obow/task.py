"""The task OBoW: settings, steps of the method, logs. See `unlabeled.pretext.obow` for the paper and shapes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.common.teacher import cosine_momentum, frozen_copy
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.obow.drawing import nearest_words, painted, side_by_side, word_colors
from unlabeled.pretext.obow.reference import reference_names
from unlabeled.pretext.obow.views import ImageCropsConfig, OBoWViews, PatchesConfig, sizes_of
from unlabeled.pretext.obow.vocabulary import (
    Distances,
    Pool,
    QueueUpdate,
    Source,
    Vocabulary,
    WordHead,
    information,
    inner_map,
    mean_over_ranks,
    perplexity,
    pick_words,
    window_of,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.nn.ema import ema_update
from unlabeled.ssl.task import Batch, NamedParameter, Paper, PretextTask, Recipe, StepOutput, TaskConfig

logger = logging.getLogger(__name__)

_VIEWS = ("crops", "patches")
"""Kinds of student views, by their key in a batch. The loss of each kind has the same weight, whatever its views."""
_MB = 2**20
_LEAST = 1e-3
"""Lower bound of the first batch's mean distance, as a fraction of the mean squared feature: on small maps each
position may itself be a word, at distance 0."""
_TINY = 1e-12
"""Smallest mean distance to divide by; for constant images it is 0."""
_SHOWN = 8
"""Number of images that `visualize` shows."""


class OBoWConfig(TaskConfig):
    """Settings of OBoW; the defaults are the full form on a ResNet-50.

    A ResNet-18 takes kappa=5 and beta=10. The vanilla form: levels=[-1], image_crops.number=1, patches.number=0.
    """

    levels: tuple[int, ...] | None = Field(None, min_length=1)
    """Feature maps that have a vocabulary each; negative numbers count from the end. null: the map at three quarters of
    the depth and the last one."""
    words: int = Field(8192, ge=2)
    """Size of each vocabulary. [words]"""
    kappa: float = Field(8.0, gt=0)
    """Scale of the student's logits."""
    beta: float | None = Field(15.0, gt=0)
    """Sharpness of the assignment to words: inverse temperature, relative to the mean distance to the nearest word;
    null: assign each location to its nearest word only."""
    pool: Pool = "max"
    """How assignments are pooled over the locations of an image."""
    word_source: Source = "local"
    """What becomes a new word. local: the 3x3 average around a random location. cell: one random location. map: the
    average of the whole map."""
    fill: Literal["auto"] | bool = "auto"
    """Fill the vocabulary from the first batch, and start the mean distance from it; false: random words, as published.
    auto: only if feature maps have negative values, which random words do not fit."""
    map_norm: Literal["auto"] | bool = "auto"
    """Normalize the teacher's feature maps over channels at each location; false: as published. auto: as `fill`."""
    momentum: float = Field(0.99, ge=0, le=1)
    """Decay rate of the teacher's weights at the start of the run; it rises to 1 along a half cosine."""
    distance_decay: float = Field(0.99, ge=0, lt=1)
    """Decay rate of the running mean distance to the nearest word."""
    center: Fraction = 0.875
    """Fraction of each side of the image that the teacher sees (224 of 256 pixels). [fraction]"""
    image_crops: ImageCropsConfig = ImageCropsConfig()
    """Crops of the image for the student."""
    patches: PatchesConfig = PatchesConfig()
    """Patches of the image for the student."""
    decay_all: bool = True
    """Apply weight decay to every parameter, as published; false: not to norms and biases."""
    memory: int = Field(256, ge=1)
    """Largest size of one table of distances; larger tables are computed in pieces. [MB]"""

    @model_validator(mode="after")
    def _student_sees_something(self) -> OBoWConfig:
        if not self.image_crops.number + self.patches.number:
            raise ValueError("image_crops.number and patches.number are both 0; the student needs a view")
        return self


class OBoW(PretextTask):
    """Predicts which visual words a teacher finds in the image, from small crops and patches of it.

    Submodules: `backbone` (the student), `teacher`, `vocabularies`, `heads`.

    All computations of a step use the words as they were before it. `after_step` updates the teacher, the words and the
    running mean distance. The authors' monitor, a linear classifier that needs labels and does not affect the features,
    is left out; online kNN serves the same purpose.

    Logs: a loss per kind of view; per level ``perplexity_*`` (number of words in use in the batch),
    ``perplexity_image_*`` (the same per image) and ``distance_*``; ``teacher_information``.
    """

    Config: ClassVar[type[TaskConfig]] = OBoWConfig
    paper = Paper(
        "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning",
        2021,
        "https://arxiv.org/abs/2012.11552",
    )
    good_for = "ResNets at moderate batch sizes; good frozen features after few epochs"
    recipe: ClassVar[Recipe] = {
        "optim": {"name": "sgd", "lr": 0.03, "lr_scaling": "none", "momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"name": "cosine", "warmup_epochs": 10, "min_lr": 3e-5, "per_epoch": True},
        "batch_size": 256,
        "epochs": 200,
    }
    """OBoW (Gidaris et al., CVPR 2021, arXiv 2012.11552): the full form on a ResNet-50 for ImageNet. The learning rate
    is not scaled. A ResNet-18 on a fifth of ImageNet: kappa 5, beta 10, lr 0.05, weight decay 5e-4, batch 128, 80
    epochs, no warm-up. The vanilla form: task.levels=[-1] task.image_crops.number=1 task.patches.number=0"""
    requires: ClassVar[frozenset[str]] = frozenset({"dense_map", "pooled"})
    small_settings: ClassVar[dict[str, Any]] = {"words": 64}
    synced_statistics: ClassVar[bool] = True
    per_image: ClassVar[bool] = False
    collapse_remedy: ClassVar[str] = "lower optim.lr, lengthen schedule.warmup_epochs, or raise task.beta"
    config: OBoWConfig
    scale: Tensor

    def __init__(self, config: OBoWConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without feature maps, ConfigError for levels or sizes that do not
        fit."""
        super().__init__(config, backbone)
        self.levels = _levels(config.levels, backbone)
        sizes = sizes_of(config.image_crops, config.patches, backbone)
        if sizes.refused is not None:
            logger.warning(
                "obow: %s takes images of %dx%d only (%s), so the student's views have that size too; "
                "backbone.kwargs.dynamic_img_size=true may help",
                backbone.name, *sizes.teacher, sizes.refused,
            )  # fmt: skip
        self.train_only(backbone.reached_by_pooled())
        # the published initial words are non-negative, like a ResNet's features after their ReLU; others need `fill`
        signed = _has_negative_values(backbone, self.levels)
        fill = signed if config.fill == "auto" else config.fill
        self.map_norm = signed if config.map_norm == "auto" else config.map_norm
        self.teacher = frozen_copy(backbone)
        channels = [backbone.stages[level].channels for level in self.levels]
        self.vocabularies = nn.ModuleList(
            Vocabulary(config.words, width, fill=fill, signed=signed, decay=config.distance_decay) for width in channels
        )
        self.heads = nn.ModuleList(WordHead(width, backbone.embed_dim) for width in channels)
        self.register_buffer("scale", torch.full((len(channels),), config.kappa))
        self._updates: list[list[QueueUpdate]] = []

    @classmethod
    def views(cls, config: OBoWConfig, backbone: Backbone) -> Views:
        sizes = sizes_of(config.image_crops, config.patches, backbone)
        return OBoWViews(config.image_crops, config.patches, sizes, config.center)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``position`` (B, levels) in [0, 1): the position in the feature map that becomes each image's new word."""
        image = batch["image"]
        return {"position": torch.rand(len(image), len(self.levels), device=image.device)}

    def forward(self, batch: Batch, *, position: Tensor | None = None) -> StepOutput:
        """``image`` (B, 3, H, W), ``crops`` (B, n, 3, h, w) and ``patches`` (B, m, 3, h', w') → KL(bag || prediction),
        summed over kinds of views and averaged over levels, images and views."""
        position = self.draw(batch)["position"] if position is None else position
        # the student encodes small views
        features = {kind: self.student(batch[kind]) for kind in _VIEWS if kind in batch}  # (B, n, D) each
        losses = {kind: self.scale.new_zeros(()) for kind in features}
        logs: dict[str, Tensor] = {}
        updates, informed = [], []
        for level, maps in enumerate(self.teacher_maps(batch["image"])):
            # the teacher assigns the image's positions to words: a bag of words per image
            words, bags, update = self.assign(level, maps, position[:, level])  # (K, C), (B, K)
            # the student predicts the bag, with a classifier generated from the words, as these change in every step
            weights = self.heads[level](words)  # (K, D)
            for kind, pooled in features.items():
                logits = bow_logits(pooled, weights, self.scale[level])  # (B, n, K)
                losses[kind] = losses[kind] + bow_loss(logits, bags) / len(self.levels)
            updates.append(update)
            informed.append(information(bags))
            logs |= self._level_logs(level, bags)
        if self.training:
            self._updates.append(updates)  # stored in `after_step`, so that all micro-steps use the same words
        logs |= {f"loss_{kind}": loss.detach() for kind, loss in losses.items()}
        logs["teacher_information"] = torch.stack(informed).mean()
        first = next(iter(features.values()))[:, 0].detach()
        return StepOutput(torch.stack(list(losses.values())).sum(), logs, first)

    def student(self, views: Tensor) -> Tensor:
        """(B, n, 3, h, w) → pooled features (B, n, D), not normalized."""
        pooled = self.backbone.pooled(self.backbone.normalize(views.flatten(0, 1)))
        return pooled.view(*views.shape[:2], -1)

    @torch.no_grad()
    def teacher_maps(self, images: Tensor) -> list[Tensor]:
        """uint8 (B, 3, H, W) → the teacher's feature maps (B, C, h, w) of all levels, prepared for assignment."""
        # in train mode, the teacher's batch norms use the statistics of the batch
        return [self.prepared(one) for one in self.teacher.maps(self.backbone.normalize(images), self.levels)]

    def prepared(self, maps: Tensor) -> Tensor:
        """Feature map (B, C, H, W) → the same without its border, and normalized at each position if `map_norm`."""
        inner = inner_map(maps)
        if not self.map_norm:
            return inner
        return F.layer_norm(widened(inner.movedim(1, -1)), inner.shape[1:2]).movedim(-1, 1)

    @torch.no_grad()
    def assign(self, level: int, maps: Tensor, position: Tensor) -> tuple[Tensor, Tensor, QueueUpdate]:
        """Maps (B, C, h, w) of one level → its words (K, C), bags (B, K), and the update to store after the step."""
        vocabulary = cast(Vocabulary, self.vocabularies[level])
        window = window_of(maps, self.config.word_source)
        words, seeds = vocabulary.read(maps, position, window)
        # squared distances of all positions to all words
        features = maps.flatten(2).transpose(1, 2)  # (B, P, C)
        distances = Distances(features, words, self.config.memory * _MB)
        # the mean distance to the nearest word sets the sharpness of the assignment
        nearest, distance = vocabulary.distance, vocabulary.distance
        if self.training or seeds is not None:
            nearest = distances.mean_nearest().view(1)
            nearest = mean_over_ranks(nearest) if self.training else nearest
            if seeds is not None:  # words come from these very maps, so the nearest may be at distance 0
                magnitude = widened(features).square().sum(-1).mean().view(1)
                magnitude = mean_over_ranks(magnitude) if self.training else magnitude
                nearest = torch.maximum(nearest, _LEAST * magnitude)
            distance = vocabulary.moved_distance(nearest)
        sharpness = None if self.config.beta is None else self.config.beta / distance.clamp(min=_TINY)
        bags = distances.bags(sharpness, self.config.pool)
        return words, bags, QueueUpdate(pick_words(maps, position, window), nearest, seeds)

    def _level_logs(self, level: int, bags: Tensor) -> dict[str, Tensor]:
        return {
            f"perplexity_{level}": perplexity(bags.mean(0)),
            f"perplexity_image_{level}": perplexity(bags).mean(),
            f"distance_{level}": cast(Vocabulary, self.vocabularies[level]).distance[0].clone(),
        }

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher toward the student, then stores new words and the mean distance."""
        # the authors move the teacher within the next step, by the same amount
        ema_update(self.teacher, self.backbone, cosine_momentum(self.config.momentum, 1.0, progress))
        steps, self._updates = self._updates, []
        # from micro-steps of levels to levels of micro-steps
        for vocabulary, updates in zip(self.vocabularies, zip(*steps, strict=True), strict=False):
            cast(Vocabulary, vocabulary).store(updates)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, but with weight decay on all parameters if `decay_all` is set."""
        for group in super().parameter_groups():
            yield group._replace(decay=group.decay or self.config.decay_all)

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``words``: one row per image (the first 8): the teacher's view, the same with each position in the color of
        its nearest word (one column per level), and the student's views. The task runs in eval mode."""
        images = batch["image"][:_SHOWN].cpu()
        columns = [images[:, None]]
        with modes_kept(self):
            self.eval()
            normalized = self.backbone.normalize(batch["image"][:_SHOWN])
            for level, maps in enumerate(self.teacher.maps(normalized, self.levels)):
                inner = self.prepared(maps)
                words = self.assign(level, inner, maps.new_zeros(len(maps)))[0]
                nearest = nearest_words(inner, words, self.config.memory * _MB)
                columns.append(painted(images, word_colors(nearest), (maps.shape[-2], maps.shape[-1]))[:, None])
        columns += [batch[kind][:_SHOWN].cpu() for kind in _VIEWS if kind in batch]
        return {"words": side_by_side(columns)}

    def load_reference(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Loads a per-epoch checkpoint of the authors' code: student, teacher, heads and queues.

        Takes the file's ``{"network": ...}`` or its tensors, with or without the prefix of data parallelism. Returns
        (missing, unexpected) names as in the file. Raises CheckpointError if the backbone is no ResNet of timm, or if
        tensors do not fit.
        """
        tensors: Mapping[str, Tensor] = state.get("network", state)
        names = reference_names(self.state_dict())
        if not any(name.startswith("feature_extractor._feature_blocks.4") for name in names):
            raise CheckpointError(
                f"checkpoint: OBoW's files hold ResNets, the backbone is {self.backbone.name}; "
                "set backbone.name=resnet50 or resnet18"
            )
        return load_mapped(self, {name.removeprefix("module."): value for name, value in tensors.items()}, names)


def bow_logits(features: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Student features (..., D), not normalized, and weights (K, D) → scale * f . w, (..., K), in at least float32."""
    # no autocast: bfloat16 would round large logits to whole numbers
    with torch.autocast(features.device.type, enabled=False):
        return scale * F.linear(widened(features), weights)


def bow_loss(logits: Tensor, bags: Tensor) -> Tensor:
    """Mean KL(bag || softmax(logits)) over views (B, n, K) of images with bags (B, K), in at least float32."""
    with torch.autocast(logits.device.type, enabled=False):
        negative_cross_entropy = (bags[:, None] * widened(logits).log_softmax(-1)).sum(-1)
    # xlogy: 0 log 0 is 0
    return torch.xlogy(bags, bags).sum(-1).mean() - negative_cross_entropy.mean()


def _levels(requested: tuple[int, ...] | None, backbone: Backbone) -> list[int]:
    """Non-negative indices of the feature maps. Raises ConfigError for unknown indices and duplicates."""
    count = len(backbone.stages)
    if requested is None:  # the map at three quarters of the depth, and the last one
        return sorted({max(min(math.ceil(3 * count / 4), count - 1) - 1, 0), count - 1})
    levels = [level % count for level in requested if -count <= level < count]
    if len(set(levels)) < len(requested):
        raise ConfigError(
            f"task.levels: {list(requested)} are not different maps of {backbone.name}, which has {count}; "
            f"give numbers from {-count} to -1"
        )
    return levels


def _has_negative_values(backbone: Backbone, levels: list[int]) -> bool:
    """Whether feature maps have negative values (a ResNet's, after their ReLU, do not)."""
    weight = next(backbone.parameters())
    # probe with noise from a separate generator: the global one must not advance
    x = torch.randn(1, 3, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), modes_kept(backbone.model):
        backbone.model.eval()
        return any(bool((one < 0).any()) for one in backbone.maps(x.to(weight), levels))
