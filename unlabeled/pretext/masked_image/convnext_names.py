"""Maps the names of ConvNeXt's parameters in timm to those in the authors' code."""

from __future__ import annotations

import re

_RULES = [
    (re.compile(r"^stem\."), "downsample_layers.0."),
    (re.compile(r"^stages\.(\d+)\.downsample\."), r"downsample_layers.\1."),
    (re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\."), r"stages.\1.\2."),
    (re.compile(r"\bconv_dw\."), "dwconv."),
    (re.compile(r"\bmlp\.fc([12])\."), r"pwconv\1."),
    (re.compile(r"\bmlp\.grn\.weight$"), "grn.gamma"),
    (re.compile(r"\bmlp\.grn\.bias$"), "grn.beta"),
    (re.compile(r"^head\.norm\."), "norm."),
    (re.compile(r"^head\.fc\."), "head."),
]
"""Source: github.com/facebookresearch/ConvNeXt and ConvNeXt-V2. The names of a ResNet match none of the rules."""


def reference_name(name: str) -> str:
    """The authors' name of the parameter or buffer that timm's ConvNeXt calls `name`; names of a ResNet are unchanged.

    >>> reference_name("stages.2.blocks.0.mlp.fc1.weight")
    'stages.2.0.pwconv1.weight'
    """
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
