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
    """The network to pretrain and the weights that it starts from."""

    name: str = "vit_small_patch16_224"
    """Name of a timm model; see timm.list_models(). unlabeled adds a few, such as nin_cifar and contextnet."""
    pretrained: bool = False
    """Start from timm's published weights instead of random ones."""
    checkpoint: Path | None = None
    """Start from the weights in this file: a run folder, its backbone.safetensors, or a state dict saved by timm,
    PyTorch or safetensors."""
    size: Size | None = None
    """Side of the images that the network receives, one number or [height, width]; null: the model's own. [pixels]"""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments of timm.create_model, such as {patch_size: 4}."""
    module: str | None = None
    """Written by a run whose backbone was passed from Python: the class of that module. To resume such a run, pass the
    module again."""
    fingerprint: str | None = None
    """Written next to `module`: a hash of the names and shapes of its tensors, its size, mean and deviation."""


class DataConfig(Section):
    """Where the images come from. The other settings depend on the source that `name` chooses."""

    model_config = ConfigDict(extra="allow")

    name: str = "folder"
    """Data source, built in or from an installed package; `unlabeled settings` lists them."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many images per split, chosen by a fixed shuffle; null: all. [images]"""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Stop the run if more than this fraction of the images cannot be decoded. [fraction]"""


class OptimConfig(Section):
    """The optimizer, and how the learning rate scales with the batch size."""

    name: str = "adamw"
    """Optimizer: any name that timm.optim.create_optimizer_v2 accepts, such as adamw, lars, lamb or sgd."""
    lr: float = Field(1.5e-4, gt=0)
    """Base learning rate, for a batch of `lr_batch` images; see `lr_scaling`."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the peak learning rate follows from `lr`. linear: lr * batch_size / lr_batch. sqrt: lr * sqrt(batch_size /
    lr_batch). none: lr."""
    lr_batch: int = Field(256, ge=1)
    """Batch size that `lr` is meant for. [images]"""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay. Most tasks do not apply it to biases and norm layers."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Move the weight decay to this value over the run along a half cosine; null: keep it constant."""
    betas: tuple[float, float] | None = None
    """Adam's decay rates of the running means of gradients and of squared gradients; null: the optimizer's own."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Multiply the learning rate of layer i by layer_decay^(depth + 1 - i), so that early layers learn more slowly;
    null: one rate for all layers."""
    patch_embed_lr: float = Field(1.0, gt=0)
    """Multiply the learning rate of the patch embedding by this, on top of `layer_decay` (DINOv2: 0.2)."""
    kwargs: Arguments = Field(default_factory=dict)
    """Further arguments of the optimizer, such as {eps: 1e-6}."""


class ScheduleConfig(Section):
    """The learning rate over the run: a linear warmup, then a cosine, steps, or a constant."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    """Shape after the warmup. cosine: down to `min_lr`. multistep: multiplied by `gamma` at each of `milestones`.
    constant: unchanged."""
    warmup_epochs: float = Field(40.0, ge=0)
    """Length of the linear warmup. [epochs]"""
    start_lr: float = Field(0.0, ge=0)
    """Learning rate at the start of the warmup."""
    start_factor: float = Field(0.0, ge=0)
    """Fraction of the peak learning rate that is added to `start_lr`. [fraction]"""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    min_factor: float = Field(0.0, ge=0)
    """Fraction of the peak learning rate that is added to `min_lr`. [fraction]"""
    warmup_in_cosine: bool = False
    """Whether the cosine spans the warmup too (as in SimMIM) or starts after it (as in MAE)."""
    reach_min: bool = False
    """Whether the last step uses the smallest learning rate (as in SparK) or would reach it one step later."""
    lag: int = Field(0, ge=0)
    """Delay of the schedule: step n uses the value of step n - lag (SimMIM's code: 1). [steps]"""
    stretch: float = Field(1.0, gt=0, le=1)
    """Fraction of the cosines of learning rate and weight decay that the run covers; below 1 it stops before they end
    (POA: 0.78 for ViTs). [fraction]"""
    per_epoch: bool = False
    """After the warmup, change the learning rate only at the start of each epoch (as in OBoW)."""
    milestones: tuple[float, ...] = ()
    """For multistep: when the learning rate is multiplied by `gamma`. [epochs]"""
    gamma: float = Field(0.1, gt=0)
    """For multistep: factor of the learning rate at each milestone."""


class EngineConfig(Section):
    """How the run is executed: precision, memory, devices, checkpoints."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numeric precision of the forward and backward pass. bf16 suits recent GPUs; fp16 scales the loss."""
    accumulation: int = Field(1, ge=1)
    """Micro-steps per optimizer step: gradients are summed over that many smaller batches, and `batch_size` stays the
    same. [micro-steps]"""
    clip: float | None = Field(None, gt=0)
    """Clip gradients to this norm; null: no clipping."""
    clip_parts: bool = False
    """Clip each submodule of the task (backbone, each head) separately, as DINOv2 and POA do, instead of all
    together."""
    compile: bool = False
    """Compile the task with torch.compile."""
    cpu_kernels: bool | None = None
    """On the CPU: run fp32 linear layers through oneDNN and bf16 attention as plain matrix products. null: where that
    is faster (AMD processors with AVX-512). Cannot be combined with `compile`."""
    channels_last: bool | None = None
    """Store convolution inputs with channels last; null: for convolutional networks on a GPU."""
    curriculum: CurriculumName | None = None
    """Train on smaller, low-frequency images first: for the first 80 % of the steps (efficienttrain) or the first
    60 % of the compute (efficienttrain++). Works with any task; null: whole images throughout."""
    sync_bn: bool | None = None
    """Compute batch-norm statistics over all processes; null: as the task's authors did."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    workers: int = Field(2, ge=0)
    """Processes that load images, for each training process; 0 loads them in the training process itself.
    [processes]"""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; null: PyTorch's choice, or the cores divided among the processes of a launcher.
    [threads]"""
    device: Literal["auto", "cpu"] = "auto"
    """Where networks run. auto: on the GPU if there is one."""
    checkpoint_epochs: float = Field(1.0, gt=0)
    """Time between checkpoints; the last step always writes one. [epochs]"""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, in place of `checkpoint_epochs`. [steps]"""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep. [checkpoints]"""

    @model_validator(mode="after")
    def _parts_are_clipped_to_something(self) -> EngineConfig:
        if self.clip_parts and self.clip is None:
            raise ValueError("clip_parts has no effect without clip; set engine.clip, such as 1.5")
        return self


class EvaluateConfig(Section):
    """How the features are evaluated, during the run and at its end.

    Each evaluator adds a section of its own name, such as ``knn``, which `unlabeled.eval.registry.settle` checks.
    """

    model_config = ConfigDict(extra="allow")

    every: float = Field(0.0, ge=0)
    """Time between kNN evaluations during the run; 0: none. [epochs]"""
    final: bool = True
    """Evaluate and write the report when the run ends, provided that there are labels."""
    data: DataConfig | None = None
    """Labeled data to evaluate on; null: the run's own data with its labels."""
    baselines: bool | tuple[Literal["pixels", "random"], ...] = True
    """Also evaluate raw pixels and the same backbone with random weights. A list chooses among them, such as
    [random]."""
    batch_size: int = Field(256, ge=1)
    """Images per batch when features are extracted. [images]"""
    limit: int | None = Field(None, ge=1)
    """Use at most this many images per split, chosen by a fixed shuffle; null: all. [images]"""
    recalibrate: Literal["auto"] | bool = "auto"
    """Recompute the running statistics of batch norms on unmasked training images. auto: if the task collected them on
    masked images."""
    recalibrate_images: int = Field(1024, ge=2)
    """Training images for `recalibrate`, chosen by a fixed shuffle. [images]"""
    evaluators: Literal["all"] | tuple[str, ...] = ("knn", "linear")
    """Evaluators to run, by name, such as [knn,linear,cluster]; all: every one."""
    prefixes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Also evaluate the first n features, and as many principal components, for each n in this list (Matryoshka
    representations). [features]"""
    embedding: str | None = "tsne"
    """Two-dimensional map of the test features in the report: tsne, pca, or umap (needs the package umap-learn); null:
    no map."""
    maps: int = Field(6, ge=0)
    """Test images for which the report shows what the backbone attends to; 0: none. [images]"""


class LogConfig(Section):
    """What is written during the run."""

    every: int = Field(10, ge=1)
    """Optimizer steps between two lines of metrics.jsonl. [steps]"""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: str | None = None
    """Project on Weights & Biases to log to; null: do not log there."""
    progress: bool = True
    """Show a progress bar in the terminal."""


class RunConfig(Section):
    """Settings of any training run that belong to no group."""

    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    out: Path = Path("runs/run")
    """Run folder."""
    epochs: float = Field(100.0, gt=0)
    """Length of the run, in passes over the data. [epochs]"""
    batch_size: int = Field(256, ge=1)
    """Images per optimizer step, summed over all processes and micro-steps. [images]"""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in `out`. never: refuse a folder that holds a checkpoint."""
    debug: bool = False
    """Tiny mode: two epochs of two steps on 64 images, to check that a command works."""


class PretrainConfig(RunConfig):
    """Pretrains a backbone on images without labels."""

    task: Arguments = Field(default_factory=lambda: {"name": "mae"})
    """Pretext task. task=NAME chooses it together with its recipe; task.FIELD=VALUE changes one of its settings. See:
    unlabeled settings task=NAME"""
    backbone: BackboneConfig = BackboneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    out: Path = Path("runs/pretrain")
    """Run folder."""
    reference: Path | None = None
    """Start the whole task (backbone, decoder, heads) from a checkpoint of the method's authors."""

    @model_validator(mode="after")
    def _task_has_a_name(self) -> PretrainConfig:
        if not isinstance(self.task.get("name"), str):
            raise ValueError("task.name is not given; set task=mae, task=rotation, ...")
        return self


class EvaluateRun(Section):
    """Evaluates a run, a timm model or a weights file on labeled data."""

    target: str
    """What to evaluate: a run folder, the name of a timm model, or a weights file (which also needs backbone.name).
    Typed without target=."""
    backbone: BackboneConfig | None = None
    """For a weights file: the network that the weights belong to."""
    pretrained: bool = True
    """For a timm name: load its published weights."""
    data: DataConfig | None = None
    """Labeled data to evaluate on; null: the data that the run was evaluated on or pretrained on."""
    evaluate: EvaluateConfig = EvaluateConfig()
    sizes: Sizes | None = None
    """For an elastic run: also evaluate these of its sizes, each with a baseline of random weights, and draw accuracy
    over size. all, or a list of [width, depth]."""
    versus: tuple[Path, ...] = ()
    """With `sizes`: runs of fixed-size networks of the same kind, drawn in the same figure as "trained alone"."""
    out: Path | None = None
    """Folder of the report; null: report/ in the run folder, or reports/TARGET."""
    device: Literal["auto", "cpu"] = "auto"
    """Where networks run. auto: on the GPU if there is one."""
    workers: int = Field(2, ge=0)
    """Processes that load images; 0 loads them in the main process. [processes]"""
    seed: int = 0
    """Seed of everything that is drawn, such as random weights and hold-outs."""


class DoctorRun(Section):
    """Scans a data source before you spend GPU hours on it."""

    data: DataConfig = DataConfig()
    """Data to scan."""
    limit: int | None = Field(None, ge=1)
    """Scan at most this many images; null: all. [images]"""
    workers: int = Field(2, ge=0)
    """Processes that decode images; 0 decodes them in the main process. [processes]"""


class ExportRun(Section):
    """Writes the network of a run, or sub-networks of an elastic run, as files that timm loads.

    Without `width`, `like` and `sizes` it is the whole network.
    """

    run: Path
    """Run folder, or another exported backbone. Typed without run=."""
    out: Path
    """File to write, with the ending .safetensors, or a folder; with `sizes` a folder."""
    width: int | None = Field(None, ge=1)
    """For an elastic run, with `depth`: width of the sub-network; `unlabeled sizes RUN` lists them. [channels]"""
    depth: Depth | None = None
    """With `width`: depth of the sub-network, in blocks, or in blocks of each stage. [blocks]"""
    sizes: Sizes | None = None
    """For an elastic run: export several sizes, one file each. all, or a list of [width, depth]."""
    like: str | None = None
    """For an elastic run: export the size of this timm model, such as vit_small_patch16_224, in a file that it
    loads."""
    recalibrate: bool = True
    """Recompute the running statistics of a sub-network's batch norms, which differ between sizes."""
    recalibrate_images: int = Field(1024, ge=2)
    """Training images for `recalibrate`, chosen by a fixed shuffle; labels are not needed. [images]"""
    data: DataConfig | None = None
    """Images for `recalibrate`; null: those of the run."""
    batch_size: int = Field(256, ge=1)
    """Images per batch for `recalibrate`. [images]"""
    device: Literal["auto", "cpu"] = "auto"
    """Where networks run. auto: on the GPU if there is one."""
    workers: int = Field(2, ge=0)
    """Processes that load images; 0 loads them in the main process. [processes]"""
