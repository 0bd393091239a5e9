"""Fine-tuning's loss, mixing, averaged weights and parameter groups against closed forms."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import one_hot
from torch import Tensor

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.train.optimizer import create_optimizer, parameter_groups, set_learning_rates
from unlabeled.workflows.finetune.classifier import create_classifier_backbone
from unlabeled.workflows.finetune.config import AugmentConfig, FinetuneOptim, ModelConfig
from unlabeled.workflows.finetune.task import Finetune, FinetuneTask

CLASSES = 4
PLAIN = {"crop": (1.0, 1.0), "flip": 0.0, "auto": None, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}


def vit(depth: int = 1) -> Backbone:
    return create_backbone("vit_tiny_patch16_224", size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2)


def resnet() -> Backbone:
    return create_backbone("resnet18", size=16, channels=[8, 8, 8, 8], stem_width=8)


def task(target: Backbone | None = None, **settings: object) -> Finetune:
    torch.manual_seed(0)
    network = create_classifier_backbone(target or vit(), CLASSES, ModelConfig())
    return Finetune(FinetuneTask.model_validate({"classes": CLASSES, **settings}), network).train()


def batch(count: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    return {"image": images, "label": torch.arange(count) % CLASSES}


def test_the_loss_is_smoothed_cross_entropy() -> None:
    made, data = task(smoothing=0.1), batch()
    loss, logs, _ = made(data)
    with torch.no_grad():
        log_p = F.log_softmax(made.backbone.model(made.backbone.normalize(data["image"])), dim=1)
    target = torch.full((8, CLASSES), 0.1 / CLASSES)
    target[torch.arange(8), data["label"]] += 0.9
    assert loss.item() == pytest.approx(-(target * log_p).sum(1).mean().item(), rel=1e-5)
    assert logs["accuracy"].item() == pytest.approx((log_p.argmax(1) == data["label"]).float().mean().item())


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_sum_to_one_and_say_what_is_in_the_image(alphas: dict[str, float]) -> None:
    made = task(augment=PLAIN | alphas, smoothing=0.1)
    labels = torch.tensor([0, 1])
    smooth = one_hot(labels, CLASSES, on_value=0.9 + 0.1 / CLASSES, off_value=0.1 / CLASSES)
    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        drawn = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
        images, targets = made.mixed(drawn, labels)
        assert targets.sum(1) == pytest.approx(torch.ones(2))
        share = 1 - images[0].mean().item()  # of the first image in the first place, by area or by weight
        torch.testing.assert_close(targets[0], share * smooth[0] + (1 - share) * smooth[1], atol=1e-5, rtol=0)
        found.add(round(share, 3))
    assert len(found) > 3


def test_mixing_is_a_function_of_torchs_generator_and_leaves_the_others_alone() -> None:
    made, data = task(augment={"auto": None}, smoothing=0.1), batch()
    drawn = []
    for state in (1, 2):
        np.random.seed(state)
        before = np.random.get_state()[1].copy()
        torch.manual_seed(5)
        drawn.append(made(data).loss.item())
        assert (np.random.get_state()[1] == before).all()
    torch.manual_seed(6)
    assert drawn[0] == drawn[1] != made(data).loss.item()


def test_without_mixing_labels_stay_and_erasing_alone_changes_images() -> None:
    made = task(augment=PLAIN | {"erase": 1.0})
    drawn, labels = torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    images, targets = made.mixed(drawn.clone(), labels)
    assert targets is labels
    assert ((images != 0).flatten(1).any(1)).all()


def test_averaged_weights_are_the_running_mean_of_the_formula() -> None:
    made = task(ema=0.999)
    head = made.backbone.model.fc if hasattr(made.backbone.model, "fc") else made.backbone.model.head
    values, expected = [1.0, 2.0, 5.0, -3.0], None
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            head.weight.fill_(value)
        made.after_step(0.0)
        decay = 0.0 if step == 1 else min(0.999, 1 - step ** (-2 / 3))  # of timm, with its warm-up
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert made.encoder().model.head.weight.unique().tolist() == pytest.approx([expected])
    assert made.encoder() is not made.backbone
    assert task().encoder().model.head.weight.abs().max() < 1e-3


def test_the_count_of_averages_goes_on_after_a_restart() -> None:
    first, second = task(ema=0.999), task(ema=0.999)
    for _ in range(3):
        first.after_step(0.0)
    second.load_state_dict(first.state_dict())
    for made in (first, second):
        with torch.no_grad():
            made.backbone.model.head.weight.fill_(7.0)
        made.after_step(0.0)
    assert torch.equal(first.encoder().model.head.weight, second.encoder().model.head.weight)
    assert int(second.state_dict()["updates"]) == 4


def test_rates_fall_with_depth_as_in_the_papers_and_tokens_do_not_decay() -> None:
    made, config = task(vit(depth=3)), FinetuneOptim(layer_decay=0.5, weight_decay=0.05)
    optimizer = create_optimizer(made, config)
    set_learning_rates(optimizer, lr=1.0, weight_decay=0.05)
    rates, decays = {}, {}
    for group, settings in zip(parameter_groups(made, config), optimizer.param_groups, strict=True):
        for name in group["names"]:
            rates[name], decays[name] = settings["lr"], settings["weight_decay"]
    last = 3 + 1
    for name, rate in rates.items():
        inner = name.removeprefix("backbone.model.")
        layer = 0 if inner.startswith(("cls_", "pos_", "patch_")) else last
        if inner.startswith("blocks."):
            layer = int(inner.split(".")[1]) + 1
        assert rate == pytest.approx(0.5 ** (last - layer)), name
    undecayed = {name for name, decay in decays.items() if decay == 0}
    assert {"backbone.model.pos_embed", "backbone.model.cls_token", "backbone.model.head.bias"} <= undecayed
    assert "backbone.model.head.weight" not in undecayed
    assert all(decays[name] == 0.05 for name in decays if name.endswith("mlp.fc1.weight"))


def test_the_classifier_of_a_network_without_blocks_is_past_the_last_layer() -> None:
    made = task(create_backbone("nin_cifar", size=16))
    layers = {named.name: named.layer for named in made.parameter_groups()}
    heads = {name for name in layers if name.removeprefix("backbone.") in made._head}
    assert heads
    assert {layers[name] for name in heads} == {made.backbone.depth + 1}


def test_frozen_is_softmax_regression_on_fixed_features() -> None:
    made, data = task(resnet(), frozen=True), batch()
    with torch.no_grad():
        made.backbone.model.fc.weight.normal_()
        state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        features = made.backbone.eval().pooled(made.backbone.normalize(data["image"]))
    made.train()
    made(data).loss.backward()
    weight, bias = made.backbone.model.fc.weight, made.backbone.model.fc.bias
    error = F.softmax(features @ weight.T + bias, dim=1) - F.one_hot(data["label"], CLASSES)
    torch.testing.assert_close(weight.grad, error.T @ features / 8, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias.grad, error.mean(0), atol=1e-6, rtol=1e-5)
    assert [named.name for named in made.parameter_groups()] == ["backbone.model.fc.weight", "backbone.model.fc.bias"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())


def test_every_trainable_parameter_gets_a_gradient_and_nothing_else_is_trainable() -> None:
    made = task(vit(depth=2), ema=0.9)
    made(batch()).loss.backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad != name.startswith("ema."), name


def test_views_pickle_and_have_the_networks_size() -> None:
    made = task()
    for augment in (AugmentConfig(), None):
        config = FinetuneTask(classes=CLASSES, augment=augment)
        views = pickle.loads(pickle.dumps(Finetune.views(config, made.backbone)))
        image = views(torch.zeros(3, 40, 25, dtype=torch.uint8))["image"]
        assert image.shape == (3, 16, 16)
        assert image.dtype == torch.uint8
