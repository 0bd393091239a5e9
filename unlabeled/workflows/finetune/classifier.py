"""Builds the model that is fine-tuned: the backbone of ``TARGET`` with a new classifier."""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.given import adopt
from unlabeled.ssl.backbones.shapes import probed, reached_by
from unlabeled.ssl.backbones.weights import fill_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.workflows.finetune.config import ModelConfig

logger = logging.getLogger(__name__)

_HEAD_DEVIATION = 2e-5
"""Standard deviation of a new classifier's weights. Nearly zero, as in MAE's code, so that the first gradients that
reach the pretrained layers are small."""


def create_classifier_backbone(
    target: Backbone, classes: int, config: ModelConfig, *, weights: bool = True
) -> Backbone:
    """Builds the model of `target` with a classifier of `classes` outputs.

    With `weights`, it gets the target's weights and a new classifier; otherwise all its weights are random, drawn from
    torch's global generator. ``.model(x)`` returns logits (B, classes). Parameters that the logits do not depend on are
    frozen. Raises ConfigError for arguments that the model does not take, CapabilityError for a model without a
    classifier, CheckpointError for weights that do not fit.
    """
    backbone = _extend(target, classes, config, weights) if target.custom else _build(target, classes, config)
    head = classifier_parameters(backbone)
    # what a model calls its classifier may give maps or several outputs, so try it on an image
    shape = probed(backbone.model, backbone.input_size, lambda model, x: tuple(model(x).shape))
    if not head or shape != (1, classes):
        raise CapabilityError(
            f"target: {backbone.name} gives {list(shape[1:])} for an image instead of {classes} classes; "
            "give a model with a classifier"
        )
    if weights and not target.custom:
        # the target may have a classifier of other classes: leave it out
        names = {name.removeprefix("model.") for name in head}
        state = {name: tensor for name, tensor in target.model.state_dict().items() if name not in names}
        report = fill_backbone(backbone, state, f"target: {target.name}")
        logger.info("newly initialized in %s: %s", backbone.name, ", ".join(report.missing))
    _start_small(backbone, head)
    # parameters without a gradient would make DistributedDataParallel fail
    reached = reached_by(backbone.model, backbone.input_size, lambda model, x: [model(x)])
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in reached)
    return backbone


def _build(target: Backbone, classes: int, config: ModelConfig) -> Backbone:
    """The timm model of `target` with random weights and a classifier."""
    kwargs: dict[str, Any] = {**target.kwargs, **config.kwargs, "num_classes": classes}
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    if config.size is not None:
        kwargs.pop("img_size", None)  # of the target; create_backbone sets it from `size`
    try:
        backbone = create_backbone(target.name, size=config.size or target.input_size, **kwargs)
    except ConfigError as error:
        # name the settings of this command in place of those of `create_backbone`
        message = str(error).replace("backbone.kwargs.drop_path_rate", "model.drop_path")
        raise ConfigError(message.replace("backbone.size", "model.size").replace("backbone.k", "model.k")) from error
    backbone.set_statistics(target.mean, target.std)
    return backbone


def _extend(target: Backbone, classes: int, config: ModelConfig, weights: bool) -> Backbone:
    """A copy of a model without a timm name, or a randomly initialized one, with a classifier."""
    if config.kwargs or config.drop_path:
        field = "model.kwargs" if config.kwargs else "model.drop_path"
        raise ConfigError(f"{field}: {target.name} has no timm name; set this where you build the module")
    model = copy.deepcopy(target.model) if weights else target.twin().model
    classifier = model
    if callable(getattr(model, "reset_classifier", None)) and callable(getattr(model, "get_classifier", None)):
        cast(Any, model).reset_classifier(classes)
    else:
        classifier = Classifier(model, target.embed_dim, classes)
    backbone = Backbone(classifier, size=config.size or target.input_size, mean=target.mean, std=target.std)
    backbone.name, backbone.origin = target.name, target.origin
    return backbone


class Classifier(nn.Module):
    """A model with timm's interface and a linear layer on its pooled features."""

    def __init__(self, model: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Any:
        """The features of `model`."""
        return cast(Any, self.model).forward_features(x)

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes); with `pre_logits`, the pooled features (B, D)."""
        pooled: Tensor = cast(Any, self.model).forward_head(features, pre_logits=True).flatten(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 3, h, w) → logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer, as in timm's interface."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that `model` exempts from weight decay."""
        exempt = getattr(self.model, "no_weight_decay", None)
        return {f"model.{name}" for name in exempt()} if callable(exempt) else set()


def create_classifier(module: nn.Module, classes: int) -> Backbone:
    """Returns a copy of `module` with a new classifier of `classes` outputs, as trained by `unlabeled.finetune`.

    `module` is a `Backbone` or a module with timm's interface. To restore a fine-tuned classifier, call
    ``load_weights(classifier, "classifier.safetensors")``. ``.model(x)`` returns logits (B, classes). Raises
    CapabilityError for a module that cannot become a classifier.
    """
    if classes < 1:
        raise ConfigError(f"classes: {classes} is not possible; give a number from 1")
    return create_classifier_backbone(adopt(module), classes, ModelConfig())


def classifier_parameters(backbone: Backbone) -> set[str]:
    """Names (relative to `backbone`) of the parameters of its classifier, or of both classifiers if it has two."""
    model = cast(Any, backbone.model)
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    # distilled models such as DeiT's have a second head for the distillation token
    heads = [head for head in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(head, nn.Module)]
    # by identity: the name of the classifier differs between architectures
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in backbone.named_parameters() if id(parameter) in own}


@torch.no_grad()
def _start_small(backbone: Backbone, head: set[str]) -> None:
    """Initializes the linear layers of the classifier with small weights and zero bias; norms are unchanged."""
    for name, parameter in backbone.named_parameters():
        if name in head and parameter.dim() > 1:  # the weights of norms are vectors
            nn.init.trunc_normal_(parameter, std=_HEAD_DEVIATION)
        elif name in head and name.endswith("bias"):
            nn.init.zeros_(parameter)


def logits_of(backbone: Backbone, images: Tensor) -> Tensor:
    """Normalized images (B, 3, h, w) → logits (B, classes)."""
    logits: Tensor = backbone.model(images)
    return logits
