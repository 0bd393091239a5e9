"""From a configuration to a `Training` that is ready for its first (or next) step."""

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
from unlabeled.ssl.train.schedule import Schedule, peak_rate

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
    """A run of `task` on `dataset`, restored from `checkpoint` if there is one; its settings are in its folder then."""
    main = accelerator.is_main_process
    curriculum = create_curriculum(config.engine.curriculum, task, plan.total_steps)
    warn_of_small_images(dataset.source, task.backbone)
    set_layout(task, config, accelerator)
    optimizer = create_optimizer(task, config.optim)
    model, optimizer = accelerator.prepare(task, optimizer)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if main:
        write_config(config)
    accelerator.wait_for_everyone()
    saver = create_saver(config, accelerator, plan, model, optimizer)
    meter = Meter()
    start = saver.load(checkpoint, meter) if checkpoint is not None else 0
    peak = peak_rate(config.optim, config.batch_size)
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
    """What writes the checkpoints, at the distance that the settings say."""
    engine = config.engine
    every_steps = engine.checkpoint_steps or max(round(engine.checkpoint_epochs * plan.steps_per_epoch), 1)
    return Saver(
        config.out, accelerator, model=model, optimizer=optimizer, every_steps=every_steps,
        total_steps=plan.total_steps, keep=engine.keep,
    )  # fmt: skip


def build_backbone(config: BackboneConfig, given: Backbone | None = None) -> Backbone:
    """The network that `config` names, with the weights that it asks for; `given`, where it comes from Python."""
    require_given(config, given)
    if given is not None:
        require_same_weights(given)
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
    """Memory format, synchronized batch norm, compilation."""
    wanted = config.engine.channels_last
    convolutional = len({stage.stride for stage in task.backbone.stages}) > 1
    if wanted or (wanted is None and convolutional and accelerator.device.type == "cuda"):
        task.to(memory_format=torch.channels_last)
    synced = config.engine.sync_bn if config.engine.sync_bn is not None else task.synced_statistics
    if synced and accelerator.num_processes > 1 and not task.masked_statistics:  # masked ones span all ranks anyway
        synchronize(task)
    if not task.per_image and config.engine.accumulation > 1:
        logger.warning(
            "engine.accumulation: %s compares the images of a batch; each of %d micro-steps has only a part of it",
            type(task).__name__, config.engine.accumulation,
        )  # fmt: skip
    if config.engine.compile:
        task.compile()


def warn_of_small_images(source: ImageSource, backbone: Backbone) -> None:
    """One line when the first readable images are smaller than what the network sees."""
    height, width = backbone.input_size
    for index in range(min(8, len(source))):
        try:
            shape = source.read(index).shape
        except DecodeError:
            continue
        if shape[1] < height or shape[2] < width:
            logger.warning(
                "data: %s is %dx%d, smaller than the network's %dx%d, and will be enlarged; see backbone.size",
                source.describe(index), shape[1], shape[2], height, width,
            )  # fmt: skip
        return


def open_loader(config: RunConfig, dataset: ViewDataset, plan: Plan, accelerator: Accelerator, start: int) -> Any:
    """Batches of views of this rank, from step `start` to the end of the run."""
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
    """Says what is about to happen, the learning-rate rule included."""
    if not accelerator.is_main_process:
        return
    optim = config.optim
    parameters = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    rule = {"linear": f"{optim.lr:g} x {plan.batch_size}/{optim.lr_batch}", "none": f"{optim.lr:g}, not scaled"}.get(
        optim.lr_scaling, f"{optim.lr:g} x sqrt({plan.batch_size}/{optim.lr_batch})"
    )
    logger.info("%s on %s: %.2f M trainable parameters", type(task).__name__, task.backbone.name, parameters / 1e6)
    logger.info(
        "%d images, %g epochs of %d steps = %d steps; batch %d = %d processes x %d micro-steps x %d",
        plan.images, config.epochs, plan.steps_per_epoch, plan.total_steps, plan.batch_size, accelerator.num_processes,
        config.engine.accumulation, plan.batch_size // accelerator.num_processes // config.engine.accumulation,
    )  # fmt: skip
    logger.info(
        "%s, peak lr %.3g (%s), %s on %s, out %s",
        optim.name, schedule.peak, rule, config.engine.precision, accelerator.device, config.out,
    )  # fmt: skip
    if config.schedule.warmup_epochs >= config.epochs > 0:
        logger.warning(
            "schedule.warmup_epochs: %g is not below epochs=%g; the peak is never reached",
            config.schedule.warmup_epochs,
            config.epochs,
        )
    if start:
        logger.info("resuming after step %d", start)
