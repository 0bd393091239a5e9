"""The surface that tasks use, and why a network does not have it."""

from __future__ import annotations

from torch import Tensor, nn

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.masked.tokens.biased import Beit, ConViT, RelativePositions
from unlabeled.ssl.backbones.masked.tokens.family import TokenFamily
from unlabeled.ssl.backbones.masked.tokens.flexible import Gemma, NaFlex, VisionLanguage
from unlabeled.ssl.backbones.masked.tokens.hiera import Hiera
from unlabeled.ssl.backbones.masked.tokens.streams import TNT, CaiT
from unlabeled.ssl.core.errors import ConfigError

FAMILIES: tuple[type[TokenFamily], ...] = (
    TokenFamily,
    Beit,
    RelativePositions,
    ConViT,
    CaiT,
    TNT,
    NaFlex,
    VisionLanguage,
    Gemma,
    Hiera,
)

_FOREIGN: dict[str, str] = {
    "CoaT": "convolutions need the whole grid",
    "CrossVit": "its two branches cut the image into patches of different sizes",
    "HieraDet": "windows need the whole grid",
    "MlpMixer": "mixing across tokens has weights for each place of the grid",
    "MultiScaleVit": "attention pooled over neighbors needs the whole grid",
    "Sequencer2d": "recurrence over rows and columns needs the whole grid",
    "VOLO": "outlook attention to neighbors needs the whole grid",
    "VisionTransformerSAM": "windows need the whole grid",
    "Xcit": "neighboring patches interact through convolutions",
}
"""Class of timm → what of it needs more than the kept patches, where a look at its modules would not tell."""


def token_dropping_missing_reason(backbone: Backbone) -> str | None:
    """Why patches cannot be dropped from this backbone, in a few words; None when they can."""
    family = _family(backbone.model)
    return _foreign_reason(backbone.model) if family is None else family(backbone.model).missing_reason()


def _family(model: nn.Module) -> type[TokenFamily] | None:
    return next((family for family in FAMILIES if family.holds(model)), None)


def _foreign_reason(model: nn.Module) -> str:
    if (reason := _FOREIGN.get(type(model).__name__)) is not None:
        return reason
    modules = list(model.modules())
    if not hasattr(model, "blocks") and any(getattr(module, "window_size", None) for module in modules):
        return "windows need the whole grid"
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    overlapping = any(a > b for conv in convolutions for a, b in zip(conv.kernel_size, conv.stride, strict=True))
    if len(convolutions) > 1 or overlapping:
        return "convolutions need the whole grid"
    return f"{type(model).__name__} is not known to keep one token per patch"


class TokenEncoder:
    """Runs the transformer inside `backbone` on kept patches; a view without parameters or state of its own.

    Build it where it is used (it costs nothing), after ``backbone.require({"token_dropping"}, ...)`` has passed.
    """

    def __init__(self, backbone: Backbone) -> None:
        family = _family(backbone.model)
        assert family is not None, f"{backbone.name} cannot drop tokens; ask lacks_token_dropping first"
        self.backbone = backbone
        self.family = family(backbone.model)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels of what is dropped or kept as a whole, (height, width): a patch, in Hiera a mask unit."""
        return self.family.cell

    @property
    def prefix(self) -> int:
        """P, the number of tokens before the patches."""
        return self.family.prefix

    @property
    def dim(self) -> int:
        """D, the channels of an encoded token."""
        return self.family.dim

    @property
    def channels(self) -> int:
        """C, the channels of an image."""
        return 3

    @property
    def projection(self) -> nn.Parameter:
        """Weights of the linear map or convolution from pixels, (D, ...)."""
        return self.family.projection

    @property
    def absolute(self) -> nn.Parameter | None:
        """Table of absolute positions, (1, L, D) or (1, P + L, D); None where the network has no such table.

        Tables that are resampled from another grid, finer than a patch, or split into rows and columns do not count.
        """
        return self.family.absolute

    @property
    def absolute_grid(self) -> tuple[int, int]:
        """Grid (gh, gw) of `absolute`."""
        return self.family.absolute_grid

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid (gh, gw) of an input of `size` (height, width) pixels.

        Raises ConfigError when the patch does not divide the size, or the network takes another size only.
        """
        patch, own = self.patch_size, self.family.own_size
        if size[0] % patch[0] or size[1] % patch[1]:
            below = tuple(max(1, pixels // step) * step for pixels, step in zip(size, patch, strict=True))
            raise ConfigError(
                f"backbone.size: {list(size)} is no multiple of {self.backbone.name}'s patch {list(patch)}; "
                f"set it to {list(below)}"
            )
        if own is not None and own != tuple(size):
            raise ConfigError(
                f"backbone.size: {self.backbone.name} is built for {list(own)} pixels, not {list(size)}; "
                "set backbone.size to the size of the images"
            )
        return size[0] // patch[0], size[1] // patch[1]

    def encode(self, x: Tensor, ids_keep: Tensor) -> tuple[Tensor, int]:
        """Normalized (B, C, H, W) and raster indices of kept patches (B, K) → tokens (B, P + K, D), and P.

        Kept tokens stay in the order of `ids_keep`; the final norm is applied as in timm's ``forward_features``.
        Raises ConfigError for a size that does not fit.
        """
        self.grid((x.shape[-2], x.shape[-1]))
        return self.family.encode(x, ids_keep), self.prefix

    def unreached(self) -> list[nn.Parameter]:
        """Parameters of the model that `encode` does not use (heads, pooling, norms after pooling)."""
        named = self.backbone.model.named_parameters()
        return [parameter for name, parameter in named if name.partition(".")[0] not in self.family.reached]
