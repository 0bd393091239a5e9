"""The Network-in-Network of RotNet for 32 x 32 images, with timm's surface.

Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018,
arXiv 1803.07728; repository github.com/gidariss/FeatureLearningRotNet.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; the size of the map stays."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)
    parts: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", nn.BatchNorm2d(outputs)), ("act", nn.ReLU())]
    return nn.Sequential(OrderedDict(parts))


def _block(inputs: int, widths: tuple[int, int, int], kernel: int, pool: nn.Module | None) -> nn.Sequential:
    """One spatial convolution and two of 1 x 1, then the pooling that belongs to the block."""
    first, second, third = widths
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", _unit(inputs, first, kernel)),
        ("conv2", _unit(first, second, 1)),
        ("conv3", _unit(second, third, 1)),
    ]
    return nn.Sequential(OrderedDict([*parts, ("pool", pool)] if pool is not None else parts))


class NetworkInNetwork(nn.Module):
    """Blocks of 96 (stride 2), 192 (stride 4), 192, ... channels; the later ones keep stride 4.

    No third pooling and the framework's default initialization, as in the released configuration.
    """

    def __init__(
        self,
        num_blocks: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if num_blocks < 3:
            raise ValueError(f"num_blocks: {num_blocks} is not possible; give 3, 4 or 5")
        average = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=True)  # the zeros of the padding count
        self.blocks = nn.Sequential(
            _block(in_chans, (192, 160, 96), 5, nn.MaxPool2d(3, stride=2, padding=1)),
            _block(96, (192, 192, 192), 5, average),
            *(_block(192, (192, 192, 192), 3, None) for _ in range(num_blocks - 2)),
        )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 192
        self.feature_info = [
            {"num_chs": 96 if i == 0 else 192, "reduction": 2 if i == 0 else 4, "module": f"blocks.{i}"}
            for i in range(num_blocks)
        ]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 192, H/4, W/4)."""
        features: Tensor = self.blocks(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 192, H/4, W/4) → (B, num_classes), or (B, 192) with `pre_logits`."""
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
        """Maps of the blocks `indices` (a number: the last so many), and the features too unless asked not to.

        `norm` belongs to timm's surface and has nothing to do here.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: {output_fmt!r} is not possible; give 'NCHW'")
        count = len(self.blocks)
        asked = range(-indices, 0) if isinstance(indices, int) else range(count) if indices is None else indices
        wanted = {range(count)[index] for index in asked}
        maps = []
        for position, block in enumerate(self.blocks):
            if stop_early and position > max(wanted):
                break
            x = block(x)
            if position in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of `num_classes`; 0: none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's description of the layers; there is no stem."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}


default_cfgs = generate_default_cfgs(
    {
        "nin_cifar.untrained": {
            "url": "",
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
            "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
            "first_conv": "blocks.0.conv1.conv",
            "classifier": "head.fc",
            "paper_ids": "arXiv:1803.07728",
        }
    }
)


def nin_cifar(pretrained: bool = False, **kwargs: Any) -> NetworkInNetwork:
    """RotNet's Network-in-Network; ``num_blocks`` is 3, 4 (default) or 5."""
    features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    model: NetworkInNetwork = build_model_with_cfg(
        NetworkInNetwork, "nin_cifar", pretrained, feature_cfg=features, **kwargs
    )
    return model


register_model(nin_cifar)
