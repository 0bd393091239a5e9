"""OBoW against the authors' implementation, with one level and one kind of crop and with two of each."""

from __future__ import annotations

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from unlabeled.pretext.common.teacher import cosine_momentum
from unlabeled.pretext.obow import OBoW, OBoWConfig
from unlabeled.pretext.obow.reference import reference_names
from unlabeled.pretext.obow.task import bow_logits, bow_loss
from unlabeled.pretext.obow.vocabulary import (
    Distances,
    inner_map,
    perplexity,
    pick_words,
    squared_distances,
    window_of,
)
from unlabeled.ssl.backbones.backbone import Backbone

RESULT, GRADIENT, LOSS, MOMENTUM = 1e-4, 3e-4, 5e-5, 1e-6
BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
COUNTERS = {"_alpha", "_iteration"}
"""Of the authors' momentum, which here is a function of the progress."""


@pytest.fixture(scope="module", params=["obow_single", "obow_two"])
def pair(golden, request):
    return golden(request.param)


def network(config) -> Backbone:
    channels, depths = tuple(config["stage_channels"]), tuple(config["stage_depths"])
    model = ResNet(BLOCKS[config["block"]], depths, channels=channels, num_classes=0)
    first, stem = model.layer1[0], config["stem_channels"]
    width, kernel = first.conv1.out_channels, first.conv1.kernel_size
    model.conv1, model.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
    first.conv1 = nn.Conv2d(stem, width, kernel, padding=kernel[0] // 2, bias=False)
    out = width * first.expansion
    shortcut = nn.Sequential(nn.Conv2d(stem, out, 1, bias=False), nn.BatchNorm2d(out))
    first.downsample = None if stem == out else shortcut
    backbone = Backbone(model, size=(config["image_size"], config["image_size"]))
    backbone.set_statistics((0.0,) * 3, (1.0,) * 3)  # the pair's images are normalised already
    return backbone


def kinds(pair) -> dict[str, dict[str, int]]:
    """Settings of each kind of student view; the second kind is what our patches are."""
    names = ("image_crops", "patches")[: len(pair.config["crop_sizes"])]
    numbers = zip(pair.config["crops_per_image"], pair.config["crop_sizes"], strict=True)
    return {name: {"number": n, "size": size} for name, (n, size) in zip(names, numbers, strict=True)}


def build(pair) -> OBoW:
    """The task with the pair's state, its teacher moved to where it stands in the pair's step."""
    config = pair.config
    task = OBoW(
        OBoWConfig(
            levels=tuple(int(name.removeprefix("block")) for name in config["levels"]),  # the stem has map 0
            words=config["words"],
            kappa=config["kappa"],
            beta=config["inverse_delta"],
            pool=config["code_pool"],
            momentum=config["base_momentum"],
            distance_decay=config["distance_decay"],
            **({"patches": {"number": 0}} | kinds(pair)),
        ),
        network(config),
    )
    missing, unexpected = task.load_reference(pair.group("state"))
    assert missing == []
    assert set(unexpected) == COUNTERS
    task.train().after_step(config["step"] / config["total_steps"])
    return task


def inputs(pair) -> tuple[dict[str, Tensor], Tensor]:
    """The batch, and the recorded places as positions in [0, 1)."""
    images = pair["input/image"]
    batch = {"image": images}
    for number, (key, kind) in enumerate(zip(("crops", "patches"), kinds(pair).values(), strict=False)):
        batch[key] = pair[f"input/crops{number}"].unflatten(0, (len(images), kind["number"]))
    positions = []
    for level, name in enumerate(pair.config["levels"]):
        side = images.shape[-1] // (16 if name == "block3" else 32) - 2 - 2  # border, 3x3 average
        positions.append((pair[f"input/queue_index_level{level}"] + 0.5) / side**2)
    return batch, torch.stack(positions, 1)


def check_loss(pair, name: str, loss: Tensor) -> None:
    for expected in (pair[name].item(), pair.meta["losses_float64"].get(name, pair[name].item())):
        assert abs(loss.item() - expected) <= LOSS * max(1, abs(expected)), name


def test_settings_of_the_pair_are_ours(pair):
    task = build(pair)
    norms = [module for module in task.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {norm.eps for norm in norms} == {pair.config["batch_norm_eps"]}
    assert {norm.momentum for norm in norms} == {pair.config["batch_norm_momentum"]}
    assert {task.vocabularies[level].pointer.item() for level in range(len(task.levels))} == set(pair.config["pointer"])
    assert task.scale.tolist() == [pair.config["kappa"]] * len(task.levels)
    assert not task.vocabularies[0].fill
    assert not task.map_norm


@torch.no_grad()
def test_teacher_targets_and_new_words(pair):
    task = build(pair)
    batch, position = inputs(pair)
    raw = task.teacher.maps(task.backbone.normalize(batch["image"]), task.levels)
    for level, whole in enumerate(raw):
        pair.assert_close(f"expect/teacher_features_level{level}", whole, RESULT)
        maps = inner_map(whole)
        words = task.vocabularies[level].words
        cells = maps.flatten(2).transpose(1, 2)
        distances = squared_distances(cells, words)
        expected = pair[f"expect/squared_distance_level{level}"]
        assert expected.shape[-2:] == maps.shape[-2:]
        pair.assert_close(
            f"expect/squared_distance_level{level}", distances.transpose(1, 2).view(expected.shape), RESULT
        )
        nearest = Distances(cells, words, 1).mean_nearest()
        pair.assert_close(f"expect/mean_min_distance_level{level}", nearest, RESULT)
        sharpness = task.config.beta / task.vocabularies[level].moved_distance(nearest.view(1))
        codes = (-sharpness * distances).softmax(-1).transpose(1, 2)
        pair.assert_close(f"expect/codes_level{level}", codes.reshape(expected.shape), RESULT)
        used, bags, update = task.assign(level, maps, position[:, level])
        assert torch.equal(used, words)
        assert torch.allclose(update.nearest, nearest)
        pair.assert_close(f"expect/bow_target_level{level}", bags, RESULT)
        pair.assert_close(f"expect/perplexity_batch_level{level}", perplexity(bags.mean(0)), RESULT)
        pair.assert_close(f"expect/perplexity_image_level{level}", perplexity(bags).mean(), RESULT)
        rows = pick_words(maps, position[:, level], window_of(maps, "local"))
        pair.assert_close(f"expect/queue_rows_level{level}", rows, RESULT)
        assert torch.equal(update.words, rows)


@torch.no_grad()
def test_student_and_predictions(pair):
    task = build(pair)
    batch, _ = inputs(pair)
    weights = [head(vocabulary.words) for head, vocabulary in zip(task.heads, task.vocabularies, strict=True)]
    for level, one in enumerate(weights):
        pair.assert_close(f"expect/word_weights_level{level}", one, RESULT)
    for number, kind in enumerate(key for key in ("crops", "patches") if key in batch):
        features = task.student(batch[kind])
        pair.assert_close(f"expect/student_features_crops{number}", features.flatten(0, 1), RESULT)
        losses = []
        for level, one in enumerate(weights):
            logits = bow_logits(features, one, task.scale[level])
            pair.assert_close(f"expect/logits_crops{number}_level{level}", logits.flatten(0, 1), RESULT)
            losses.append(bow_loss(logits, pair[f"expect/bow_target_level{level}"]))
        check_loss(pair, f"expect/loss_crops{number}", torch.stack(losses).mean())


def test_loss_gradients_and_what_the_step_leaves(pair):
    task = build(pair)
    batch, position = inputs(pair)
    names = reference_names(task.state_dict())
    output = task(batch, position=position)
    check_loss(pair, "expect/loss", output.loss)
    for number, kind in enumerate(key for key in ("crops", "patches") if key in batch):
        check_loss(pair, f"expect/loss_crops{number}", output.logs[f"loss_{kind}"])
    output.loss.backward()
    parameters = dict(task.named_parameters())
    for name in pair.group("grad"):
        pair.assert_close(f"grad/{name}", parameters[names[name]].grad, GRADIENT)
    teacher = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task.after_step((pair.config["step"] + 1) / pair.config["total_steps"])
    state = task.state_dict() | {f"teacher.{name}": value for name, value in teacher.items()}  # as the step used it
    for name in set(pair.group("after")) - COUNTERS:
        limit = MOMENTUM if "teacher" in name and "running" not in name else RESULT
        pair.assert_close(f"after/{name}", state[names[name]], limit)
    for level, vocabulary in enumerate(task.vocabularies):
        reference = f"bow_extractor.bow_extractor.{level}._embedding"
        before, after = pair[f"state/{reference}"], pair[f"after/{reference}"]
        kept = (before == after).all(1)
        assert kept.sum() == len(before) - len(batch["image"])
        assert torch.equal(vocabulary.words[kept], before[kept])


def test_momentum(pair):
    progress = pair.config["step"] / pair.config["total_steps"]
    momentum = cosine_momentum(pair.config["base_momentum"], 1.0, progress)
    assert momentum == pytest.approx(pair["expect/momentum"].item(), abs=MOMENTUM)
    assert pair["after/_iteration"].item() == pair.config["step"] + 1 == pair["state/_iteration"].item() + 1


def test_no_tensor_was_left_out(pair):
    build(pair), inputs(pair)
    for level in range(len(pair.config["levels"])):
        for name in (
            "word_weights", "teacher_features", "squared_distance", "mean_min_distance", "codes", "bow_target",
            "queue_rows", "perplexity_batch", "perplexity_image",
        ):  # fmt: skip
            pair[f"expect/{name}_level{level}"]
    for number in range(len(pair.config["crop_sizes"])):
        for name in ("student_features_crops{}", "loss_crops{}"):
            pair["expect/" + name.format(number)]
        for level in range(len(pair.config["levels"])):
            pair[f"expect/logits_crops{number}_level{level}"]
    for name in ("expect/loss", "expect/momentum"):
        pair[name]
    pair.group("grad"), pair.group("after")
    assert pair.unused() == []
