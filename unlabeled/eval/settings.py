"""Settings of the evaluators, one section each: ``evaluate.knn``, ``evaluate.linear``, ...

The order is that of `unlabeled.eval.registry.EVALUATORS`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unlabeled.ssl.config.base import Section


def _listed(value: Any) -> Any:
    """One number as a list of one."""
    return (value,) if isinstance(value, (int, float)) else value


class KnnConfig(Section):
    """Weighted kNN, the protocol of DINO."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)] = (0.07,)
    """One or several; the headline is 0.07, or the first where that is not among them."""
    search: Literal["exact", "reduced", "ivf", "hnsw"] = "exact"
    """exact: float32 · reduced: 8-bit products first, the same neighbours proven, faster where the processor has such
    instructions · ivf, hnsw: approximate, with their recall measured."""
    effort: int = Field(64, ge=1)
    """Of an approximate search: lists that ivf visits, breadth of the search through hnsw (at least k)."""
    memory_gb: float = Field(2.0, gt=0)
    """Of training features made ready in memory at a time, in 1e9 bytes; an approximate search needs them all."""
    shots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also with so many training pictures of each class alone."""
    shot_draws: int = Field(5, ge=2)
    """Draws of these pictures, which give the mean and its interval."""


class LinearConfig(Section):
    """Linear probe on frozen features: a grid trained in one pass, chosen on a split of the training set."""

    grid: Literal["dinov2"] | None = None
    """dinov2: the 52 heads of DINOv2 (arXiv 2304.07193): 13 learning rates, class tokens of the last 1 and 4 blocks,
    without and with the average of the patches, no decay, weights from N(0, 0.01). It stands for lr, weight_decay,
    blocks, pooling and init."""
    lr: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of SGD with momentum, for standardised features and a batch of 256."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3)
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also part of the grid: features of the last so many blocks (of a network of stages: stages), final norm applied.
    (): the pooled features alone."""
    pooling: tuple[Literal["cls", "avg", "cls+avg"], ...] = ()
    """What is read of these blocks: their class tokens, the averages of their patches, or the class tokens and the
    average of the last block's patches. (): cls where the network has a class token, else avg."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also probe the first so many pooled features (Matryoshka representations), each with its own choice, in the same
    pass."""
    init: float = Field(0.0, ge=0)
    """Standard deviation of the first weights."""
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses the head."""
    augment: bool = False
    """Train on random crops and flips, encoded anew in each epoch, and not on cached features. The hold-out is not
    augmented; raw pixels are not either."""
    augment_epochs: int = Field(10, ge=1)
    """Epochs with `augment`, instead of `epochs`; each is a pass of the network over the training set, and there are
    two trainings: for the choice and for the result."""


class LogisticConfig(Section):
    """Logistic regression on standardised features, solved by L-BFGS: what the linear probe should reach."""

    C: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Inverse strengths of the L2 penalty, as scikit-learn counts it; a hold-out of the training set chooses one."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training set that chooses C."""
    iterations: int = Field(1000, ge=1)
    """Largest number of L-BFGS iterations."""
    limit: int | None = Field(20_000, ge=2)
    """Largest number of training pictures, drawn class by class; None: all, which is slow."""


class FewShotConfig(Section):
    """Episodes of nearest class means on centred features of unit length (SimpleShot's CL2N)."""

    ways: int = Field(5, ge=2)
    """Classes of an episode."""
    shots: tuple[int, ...] = (1, 5)
    """Labelled pictures of each class."""
    queries: int = Field(15, ge=1)
    """Pictures of each class to be classified."""
    episodes: int = Field(600, ge=2)


class LowLabelConfig(Section):
    """The linear probe with few labels."""

    fractions: tuple[float, ...] = (0.01, 0.1)
    """Parts of the training labels, drawn class by class."""
    draws: int = Field(3, ge=1)
    """Draws of labelled pictures, over which the interval is taken."""
    steps: int = Field(500, ge=1)
    """Least number of optimizer steps; a small part has few in an epoch."""
    C: float = Field(0.01, gt=0)
    """Of logistic regression, which replaces the probe below five pictures a class."""
    probe: LinearConfig = LinearConfig()


class ClusterConfig(Section):
    """k-means on the test features through faiss, compared with the classes."""

    restarts: int = Field(5, ge=1)
    """Runs from other starting points; the one of the best objective counts."""
    iterations: int = Field(50, ge=1)
    spherical: bool = True
    """Features and centroids of unit length, compared by cosine; false: as they are, by Euclidean distance."""


class RetrievalConfig(Section):
    """Test pictures that look for others of their class."""

    k: tuple[int, ...] = (1, 5, 10)
    """Of recall@k."""


class DuplicatesConfig(Section):
    """Pictures that are in the training split too, or nearly so."""

    chance: float = Field(1e-3, gt=0, lt=1)
    """Share of ordinary pictures that may be taken for near duplicates; sets the threshold."""
    queries: int = Field(10_000, ge=1)
    """Largest number of training pictures, drawn by lot, that are looked up in the training split."""
    shown: int = Field(8, ge=1)
    """Closest pairs in the report's picture."""


class SegmentationConfig(Section):
    """Segmentation from single places of the frozen feature map: a linear probe, and their nearest training places."""

    level: int | None = None
    """Number of the feature map; None: the deepest one that is fine enough (14 places a side at 224 pixels)."""
    bank: int = Field(20_000, ge=2)
    """Largest number of training places, as many of each picture, for the probe and for the neighbours."""
    k: int = Field(30, ge=1)
    """Neighbours of a place."""
    temperature: float = Field(0.02, gt=0)
    """Of the softmax over the neighbours' cosines."""
    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1)
    """Learning rates of SGD with momentum, for standardised features; training pictures held out choose one."""
    weight_decay: float = Field(1e-4, ge=0)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(256, ge=1)
    """Places per step."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Part of the training pictures that chooses the learning rate."""
    examples: int = Field(6, ge=1)
    """Test pictures that are shown."""


class ObjectsConfig(Section):
    """Objects found without any training by cutting the graph of places in two (TokenCut)."""

    level: int | None = None
    """Number of the feature map; None: keys of the last attention block, or the deepest map that is fine enough."""
    pictures: int = Field(1000, ge=1)
    """Largest number of test pictures."""
    tau: float = Field(0.2, ge=-1, lt=1)
    """Cosine from which two places are joined."""
    native: bool = False
    """Pictures at their own size, padded to whole patches, as published; None of them is resized, so the network must
    take any size (``backbone.kwargs={dynamic_img_size: true}`` for vision transformers)."""
    examples: int = Field(12, ge=1)
    """Test pictures that are shown."""


class SpectrumConfig(Section):
    """Measures of the training features that need no labels: RankMe, α-ReQ, intrinsic dimension, uniformity."""

    pictures: int = Field(25_600, ge=2)
    """Training pictures, drawn by the seed; the number of the RankMe paper."""
    pairwise: int = Field(10_000, ge=2)
    """Of these, as many for what compares pairs: intrinsic dimension, cluster learnability, uniformity."""


class InvarianceConfig(Section):
    """LiDAR and alignment over crops, flips and colour jitter of training pictures."""

    pictures: int = Field(500, ge=2)
    """Training pictures, drawn by the seed; the paper of LiDAR takes 1000."""
    views: int = Field(10, ge=2)
    """Of each picture; the paper takes 50."""
    scale: float = Field(0.2, gt=0, le=1)
    """Smallest part of a picture's area that a crop shows."""


class LayersConfig(Section):
    """Similarity (debiased linear CKA) between the layers of the network, and with those of random weights."""

    pictures: int = Field(1024, ge=4)
    """Training pictures, drawn by the seed."""


CorruptionName = Literal["gaussian_noise", "gaussian_blur", "jpeg", "brightness", "contrast", "pixelate"]


class CorruptionConfig(Section):
    """Accuracy on corrupted test pictures of a classifier fitted to clean features, after ImageNet-C."""

    corruptions: tuple[CorruptionName, ...] = Field(
        ("gaussian_noise", "gaussian_blur", "jpeg", "brightness"), min_length=1
    )
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((1, 3, 5), min_length=1)
    """From 1 (weak) to 5."""
    pictures: int = Field(1000, ge=1)
    """Test pictures, drawn by the seed."""
    classifier: Literal["knn", "linear"] = "knn"
    """kNN with k = 20, or a linear probe with the default settings of ``evaluate.linear``."""
