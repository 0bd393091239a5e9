"""Builds a `Training` that is ready for its first (or next) step from a configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.given import require_given, require_same_weights
from unlabeled.ssl.backbones.weights import load_weights
from unlabeled.ssl.config.schema import BackboneConfig, RunConfig
from unlabeled.ssl.core.plain import counted
from unlabeled.ssl.data.bad import BadImages
from unlabeled.ssl.data.loader import RunSampler, ViewDataset, make_loader
from unlabeled.ssl.data.source import DecodeError, ImageSource
from unlabeled.ssl.nn.batch_norm import synchronize
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.collapse import CollapseAlarm
from unlabeled.ssl.train.curriculum import create_curriculum
from unlabeled.ssl.train.loop import Online, Training
from unlabeled.ssl.train.monitor import Meter, Monitor, Stopwatch
from unlabeled.ssl.train.optimizer import create_optimizer
from unlabeled.ssl.train.run_folder import Plan, write_config
from unlabeled.ssl.train.saver import Saver
from unlabeled.ssl.train.schedule import Schedule, peak_learning_rate

logger = logging.getLogger(__name__)


def assemble(
    config: RunConfig,
    accelerator: Accelerator,
    checkpoint: Path | None,
    plan: Plan,
    *,
    task: PretextTask,
    dataset: ViewDataset,
    online: Online,
) -> Training:
    """Prepares a run of `task` on `dataset`: writes its settings into its folder and restores `checkpoint`, if any."""
    main = accelerator.is_main_process

    # model and optimizer
    curriculum = create_curriculum(config.engine.curriculum, task, plan.total_steps)
    warn_about_small_images(dataset.source, task.backbone)
    set_layout(task, config, accelerator)
    optimizer = create_optimizer(task, config.optim)
    model, optimizer = accelerator.prepare(task, optimizer)

    # run folder and state; no rank may write before all ranks have checked the folder
    accelerator.wait_for_everyone()
    if main:
        write_config(config)
    accelerator.wait_for_everyone()
    saver = create_saver(config, accelerator, plan, model, optimizer)
    meter = Meter()
    start = saver.load(checkpoint, meter) if checkpoint is not None else 0

    # schedule and metrics
    peak = peak_learning_rate(config.optim, config.batch_size)
    schedule = Schedule(config.schedule, peak, plan.steps_per_epoch, plan.total_steps)
    settings = config.model_dump(mode="json")
    monitor = Monitor(config.out, config.log, main=main, start_step=start, total_steps=plan.total_steps, run=settings)
    announce(config, plan, schedule, task, accelerator, start)
    if curriculum is not None and main:
        logger.info("%s", curriculum)
    return Training(
        config=config,
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        curriculum=curriculum,
        batches=iter(open_loader(config, dataset, plan, accelerator, start)),
        bad=BadImages(config.out / "bad_images.jsonl", len(dataset), config.data.max_bad_fraction, write=main),
        meter=meter,
        monitor=monitor,
        saver=saver,
        online=online,
        alarm=CollapseAlarm(task.collapse_remedy),
        start_step=start,
        watch=Stopwatch(),
    )


def create_saver(
    config: RunConfig, accelerator: Accelerator, plan: Plan, model: torch.nn.Module, optimizer: Any
) -> Saver:
    """The Saver of a run, with the interval between checkpoints from the settings."""
    engine = config.engine
    every_steps = engine.checkpoint_steps or max(round(engine.checkpoint_epochs * plan.steps_per_epoch), 1)
    return Saver(
        config.out, accelerator, model=model, optimizer=optimizer, every_steps=every_steps,
        total_steps=plan.total_steps, keep=engine.keep,
    )  # fmt: skip


def build_backbone(config: BackboneConfig, given: Backbone | None = None) -> Backbone:
    """The backbone that `config` describes, with its initial weights; `given` if it was passed from Python."""
    require_given(config, given)
    if given is not None:
        require_same_weights(given)  # each rank created it in its own script
        return given
    backbone = create_backbone(config.name, pretrained=config.pretrained, size=config.size, **config.kwargs)
    if config.checkpoint is not None:
        report = load_weights(backbone, config.checkpoint)
        logger.info("backbone: loaded %d tensors from %s", len(report.loaded), config.checkpoint)
        for what, names in (("not in the file", report.missing), ("not used", report.unexpected)):
            if names:
                logger.info("backbone: %s: %s", what, ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""))
    return backbone


def set_layout(task: PretextTask, config: RunConfig, accelerator: Accelerator) -> None:
    """Applies the memory format, synchronized batch norm and compilation to `task`, in place."""
    wanted = config.engine.channels_last
    convolutional = len({stage.stride for stage in task.backbone.stages}) > 1  # a plain ViT has a single stride
    if wanted or (wanted is None and convolutional and accelerator.device.type == "cuda"):
        task.to(memory_format=torch.channels_last)
    synced = config.engine.sync_bn if config.engine.sync_bn is not None else task.synced_statistics
    # masked statistics already span all ranks (`unlabeled.ssl.backbones.masked`)
    if synced and accelerator.num_processes > 1 and not task.masked_statistics:
        synchronize(task)
    if not task.per_image and config.engine.accumulation > 1:
        logger.warning(
            "engine.accumulation: %s compares the images of a batch; each of %d micro-steps sees only a fraction of it",
            type(task).__name__, config.engine.accumulation,
        )  # fmt: skip
    if config.engine.compile:
        task.compile()


def warn_about_small_images(source: ImageSource, backbone: Backbone) -> None:
    """Logs a warning if the first readable image is smaller than the backbone's input."""
    height, width = backbone.input_size
    for index in range(min(8, len(source))):
        try:
            shape = source.read(index).shape
        except DecodeError:
            continue
        if shape[1] < height or shape[2] < width:
            logger.warning(
                "data: %s is %dx%d, smaller than the backbone's %dx%d, and will be enlarged; see backbone.size",
                source.describe(index), shape[1], shape[2], height, width,
            )  # fmt: skip
        return  # one image is enough: this is a hint, `unlabeled doctor` scans all


def open_loader(config: RunConfig, dataset: ViewDataset, plan: Plan, accelerator: Accelerator, start: int) -> Any:
    """The loader of this rank's batches of views, from step `start` to the end of the run."""
    sampler = RunSampler(
        length=plan.images,
        batch_size=plan.batch_size,
        accumulation=config.engine.accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        seed=config.engine.seed,
        start_step=start,
        total_steps=plan.total_steps,
    )
    return make_loader(dataset, sampler, config.engine.workers, accelerator.device.type == "cuda")


def announce(
    config: RunConfig, plan: Plan, schedule: Schedule, task: PretextTask, accelerator: Accelerator, start: int
) -> None:
    """Logs the length of the run, the batch size, how the peak learning rate was computed, and doubtful schedules."""
    if not accelerator.is_main_process:
        return
    optim = config.optim
    parameters = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    ratio = f"{plan.batch_size}/{optim.lr_batch}"
    factor = {"linear": f" ({optim.lr:g} x {ratio})", "sqrt": f" ({optim.lr:g} x sqrt({ratio}))"}
    rule = factor.get(optim.lr_scaling, "")
    logger.info("%s on %s: %.2f M trainable parameters", type(task).__name__, task.backbone.name, parameters / 1e6)
    shares = _shares(plan.batch_size, accelerator.num_processes, config.engine.accumulation)
    logger.info(
        "%s, %s of %s = %s; batch %s",
        counted(plan.images, "image"), counted(config.epochs, "epoch"), counted(plan.steps_per_epoch, "step"),
        counted(plan.total_steps, "step"), shares,
    )  # fmt: skip
    logger.info(
        "%s, peak lr %.3g%s, %s on %s, out %s",
        optim.name, schedule.peak, rule, config.engine.precision, accelerator.device, config.out,
    )  # fmt: skip
    _warn_about_schedule(config)
    if start >= plan.total_steps:
        logger.info("%s is already finished (%s)", config.out, counted(plan.total_steps, "step"))
    elif start:
        logger.info("resuming after step %d", start)


def _shares(batch: int, processes: int, micro_steps: int) -> str:
    """A batch size and how it is divided: ``64``, or ``64 = 2 processes x 1 micro-step x 32``."""
    if processes == micro_steps == 1:
        return str(batch)
    share = batch // processes // micro_steps
    return f"{batch} = {counted(processes, 'process')} x {counted(micro_steps, 'micro-step')} x {share}"


def _warn_about_schedule(config: RunConfig) -> None:
    """Logs a warning if the learning rate never reaches its peak or never falls."""
    schedule, epochs = config.schedule, config.epochs
    if schedule.warmup_epochs >= epochs > 0:
        logger.warning(
            "schedule.warmup_epochs: %g is not below epochs=%g; the peak is never reached",
            schedule.warmup_epochs,
            epochs,
        )
    late = bool(schedule.milestones) and min(schedule.milestones) >= epochs
    if schedule.name == "multistep" and late and not config.debug:  # debug mode shortens every run
        logger.warning(
            "schedule.milestones: [%s] %s after the last epoch (%g), so the learning rate never falls; "
            "set schedule.name=cosine or other milestones",
            ", ".join(f"{milestone:g}" for milestone in schedule.milestones),
            "lie" if len(schedule.milestones) > 1 else "lies", epochs,
        )  # fmt: skip
