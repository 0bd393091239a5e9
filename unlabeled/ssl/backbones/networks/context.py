"""The network of context prediction for patches of 96 x 96 pixels, with timm's surface.

Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, ICCV 2015, arXiv 1505.05192;
repository github.com/cdoersch/deepcontext, whose second layer (256 channels, stride 1) is taken, not the figure's.

An AlexNet without groups whose batch norms have no scale and shift: with a scale that is learned, the network can
silence itself, and then predicts all positions alike.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

_FC6 = 3
"""Rows and columns of the map that the first fully connected layer takes: 96 pixels give 24, 12, 6 and then 3."""


class ResponseNorm(nn.LocalResponseNorm):
    """Krizhevsky's normalization over five neighboring channels, in float32: squares of what patches of RMS 50 give
    overflow fp16."""

    def __init__(self) -> None:
        super().__init__(size=5, alpha=1e-4, beta=0.75, k=1.0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(B, C, H, W) → the same shape and type."""
        wide = input if input.dtype.itemsize >= 4 else input.float()
        return super().forward(wide).to(input.dtype)


def caffe_xavier_(module: nn.Module) -> None:
    """Weights of every convolution and linear layer inside `module` from U(-sqrt(3 / fan_in), sqrt(3 / fan_in)), their
    biases 0: Caffe's filler `xavier`."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = math.sqrt(3 / math.prod(layer.weight.shape[1:]))
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _block(conv: nn.Conv2d, *, pool: bool) -> nn.Sequential:
    """With `pool`, pooling and response norm of the block before; convolution; a norm where it has no bias; ReLU."""
    parts: list[tuple[str, nn.Module]] = []
    if pool:
        parts += [("pool", nn.MaxPool2d(3, stride=2, ceil_mode=True)), ("lrn", ResponseNorm())]
    parts.append(("conv", conv))
    if conv.bias is None:  # a norm without shift undoes a bias before it
        parts.append(("bn", nn.BatchNorm2d(conv.out_channels, affine=False)))
    parts.append(("act", nn.ReLU()))
    return nn.Sequential(OrderedDict(parts))


class _Head(nn.Module):
    """fc6 at every place of the map, the mean over places (one for 96 pixels), and the classifier."""

    def __init__(self, inputs: int, embed_dim: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        self.fc6 = nn.Conv2d(inputs, embed_dim, _FC6, bias=False)
        self.bn6 = nn.BatchNorm2d(embed_dim, affine=False)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.fc = _classifier(embed_dim, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if min(x.shape[-2:]) < _FC6:  # small images: the nearest places stand in for those that are missing
            x = F.adaptive_avg_pool2d(x, (max(_FC6, x.shape[2]), max(_FC6, x.shape[3])))
        x = self.act(self.bn6(self.fc6(x)))
        if not self.global_pool:
            return x
        x = self.drop(x.mean((2, 3)))
        logits: Tensor = x if pre_logits else self.fc(x)
        return logits


def _classifier(inputs: int, num_classes: int) -> nn.Module:
    return nn.Linear(inputs, num_classes) if num_classes else nn.Identity()


class ContextNet(nn.Module):
    """conv1 to conv5 (strides 4, 8, 16, 16, 16), a last pooling to stride 32, and fc6, whose outputs are the features.

    With the statistics of its default configuration, images enter on the scale 0..255 without their mean color,
    about as large as the patches of RMS 50 that it is pretrained on.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256),
        embed_dim: int = 4096,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool: {global_pool!r} is not possible; give 'avg' or ''")
        one, two, three, four, five = widths
        self.blocks = nn.Sequential(
            _block(nn.Conv2d(in_chans, one, 11, stride=4, padding=5), pool=False),
            _block(nn.Conv2d(one, two, 5, padding=2), pool=True),
            _block(nn.Conv2d(two, three, 3, padding=1, bias=False), pool=True),
            _block(nn.Conv2d(three, four, 3, padding=1, bias=False), pool=False),
            _block(nn.Conv2d(four, five, 3, padding=1, bias=False), pool=False),
        )
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.num_classes = num_classes
        self.num_features = five
        self.head_hidden_size = embed_dim
        strides = (4, 8, 16, 16, 16)
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"blocks.{i}"}
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.head = _Head(five, embed_dim, num_classes, global_pool, drop_rate)
        caffe_xavier_(self)

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        for block in self.blocks:
            x = block(x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 256, H/32, W/32)."""
        features: Tensor = self.pool(self.blocks(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 256, H/32, W/32) → (B, num_classes), or (B, embed_dim) with `pre_logits`."""
        logits: Tensor = self.head(x, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of conv1 ... conv5 at `indices` (a number: the last so many), and the pooled map of
        `forward_features` before them unless asked not to.

        `norm` belongs to timm's surface and has nothing to do here.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: {output_fmt!r} is not possible; give 'NCHW'")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        maps = list(islice(self._maps(x), last + 1 if stop_early and intermediates_only else len(self.blocks)))
        chosen = [maps[index] for index in sorted(wanted)]
        return chosen if intermediates_only else (self.pool(maps[-1]), chosen)

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of `num_classes`; 0: none."""
        self.num_classes = num_classes
        self.head.global_pool = self.head.global_pool if global_pool is None else global_pool
        self.head.fc = _classifier(self.head_hidden_size, num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers; there is no stem."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^head\.fc6", (99999,))]}


default_cfgs = generate_default_cfgs(
    {
        "contextnet.untrained": {
            "url": "",
            "input_size": (3, 96, 96),
            "num_classes": 1000,
            "pool_size": (3, 3),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (1 / 255, 1 / 255, 1 / 255),
            "first_conv": "blocks.0.conv",
            "classifier": "head.fc",
            "paper_ids": "arXiv:1505.05192",
        }
    }
)


def contextnet(pretrained: bool = False, **kwargs: Any) -> ContextNet:
    """The trunk of context prediction; ``widths`` of conv1 to conv5 and ``embed_dim`` of fc6 can be changed."""
    features = {"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"}
    model: ContextNet = build_model_with_cfg(ContextNet, "contextnet", pretrained, feature_cfg=features, **kwargs)
    return model


register_model(contextnet)
