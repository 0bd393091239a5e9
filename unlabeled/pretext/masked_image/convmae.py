"""ConvMAE: MAE on a hybrid backbone with convolution stages first, which process the visible cells only.

Gao, Ma, Li, Lin, Dai, Qiao, "MCMAE: Masked Convolution Meets Masked Autoencoders", NeurIPS 2022, arXiv 2205.03892;
code of the authors: github.com/Alpha-VL/ConvMAE. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from unlabeled.pretext.masked_image.autoencoder import (
    AutoencoderConfig,
    PositionTable,
    init_linear,
    init_projection,
    load_autoencoder,
    names_of_fixed,
    reinitializes,
    settle_positions,
)
from unlabeled.pretext.masked_image.mae import TransformerDecoder
from unlabeled.pretext.masked_image.masked_image import MaskedImageTask, cell_images, cell_targets, squared_error
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.stages import Execution, StageEncoder
from unlabeled.ssl.backbones.networks.convmae import ConvViT, PatchConv
from unlabeled.ssl.task import Batch, Paper, Recipe, StepOutput, TaskConfig


class ConvMAEConfig(AutoencoderConfig):
    """Settings of ConvMAE; the defaults are those of the authors' command."""

    execution: Execution = "gathered"
    """How the convolution stages run. gathered: on visible cells only. dense: on all cells, then masked, as in the
    authors' code. Results and gradients are the same; gathered is faster."""


class ConvMAE(MaskedImageTask):
    """Reconstructs masked cells with a backbone of convolution stages followed by a transformer.

    Submodules: `backbone`, `decoder`, and two skip connections, `stage1_output_decode` and `stage2_output_decode`,
    which add the features of the convolution stages to the tokens of their cell. They are discarded with the decoder.
    There is no class token. `load_reference` takes the authors' pretraining files, with or without skips and decoder.
    """

    Config: ClassVar[type[TaskConfig]] = ConvMAEConfig
    paper = Paper("MCMAE: Masked Convolution Meets Masked Autoencoders", 2022, "https://arxiv.org/abs/2205.03892")
    good_for = "hybrid backbones that you will fine-tune, for detection and segmentation above all"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "adamw",
            "lr": 1.5e-4,
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
    config: ConvMAEConfig

    def __init__(self, config: ConvMAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without masked stages, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        encoder = StageEncoder(backbone)
        self.cell = encoder.cell
        grid = self.grid_of(backbone.input_size)
        self.keep(grid)  # raises for a ratio that masks all cells or none
        (first, second, last), sides = (stage.channels for stage in backbone.stages), encoder.sides
        # the skips; named as in the authors' files
        self.stage1_output_decode = PatchConv(first, last, sides[0])
        self.stage2_output_decode = PatchConv(second, last, sides[1])
        values = self.cell[0] * self.cell[1] * encoder.channels
        self.decoder = TransformerDecoder(last, values, grid=grid, **config.decoder.model_dump())
        reinitialize = reinitializes(config, backbone)
        if reinitialize:
            _init_encoder(encoder.model)
        settle_positions(config, backbone, self.positions(), reinitialize=reinitialize)
        for parameter in encoder.unreached():
            parameter.requires_grad_(False)

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error on the masked cells of ``batch["image"]``; logs ``explained`` (see `squared_error`).

        A uint8 image (B, 3, H, W) is normalized; a float image is expected to be normalized already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) determines the masks; if both are None, they are drawn.
        """
        # choose which cells to mask
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # K of L cells stay visible
        # encode the visible cells, predict the masked ones
        latent = self.encode(images, masking)  # (B, K, D)
        predictions = self.decoder(latent, masking)  # (B, L - K, ph * pw * 3)
        # compare with the pixels of the masked cells
        targets = cell_targets(images, self.cell, masking.ids_masked, norm_pix=self.config.norm_pix)
        return squared_error(predictions, targets)

    def encode(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) → tokens of the visible cells (B, K, D), summed over the three stages."""
        encoder = StageEncoder(self.backbone)
        stages = encoder.encode(images, masking, self.config.execution)
        # each skip turns the c x c positions of a cell into one token: (B, K, c, c, C) -> (B, K, 1, 1, D) -> (B, K, D)
        tokens = stages.tokens + self.stage1_output_decode(stages.first).flatten(1, 3)
        tokens = tokens + self.stage2_output_decode(stages.second).flatten(1, 3)
        # the backbone's last norm comes after the sum, as in the authors' code
        return cast(Tensor, encoder.model.norm(tokens))

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        predictions = self.decoder.predict_all(self.encode(images, masking), masking)  # (B, L, ph * pw * 3)
        return cell_images(predictions, images, self.cell, masking.grid, norm_pix=self.config.norm_pix)

    def positions(self) -> PositionTable:
        """The backbone's table of absolute position embeddings."""
        model = StageEncoder(self.backbone).model
        return PositionTable(model.pos_embed, model.grid_size)

    def fixed(self) -> set[str]:
        """See the base class: the position table, if it is the fixed one."""
        return names_of_fixed(self.backbone, self.positions())

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """See the class and `load_autoencoder`."""
        found = load_autoencoder(self, state, self.positions(), file_prefix=0)  # there is no class token
        # the file's table may be the fixed one or a trained one: freeze or train it accordingly
        settle_positions(self.config, self.backbone, self.positions(), reinitialize=False)
        return found


def _init_encoder(model: ConvViT) -> None:
    """Draws matrices and the last patch projection as in MAE, and all other convolutions with PyTorch's default."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            cast(Any, layer).reset_parameters()
    init_linear(model)
    init_projection(model.patch_embed3.proj)
