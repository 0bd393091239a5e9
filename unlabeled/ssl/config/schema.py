"""Every setting of a run: its name, type, default, unit and meaning.

`unlabeled.ssl.config.composition` fills these models from the YAML files in ``configs/`` and the words of the command
line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from unlabeled.ssl.config.base import Arguments, Section

Size = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Depth = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...]
"""Blocks of all stages together, or of each stage."""


def _list_of_sizes(value: Any) -> Any:
    pairs = isinstance(value, (list, tuple)) and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in value)
    if value == "all" or (value and pairs):
        return value
    raise ValueError(f"{value} is not possible; give all, or a list of [width, depth] such as [[384,12],[768,12]]")


Sizes = Annotated[
    Literal["all"] | tuple[tuple[Annotated[int, Field(ge=1)], Depth], ...], BeforeValidator(_list_of_sizes)
]
"""Of an elastic network: all of them, or a list of [width, depth]."""
CurriculumName = Literal["efficienttrain", "efficienttrain++"]


class BackboneConfig(Section):
    """Which network is pretrained, and from which weights it starts."""

    name: str = "vit_small_patch16_224"
    """A timm model name (ours, such as ``nin_cifar``, are registered with timm too)."""
    pretrained: bool = False
    """Start from timm's published weights."""
    checkpoint: Path | None = None
    """Start from this file: a run's ``backbone.safetensors``, a run folder, or a timm or safetensors state dict."""
    size: Size | None = None
    """Pixels of the images that the network sees, one number or [height, width]; None: the model's own."""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments for ``timm.create_model``, such as ``{patch_size: 4}``."""
    module: str | None = None
    """Written by a run that was given its network from Python, as an ``nn.Module`` or `Backbone`: the class of that.
    Such a run goes on when it is given again; `name` is ``custom`` unless timm built it."""
    fingerprint: str | None = None
    """Written beside `module`: a hash of its tensors' names and shapes, and of its size, mean and deviation."""


class DataConfig(Section):
    """Where the images come from. Further keys are settings of the source that `name` chooses: its own ``Config``."""

    model_config = ConfigDict(extra="allow")

    name: str = "folder"
    """A data source: built in, or of an installed package."""
    limit: int | None = Field(None, ge=1)
    """Use only this many images, chosen by a fixed shuffle."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """A run stops when more than this part of the data cannot be decoded."""


class OptimConfig(Section):
    """The optimizer (any name that timm knows) and how the learning rate follows the batch."""

    name: str = "adamw"
    lr: float = Field(1.5e-4, gt=0)
    """Base learning rate, for a batch of `lr_batch` images."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """peak = lr x (batch_size / lr_batch), its square root, or lr as it is."""
    lr_batch: int = Field(256, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)
    """Cosine from `weight_decay` to this over the run; None: constant."""
    betas: tuple[float, float] | None = None
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD-like optimizers."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Learning rate of layer i is multiplied by layer_decay^(depth + 1 - i); None: no layer-wise decay."""
    patch_embed_lr: float = Field(1.0, gt=0)
    """Learning rate of the backbone's patch embedding is multiplied by this, on top of `layer_decay` (DINOv2: 0.2)."""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments of the optimizer."""


class ScheduleConfig(Section):
    """The learning rate over the run, set before each optimizer step. See `unlabeled.ssl.train.schedule`."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: float = Field(40.0, ge=0)
    start_lr: float = Field(0.0, ge=0)
    """Where the linear warm-up begins."""
    start_factor: float = Field(0.0, ge=0)
    """Added to `start_lr`: this part of the peak rate."""
    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    min_factor: float = Field(0.0, ge=0)
    """Added to `min_lr`: this part of the peak rate."""
    warmup_in_cosine: bool = False
    """Whether the cosine's length includes the warm-up (SimMIM) or begins after it (MAE)."""
    reach_min: bool = False
    """Whether the last step already has the smallest rate (SparK) or would have it one step later."""
    lag: int = Field(0, ge=0)
    """Step n uses the value of step n - lag (SimMIM's loop: 1)."""
    stretch: float = Field(1.0, gt=0, le=1)
    """The run is this part of its cosines, of weight decay too, which end beyond it (POA: 0.78 for ViT)."""
    per_epoch: bool = False
    """Change the rate only at the start of an epoch once the warm-up is over (OBoW)."""
    milestones: tuple[float, ...] = ()
    """multistep: epochs at which the rate is multiplied by `gamma`."""
    gamma: float = Field(0.1, gt=0)


class EngineConfig(Section):
    """How the run is executed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: int = Field(1, ge=1)
    """Micro-steps per optimizer step; the batch stays `batch_size`."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; None: no clipping."""
    clip_parts: bool = False
    """Clip each child module of the task (backbone, heads) by itself, as DINOv2 and POA do, and not all together."""
    compile: bool = False
    cpu_kernels: bool | None = None
    """CPU: fp32 linear layers through oneDNN and bf16 attention as plain products, instead of what torch chooses; None:
    where that is faster (AMD with AVX-512). Not together with `compile`."""
    channels_last: bool | None = None
    """Memory layout of convolutions; None: channels last for networks of 2-D maps on a GPU."""
    curriculum: CurriculumName | None = None
    """Smaller images, of low frequencies alone, in the first 80 % of the steps (efficienttrain) or for the first 60 %
    of the compute (efficienttrain++). For any task; see `unlabeled.ssl.train.curriculum`."""
    sync_bn: bool | None = None
    """Batch-norm statistics over all processes; None: where the task's authors had it so."""
    seed: int = 0
    workers: int = Field(2, ge=0)
    """Loader processes per process."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per process; None: torch's choice, or the cores shared between the processes of a launcher."""
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_epochs: float = Field(1.0, gt=0)
    """Epochs between checkpoints; the last step always writes one."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, instead of `checkpoint_epochs`."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""

    @model_validator(mode="after")
    def _parts_are_clipped_to_something(self) -> EngineConfig:
        if self.clip_parts and self.clip is None:
            raise ValueError("clip_parts has no effect without clip; set engine.clip, such as 1.5")
        return self


class EvaluateConfig(Section):
    """Evidence: during the run and at its end.

    Beside the fields below it takes a section of each evaluator's name, such as ``knn``, whose settings are the
    evaluator's own: `unlabeled.eval.registry.settle` checks them.
    """

    model_config = ConfigDict(extra="allow")

    every: float = Field(0.0, ge=0)
    """Epochs between online kNN evaluations; 0: none."""
    final: bool = True
    """Evaluate and write the report when the run ends, if there are labels."""
    data: DataConfig | None = None
    """Labeled data; None: the run's own data, with its labels."""
    baselines: bool | tuple[Literal["pixels", "random"], ...] = True
    """Also evaluate raw pixels and the same backbone with random weights; a list takes one of them alone."""
    batch_size: int = Field(256, ge=1)
    limit: int | None = Field(None, ge=1)
    """Largest number of images per split, chosen by a fixed shuffle."""
    recalibrate: Literal["auto"] | bool = "auto"
    """Estimate the running statistics of batch norms anew on whole training images, of the backbone and of its
    baseline with random weights. auto: when the task collected them on masked images."""
    recalibrate_images: int = Field(1024, ge=2)
    """Training images for that estimate, chosen by a fixed shuffle."""
    evaluators: Literal["all"] | tuple[str, ...] = ("knn", "linear")
    """Which evaluators judge the features, by name."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also judge the first so many features, and as many principal components, by every evaluator of pooled features
    (Matryoshka representations)."""
    embedding: str | None = "tsne"
    """Map of the test features in the report: tsne, umap (needs ``umap-learn``) or pca; None: no map."""
    maps: int = Field(6, ge=0)
    """Test images, drawn by seed, on which the report shows what the backbone looks at; 0: none."""


class LogConfig(Section):
    """What is written while the run goes."""

    every: int = Field(10, ge=1)
    """Optimizer steps between lines of ``metrics.jsonl``."""
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases project; None: off."""
    progress: bool = True


class RunConfig(Section):
    """What the engine needs to know of any run."""

    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    out: Path = Path("runs/run")
    """The run folder."""
    epochs: float = Field(100.0, gt=0)
    """Passes over the data."""
    batch_size: int = Field(256, ge=1)
    """Images per optimizer step, over all processes and micro-steps."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in `out`; never: refuse a folder that holds one."""
    debug: bool = False
    """Tiny mode: two epochs of two steps, 64 images, no workers; proves that a command works."""


class PretrainConfig(RunConfig):
    """One pretraining run."""

    task: Arguments = Field(default_factory=lambda: {"name": "mae"})
    """``name`` and the fields of that task's own ``Config``."""
    backbone: BackboneConfig = BackboneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    out: Path = Path("runs/pretrain")
    """The run folder."""
    reference: Path | None = None
    """Start the whole task (backbone, decoder, heads) from this checkpoint of the method's original authors."""

    @model_validator(mode="after")
    def _task_has_a_name(self) -> PretrainConfig:
        if not isinstance(self.task.get("name"), str):
            raise ValueError("task.name is not given; set task=mae, task=rotation, ...")
        return self


class EvaluateRun(Section):
    """``unlabeled evaluate TARGET``: a run folder, a timm name or a weights file, and labeled data."""

    target: str
    """A run folder, a timm model name, or a file of weights (which also needs `backbone.name`)."""
    backbone: BackboneConfig | None = None
    pretrained: bool = True
    """For a timm name: load its published weights."""
    data: DataConfig | None = None
    """Labeled data; None: what the run was evaluated on or pretrained on."""
    evaluate: EvaluateConfig = EvaluateConfig()
    sizes: Sizes | None = None
    """Of an elastic run: also evaluate these of its sizes, each beside random weights, and draw the curve."""
    versus: tuple[Path, ...] = ()
    """With `sizes`: runs of single networks of the same kind, drawn at their size as "trained alone"."""
    out: Path | None = None
    """Where the report goes; None: ``report/`` in the run folder, else ``reports/<target>``."""
    device: Literal["auto", "cpu"] = "auto"
    workers: int = Field(2, ge=0)
    seed: int = 0


class DoctorRun(Section):
    """``unlabeled doctor data=...``: scan a data source before anyone spends a GPU hour."""

    data: DataConfig = DataConfig()
    limit: int | None = Field(None, ge=1)
    """Scan only this many images; None: all."""
    workers: int = Field(2, ge=0)


class ExportRun(Section):
    """``unlabeled export RUN``: a run's network, or sub-networks of an elastic one, as files that timm loads.

    Without `width`, `like` and `sizes` it is the whole network.
    """

    run: Path
    """The run folder, or another exported backbone."""
    out: Path
    """A name that ends in ``.safetensors``, or a folder; with `sizes` a folder."""
    width: int | None = Field(None, ge=1)
    """With `depth`: the size that is wanted (``unlabeled sizes RUN`` lists them)."""
    depth: Depth | None = None
    sizes: Sizes | None = None
    """Several sizes, one file each."""
    like: str | None = None
    """The size of this timm model, in a file that it loads, such as ``vit_small_patch16_224``."""
    recalibrate: bool = True
    """Where a sub-network has batch norms: estimate their running statistics, which belong to one size alone."""
    recalibrate_images: int = Field(1024, ge=2)
    """Training images for that estimate, chosen by a fixed shuffle; labels are not needed."""
    data: DataConfig | None = None
    """Images for that estimate; None: those of the run."""
    batch_size: int = Field(256, ge=1)
    device: Literal["auto", "cpu"] = "auto"
    workers: int = Field(2, ge=0)
