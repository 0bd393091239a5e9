"""SparK: a convolutional network encodes 40 % of the cells, and a hierarchical decoder predicts the others' pixels.

Tian, Jiang, Diao, Lin, Wang, Yuan, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023, arXiv 2301.03580; code of the authors: github.com/keyu-tian/SparK.

Shapes as in `unlabeled.ssl.task`. Levels count from the coarsest feature map (0) to finer ones, in the order in which
the decoder takes them; each is twice as large as the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.masked_image.convnext_names import reference_name
from unlabeled.pretext.masked_image.masked_image import (
    MaskedImageConfig,
    MaskedImageTask,
    cell_images,
    cell_targets,
    patchify,
    squared_error,
)
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.masking import Masking, Method
from unlabeled.ssl.backbones.masked.sparse import MaskedMap, SparseEncoder, convert
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm2d
from unlabeled.ssl.task import Batch, NamedParameter, Paper, Recipe, StepOutput, TaskConfig

_UNDECAYED = re.compile(r"cls_token|pos_embed|mask_token|gamma")
"""Parameters that the authors do not decay, in addition to one-dimensional ones and biases."""
_ENCODER = "sparse_encoder.sp_cnn."
"""Prefix of the encoder's tensors in the authors' files."""
_DECODER_NAMES = {
    "decoder.blocks.": "dense_decoder.dec.",
    "decoder.proj.": "dense_decoder.proj.",
    ".up.": ".up_sample.",
    ".mix.": ".conv.",
    "densify.mask_tokens.": "mask_tokens.",
    "densify.": "densify_",
}
"""Substrings of our names → of theirs, replaced in this order."""
_UNUSED = frozenset({"imn_m", "imn_s", "norm_black"})
"""Constants in the authors' files that are only used for their visualizations."""


class LightDecoderConfig(TaskConfig):
    """The decoder, which is discarded after pretraining."""

    width: int = Field(768, ge=2)
    """Channels at the coarsest level; each further level has half as many. Narrower is much faster: at 768, the decoder
    costs three times as much as a ResNet-50. [channels]"""


class SparKConfig(MaskedImageConfig):
    """Settings of SparK; the defaults are the paper's."""

    mask_ratio: float = Field(0.6, gt=0, lt=1)
    crop_scale: tuple[Fraction, Fraction] = (0.67, 1.0)
    mask_unit: int | None = Field(None, ge=1)
    """Side of one cell of the mask, a multiple of the network's total stride; null: that stride, as published.
    [pixels]"""
    levels: int = Field(4, ge=1)
    """Feature maps that the decoder receives, starting with the coarsest; fewer if the network has fewer. [feature
    maps]"""
    decoder: LightDecoderConfig = LightDecoderConfig()
    """The decoder, which is discarded after pretraining."""


class SparK(MaskedImageTask):
    """Reconstructs masked cells from the sparse feature maps of a convolutional network at several scales.

    Submodules: `backbone`, `densify` and `decoder`."""

    Config: ClassVar[type[TaskConfig]] = SparKConfig
    paper = Paper(
        "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
        2023,
        "https://arxiv.org/abs/2301.03580",
    )
    good_for = "ResNets and other convolutional networks that you will fine-tune"
    recipe: ClassVar[Recipe] = {
        "optim": {
            "name": "lamb",
            "lr": 2e-4,
            "lr_scaling": "linear",
            "lr_batch": 256,
            "betas": [0.9, 0.95],
            "weight_decay": 0.04,
            "weight_decay_end": 0.2,
        },
        "schedule": {
            "name": "cosine",
            "warmup_epochs": 40,
            "start_factor": 0.005,
            "min_factor": 0.001,
            "reach_min": True,
        },
        "engine": {"clip": 5.0, "channels_last": True},
    }
    """SparK (Tian et al., ICLR 2023, arXiv 2301.03580): the published recipe for ResNets. For ConvNeXt betas are
    [0.9, 0.999]. LAMB adapts the learning rate of decayed tensors only; its gradient clipping is done by the engine."""
    requires: ClassVar[frozenset[str]] = frozenset({"sparse_convs"})
    method: ClassVar[Method] = "spark"
    masked_statistics: ClassVar[bool] = True
    config: SparKConfig

    def __init__(self, config: SparKConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without a masked form or with a stride that is no power of two, and
        ConfigError for cells, sizes and widths that do not fit."""
        super().__init__(config, backbone)
        stride = _total_stride(backbone)
        self.cell = _cell(config.mask_unit, stride, backbone.name)
        self.keep(self.grid_of(backbone.input_size))  # raises for a ratio that masks all cells or none
        self.sparse = SparseEncoder(backbone, cell=self.cell)
        self.levels = _levels(backbone, stride, config.levels)
        # each block doubles the resolution, so it takes log2(stride) of them
        widths = _widths(config.decoder.width, blocks=stride.bit_length() - 1)
        channels = [backbone.stages[index].channels for index in self.levels]
        self.densify = Densify(channels, widths, "batch" if _has_batch_norm(backbone) else "layer")
        self.decoder = LightDecoder(widths)
        self.train_only(backbone.reached_by_maps(self.levels))

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error on the masked cells of ``batch["image"]``; logs ``explained`` (see `squared_error`).

        A uint8 image (B, 3, H, W) is normalized; a float image is expected to be normalized already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) determines the masks; if both are None, they are drawn.
        """
        # choose which cells to mask
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # K of L cells stay visible
        # encode the visible cells at several scales, decode to a full image
        maps = self.encode(images, masking)  # one sparse map per level, (B, C_i, h_i, w_i)
        predicted = self.decode(maps)  # (B, 3, H, W)
        # compare with the pixels of the masked cells
        predictions = patchify(predicted, self.cell, masking.ids_masked)  # (B, L - K, ph * pw * 3)
        targets = cell_targets(images, self.cell, masking.ids_masked)
        return squared_error(predictions, targets)

    def encode(self, images: Tensor, masking: Masking) -> list[MaskedMap]:
        """Normalized (B, 3, H, W) → feature maps of the visible positions (B, C_i, h_i, w_i), coarsest first."""
        return self.sparse.maps(images, masking, indices=self.levels)

    def decode(self, maps: Sequence[MaskedMap]) -> Tensor:
        """Maps of visible positions → predictions (B, 3, H, W), each cell normalized by its own mean and deviation."""
        prediction: Tensor = self.decoder(self.densify(maps))
        return prediction

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) → predictions (B, 3, H, W), each cell normalized by its own mean and deviation."""
        return self.decode(self.encode(images, masking))

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        predictions = patchify(self.predict(images, masking), self.cell)  # (B, L, ph * pw * 3)
        return cell_images(predictions, images, self.cell, masking.grid)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """As in the base class, but also without weight decay for mask embeddings and layer scales, as published."""
        for named in super().parameter_groups():
            yield named._replace(decay=named.decay and not _UNDECAYED.search(named.name))

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads ``*_spark_style.pth`` (everything) and ``*_timm_style.pth`` (encoder only) files.

        Takes the dictionary of tensors or the file's ``{"module": ...}``. Returns (missing, unexpected) names as in the
        file; if it has no decoder, the decoder's names are missing.

        Raises CheckpointError if a shape differs or no tensor fits; nothing is changed in that case.
        """
        tensors = {name: value for name, value in _inner(state).items() if isinstance(value, Tensor)}
        for name in _UNUSED & tensors.keys():
            del tensors[name]
        with_decoder = any(name.startswith(_ENCODER) for name in tensors)
        # a ConvNeXt may have timm's names or its authors': take the layout that more tensors belong to
        layouts = [
            reference_names(self.state_dict(), encoder=_ENCODER if with_decoder else "", timm_names=timm_names)
            for timm_names in (False, True)
        ]
        return load_mapped(self, tensors, max(layouts, key=lambda names: len(names.keys() & tensors.keys())))


class Densify(nn.Module):
    """Turns sparse maps into dense ones: a norm, a learned embedding at masked positions, and a projection.

    `channels` of the encoder's maps and `widths` of the decoder, coarsest first. Source: section 3 of the paper.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], norm: Literal["batch", "layer"]) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm == "batch" else LayerNorm2d  # LayerNorm2d: eps 1e-6
        # `convert`: norms that compute their statistics over visible positions only
        self.norms = nn.ModuleList(convert(make(count)) for count in channels)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, count, 1, 1)) for count in channels)
        self.projs = nn.ModuleList(
            _projection(count, width, level) for level, (count, width) in enumerate(zip(channels, widths, strict=False))
        )
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def forward(self, maps: Sequence[MaskedMap]) -> list[Tensor]:
        """Maps of visible positions (B, C_i, h_i, w_i) → dense maps (B, W / 2^i, h_i, w_i)."""
        levels = zip(maps, self.norms, self.mask_tokens, self.projs, strict=True)
        # the norm comes before the embeddings, which must not enter its statistics
        return [project(fill(norm(one), token)) for one, norm, token, project in levels]


def fill(masked: MaskedMap, token: Tensor) -> Tensor:
    """Fills the masked positions of a map (B, C, h, w) with `token` (1, C, 1, 1)."""
    dense = masked.dense()
    return torch.where(masked.cells.active(masked.factor), dense, token.to(dense.dtype))


class LightDecoder(nn.Module):
    """Upsamples the coarsest map to the size of the image, adding the finer maps on the way.

    `widths` are the channels before the first block, between blocks, and after the last block. Source: section 3 of the
    paper; sizes and initial weights as in the authors' code.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UpsamplingBlock(before, after) for before, after in pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], 3, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps (B, W / 2^i, h_i, w_i), coarsest first, at most one per block → (B, 3, H, W)."""
        x, *skips = maps
        for index, block in enumerate(self.blocks):  # (B, W / 2^i, h_i, w_i) -> (B, W / 2^(i + 1), 2 h_i, 2 w_i)
            x = block(x + skips[index - 1] if 0 < index <= len(skips) else x)  # the last blocks may have no map
        prediction: Tensor = self.proj(x)  # (B, 3, H, W)
        return prediction


class UpsamplingBlock(nn.Module):
    """Doubles the resolution: (B, before, h, w) → (B, after, 2 h, 2 w)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, before, 4, stride=2, padding=1)
        self.mix = nn.Sequential(
            nn.Conv2d(before, before, 3, padding=1, bias=False),
            SyncedBatchNorm2d(before),
            nn.ReLU6(),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            SyncedBatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.up(x))
        return mixed


def _projection(channels: int, width: int, level: int) -> nn.Module:
    """A layer from the encoder's channels to the decoder's width; the identity if they match at the coarsest level."""
    if level == 0:
        return nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
    return nn.Conv2d(channels, width, 3, padding=1)


def _total_stride(backbone: Backbone) -> int:
    """Stride of the coarsest map, in pixels. Raises CapabilityError unless it is a power of two above 1."""
    stride = backbone.stages[-1].stride
    if stride < 2 or stride & (stride - 1):
        raise CapabilityError(
            f"backbone: {backbone.name} cannot do SparK: its total stride, {stride}, is no power of two above 1, which "
            "the doubling decoder needs; take another network or other strides"
        )
    return stride


def _cell(unit: int | None, stride: int, name: str) -> tuple[int, int]:
    """Size of a cell in pixels: `unit`, or else `stride`. Raises ConfigError unless it is a multiple of `stride`."""
    unit = stride if unit is None else unit
    if unit % stride:
        near = max(1, round(unit / stride)) * stride
        raise ConfigError(f"task.mask_unit: {unit} is no multiple of {name}'s total stride, {stride}; set it to {near}")
    return unit, unit


def _levels(backbone: Backbone, stride: int, count: int) -> list[int]:
    """Indices of the feature maps that the decoder receives, coarsest first: the deepest map of each stride."""
    deepest = {stage.stride: index for index, stage in enumerate(backbone.stages)}  # later maps replace earlier ones
    levels: list[int] = []
    # down to stride 2: no block takes a finer map, since the last one outputs the image's own size
    while stride > 1 and stride in deepest and len(levels) < count:
        levels.append(deepest[stride])
        stride //= 2
    return levels


def _widths(width: int, blocks: int) -> list[int]:
    """Channels before, between and after the decoder's blocks. Raises ConfigError if none would be left."""
    if width >> blocks == 0:
        raise ConfigError(
            f"task.decoder.width: {width} cannot be halved by {blocks} blocks; set it to {1 << blocks} or more"
        )
    return [width >> index for index in range(blocks + 1)]


def _has_batch_norm(backbone: Backbone) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.model.modules())


def reference_names(own: Iterable[str], *, encoder: str = _ENCODER, timm_names: bool = False) -> dict[str, str]:
    """Name in the authors' files → our name, for the names `own` of the tensors of a `SparK`.

    `encoder` is the prefix of the encoder's names; with `timm_names`, a ConvNeXt has timm's names and not its authors'.
    """

    def reference(name: str) -> str:
        if name.startswith("backbone."):
            name = name.removeprefix("backbone.model.")
            return encoder + (name if timm_names else reference_name(name))
        for ours, theirs in _DECODER_NAMES.items():
            name = name.replace(ours, theirs)
        return name

    return {reference(name): name for name in own}


def _inner(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], state.get("module", state))
