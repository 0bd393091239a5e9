"""What every pretext task must keep to. A new task is tested here by being registered."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_tasks import pictures, tiny_task, views_batch

from unlabeled.pretext.base import PretextTask
from unlabeled.pretext.registry import task_class, task_config
from unlabeled.ssl.errors import CheckpointError, ConfigError
from unlabeled.ssl.export import export_backbone


def test_loss_is_a_finite_scalar_in_float32_and_logs_are_detached(task: PretextTask) -> None:
    output = task(views_batch(task))
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert all(value.ndim == 0 and not value.requires_grad for value in output.logs.values())


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(task: PretextTask) -> None:
    task(views_batch(task)).loss.backward()
    without = [name for name, p in task.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    frozen = [name for name, p in task.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not without
    assert not frozen


def test_parameter_groups_name_every_trainable_parameter_once(task: PretextTask) -> None:
    groups = list(task.parameter_groups())
    assert [g.name for g in groups] == [name for name, p in task.named_parameters() if p.requires_grad]
    assert len({id(g.parameter) for g in groups}) == len(groups)
    assert {g.layer for g in groups} <= set(range(task.encoder().depth + 2))


def test_the_same_seed_gives_the_same_loss_and_draws_can_be_passed_in(task: PretextTask) -> None:
    batch = views_batch(task)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(task(batch).loss)
    assert torch.equal(*losses)
    draw = task.draw(batch)
    assert torch.equal(task(batch, **draw).loss, task(batch, **draw).loss)
    assert {len(value) for value in draw.values()} <= {len(value) for value in batch.values()}


def test_state_dict_round_trips(name: str, task: PretextTask) -> None:
    batch = views_batch(task)
    draw = task.draw(batch)
    other = tiny_task(name)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(task.state_dict())
    assert torch.equal(other(batch, **draw).loss, task(batch, **draw).loss)


def test_halves_of_a_batch_add_up_to_the_whole(task: PretextTask) -> None:
    """Gradient accumulation: the mean of two half batches is the whole batch, in loss and gradient (1e-6).

    Batch norms, which see the batch in training, take their stored statistics here. A task whose pictures are compared
    with each other says so.
    """
    if not task.per_picture:
        pytest.skip("the loss compares the pictures of a batch")
    task.double()
    for module in task.modules():
        module.training &= not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    batch = views_batch(task)
    draw = task.draw(batch)

    def run(rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        task.zero_grad()
        loss = task({k: v[rows] for k, v in batch.items()}, **{k: v[rows] for k, v in draw.items()}).loss
        loss.backward()
        return loss.detach(), {k: p.grad.clone() for k, p in task.named_parameters() if p.grad is not None}

    (whole, whole_grads), (first, first_grads), (second, second_grads) = (
        run(s) for s in (slice(0, 4), slice(0, 2), slice(2, 4))
    )
    assert abs((first + second) / 2 - whole) < 1e-6
    for key, gradient in whole_grads.items():
        half = (first_grads[key] + second_grads[key]) / 2
        assert (half - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), key


def test_bf16_autocast_gives_a_finite_loss_close_to_fp32(task: PretextTask) -> None:
    batch = views_batch(task)
    draw = task.draw(batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = task(batch, **draw).loss.float()
    assert torch.isfinite(low)
    assert abs(low - task(batch, **draw).loss) < 0.05


def test_views_pickle_and_give_fixed_shapes_for_any_picture(task: PretextTask) -> None:
    views = pickle.loads(pickle.dumps(type(task).views(task.config, task.backbone)))
    shapes = [{key: (value.shape, value.dtype) for key, value in views(picture).items()} for picture in pictures()]
    assert all(shape == shapes[0] for shape in shapes)
    seen = [shape[-3:] for shape, dtype in shapes[0].values() if dtype == torch.uint8]
    assert seen, "pictures travel as uint8"
    assert all(shape[0] == 3 for shape in seen)


def test_the_exported_encoder_loads_into_timm_strictly(task: PretextTask, tmp_path: Path) -> None:
    encoder = task.encoder().eval()
    export_backbone(encoder, tmp_path)
    plain = timm.create_model(encoder.name, **encoder.kwargs).eval()
    plain.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    x = torch.randn(2, 3, *encoder.input_size)
    assert encoder.pooled(x).shape == (2, encoder.embed_dim)
    assert torch.equal(plain.forward_head(plain.forward_features(x), pre_logits=True).flatten(1), encoder.pooled(x))


def test_visualize_gives_pictures(task: PretextTask) -> None:
    found = task.visualize(views_batch(task))
    assert found
    assert all(p.dtype == torch.uint8 and p.ndim == 3 and p.shape[0] == 3 for p in found.values())


def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"task.no_such_field: there is no such setting in task"):
        task_config({"name": name, "no_such_field": 1})


def test_a_foreign_checkpoint_is_refused(task: PretextTask) -> None:
    with pytest.raises(CheckpointError):
        task.load_official({"something.else": torch.zeros(1)})


def test_every_setting_and_every_task_is_documented(name: str) -> None:
    cls = task_class(name)
    assert (cls.__doc__ or "").strip()
    assert (cls.Config.__doc__ or "").strip()
