"""From what ``TARGET`` names to the network that is fine-tuned: the same timm model with a new classifier."""

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
"""Of a new classifier's weights: nearly no opinion at first, as in MAE's code, so that the first gradients that reach
the pretrained layers are small."""


def create_classifier_backbone(
    target: Backbone, classes: int, config: ModelConfig, *, weights: bool = True
) -> Backbone:
    """The model of `target` with a classifier of `classes` outputs, filled with the target's `weights` or random.

    ``.model(x)`` gives logits (B, classes). Parameters that these do not depend on are frozen. Random weights come from
    torch's global generator. Raises ConfigError for arguments that the model does not take, CapabilityError for one
    that has no classifier, CheckpointError for weights that do not fit.
    """
    network = _extend(target, classes, config, weights) if target.custom else _build(target, classes, config)
    head = classifier_parameters(network)
    shape = probed(network.model, network.input_size, lambda model, x: tuple(model(x).shape))
    if not head or shape != (1, classes):
        raise CapabilityError(
            f"target: {network.name} gives {list(shape[1:])} for an image instead of {classes} classes; "
            "give a network with a classifier"
        )
    if weights and not target.custom:
        names = {name.removeprefix("model.") for name in head}
        state = {name: tensor for name, tensor in target.model.state_dict().items() if name not in names}
        report = fill_backbone(network, state, f"target: {target.name}")
        logger.info("new in %s: %s", network.name, ", ".join(report.missing))
    _start_small(network, head)
    reached = reached_by(network.model, network.input_size, lambda model, x: [model(x)])
    for name, parameter in network.model.named_parameters():
        parameter.requires_grad_(name in reached)
    return network


def _build(target: Backbone, classes: int, config: ModelConfig) -> Backbone:
    kwargs: dict[str, Any] = {**target.kwargs, **config.kwargs, "num_classes": classes}
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    if config.size is not None:
        kwargs.pop("img_size", None)
    try:
        network = create_backbone(target.name, size=config.size or target.input_size, **kwargs)
    except ConfigError as error:
        told = str(error).replace("backbone.kwargs.drop_path_rate", "model.drop_path")
        raise ConfigError(told.replace("backbone.size", "model.size").replace("backbone.k", "model.k")) from error
    network.set_statistics(target.mean, target.std)
    return network


def _extend(target: Backbone, classes: int, config: ModelConfig, weights: bool) -> Backbone:
    """A copy of a network without a timm name, or its random twin, with a classifier."""
    if config.kwargs or config.drop_path:
        field = "model.kwargs" if config.kwargs else "model.drop_path"
        raise ConfigError(f"{field}: {target.name} is not built by its name; set this where you build the module")
    model = copy.deepcopy(target.model) if weights else target.twin().model
    classifier = model
    if callable(getattr(model, "reset_classifier", None)) and callable(getattr(model, "get_classifier", None)):
        cast(Any, model).reset_classifier(classes)
    else:
        classifier = Classifier(model, target.embed_dim, classes)
    network = Backbone(classifier, size=config.size or target.input_size, mean=target.mean, std=target.std)
    network.name, network.origin = target.name, target.origin
    return network


class Classifier(nn.Module):
    """A network of timm's surface with one linear layer on its pooled features."""

    def __init__(self, model: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Any:
        """As `model`."""
        return cast(Any, self.model).forward_features(x)

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes); with `pre_logits` the pooled features (B, D)."""
        pooled: Tensor = cast(Any, self.model).forward_head(features, pre_logits=True).flatten(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized (B, 3, h, w) → (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer, as timm's models give it."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that `model` excepts from weight decay."""
        excepted = getattr(self.model, "no_weight_decay", None)
        return {f"model.{name}" for name in excepted()} if callable(excepted) else set()


def create_classifier(module: nn.Module, classes: int) -> Backbone:
    """A copy of `module`, a `Backbone` or a module with timm's surface, with a new classifier of `classes` outputs.

    It is what `unlabeled.finetune` trains; ``load_weights(classifier, "classifier.safetensors")`` brings a fine-tuned
    one back. Its ``.model(x)`` gives logits (B, classes). Raises CapabilityError for a module that cannot be one.
    """
    if classes < 1:
        raise ConfigError(f"classes: {classes} is not possible; give a number from 1")
    return create_classifier_backbone(adopt(module), classes, ModelConfig())


def classifier_parameters(network: Backbone) -> set[str]:
    """Names (relative to `network`) of the parameters of its classifier, of both where it has two."""
    model = cast(Any, network.model)
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [head for head in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(head, nn.Module)]
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in own}


@torch.no_grad()
def _start_small(network: Backbone, head: set[str]) -> None:
    """Small weights and no bias for the linear layers of the classifier; norms in it stay as they are."""
    for name, parameter in network.named_parameters():
        if name in head and parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=_HEAD_DEVIATION)
        elif name in head and name.endswith("bias"):
            nn.init.zeros_(parameter)


def logits_of(network: Backbone, images: Tensor) -> Tensor:
    """Normalized images (B, 3, h, w) → (B, classes)."""
    logits: Tensor = network.model(images)
    return logits
