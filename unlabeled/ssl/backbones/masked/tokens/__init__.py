"""The *token_dropping* capability: a timm transformer run on some of its patches only.

Dropping is exact when each patch becomes tokens from its own pixels, what is known of positions belongs to single
tokens (added to them, or rotating their queries and keys) or to pairs of them (a bias of attention), and every block
treats its tokens as a set. The result is then the same as hiding the dropped tokens from attention in the full network.

`family` holds the steps for plain vision transformers, the other modules what differs in other families.

Shapes: B images, L = gh * gw patches in raster order, K kept ones, P prefix tokens (class, distillation, registers),
D channels, (gh, gw) grid.
"""

from unlabeled.ssl.backbones.masked.tokens.encoder import TokenEncoder, token_dropping_missing_reason
from unlabeled.ssl.backbones.masked.tokens.family import gather_patches

__all__ = ["TokenEncoder", "gather_patches", "token_dropping_missing_reason"]
