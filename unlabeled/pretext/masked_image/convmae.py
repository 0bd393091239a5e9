"""ConvMAE: MAE on a network whose first stages are convolutions that see the visible cells alone.

Gao, Ma, Li, Lin, Dai, Qiao, "MCMAE: Masked Convolution Meets Masked Autoencoders", NeurIPS 2022, arXiv 2205.03892;
code of the authors: github.com/Alpha-VL/ConvMAE. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from unlabeled.pretext.masked_image.autoencoder import (
    AutoencoderConfig,
    MaskedAutoencoder,
    init_linear,
    init_projection,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.stages import Execution, StageEncoder
from unlabeled.ssl.backbones.networks.convmae import ConvViT, PatchConv
from unlabeled.ssl.task import Recipe, TaskConfig


class ConvMAEConfig(AutoencoderConfig):
    """Settings of ConvMAE; the defaults are those of the authors' command."""

    execution: Execution = "gathered"
    """gathered: the convolution stages compute visible cells only. dense: they compute all and mask, as the authors'
    code does. Results and gradients are the same."""


class ConvMAE(MaskedAutoencoder):
    """Masked autoencoder over stages. Submodules: `backbone`, `decoder`, and the two skips into the decoder.

    The skips bring the convolution stages to the tokens of their cell, and are thrown away with the decoder. There is
    no class token. `load_official` takes the authors' pretraining files, with or without skips and decoder.
    """

    Config: ClassVar[type[TaskConfig]] = ConvMAEConfig
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "adamw",
            "lr": 0.00015,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
        },
        "schedule": {"name": "cosine", "warmup_epochs": 40},
    }
    """ConvMAE (Gao et al., NeurIPS 2022, arXiv 2205.03892): the published recipe, 1600 epochs of batches of 2048 to
    3072. Its authors saw losses overflow late in float16; bfloat16 (engine.precision=bf16) does not."""
    requires: ClassVar[frozenset[str]] = frozenset({"masked_stages"})
    method: ClassVar[Method] = "convmae"
    official_prefix: ClassVar[int] = 0
    config: ConvMAEConfig

    def __init__(self, config: ConvMAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without masked stages, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        encoder = StageEncoder(backbone)
        self.cell = encoder.cell
        grid = self.grid_of(backbone.input_size)
        self.keep(grid)
        (first, second, last), sides = (stage.channels for stage in backbone.stages), encoder.sides
        self.stage1_output_decode = PatchConv(first, last, sides[0])
        self.stage2_output_decode = PatchConv(second, last, sides[1])
        self._build_decoder(last, encoder.channels, grid)
        if self.anew:
            _init_encoder(encoder.model)
        self._settle_positions(overwrite=self.anew)
        for parameter in encoder.unreached():
            parameter.requires_grad_(False)

    def latent(self, images: Tensor, masking: Masking) -> Tensor:
        encoder = StageEncoder(self.backbone)
        stages = encoder.encode(images, masking, self.config.execution)
        tokens = stages.tokens + self.stage1_output_decode(stages.first).flatten(1, 3)
        return cast(Tensor, encoder.model.norm(tokens + self.stage2_output_decode(stages.second).flatten(1, 3)))

    def absolute(self) -> tuple[nn.Parameter, tuple[int, int]]:
        model = StageEncoder(self.backbone).model
        return model.pos_embed, model.grid_size


def _init_encoder(model: ConvViT) -> None:
    """Matrices and the last patch projection as in MAE, all other convolutions as the framework draws them."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            cast(Any, layer).reset_parameters()
    init_linear(model)
    init_projection(model.patch_embed3.proj)
