"""FCMAE: a convolutional network encodes 40 % of the cells, and one dense block predicts the pixels of the others.

Woo, Debnath, Hu, Chen, Liu, Kweon, Xie, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
CVPR 2023, arXiv 2301.00808; code of the authors: github.com/facebookresearch/ConvNeXt-V2.

Made for ConvNeXt V2, but any backbone with a masked (sparse) form works. Global response norms compute their statistics
per image over the visible positions, as in the paper; the authors' PyTorch code computes them over all images of a
process. Shapes as in `unlabeled.ssl.task`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.masked_image.convnext_names import reference_name
from unlabeled.pretext.masked_image.masked_image import (
    MaskedImageConfig,
    MaskedImageTask,
    cell_images,
    cell_targets,
    squared_error,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.sparse import SparseEncoder
from unlabeled.ssl.task import Batch, NamedParameter, Paper, Recipe, StepOutput, TaskConfig

_STD = 0.02
"""Standard deviation of all initial weights of the decoder."""


class ConvDecoderConfig(TaskConfig):
    """The decoder, which is discarded after pretraining; the defaults are the best of the paper's comparison."""

    dim: int = Field(512, ge=1)
    """Width of the decoder. [channels]"""
    depth: int = Field(1, ge=1)
    """ConvNeXt V2 blocks; more cost time without improving results. [blocks]"""


class FCMAEConfig(MaskedImageConfig):
    """Settings of FCMAE; the defaults are the paper's."""

    mask_ratio: float = Field(0.6, gt=0, lt=1)
    norm_pix: bool = True
    """Predict each cell after normalizing it by its own mean and deviation; false: predict the pixels of the normalized
    image."""
    decoder: ConvDecoderConfig = ConvDecoderConfig()
    """The decoder, which is discarded after pretraining."""


class FCMAE(MaskedImageTask):
    """Reconstructs the masked cells of an image with a fully convolutional autoencoder.

    Submodules: `backbone` (the encoder) and `decoder`.

    A cell of the mask is one position of the encoder's last feature map. The backbone keeps its initial weights: timm
    draws those of ConvNeXt with a deviation of 0.02. (The authors' PyTorch code redraws some with a deviation of 1.)
    """

    Config: ClassVar[type[TaskConfig]] = FCMAEConfig
    paper = Paper(
        "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
        2023,
        "https://arxiv.org/abs/2301.00808",
    )
    good_for = "ConvNeXt V2 and similar convolutional networks that you will fine-tune; a cheap step"
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
        "engine": {"channels_last": True},
    }
    """Fully convolutional masked autoencoder (Woo et al., CVPR 2023, arXiv 2301.00808): the published recipe."""
    requires: ClassVar[frozenset[str]] = frozenset({"sparse_convs"})
    method: ClassVar[Method] = "fcmae"
    masked_statistics: ClassVar[bool] = True
    config: FCMAEConfig

    def __init__(self, config: FCMAEConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without a masked form, ConfigError for sizes that do not fit."""
        super().__init__(config, backbone)
        last = backbone.stages[-1]
        self.cell = (last.stride, last.stride)
        self.keep(self.grid_of(backbone.input_size))  # raises for a ratio that masks all cells or none
        self.sparse = SparseEncoder(backbone, cell=self.cell)
        self.decoder = ConvDecoder(
            last.channels, 3 * last.stride**2, dim=config.decoder.dim, depth=config.decoder.depth
        )
        self.train_only(backbone.reached_by_maps([-1]))  # freezes what comes after the last map, such as the classifier

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error on the masked cells of ``batch["image"]``; logs ``explained`` (see `squared_error`).

        A uint8 image (B, 3, H, W) is normalized; a float image is expected to be normalized already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) determines the masks; if both are None, they are drawn.
        """
        # choose which cells to mask
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # K of L cells stay visible
        # encode the visible cells, predict the masked ones
        latent = self.encode(images, masking)  # (B, K, C)
        predictions = self.decoder(latent, masking)  # (B, L - K, ph * pw * 3)
        # compare with the pixels of the masked cells
        targets = cell_targets(images, self.cell, masking.ids_masked, norm_pix=self.config.norm_pix)
        return squared_error(predictions, targets)

    def encode(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) → features of the visible cells (B, K, C), in the order of `ids_keep`."""
        (last,) = self.sparse.maps(images, masking, indices=[-1])
        return last.tokens()  # one token per cell, as a cell is one position of the last map

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        predictions = self.decoder.predict_all(self.encode(images, masking), masking)  # (B, L, ph * pw * 3)
        return cell_images(predictions, images, self.cell, masking.grid, norm_pix=self.config.norm_pix)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """See the base class; gains and offsets of response norms are decayed, as published."""
        # in the authors' code they have four dimensions, so their exception for one-dimensional tensors misses them
        for named in super().parameter_groups():
            yield named._replace(decay=named.decay or ".grn." in named.name)

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads checkpoints of a pretraining run (sparse layout, with decoder) and ``convnextv2_*_fcmae.pt`` files.

        Takes the dictionary of tensors or the file's ``{"model": ...}``. Returns (missing, unexpected) names of the
        dense layout; if the file has no decoder, the decoder's names are missing.

        Raises CheckpointError if a shape differs or no tensor fits; nothing is changed in that case.
        """
        tensors = dense_layout(cast(Mapping[str, Tensor], state.get("model", state)))
        shaped = {name: _flat(name, value) for name, value in tensors.items()}
        return load_mapped(self, shaped, reference_names(self.state_dict()))


class ConvDecoder(nn.Module):
    """Predicts the pixels of each cell from the features of the visible ones. Source: section 3 of the paper."""

    def __init__(self, in_dim: int, out_dim: int, *, dim: int = 512, depth: int = 1) -> None:
        """`in_dim`: channels of the encoder; `out_dim`: values to predict per cell."""
        super().__init__()
        # each linear layer is a 1x1 convolution in the authors' code
        self.proj = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(depth)])
        self.pred = nn.Linear(dim, out_dim)
        nn.init.normal_(self.mask_token, std=_STD)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, latent: Tensor, masking: Masking) -> Tensor:
        """Features of the visible cells (B, K, in_dim) → predictions (B, L - K, out_dim) of the cells `ids_masked`."""
        x = self.mixed(latent, masking)  # (B, L, dim): convolutions need all cells, the prediction only masked ones
        masked = x.gather(1, masking.ids_masked[..., None].expand(-1, -1, x.shape[-1]))  # (B, L - K, dim)
        prediction: Tensor = self.pred(masked)
        return prediction

    def predict_all(self, latent: Tensor, masking: Masking) -> Tensor:
        """Features of the visible cells (B, K, in_dim) → predictions of all cells in raster order (B, L, out_dim)."""
        prediction: Tensor = self.pred(self.mixed(latent, masking))
        return prediction

    def mixed(self, latent: Tensor, masking: Masking) -> Tensor:
        """Features of the visible cells (B, K, in_dim) → the blocks' output for all cells (B, L, dim), raster order."""
        visible = self.proj(latent)  # (B, K, in_dim) -> (B, K, dim)
        masked = self.mask_token.to(visible.dtype).expand(visible.shape[0], masking.ids_masked.shape[1], -1)
        x = masking.restore(torch.cat([visible, masked], dim=1))  # (B, L, dim), raster order
        # the blocks run on a dense map: unlike in the encoder, their response norms see the whole image
        x = x.view(x.shape[0], *masking.grid, -1).permute(0, 3, 1, 2)  # (B, L, dim) -> (B, dim, gh, gw)
        return cast(Tensor, self.blocks(x)).flatten(2).transpose(1, 2)


def dense_layout(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts the authors' tensors from their sparse to their dense layout; dense ones are unchanged.

    The prefix ``encoder.`` of names is removed, and those that are not tensors are left out.
    """
    dense: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        name = name.removeprefix("encoder.").replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name, value = name.removesuffix("kernel") + "weight", _dense_kernel(value)
        elif name.endswith(".bias"):
            value = value.flatten()
        elif name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        dense[name] = value
    return dense


def _dense_kernel(kernel: Tensor) -> Tensor:
    """(k * k, C) → (C, 1, k, k); (k * k, C_in, C_out) → (C_out, C_in, k, k)."""
    if kernel.ndim == 2:
        kernel = kernel[:, None]  # one input channel for each output channel
    side = math.isqrt(kernel.shape[0])
    # a sparse kernel is column-major: entry x * k + y is the weight at row y, column x
    return kernel.reshape(side, -1, *kernel.shape[1:]).permute(3, 2, 1, 0).contiguous()


def reference_names(own: Iterable[str]) -> dict[str, str]:
    """Name in the authors' dense layout → our name, for the names `own` of the tensors of an `FCMAE`."""

    def reference(name: str) -> str:
        if name.startswith("decoder."):
            return reference_name(name.removeprefix("decoder.")).replace("blocks.", "decoder.")
        return reference_name(name.removeprefix("backbone.model."))

    return {reference(name): name for name in own}


def _flat(name: str, value: Tensor) -> Tensor:
    """Reshapes a tensor of the dense layout to the shape that it has here."""
    if name.endswith((".grn.gamma", ".grn.beta")):
        return value.flatten()
    if name == "mask_token":
        return value.reshape(1, 1, -1)
    return value.flatten(1) if name in {"proj.weight", "pred.weight"} else value
