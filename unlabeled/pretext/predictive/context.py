"""Context prediction: at which of eight positions around one patch of an image does another patch lie?

Doersch, Gupta, Efros: Unsupervised Visual Representation Learning by Context Prediction, ICCV 2015, arXiv 1505.05192;
code of the authors: github.com/cdoersch/deepcontext. Shapes: B images, P patches of a grid, Q ordered pairs of
neighbors.

- **Patches and images.** The backbone's input size is the size of a patch: 96 pixels in the paper
  (``backbone=contextnet``, or any other with ``backbone.size=96``). Images are resized to 150,000 .. 450,000 pixels for
  patches of 96, in proportion for others, and further enlarged if the grid does not fit. So small images work: in an
  image of 32 x 32, a patch of a 3 x 3 grid covers at most 8 original pixels a side, and up to 12 in a 2 x 2 grid.
- **One grid per image**, of fixed shape: 9 patches and their 40 pairs. The authors draw four grids per image, as large
  as they fit; their batch of about 506 patches and 2309 pairs corresponds to 56 images here.
- **Loss**: the mean over pairs. The authors sum: their learning rate of 1e-5 is 0.023 for the mean over 2309 pairs.
- **Batch norm statistics** are computed over all ranks, since the authors' single process has the whole batch.
- Images are never mirrored, because that would swap left and right.

OpenMMLab's recipe differs (mmselfsup, ResNet-50): random crops of 64 in 3 x 3 cells of 85 pixels, random grayscale,
only the 8 pairs with the center, labeled in the other direction (neighbor first), and each patch embedded per pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.pretext.common.checkpoint import load_mapped
from unlabeled.pretext.common.drawing import RIGHT, WRONG, tiled
from unlabeled.pretext.common.precision import widened
from unlabeled.pretext.common.views import Fraction
from unlabeled.pretext.predictive import patch_cues
from unlabeled.pretext.predictive.patch_grid import OFFSETS, GridLayout, GridViews, Mark, draw_grid, neighbor_pairs
from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.networks.context import caffe_xavier_
from unlabeled.ssl.backbones.shapes import modes_kept
from unlabeled.ssl.data.views import Views
from unlabeled.ssl.task import Batch, FloatImages, Paper, PretextTask, Recipe, StepOutput, TaskConfig

Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[float, Field(gt=0)]

_PAPER = 96
"""Side of the paper's patches, in pixels; the setting `pixels` refers to it."""
_SHOWN = 4
"""Number of images that `visualize` shows."""
_MARGIN = 8
"""Pixels of margin around each drawn grid."""


class ContextConfig(TaskConfig):
    """Settings of context prediction; the defaults are those of the released code."""

    grid: tuple[Count, Count] = (3, 3)
    """Rows and columns of patches. [patches]"""
    gap: float = Field(0.5, ge=0)
    """Gap between neighboring patches: 48 pixels for patches of 96. [patch sides]"""
    jitter: float = Field(7 / 96, ge=0)
    """Largest random shift of a patch along each axis: 7 pixels for patches of 96. [patch sides]"""
    pixels: tuple[Pixels, Pixels] = (150_000, 450_000)
    """Smallest and largest area of the resized image, for patches of 96x96; in proportion for other patches.
    [pixels]"""
    color: Literal["drop", "projection", "none"] = "drop"
    """How color is removed, so that chromatic aberration does not give the location away. drop: keep one random channel
    and replace the others by noise. projection: remove the axis from green to magenta. none: keep all colors."""
    pixelate: float = Field(0.33, ge=0, le=1)
    """Probability that a patch is downsampled and upsampled again."""
    smallest: Fraction = 10 / 96
    """Smallest side of a downsampled patch. [fraction of the patch]"""
    widths: tuple[Count, Count] = (4096, 4096)
    """Widths of the two hidden layers of the head (fc7, fc8). [channels]"""

    @field_validator("grid")
    @classmethod
    def _has_neighbors(cls, grid: tuple[int, int]) -> tuple[int, int]:
        if grid == (1, 1):
            raise ValueError("one patch has no neighbors; give at least [1, 2]")
        return grid

    @field_validator("pixels")
    @classmethod
    def _ascends(cls, pixels: tuple[float, float]) -> tuple[float, float]:
        if pixels[0] > pixels[1]:
            raise ValueError(f"{list(pixels)} is no range; give the smaller number first")
        return pixels

    def layout(self, patch: tuple[int, int]) -> GridLayout:
        """The grid in pixels, for patches of size `patch` (height, width)."""
        gap, jitter = ((round(sides * patch[0]), round(sides * patch[1])) for sides in (self.gap, self.jitter))
        return GridLayout(self.grid, patch, gap, jitter)


class PairHead(nn.Module):
    """Classifies ordered pairs of embeddings: fc7, a batch norm without scale and shift, fc8, fc9.

    fc7 applied to two concatenated embeddings equals the sum of two layers with one embedding each. These run once per
    patch, not once per pair: the same result for a quarter of the work on a 3 x 3 grid.
    """

    def __init__(self, dim: int, widths: tuple[int, int], classes: int = len(OFFSETS)) -> None:
        super().__init__()
        self.fc7_first = nn.Linear(dim, widths[0], bias=False)  # the norm would undo a bias
        self.fc7_second = nn.Linear(dim, widths[0], bias=False)
        self.bn7 = nn.BatchNorm1d(widths[0], affine=False)
        self.fc8 = nn.Linear(widths[0], widths[1])
        self.fc9 = nn.Linear(widths[1], classes)
        caffe_xavier_(self)
        with torch.no_grad():
            for half in (self.fc7_first, self.fc7_second):
                half.weight.mul_(0.5**0.5)  # initialize as the single layer of 2 * dim inputs would be

    def forward(self, embeddings: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Embeddings (B, P, D) and the patches `first` and `second` (Q,) of each pair → scores (B, Q, classes)."""
        as_first, as_second = self.fc7_first(embeddings), self.fc7_second(embeddings)  # (B, P, W)
        hidden = as_first.index_select(1, first) + as_second.index_select(1, second)  # (B, Q, W)
        hidden = F.relu(self.bn7(hidden.flatten(0, 1)))  # (B * Q, W): statistics over all pairs
        scores: Tensor = self.fc9(F.relu(self.fc8(hidden)))
        return scores.view(len(embeddings), len(first), -1)


class Context(PretextTask):
    """Classifies where one patch lies relative to a neighboring patch of the same image.

    Submodules: `backbone` and `head`."""

    Config: ClassVar[type[TaskConfig]] = ContextConfig
    paper = Paper(
        "Unsupervised Visual Representation Learning by Context Prediction",
        2015,
        "https://arxiv.org/abs/1505.05192",
    )
    good_for = "a classic baseline that learns how the parts of an object are arranged"
    recipe: ClassVar[Recipe] = {
        "optim": {"name": "momentum", "lr": 0.023, "lr_scaling": "none", "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_epochs": 0},
        "batch_size": 56,
        "epochs": 75,
    }
    """Context prediction (Doersch et al., ICCV 2015, arXiv 1505.05192): the authors' released recipe for
    contextnet. 56 images give 504 patches and 2240 pairs, about as many as in the authors' batches. Their learning
    rate of 1e-5 is for the sum over pairs, which is 0.023 for the mean. Plain SGD (timm's `momentum`, since its `sgd`
    is Nesterov's) at a constant rate and without momentum; the paper mentions 0.999. 75 epochs of ImageNet are their
    1.7 million steps."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    synced_statistics: ClassVar[bool] = True
    float_images: ClassVar[FloatImages] = "bytes"
    captions: ClassVar[Mapping[str, str]] = {
        "positions": "green frame: position predicted correctly, red: not; white dot: the predicted position"
    }
    collapse_remedy: ClassVar[str] = (
        "lower optim.lr, or take a backbone whose batch norms have no learnable scale (backbone=contextnet)"
    )
    config: ContextConfig

    def __init__(self, config: ContextConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled())
        self.layout = config.layout(backbone.input_size)
        # `_first`, `_second` and `_label` (Q,): buffers, to be on the task's device, but not in checkpoints
        for name, values in neighbor_pairs(*config.grid)._asdict().items():
            self.register_buffer(f"_{name}", values, persistent=False)
        self.head = PairHead(backbone.embed_dim, config.widths)

    @classmethod
    def views(cls, config: ContextConfig, backbone: Backbone) -> Views:
        height, width = backbone.input_size
        scale = height * width / _PAPER**2
        return GridViews(config.layout((height, width)), (config.pixels[0] * scale, config.pixels[1] * scale))

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """For each patch: ``shrink`` (B, P), the fraction of its side that it is reduced to (1: not reduced), and with
        ``color: drop`` the channel ``kept`` (B, P) and the ``noise`` (B, P, 3, h, w) that replaces the others."""
        patches = batch["patches"]
        chosen, area = torch.rand(2, *patches.shape[:2], device=patches.device).unbind()
        smallest, largest = self.config.smallest**2, (1 - 1 / max(patches.shape[-2:])) ** 2
        shrink = (smallest + area * max(largest - smallest, 0.0)).sqrt()  # uniform in area, as published
        drawn = {"shrink": torch.where(chosen < self.config.pixelate, shrink, 1.0)}
        if self.config.color == "drop":
            drawn["kept"] = torch.randint(3, patches.shape[:2], device=patches.device)
            drawn["noise"] = torch.rand(patches.shape, device=patches.device) - 0.5
        return drawn

    def disguise(
        self, patches: Tensor, shrink: Tensor, kept: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """uint8 patches (N, 3, h, w) → float32 (N, 3, h, w) of RMS 50, without cues that give the position away.

        `shrink`, `kept` and `noise` are those of `draw`, with (B, P) flattened to (N,).
        """
        pixels = patch_cues.pixelate(patches.float(), shrink)
        if self.config.color == "drop":
            pixels = patch_cues.keep_one_channel(pixels, cast(Tensor, kept), cast(Tensor, noise))
        elif self.config.color == "projection":
            pixels = patch_cues.drop_green_magenta(pixels)
        else:
            pixels = patch_cues.without_mean(pixels)
        return patch_cues.to_rms(pixels)

    def inputs(self, disguised: Tensor) -> Tensor:
        """Disguised patches (N, 3, h, w) → the backbone's input: divided by its mean standard deviation in 0..255."""
        # so that pretraining and later use, through `Backbone.normalize`, have the same contrast: RMS 50 for
        # `contextnet`, as published, and 0.87 with ImageNet's statistics
        deviation = 255 * sum(self.backbone.std) / len(self.backbone.std)
        return disguised.to(self.head.fc9.weight.dtype) / deviation

    def classify(self, disguised: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Disguised patches (B * P, 3, h, w) of B `images` → scores (B, Q, 8) and embeddings (B * P, D)."""
        # every patch is embedded once, not once per pair
        embeddings = self.backbone.pooled(self.inputs(disguised))
        scores = self.head(embeddings.reshape(images, -1, self.backbone.embed_dim), self._first, self._second)
        return widened(scores), embeddings

    def forward(self, batch: Batch, **draw: Tensor) -> StepOutput:
        """``patches`` uint8 (B, P, 3, h, w) → mean cross-entropy over all B * Q pairs; chance level is ln 8 = 2.079."""
        patches = batch["patches"]
        # remove cues such as color fringes, then embed each patch and classify all pairs
        drawn = {name: values.flatten(0, 1) for name, values in (draw or self.draw(batch)).items()}
        scores, embeddings = self.classify(self.disguise(patches.flatten(0, 1), **drawn), len(patches))
        # compare with the true relative positions, which are the same for every image
        labels = cast(Tensor, self._label).expand(len(patches), -1)
        accuracy = (scores.detach().argmax(-1) == labels).float().mean()
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return StepOutput(loss, {"accuracy": accuracy}, embeddings.detach())

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``positions``: one row per image (the first 4), its grid as cropped and as the backbone sees it.

        Shows the predictions for the middle patch (gray frame) and each neighbor. A neighbor's frame is green if its
        position was predicted correctly, else red. The white dot marks the predicted position; if all are correct,
        every dot lies on the outside of the grid.
        """
        patches, corners = batch["patches"][:_SHOWN], batch["corners"][:_SHOWN].cpu()
        drawn = {name: values.flatten(0, 1) for name, values in self.draw({"patches": patches}).items()}
        disguised = self.disguise(patches.flatten(0, 1), **drawn)
        with modes_kept(self):
            self.eval()
            predicted = self.classify(disguised, len(patches))[0].argmax(-1).cpu()
        inputs = (disguised + 127.5).clamp(0, 255).to(torch.uint8).reshape(patches.shape)  # zero mean becomes gray
        tiles = [
            draw_grid(self.layout, shown[image].cpu(), corners[image], self._marks(labels))
            for image, labels in enumerate(predicted.tolist())
            for shown in (patches, inputs)
        ]
        return {"positions": tiled(tiles, 2, gap=_MARGIN)}

    def _marks(self, predicted: list[int]) -> Iterator[Mark]:
        """Frames of the middle patch and its neighbors, from the predicted labels of all Q pairs of one image."""
        rows, columns = self.config.grid
        middle = rows // 2 * columns + columns // 2
        yield Mark(middle, (150, 150, 150))
        pairs = zip(*(values.tolist() for values in neighbor_pairs(rows, columns)), strict=True)
        for prediction, (first, second, label) in zip(predicted, pairs, strict=True):
            if first == middle:
                yield Mark(second, RIGHT if prediction == label else WRONG, prediction)

    def load_reference(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Loads the blobs of the released Caffe model, by name, for `contextnet`.

        ``conv1`` ... ``conv5`` and ``fc6`` ... ``fc9`` have ``.weight`` and ``.bias``. ``bn3`` ... ``bn7`` have ``.0``,
        ``.1``, ``.2`` (mean times s, variance times s, s), or are absent if folded into their layers. Returns
        (missing, unexpected): missing tensors by our names, unexpected ones by those of the file.
        """
        rest = dict(state)
        converted: dict[str, Tensor] = {}
        for layer, (ours, norm) in _REFERENCE.items():
            converted |= _from_caffe(rest, layer, ours, norm)
        # their fc7 takes two concatenated embeddings, ours is one layer for each
        if (joined := converted.pop("head.fc7.weight", None)) is not None:
            first, second = joined.tensor_split(2, dim=-1)
            converted |= {"head.fc7_first.weight": first, "head.fc7_second.weight": second}
        wanted = [name for name in self.state_dict() if not name.endswith(_COUNTER)]
        missing, foreign = load_mapped(self, converted, {name: name for name in wanted})
        return missing, foreign + list(rest)


_COUNTER = "num_batches_tracked"
_TRUNK = "backbone.model"
_REFERENCE: dict[str, tuple[str, str | None]] = {
    "conv1": (f"{_TRUNK}.blocks.0.conv", None),
    "conv2": (f"{_TRUNK}.blocks.1.conv", None),
    "conv3": (f"{_TRUNK}.blocks.2.conv", f"{_TRUNK}.blocks.2.bn"),
    "conv4": (f"{_TRUNK}.blocks.3.conv", f"{_TRUNK}.blocks.3.bn"),
    "conv5": (f"{_TRUNK}.blocks.4.conv", f"{_TRUNK}.blocks.4.bn"),
    "fc6": (f"{_TRUNK}.head.fc6", f"{_TRUNK}.head.bn6"),
    "fc7": ("head.fc7", "head.bn7"),
    "fc8": ("head.fc8", None),
    "fc9": ("head.fc9", None),
}
"""Layer of the released model → our layer, and the batch norm after it (None: no batch norm)."""
_EPS = 1e-5
"""Epsilon of all batch norms, theirs and ours."""


def _from_caffe(state: dict[str, Tensor], layer: str, ours: str, norm: str | None) -> dict[str, Tensor]:
    """Removes a layer and its norm from `state` and returns them under our names."""
    found: dict[str, Tensor] = {}
    if (weight := state.pop(f"{layer}.weight", None)) is not None:
        # fc6 is a matrix over a flattened 3 x 3 map in Caffe, and a 3 x 3 convolution here
        as_map = layer == "fc6" and weight.ndim == 2 and weight.shape[1] % 9 == 0
        found[f"{ours}.weight"] = weight.reshape(len(weight), -1, 3, 3) if as_map else weight
    bias = state.pop(f"{layer}.bias", None)
    if norm is None:
        return found if bias is None else {**found, f"{ours}.bias": bias}
    blobs = [state.pop(name, None) for name in (f"bn{layer[-1]}.{number}" for number in range(3))]
    # our layers have no bias before a norm, so the norm's running mean takes it
    match blobs:
        case [Tensor() as mean, Tensor() as variance, Tensor() as scale]:
            found[f"{norm}.running_mean"] = mean / scale - (0.0 if bias is None else bias)
            found[f"{norm}.running_var"] = variance / scale
        case _ if bias is not None:  # a norm folded into its layer: ours must then only add the bias
            found[f"{norm}.running_mean"] = -bias
            found[f"{norm}.running_var"] = torch.full_like(bias, 1 - _EPS)
    return found
