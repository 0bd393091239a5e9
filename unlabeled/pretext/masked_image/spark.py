"""SparK: a convolutional network sees 40 % of the cells, a hierarchical decoder predicts the pixels of the rest.

Tian, Jiang, Diao, Lin, Wang, Yuan, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023, arXiv 2301.03580; code of the authors: github.com/keyu-tian/SparK.

Shapes as in `unlabeled.ssl.task`. Levels count from the coarsest feature map (0) to finer ones, as the decoder
meets them; each is twice as large as the one before.
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
from unlabeled.pretext.masked_image.convnext_names import reference_name
from unlabeled.pretext.masked_image.masked_image import (
    MaskedImageConfig,
    MaskedImageTask,
    Part,
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
"""Parameters that the authors do not decay, besides one-dimensional ones and biases."""
_ENCODER = "sparse_encoder.sp_cnn."
"""What precedes the names of the encoder's tensors in the authors' files."""
_DECODER_NAMES = {
    "decoder.blocks.": "dense_decoder.dec.",
    "decoder.proj.": "dense_decoder.proj.",
    ".up.": ".up_sample.",
    ".mix.": ".conv.",
    "densify.mask_tokens.": "mask_tokens.",
    "densify.": "densify_",
}
"""Parts of our names → of theirs, replaced in this order."""
_UNUSED = frozenset({"imn_m", "imn_s", "norm_black"})
"""Constants in the authors' files that only their images need."""


class LightDecoderConfig(TaskConfig):
    """The decoder, which is discarded after pretraining."""

    width: int = Field(768, ge=2)
    """Channels at the coarsest level; each further level has half as many. Narrower is much faster: at 768, the decoder
    costs three times as much as a ResNet-50. [channels]"""


class SparKConfig(MaskedImageConfig):
    """Settings of SparK; the defaults are the paper's."""

    mask_ratio: float = Field(0.6, gt=0, lt=1)
    crop_scale: tuple[Part, Part] = (0.67, 1.0)
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
    [0.9, 0.999]. LAMB adapts the rate of decayed tensors only; the clipping inside it is done by the engine."""
    requires: ClassVar[frozenset[str]] = frozenset({"sparse_convs"})
    method: ClassVar[Method] = "spark"
    masked_statistics: ClassVar[bool] = True
    config: SparKConfig

    def __init__(self, config: SparKConfig, backbone: Backbone) -> None:
        """Raises CapabilityError for a backbone without masked form or whose stride is no power of two, and
        ConfigError for cells, sizes and widths that do not fit it."""
        super().__init__(config, backbone)
        stride = _total_stride(backbone)
        self.cell = _cell(config.mask_unit, stride, backbone.name)
        self.keep(self.grid_of(backbone.input_size))  # refuses a ratio that hides nothing or all
        self.sparse = SparseEncoder(backbone, cell=self.cell)
        self.levels = _levels(backbone, stride, config.levels)
        widths = _widths(config.decoder.width, blocks=stride.bit_length() - 1)  # each doubles: log2 of the stride
        channels = [backbone.stages[index].channels for index in self.levels]
        self.densify = Densify(channels, widths, "batch" if _has_batch_norm(backbone) else "layer")
        self.decoder = LightDecoder(widths)
        self.train_only(backbone.reached_by_maps(self.levels))

    def forward(self, batch: Batch, *, noise: Tensor | None = None, visible: Tensor | None = None) -> StepOutput:
        """Mean squared error of the hidden cells of ``batch["image"]``, and the part of their variance explained.

        A uint8 image (B, 3, H, W) is normalized here; a float one is taken as normalized already. `noise` (B, L) or
        `visible` (bool, B, gh, gw) decides the masks; None: as `draw` gives it.
        """
        images = self.images_of(batch)  # (B, 3, H, W)
        masking = self.mask(images, noise, visible)  # K of L cells stay visible
        maps = self.encode(images, masking)  # a map of visible places a level, (B, C_i, h_i, w_i)
        predicted = self.decode(maps)  # (B, 3, H, W)
        predictions = patchify(predicted, self.cell, masking.ids_masked)  # (B, L - K, ph * pw * 3)
        targets = cell_targets(images, self.cell, masking.ids_masked)
        return squared_error(predictions, targets)

    def encode(self, images: Tensor, masking: Masking) -> list[MaskedMap]:
        """Normalized (B, 3, H, W) → maps of visible places (B, C_i, h_i, w_i), coarsest first."""
        return self.sparse.maps(images, masking, indices=self.levels)

    def decode(self, maps: Sequence[MaskedMap]) -> Tensor:
        """Maps of visible places → predictions (B, 3, H, W) in units of each cell's own mean and deviation."""
        prediction: Tensor = self.decoder(self.densify(maps))
        return prediction

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """Normalized (B, 3, H, W) → predictions (B, 3, H, W) in units of each cell's own mean and deviation."""
        return self.decode(self.encode(images, masking))

    def reconstruct(self, images: Tensor, masking: Masking) -> Tensor:
        predictions = patchify(self.predict(images, masking), self.cell)  # (B, L, ph * pw * 3)
        return cell_images(predictions, images, self.cell, masking.grid)

    def parameter_groups(self) -> Iterator[NamedParameter]:
        """See the base class; mask embeddings and layer scales are not decayed either, as published."""
        for named in super().parameter_groups():
            yield named._replace(decay=named.decay and not _UNDECAYED.search(named.name))

    def load_reference(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Loads ``*_spark_style.pth`` (everything) and ``*_timm_style.pth`` (encoder only) files.

        Takes the dictionary of tensors or the file's ``{"module": ...}``. Returns (missing, unexpected) names of the
        file's layout; without a decoder in the file its names are all missing.

        Raises CheckpointError, before anything is changed, when a tensor has another shape or none fits.
        """
        tensors = {name: value for name, value in _inner(state).items() if isinstance(value, Tensor)}
        for name in _UNUSED & tensors.keys():
            del tensors[name]
        whole = any(name.startswith(_ENCODER) for name in tensors)
        layouts = [
            reference_names(self.state_dict(), encoder=_ENCODER if whole else "", timm_names=timm_names)
            for timm_names in (False, True)
        ]
        return load_mapped(self, tensors, max(layouts, key=lambda names: len(names.keys() & tensors.keys())))


class Densify(nn.Module):
    """Whole maps from visible places: a norm over these, a learned embedding at masked ones, and a projection.

    Source: section 3 of the paper. `channels` of the encoder's maps and `widths` of the decoder, coarsest first.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], norm: Literal["batch", "layer"]) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm == "batch" else LayerNorm2d  # LayerNorm2d: eps 1e-6
        self.norms = nn.ModuleList(convert(make(count)) for count in channels)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, count, 1, 1)) for count in channels)
        self.projs = nn.ModuleList(
            _projection(count, width, level) for level, (count, width) in enumerate(zip(channels, widths, strict=False))
        )
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def forward(self, maps: Sequence[MaskedMap]) -> list[Tensor]:
        """Maps of visible places (B, C_i, h_i, w_i) → whole maps (B, W / 2^i, h_i, w_i)."""
        levels = zip(maps, self.norms, self.mask_tokens, self.projs, strict=True)
        # the norm comes before the tokens, so that its statistics are those of visible places
        return [project(fill(norm(one), token)) for one, norm, token, project in levels]


def fill(masked: MaskedMap, token: Tensor) -> Tensor:
    """A map of visible places (B, C, h, w) with `token` (1, C, 1, 1) at all others."""
    dense = masked.dense()
    return torch.where(masked.cells.active(masked.factor), dense, token.to(dense.dtype))


class LightDecoder(nn.Module):
    """Doubles the coarsest map until it has the size of the image, adding the finer maps on the way.

    Source: section 3 of the paper; sizes and initial weights are those of the authors' code. `widths` (one more than
    there are blocks) are the channels before the first, between all, and after the last block.
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
        """Whole maps (B, W / 2^i, h_i, w_i), coarsest first, at most one a block → (B, 3, H, W)."""
        x, *skips = maps
        for position, block in enumerate(self.blocks):  # (B, W / 2^i, h_i, w_i) -> (B, W / 2^(i + 1), 2 h_i, 2 w_i)
            x = block(x + skips[position - 1] if 0 < position <= len(skips) else x)
        prediction: Tensor = self.proj(x)  # (B, 3, H, W)
        return prediction


class UpsamplingBlock(nn.Module):
    """Doubles the resolution, (B, before, h, w) → (B, after, 2 h, 2 w)."""

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
    """From the encoder's channels to the decoder's: nothing to do where they are equal at the coarsest level."""
    if level == 0:
        return nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
    return nn.Conv2d(channels, width, 3, padding=1)


def _total_stride(backbone: Backbone) -> int:
    """Pixels per place of the coarsest map. Raises CapabilityError unless it is a power of two above one."""
    stride = backbone.stages[-1].stride
    if stride < 2 or stride & (stride - 1):
        raise CapabilityError(
            f"backbone: {backbone.name} cannot do SparK: its total stride, {stride}, is no power of two above 1, which "
            "the doubling decoder needs; take another network or other strides"
        )
    return stride


def _cell(unit: int | None, stride: int, name: str) -> tuple[int, int]:
    unit = stride if unit is None else unit
    if unit % stride:
        near = max(1, round(unit / stride)) * stride
        raise ConfigError(f"task.mask_unit: {unit} is no multiple of {name}'s total stride, {stride}; set it to {near}")
    return unit, unit


def _levels(backbone: Backbone, stride: int, count: int) -> list[int]:
    """Indices of the maps that the decoder receives, coarsest first: the deepest of each stride, by halves down to 2.

    A finer map would have no block that takes it: the decoder's last block gives the image's own size.
    """
    deepest = {stage.stride: index for index, stage in enumerate(backbone.stages)}
    levels: list[int] = []
    while stride > 1 and stride in deepest and len(levels) < count:
        levels.append(deepest[stride])
        stride //= 2
    return levels


def _widths(width: int, blocks: int) -> list[int]:
    """Channels before, between and after the decoder's blocks. Raises ConfigError when none would be left."""
    if width >> blocks == 0:
        raise ConfigError(
            f"task.decoder.width: {width} cannot be halved by {blocks} blocks; set it to {1 << blocks} or more"
        )
    return [width >> position for position in range(blocks + 1)]


def _has_batch_norm(backbone: Backbone) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.model.modules())


def reference_names(own: Iterable[str], *, encoder: str = _ENCODER, timm_names: bool = False) -> dict[str, str]:
    """Name in the authors' files → name among `own`, those of the tensors of a `SparK`.

    `encoder` precedes the names of the encoder's tensors; with `timm_names` these are timm's own, also of a ConvNeXt.
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
