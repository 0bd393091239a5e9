"""The masked form of each layer, by its exact type.

By exact type, since a subclass may do more than its base: timm's ``BatchNormAct2d`` is a BatchNorm2d with an activation
inside, ``LayerNorm2d`` a LayerNorm of another axis. A layer is one of

- *pointwise*: treats each place by itself;
- *statistic*: treats places alike, and takes statistics over them: over visible ones only;
- *spatial*: mixes neighboring places: masked ones are zero, and the output is kept at visible ones (an average pool
  counts masked places in its divisor, a max pool takes their zeros, as SparK's code does);
- *convolution*: pointwise, inside a cell, or spatial, by its kernel;
- *batch norm*: statistic, over all images and ranks;
- *through*: its own code runs on the map, as the code of blocks does.

Sources: SparK (arXiv 2301.03580), ConvNeXt V2 (arXiv 2301.00808).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import timm.layers as layers
import torch
from timm.layers import activations, grn, norm_act
from timm.layers.norm_act import BatchNormAct2d
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import fastvit, hgnet, metaformer, swiftformer
from torch import Tensor, nn

from unlabeled.ssl.backbones.masked.sparse.attention import selective_kernel, split_attention
from unlabeled.ssl.backbones.masked.sparse.convolution import on_dense
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap, NoRuleError
from unlabeled.ssl.nn.batch_norm import SyncedBatchNorm2d, batch_norm_features, synced

Forward = Callable[..., Any]
Rule = Callable[[Any, Forward, MaskedMap], Any]
"""(module, its own forward, map) → map."""


def pointwise(module: nn.Module, forward: Forward, x: MaskedMap) -> MaskedMap:
    return x.from_shown(forward(x.as_shown())).zeroed()


def statistic(module: nn.Module, forward: Forward, x: MaskedMap) -> MaskedMap:
    if x.unmasked:
        return x.from_shown(forward(x.as_shown()))
    return x.with_gathered(forward(x.as_shown(gathered=True)))


def spatial(module: nn.Module, forward: Forward, x: MaskedMap) -> MaskedMap:
    return on_dense(x, forward)


def through(module: nn.Module, forward: Forward, x: MaskedMap) -> Any:
    return forward(x)


def pooled(module: nn.Module, forward: Forward, x: MaskedMap) -> Tensor:
    """Pools over all visible places, to a plain tensor."""
    size = getattr(module, "output_size", 1)
    if size not in (1, (1, 1), [1, 1]):
        raise NoRuleError(f"pooling to {size} places has no masked form")
    return cast(Tensor, forward(x.as_shown(gathered=not x.unmasked)))


def convolution(module: nn.Conv2d, forward: Forward, x: MaskedMap) -> MaskedMap:
    """The plain one has its rule as a function (`convolve`); a weight-standardized 1x1 convolution is pointwise too."""
    if type(module).__mro__[1] is nn.Conv2d and module.padding_mode == "zeros":
        return cast(MaskedMap, forward(x))
    alone = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), "same", "valid")
    return pointwise(module, forward, x) if alone else on_dense(x, forward)


def batch_norm(module: nn.BatchNorm2d, forward: Forward, x: MaskedMap) -> MaskedMap:
    trains = module.training or module.running_mean is None
    if not trains:
        return pointwise(module, forward, x)
    if x.unmasked and not synced():
        return x.from_shown(forward(x.as_shown()))
    tokens = x.tokens()
    normalized = batch_norm_features(module, tokens.reshape(-1, tokens.shape[-1])).view(tokens.shape)
    gathered = normalized.transpose(1, 2).unsqueeze(-1)
    if isinstance(module, BatchNormAct2d):
        gathered = module.act(module.drop(gathered))
    return x.with_gathered(gathered)


def response_norm(module: grn.GlobalResponseNorm, forward: Forward, x: MaskedMap) -> MaskedMap:
    """Global response norm, each image by itself, in float32: sums of squares overflow in half precision."""
    if x.unmasked:
        return x.from_shown(forward(x.as_shown()))
    gathered = x.as_shown(gathered=True)
    wide = torch.promote_types(gathered.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gathered, dim=module.spatial_dim, keepdim=True, dtype=wide)
    relative = norm / (norm.mean(dim=module.channel_dim, keepdim=True) + module.eps)
    weight, bias = module.weight.view(module.wb_shape), module.bias.view(module.wb_shape)
    return x.with_gathered(torch.addcmul(bias.to(gathered.dtype), gathered, (1 + weight * relative).to(gathered.dtype)))


def _types(module: Any, names: str) -> list[type[nn.Module]]:
    """Those of the named classes that this release of the library has."""
    return [getattr(module, name) for name in names.split() if hasattr(module, name)]


_POINTWISE = [
    *_types(
        nn,
        """ReLU ReLU6 GELU SiLU Mish Hardswish Hardsigmoid Sigmoid Tanh LeakyReLU PReLU ELU CELU SELU Softplus Hardtanh
        Identity Linear Dropout Dropout2d LayerNorm""",
    ),
    *(cls for cls in vars(activations).values() if isinstance(cls, type) and issubclass(cls, nn.Module)),
    *_types(
        layers,
        """DropPath LayerScale LayerScale2d Mlp ConvMlp Format LayerNorm LayerNorm2d LayerNormFp32 LayerNorm2dFp32
        LayerNormExp2d RmsNorm RmsNorm2d RmsNormFp32 RmsNorm2dFp32 SimpleNorm SimpleNorm2d SimpleNormFp32
        SimpleNorm2dFp32 FrozenBatchNormAct2d""",
    ),
    *_types(hgnet, "LearnableAffineBlock"),
    *_types(fastvit, "LayerScale2d"),
    *_types(metaformer, "LayerNorm2dNoBias LayerNormNoBias Scale"),
    *_types(swiftformer, "LayerScale2d"),
    *_types(norm_act, "LayerNormAct LayerNormAct2d LayerNormActFp32 LayerNormAct2dFp32 RmsNormAct2d"),
]
_STATISTIC = [
    *_types(nn, "GroupNorm InstanceNorm2d"),
    *_types(
        layers,
        """GroupNorm GroupNorm1 GroupNormAct GroupNorm1Act SEModule SqueezeExcite EffectiveSEModule EcaModule
        EffectiveSqueezeExcite CecaModule GlobalContext FilterResponseNormTlu2d FilterResponseNormAct2d EvoNorm2dS0
        EvoNorm2dS0a ChannelAttn LightChannelAttn""",
    ),
    *_types(metaformer, "GroupNorm1NoBias"),
    efficientnet.SqueezeExcite,
]
_SPATIAL = [
    *_types(nn, "MaxPool2d AvgPool2d ZeroPad2d PixelUnshuffle"),
    *_types(layers, "MaxPool2dSame AvgPool2dSame BlurPool2d SpaceToDepth"),
]
_CONVOLUTIONS: list[type[nn.Module]] = [
    nn.Conv2d,
    *_types(layers, "Conv2dSame ScaledStdConv2d ScaledStdConv2dSame StdConv2d StdConv2dSame"),
]
_BATCH_NORMS: list[type[nn.Module]] = [
    *_types(nn, "BatchNorm2d SyncBatchNorm"),
    *_types(layers, "BatchNormAct2d SyncBatchNormAct"),
    SyncedBatchNorm2d,
]

RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_STATISTIC, statistic),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_CONVOLUTIONS, convolution),
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    **dict.fromkeys([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d], pooled),
    **dict.fromkeys([nn.Upsample, nn.Sequential], through),
    layers.SplitAttn: split_attention,
    layers.SelectiveKernel: selective_kernel,
    grn.GlobalResponseNorm: response_norm,
}
"""Exact type → rule. Modules with children that are not here run their own code on the map."""


def refusal(kind: type[nn.Module]) -> str:
    """Why a layer without a rule cannot be masked, in a few words."""
    return f"{kind.__name__} attends to all places" if attends(kind) else f"{kind.__name__} has no masked form"


def attends(kind: type[nn.Module]) -> bool:
    """Whether a module is some kind of attention between places, by its name."""
    return any(word in kind.__name__.lower() for word in ("attn", "attention", "mhsa", "transformer"))
