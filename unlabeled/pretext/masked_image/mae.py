"""MAE: a transformer sees a quarter of the patches, a small decoder predicts the pixels of the rest.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377;
code of the authors: github.com/facebookresearch/mae. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from unlabeled.pretext.masked_image.autoencoder import AutoencoderConfig, MaskedAutoencoder, init_linear
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.tokens import TokenEncoder
from unlabeled.ssl.task import Recipe, TaskConfig


class MAEConfig(AutoencoderConfig):
    """Settings of MAE; the defaults are the paper's."""


class MAE(MaskedAutoencoder):
    """Masked autoencoder. Submodules: `backbone` (the encoder) and `decoder`.

    `load_official` takes ``mae_pretrain_vit_*`` (encoder) and ``*_full`` and ``mae_visualize_*`` files (with decoder).
    """

    Config: ClassVar[type[TaskConfig]] = MAEConfig
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
    """Masked autoencoder (He et al., CVPR 2022, arXiv 2111.06377): the published recipe."""
    requires: ClassVar[frozenset[str]] = frozenset({"token_dropping"})
    method: ClassVar[Method] = "mae"
    config: MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone that cannot drop tokens, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        encoder = TokenEncoder(backbone)
        grid = encoder.grid(backbone.input_size)
        self.cell = encoder.patch_size
        self.keep(grid)
        self._build_decoder(encoder.dim, encoder.channels, grid)
        if self.anew:
            _init_encoder(encoder)
        self._settle_positions(overwrite=self.anew)
        for parameter in encoder.unreached():
            parameter.requires_grad_(False)

    def latent(self, images: Tensor, masking: Masking) -> Tensor:
        return TokenEncoder(self.backbone).encode(images, masking.ids_keep)[0]

    def absolute(self) -> tuple[nn.Parameter, tuple[int, int]] | None:
        encoder = TokenEncoder(self.backbone)
        return None if encoder.absolute is None else (encoder.absolute, encoder.absolute_grid)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return TokenEncoder(self.backbone).grid(size)


def _init_encoder(encoder: TokenEncoder) -> None:
    """Matrices as in the decoder, tokens from a normal distribution of 0.02."""
    model = encoder.backbone.model
    init_linear(model)
    nn.init.xavier_uniform_(encoder.projection.data.view(encoder.projection.shape[0], -1))
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in {"cls_token", "reg_token", "dist_token"}:
            nn.init.normal_(parameter, std=0.02)
    for layer in model.modules():
        if hasattr(layer, "local_init"):  # ConViT: heads that begin as convolutions, by design and not by chance
            cast(Any, layer).local_init()
