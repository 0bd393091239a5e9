"""The *token_dropping* capability: a timm transformer run on some of its patches only.

Dropping tokens is exact under three conditions. Each patch becomes tokens from its own pixels. Positions enter per
token (added to it, or rotating its query and key) or per pair of tokens (an attention bias). Every block treats its
tokens as a set. The result then equals the full model with the dropped tokens masked in attention.

`family` holds the steps for plain vision transformers; the other modules hold what differs in other families.

Shapes: B images, L = gh * gw patches in raster order, K kept ones, P prefix tokens (class, distillation, registers),
D channels, (gh, gw) grid.
"""

from unlabeled.ssl.backbones.masked.tokens.encoder import TokenEncoder, token_dropping_missing_reason
from unlabeled.ssl.backbones.masked.tokens.family import gather_patches

__all__ = ["TokenEncoder", "gather_patches", "token_dropping_missing_reason"]
