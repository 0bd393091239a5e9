"""Jigsaw puzzles: predict in which of some known orders the tiles of an image were shuffled.

Noroozi, Favaro: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles, ECCV 2016, arXiv 1603.09246.
The backbone sees each tile by itself; a head reads the features of all tiles in their shuffled order.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.utils import make_grid

from unlabeled import Backbone, Batch, Paper, PretextTask, Recipe, StepOutput, TaskConfig, modes_kept
from unlabeled_jigsaw.orders import distant_orders, shuffled


class JigsawConfig(TaskConfig):
    """Settings of jigsaw puzzles; the defaults are the paper's."""

    grid: int = Field(3, ge=2, le=4)
    """Tiles along each side."""
    permutations: int = Field(1000, ge=2)
    """Number of orders to choose from. There are only 24 orders of 2x2 tiles."""
    gap: float = Field(75 / 64, ge=1)
    """Side of a cell relative to the tile cropped from it at random, so that edges of neighbors do not match."""
    gray: float = Field(0.3, ge=0, le=1)
    """Probability of a gray image. Color fringes would reveal the order."""


class JigsawViews:
    """One image → its tiles in their true order."""

    def __init__(self, config: JigsawConfig, tile: tuple[int, int]) -> None:
        self.cell = [round(length * config.gap) for length in tile]
        size = [config.grid * length for length in self.cell]
        resize = v2.Resize(max(size) * 256 // 225, antialias=True)
        self.crop = v2.Compose([resize, v2.RandomCrop(size), v2.RandomGrayscale(config.gray)])
        self.tile = v2.RandomCrop(tile)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 (3, H, W) of any size → ``tiles``, uint8 (n, 3, h, w), row by row."""
        rows = self.crop(image).split(self.cell[0], dim=1)
        return {"tiles": torch.stack([self.tile(cell) for row in rows for cell in row.split(self.cell[1], dim=2)])}


class Jigsaw(PretextTask):
    """Predicts how the tiles of an image were shuffled."""

    paper = Paper("Visual Representations by Solving Jigsaw Puzzles", 2016, "https://arxiv.org/abs/1603.09246")
    good_for = "images of objects with parts in a typical layout"

    Config: ClassVar[type[TaskConfig]] = JigsawConfig
    recipe: ClassVar[Recipe] = {
        "optim": {"name": "sgd", "lr": 0.01, "lr_scaling": "none", "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"name": "multistep", "warmup_epochs": 0, "milestones": [20, 40, 60], "gamma": 0.1},
        "batch_size": 256,
        "epochs": 70,
    }
    """The authors' solver (solver_cfn_jps.prototxt of github.com/MehdiNoroozi/JigsawPuzzleSolver): 350,000 steps of 256
    images, a tenth of the rate every 100,000; that many steps are 70 and 20 epochs of ImageNet."""
    requires: ClassVar[frozenset[str]] = frozenset({"pooled"})
    orders: Tensor

    def __init__(self, config: JigsawConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.train_only(backbone.reached_by_pooled())
        self.register_buffer("orders", distant_orders(config.grid**2, config.permutations))
        width = config.grid**2 * backbone.embed_dim
        self.head = nn.Sequential(nn.Linear(width, 4096), nn.ReLU(), nn.Linear(4096, config.permutations))

    @classmethod
    def views(cls, config: JigsawConfig, backbone: Backbone) -> JigsawViews:
        return JigsawViews(config, backbone.input_size)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """``order``, int64 (B,): the permutation of each image."""
        tiles = batch["tiles"]
        return {"order": torch.randint(len(self.orders), tiles.shape[:1], device=tiles.device)}

    def forward(self, batch: Batch, *, order: Tensor | None = None) -> StepOutput:
        """Mean cross-entropy of the permutation; `order` None: drawn here."""
        order = self.draw(batch)["order"] if order is None else order
        scores = self.scores(shuffled(batch["tiles"], self.orders[order]))
        accuracy = (scores.detach().argmax(1) == order).float().mean()
        return StepOutput(nn.functional.cross_entropy(scores, order), {"accuracy": accuracy})

    def scores(self, tiles: Tensor) -> Tensor:
        """Shuffled tiles, uint8 (B, n, 3, h, w), each scaled to mean 0 and deviation 1 → (B, permutations)."""
        x = self.backbone.normalize(tiles.flatten(0, 1))
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        features = self.backbone.pooled((x - mean) / (std + 1e-5))  # (B * n, D)
        scores: Tensor = self.head(features.reshape(len(tiles), -1))
        return scores.float()

    @torch.no_grad()
    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """``puzzles``: the shuffled tiles of each image, and next to them the predicted order."""
        with modes_kept(self):
            self.eval()
            given = shuffled(batch["tiles"], self.orders[self.draw(batch)["order"]])
            solved = shuffled(given, self.orders[self.scores(given).argmax(1)].argsort(1))
        pairs = torch.stack([given, solved], 1)[:8].flatten(0, 1).cpu()
        puzzles = [make_grid(tiles, round(len(tiles) ** 0.5), padding=1) for tiles in pairs]
        return {"puzzles": make_grid(puzzles, nrow=4, padding=4)}
