"""Every task under a curriculum: it learns from smaller images, or the run is refused before it begins."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_tasks import SMALL

from unlabeled.pretext.registry import create_task, task_class
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.task import PretextTask
from unlabeled.ssl.train.curriculum import as_floats, create_curriculum
from unlabeled.testing import views_batch
from unlabeled.testing.case import tiny_backbone


def tiny_task_of_any_size(name: str) -> PretextTask:
    """The task of the contract tests, on a network of twice the size that takes others where it can."""
    plain = tiny_backbone(task_class(name))
    arguments = {key: value for key, value in plain.kwargs.items() if key not in {"num_classes", "img_size"}}
    if "dynamic_img_size" in inspect.signature(type(plain.model).__init__).parameters:
        arguments["dynamic_img_size"] = True
    height, width = plain.input_size
    return create_task(
        {"name": name, **SMALL.get(name, {})}, create_backbone(plain.name, size=(2 * height, 2 * width), **arguments)
    )


def test_smaller_images_train_the_same_parameters(name: str) -> None:
    torch.manual_seed(0)
    task = tiny_task_of_any_size(name)
    whole = views_batch(task)
    try:
        curriculum = create_curriculum("efficienttrain", task, 10)
        assert curriculum is not None
        batches = [curriculum.apply(whole, stage.first) for stage in curriculum.stages[:-1]]
    except ConfigError as error:
        pytest.skip(str(error))
    for stage, batch in zip(curriculum.stages, batches, strict=False):
        assert any(tensor.shape[-2:] == stage.size for tensor in batch.values())
        task.zero_grad()
        output = task(batch, **task.draw(batch))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert output.loss.dtype == torch.float32
        without = [n for n, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not without


def test_floating_images_mean_what_the_task_says(name: str) -> None:
    """The loss is that of the same images as bytes."""
    torch.manual_seed(0)
    task = tiny_task_of_any_size(name)
    if task.size_step() is None:
        pytest.skip("its images are never made smaller")
    batch = views_batch(task)
    floats = {key: as_floats(task, one.float()) if one.dtype == torch.uint8 else one for key, one in batch.items()}
    draw = task.draw(batch)
    losses = []
    for images in (batch, floats):
        torch.manual_seed(7)
        losses.append(task(images, **draw).loss)
    assert torch.allclose(*losses, rtol=1e-5)
