"""Reads off a parameter's name which layer it belongs to and whether weight decay applies to it.

Layers are numbered as in the fine-tuning code of BEiT, MAE and SimMIM: the stem is 0, block i (counted over all stages)
is i + 1, and everything past the last block (norms, heads) is `depth + 1`. The learning rate of layer i is multiplied
by decay^(depth + 1 - i).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

DecayRule = Literal["pretrain", "finetune", "swin"]

_BLOCK = re.compile(
    r"""
    ^(?:(?:model|module|encoder|backbone|trunk|body|features)\.)*       # wrappers around the trunk
    (?:
      (?P<block>
          (?:stages|layers|levels|transformers)\.\d+\.(?:blocks|transformer_encoder)\.\d+   # Swin, ConvNeXt, NesT
        | (?:layer|stage)\d+\.\d+                                       # ResNet, HRNet, Visformer
        | denseblock\d+\.denselayer\d+ | s\d+\.b\d+ | level\d+(?:\.tree\d+)+                # DenseNet, RegNet, DLA
        | conv[2-9]_\d+ | block\d+ | [Mm]ixed_\d\w | (?:reduction_)?cell_\d+ | repeat(?:_\d+)?\.\d+  # DPN to NASNet
      )
      | (?P<outer>(?P<container>(?:\w*stages|layers?|(?:post_)?network|\w*blocks\w*|features)\.)\d+)(?P<inner>\.\d+)?
    )\.(?P<rest>.+)$
    """,
    re.VERBOSE,
)
# names that a parameter has directly inside a numbered module, if that module is a layer rather than a block
_BARE_LAYER = {"weight", "bias"}


def _block_keys(names: Sequence[str]) -> list[str | None]:
    """The name of the block that each parameter belongs to; None outside of blocks.

    When a numbered module contains numbered modules (``blocks.1.0``), the inner ones are the blocks, as in
    EfficientNet, unless most of them are bare layers (ConvMixer's ``blocks.1.2.weight``): then the outer one is.
    """
    matches = [_BLOCK.match(name) for name in names]
    # containers of blocks that the first alternative names in full, such as "stages." of Swin, are nested too
    nested = {match["block"].split(".")[0] + "." for match in matches if match and match["block"]}
    nested |= _nested_containers([match for match in matches if match and match["outer"]])

    def key(match: re.Match[str] | None) -> str | None:
        if match is None or match["block"]:
            return match and match["block"]
        if match["container"] not in nested:
            return match["outer"]
        # a bare layer next to nested blocks, such as a downsampling convolution, belongs to none of them
        return match["outer"] + match["inner"] if match["inner"] and match["rest"] not in _BARE_LAYER else None

    return [key(match) for match in matches]


def _nested_containers(matches: Sequence[re.Match[str]]) -> set[str]:
    """Containers with blocks numbered twice: no inner module is a bare layer, or most inner modules are not."""
    outer: dict[str, set[str]] = {}
    inner: dict[str, set[str]] = {}
    bare: set[str] = set()
    for match in matches:
        outer.setdefault(match["container"], set()).add(match["outer"])
        if match["inner"] and match["rest"] in _BARE_LAYER:
            bare.add(match["container"])
        elif match["inner"]:
            inner.setdefault(match["container"], set()).add(match["outer"] + match["inner"])
    return {name for name, blocks in inner.items() if name not in bare or len(blocks) > len(outer[name])}


def block_layers(names: Iterable[str]) -> list[int]:
    """Layer of each parameter name; `names` must be in the order of the modules.

    Blocks are counted over all stages. Parameters before the first block belong to the stem (0), those between two
    blocks to the earlier one, and those after the last block to layer depth + 1. A model without blocks is all stem.
    """
    keys = _block_keys(list(names))
    order = {key: position for position, key in enumerate(dict.fromkeys(key for key in keys if key), start=1)}
    # without blocks nothing is past the last one: every parameter gets layer 0
    last = max((position for position, key in enumerate(keys) if key), default=len(keys))
    layers, current = [], 0
    for position, key in enumerate(keys):
        # `max` keeps layers ascending where the names of two blocks are interleaved
        current = max(current, order[key]) if key else current
        layers.append(current if position <= last else len(order) + 1)
    return layers


def count_blocks(names: Iterable[str]) -> int:
    """Depth of a model: the number of its blocks, over all stages."""
    return len({key for key in _block_keys(list(names)) if key})


def layer_scale(layer: int, depth: int, decay: float) -> float:
    """Learning-rate multiplier of `layer`: decay^(depth + 1 - layer), which is 1 past the last block."""
    return decay ** (depth + 1 - layer)


def decay_applies(name: str, shape: Sequence[int], rule: DecayRule = "pretrain") -> bool:
    """Whether weight decay applies to parameter `name` of `shape`.

    pretrain: not for one-dimensional tensors and biases (timm 0.3.2's rule; tokens and positions are decayed).
    finetune: nor for the class token and the position table (MAE's and SimMIM's ViT; their two-dimensional tables of
    relative positions are decayed). swin: nor for tables of relative or absolute positions (SimMIM's Swin).
    """
    if len(shape) <= 1 or name.endswith(".bias"):
        return False
    last = name.rsplit(".", 1)[-1]
    if rule == "finetune":
        return last not in {"cls_token", "pos_embed"}
    if rule == "swin":
        return last not in {"relative_position_bias_table", "absolute_pos_embed"}
    return True
