"""OBoW against its definition, trap by trap; against the authors' numbers it is tested in tests/golden."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from unlabeled.pretext.obow import OBoW, OBoWConfig
from unlabeled.pretext.obow.reference import reference_names
from unlabeled.pretext.obow.vocabulary import Distances, Vocabulary, pick_words, seed_words, squared_distances
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CheckpointError, ConfigError

SMALL = {"words": 24, "image_crops": {"number": 2}, "patches": {"number": 2}}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}


def resnet(size: int | tuple[int, int] = 32) -> Backbone:
    return create_backbone("resnet18", size=size, channels=[8, 8, 16, 16], stem_width=8, output_stride=8)


def make(backbone: Backbone | None = None, **settings) -> OBoW:
    torch.manual_seed(0)
    return OBoW(OBoWConfig(**(SMALL | settings)), backbone or resnet()).train()


def batch_of(task: OBoW, images: int = 3, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    views = OBoW.views(task.config, task.backbone)
    seen = [views(torch.randint(0, 256, (3, 40, 52), dtype=torch.uint8)) for _ in range(images)]
    return {key: torch.stack([one[key] for one in seen]) for key in seen[0]}


def step(task: OBoW, batch: dict[str, Tensor], position: Tensor, progress: float = 0.5) -> Tensor:
    loss = task(batch, position=position).loss
    task.after_step(progress)
    return loss.detach()


# --- one pass ---------------------------------------------------------------------------------------------------------


def test_border_cells_change_neither_bag_nor_queue():
    task = make(resnet(64))  # maps of 8x8
    maps = torch.rand(2, 16, 8, 8)
    spoiled = maps.clone()
    spoiled[..., 0] = spoiled[..., -1] = 1e6
    spoiled[:, :, 0] = spoiled[:, :, -1] = 1e6
    for corner in (0.0, 0.5, 0.999):
        position = torch.full((2,), corner)
        first, second = (task.assign(1, task.prepared(one), position) for one in (maps, spoiled))
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2].words, second[2].words)


def test_mean_distance_moves_before_it_is_used():
    task = make(levels=(-1,), beta=15)
    maps = torch.rand(2, 16, 4, 4) * 10
    vocabulary = task.vocabularies[0]
    cells = maps.flatten(2).transpose(1, 2)
    nearest = Distances(cells, vocabulary.words, 1 << 20).mean_nearest().item()
    used = 0.99 * 0.5 + 0.01 * nearest
    _, bags, found = task.assign(0, maps, torch.zeros(2))
    codes = (-15 / used * squared_distances(cells, vocabulary.words)).softmax(-1).amax(1)
    assert torch.allclose(bags, codes / codes.sum(1, keepdim=True), atol=1e-5)
    assert vocabulary.distance.item() == 0.5
    vocabulary.store([found])
    assert vocabulary.distance.item() == pytest.approx(used, rel=1e-5)


def test_views_belong_to_their_image():
    task = make(patches={"number": 0}).eval()
    batch, position = batch_of(task), torch.rand(3, 2)
    features = task.student(batch["crops"])
    assert features.shape == (3, 2, 16)
    assert torch.allclose(features[1, 0], task.student(batch["crops"][1:2, :1])[0, 0], atol=1e-5)
    loss = task(batch, position=position).loss
    moved = {key: views.roll(1, 0) for key, views in batch.items()}
    assert task(moved, position=position).loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert task(moved | {"image": batch["image"]}, position=position).loss.item() != pytest.approx(
        loss.item(), rel=1e-3
    )


def test_loss_is_the_sum_over_kinds_of_views_whatever_their_number():
    task = make()
    batch = batch_of(task)
    output = task(batch, position=torch.rand(3, 2))
    assert output.loss.item() == pytest.approx((output.logs["loss_crops"] + output.logs["loss_patches"]).item())
    doubled = batch | {"patches": batch["patches"].repeat_interleave(2, 1)}  # twice the views, the same mean
    assert task(doubled, position=torch.rand(3, 2)).loss.item() == pytest.approx(output.loss.item(), rel=1e-4)
    only = task({"image": batch["image"], "crops": batch["crops"]}, position=torch.rand(3, 2))
    assert only.loss.item() == pytest.approx(output.logs["loss_crops"].item(), rel=1e-5)
    assert only.features.shape == (3, 16)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_the_loss_uses_the_words_before_the_step(monkeypatch):
    task = make()
    batch, position = batch_of(task), torch.rand(3, 2)
    expected = task(batch, position=position).loss
    task._updates.clear()
    monkeypatch.setattr(Vocabulary, "store", lambda self, updates: self.words.fill_(1e6))
    assert torch.equal(step(task, batch, position), expected)
    assert not torch.isclose(task(batch, position=position).loss, expected, rtol=1e-2)


def test_a_restored_task_goes_on_as_if_never_stopped():
    task = make()
    batch, position = batch_of(task), torch.rand(3, 2)
    step(task, batch, position)
    other = make()
    other.load_state_dict(task.state_dict())
    assert [q.pointer.item() for q in other.vocabularies] == [3, 3]
    assert torch.equal(step(other, batch, position), step(task, batch, position))
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in other.state_dict().items())


def test_teacher_follows_in_parameters_and_keeps_statistics_of_its_own():
    task = make()
    with torch.no_grad():
        for parameter in task.backbone.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy(task.teacher)
    batch = batch_of(task)
    task(batch)
    teacher, student = task.teacher.model.bn1, task.backbone.model.bn1
    seen = task.teacher.model.conv1(task.backbone.normalize(batch["image"])).mean((0, 2, 3))
    assert torch.allclose(teacher.running_mean, 0.1 * seen, atol=1e-6)
    assert not torch.allclose(teacher.running_mean, student.running_mean)
    kept = teacher.running_mean.clone()
    task.after_step(1.0)
    assert torch.equal(teacher.weight, before.model.bn1.weight)  # at the end of the run it stands still
    task.after_step(0.0)
    assert torch.allclose(teacher.weight, 0.99 * before.model.bn1.weight + 0.01 * student.weight)
    assert torch.equal(teacher.running_mean, kept)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


def test_evaluation_changes_nothing():
    task = make().eval()
    state = copy.deepcopy(task.state_dict())
    task(batch_of(task))
    task.after_step(0.5)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


def test_scale_is_not_trained():
    task = make(kappa=5.0)
    optimizer = torch.optim.SGD([group.parameter for group in task.parameter_groups()], 0.1, weight_decay=0.5)
    batch, position = batch_of(task), torch.rand(3, 2)
    for _ in range(10):
        optimizer.zero_grad()
        task(batch, position=position).loss.backward()
        optimizer.step()
    assert task.scale.tolist() == [5.0, 5.0]


def test_weight_decay_applies_to_everything_as_published():
    assert all(group.decay for group in make().parameter_groups())
    assert not all(group.decay for group in make(decay_all=False).parameter_groups())


# --- networks with negative maps -------------------------------------------------------------------------------------


def test_words_of_other_networks_come_from_the_first_batch():
    backbone = create_backbone("vit_tiny_patch16_224", size=32, dynamic_img_size=True, **VIT)
    task = make(backbone)
    assert task.levels == [2, 3]
    assert task.map_norm
    batch, position = batch_of(task), torch.rand(3, 2)
    maps = task.teacher_maps(batch["image"])
    expected = seed_words(maps[1], position[:, 1], (3, 3), 8)
    before = task.vocabularies[1].words.clone()
    first = task(batch, position=position)
    assert torch.equal(task.vocabularies[1].words, before)
    task._updates.clear()
    assert torch.equal(task(batch, position=position).loss, first.loss)
    nearest = Distances(maps[1].flatten(2).transpose(1, 2), expected, 1 << 20).mean_nearest()
    task.after_step(0.0)
    assert torch.allclose(task.vocabularies[1].distance, nearest)
    assert torch.equal(task.vocabularies[1].words[3:], expected[3:])
    rows = pick_words(maps[1], position[:, 1], (3, 3))
    assert torch.allclose(task.vocabularies[1].words[:3], rows)
    task(batch, position=position)
    task.after_step(0.0)
    assert task.vocabularies[1].pointer.item() == 6
    assert torch.equal(task.vocabularies[1].words[6:], expected[6:])


@pytest.mark.parametrize("constant", [False, True])
def test_a_first_batch_whose_every_position_is_a_word(constant):
    backbone = create_backbone("vit_tiny_patch16_224", size=32, dynamic_img_size=True, **VIT)
    task = make(backbone, words=60, word_source="cell")
    batch = batch_of(task)
    if constant:
        batch = {key: torch.full_like(views, 7) for key, views in batch.items()}
    loss = task(batch).loss
    loss.backward()
    task.after_step(0.0)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)
    distance = task.vocabularies[1].distance.item()
    assert distance == pytest.approx(1e-3 * 16, rel=0.01)  # features of 16 channels and unit variance
    assert task(batch).loss.isfinite()


def test_a_resumed_vocabulary_is_not_filled_again():
    backbone = create_backbone("vit_tiny_patch16_224", size=32, dynamic_img_size=True, **VIT)
    task = make(copy.deepcopy(backbone))
    batch, position = batch_of(task), torch.rand(3, 2)
    step(task, batch, position)
    other = make(backbone)
    assert not other.vocabularies[0].ready
    other.load_state_dict(task.state_dict())
    assert other.vocabularies[0].ready
    assert torch.equal(other(batch, position=position).loss, task(batch, position=position).loss)


@pytest.mark.parametrize("fill", [True, False])
def test_filling_and_norm_can_be_chosen(fill):
    task = make(fill=fill, map_norm=True)
    assert task.vocabularies[0].ready is not fill
    maps = task.teacher_maps(batch_of(task)["image"])[0]
    assert torch.allclose(maps.mean(1), torch.zeros_like(maps[:, 0]), atol=1e-5)
    assert torch.allclose(maps.std(1, correction=0).mean(), torch.tensor(1.0), atol=1e-2)


# --- settings --------------------------------------------------------------------------------------------------------


def test_levels():
    depths = {"resnet18": [3, 4], "test_convnext2": [2, 3]}
    for name, expected in depths.items():
        assert OBoW(OBoWConfig(words=4), create_backbone(name, size=64)).levels == expected
    assert make(levels=(-1,)).levels == [4]
    assert len(make(levels=[1, 4, -2]).heads) == 3
    with pytest.raises(ConfigError, match=r"task.levels: \[-9\] are not different maps of resnet18, which has 5; give"):
        make(levels=(-9,))
    with pytest.raises(ConfigError, match=r"task.levels: \[-1, 4\] are not different maps"):
        make(levels=(-1, 4))


def test_a_student_without_views_is_refused():
    with pytest.raises(ValueError, match=r"image_crops.number and patches.number are both 0"):
        OBoWConfig(image_crops={"number": 0}, patches={"number": 0})
    with pytest.raises(ValueError, match=r"scale \[0.6, 0.5\] begins above its end"):
        OBoWConfig(image_crops={"scale": (0.6, 0.5)})


def test_loads_the_authors_files_with_their_prefixes():
    task, other = make(), make()
    names = reference_names(task.state_dict())
    file = {f"module.{theirs}": torch.ones_like(task.state_dict()[ours]) for theirs, ours in names.items()}
    missing, unexpected = other.load_reference({"network": file | {"module._alpha": torch.ones(1)}})
    assert (missing, unexpected) == ([], ["_alpha"])
    assert sorted(names.values()) == sorted(task.state_dict())
    assert all((value == 1).all() for value in other.state_dict().values())


def test_a_network_of_another_kind_is_refused_by_the_authors_files():
    task = OBoW(OBoWConfig(words=4), create_backbone("test_convnext2", size=64))
    with pytest.raises(CheckpointError, match=r"OBoW's files hold ResNets, the backbone is test_convnext2; set"):
        task.load_reference({"bow_predictor.scale": torch.ones(2)})


def test_visualize_restores_modes_and_leaves_no_updates():
    task = make()
    modes = [module.training for module in task.modules()]
    statistics = task.teacher.model.bn1.running_mean.clone()
    image = task.visualize(batch_of(task))["words"]
    assert image.shape == (3, 3 * 98 + 2, 7 * 98 + 2)  # the whole, two levels, two crops, two patches
    assert image.dtype == torch.uint8
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(task.teacher.model.bn1.running_mean, statistics)
    assert task._updates == []
