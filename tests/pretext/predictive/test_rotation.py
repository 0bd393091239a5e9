"""Rotation prediction against its paper's definition, trap by trap."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from unlabeled.pretext.predictive.rotation import Rotation, RotationConfig, rotations
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import CapabilityError, CheckpointError, ConfigError

GRID = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(1, 3, 2, 2)


def _task(name: str = "test_resnet", size: int | tuple[int, int] = 32, **settings) -> Rotation:
    return Rotation(RotationConfig(**settings), create_backbone(name, size=size))


def _batch(images: int = 3, size: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    return {"image": torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8)}


def test_label_k_is_a_counter_clockwise_rotation_by_k_quarters():
    expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert rotations(GRID, 4)[:, 0].tolist() == expected
    assert rotations(GRID, 2)[:, 0].tolist() == [expected[0], expected[2]]


def test_rotations_are_the_flips_and_transposes_of_the_authors():
    image = torch.randn(1, 3, 5, 5)
    none, first, second, third = rotations(image, 4)
    assert torch.equal(none, image[0])
    assert torch.equal(first, image[0].transpose(1, 2).flip(1))
    assert torch.equal(second, image[0].flip(1, 2))
    assert torch.equal(third, image[0].flip(1).transpose(1, 2))
    assert torch.equal(rotations(first[None], 4)[3], image[0])


def test_rotated_images_hold_the_same_pixels():
    image = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8)
    for rotated in rotations(image, 4):
        assert torch.equal(rotated.flatten(1).sort(1).values, image[0].flatten(1).sort(1).values)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_order_is_image_by_image_in_either_memory_layout(layout):
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=layout)
    found = rotations(images, 4)
    assert found.is_contiguous() or found.is_contiguous(memory_format=torch.channels_last)
    for position, rotated in enumerate(found):
        assert torch.equal(rotated, torch.rot90(images[position // 4], position % 4, (1, 2)))


@pytest.mark.parametrize("angles", [2, 4])
def test_loss_is_the_mean_cross_entropy_over_all_rotations(angles):
    task = _task("test_vit", angles=angles).eval()
    batch = _batch()
    total, right = 0.0, 0
    for image in batch["image"]:
        for label in range(angles):
            turned = torch.rot90(image, label * 4 // angles, (1, 2))[None]
            logits = task.head(task.backbone.pooled(task.backbone.normalize(turned)))
            total += F.cross_entropy(logits, torch.tensor([label])).item() / (3 * angles)
            right += int(logits.argmax(1).item() == label)
    output = task(batch)
    assert output.loss.item() == pytest.approx(total, rel=1e-5)
    assert output.logs["accuracy"].item() == pytest.approx(right / (3 * angles))
    assert not output.logs["accuracy"].requires_grad


def test_all_rotations_are_in_every_batch():
    labels = _task()._labels(5, torch.device("cpu"))
    assert torch.bincount(labels).tolist() == [5, 5, 5, 5]
    assert labels[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_equal_logits_give_the_logarithm_of_the_number_of_angles():
    task = _task()
    torch.nn.init.zeros_(task.head.weight)
    torch.nn.init.zeros_(task.head.bias)
    assert task(_batch()).loss.item() == pytest.approx(math.log(4))


def test_non_square_images_need_two_angles():
    with pytest.raises(ConfigError, match=r"task.angles: 4 rotations need square images, these are 32x64; set task"):
        _task(size=(32, 64))
    with pytest.raises(ConfigError, match=r"these are 64x96; set task.angles=2"):
        _task()(_batch(size=(64, 96)))
    task = _task(size=(32, 64), angles=2)
    assert task(_batch(size=(32, 64))).loss.isfinite()
    assert task.head.out_features == 2


@pytest.mark.parametrize("name", ["nin_cifar", "test_vit", "test_resnet", "mobilenetv3_small_050"])
def test_every_trainable_parameter_gets_a_gradient(name):
    task = _task(name)
    task(_batch()).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


def test_parameters_that_the_loss_does_not_reach_are_frozen():
    backbone = create_backbone("test_resnet", size=32)
    backbone.model.spare = torch.nn.Linear(2, 2)
    task = Rotation(RotationConfig(), backbone)
    frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.model.spare.weight", "backbone.model.spare.bias"]
    assert not any("spare" in group.name for group in task.parameter_groups())


def test_weight_decay_applies_to_everything_as_published():
    groups = list(_task().parameter_groups())
    assert all(group.decay for group in groups)
    modern = {group.name: group.decay for group in _task(decay_all=False).parameter_groups()}
    assert modern["backbone.model.bn1.weight"] is False
    assert modern["head.weight"] is True
    assert {group.name: group.layer for group in groups}["head.bias"] == 5


def test_the_backbone_must_pool():
    backbone = create_backbone("test_vit", size=32, global_pool="")
    with pytest.raises(CapabilityError, match=r"test_vit cannot do Rotation: it lacks pooled .its head does not pool"):
        Rotation(RotationConfig(), backbone)


def test_created_by_name():
    task = create_task({"name": "rotation", "angles": 2}, create_backbone("nin_cifar"))
    assert isinstance(task, Rotation)
    assert isinstance(task.encoder(), Backbone)
    with pytest.raises(ConfigError, match=r"task.angles: 3 is not possible; choose 2 or 4"):
        create_task({"name": "rotation", "angles": 3}, create_backbone("nin_cifar"))


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["pad", "resized", "auto"])
@pytest.mark.parametrize("original", [(32, 32), (40, 57), (9, 8)])
def test_views_give_images_of_the_backbones_size(crop, original):
    config = RotationConfig(crop=crop)
    views = pickle.loads(pickle.dumps(Rotation.views(config, create_backbone("test_resnet", size=32))))
    image = views(torch.randint(0, 256, (3, *original), dtype=torch.uint8))["image"]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def test_pad_crop_shifts_by_up_to_four_and_fills_with_zeros():
    views = Rotation.views(RotationConfig(crop="pad", flip=0), create_backbone("nin_cifar"))
    original = torch.arange(1, 1025).remainder(251).add(1).to(torch.uint8).view(1, 32, 32).expand(3, 32, 32)
    padded = F.pad(original, (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)[0].flatten(0, 1)
    seen = set()
    for _ in range(60):
        image = views(original)["image"][0]
        matches = (windows == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20


def test_auto_crop_follows_the_size():
    original = torch.zeros(3, 32, 32, dtype=torch.uint8)
    original[:, 8:24, 8:24] = 255
    small = Rotation.views(RotationConfig(), create_backbone("nin_cifar"))
    areas = {int((small(original)["image"][0] == 255).sum()) for _ in range(10)}
    assert areas == {256}  # shifted, never scaled
    large = Rotation.views(RotationConfig(), create_backbone("test_resnet", size=96))
    assert len({int((large(original)["image"][0] > 127).sum()) for _ in range(10)}) > 5


@pytest.mark.parametrize(("flip", "expected"), [(0.0, {0}), (1.0, {1})])
def test_flip(flip, expected):
    views = Rotation.views(RotationConfig(pad=0, flip=flip), create_backbone("nin_cifar"))
    original = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
    assert {int(views(original)["image"][0, 0, 0] == 31) for _ in range(5)} == expected


# --- images and checkpoints ----------------------------------------------------------------------------------------


def test_visualize_shows_verdict_and_predicted_top():
    task = _task("nin_cifar")
    torch.nn.init.zeros_(task.head.weight)
    task.head.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0])  # always 90 degrees: the top is on the left
    modes = [module.training for module in task.modules()]
    statistics = task.backbone.model.blocks[0].conv1.bn.running_mean.clone()
    batch = _batch(images=2)
    original = task.visualize(batch)["rotations"]
    side = 3 * 32 + 2 * 8
    assert (original.dtype, original.shape) == (torch.uint8, (3, 2 * (side + 2) + 2, 4 * (side + 2) + 2))
    colors = [original[:, 2, 2 + k * (side + 2)].tolist() for k in range(4)]
    assert [color == colors[1] for color in colors] == [False, True, False, False]
    assert original[:, 2 + side // 2, 2 + 4].tolist() == [255, 255, 255]
    assert original[:, 2 + side // 2, 2 + side - 4].tolist() == colors[0]
    turned = torch.rot90(batch["image"][0], 1, (1, 2))
    assert torch.equal(original[:, 10:106:3, 10 + side + 2 : 106 + side + 2 : 3], turned)
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(task.backbone.model.blocks[0].conv1.bn.running_mean, statistics)


def _official(blocks: int = 4) -> dict[str, torch.Tensor]:
    """A checkpoint with the names and shapes of the authors' repository."""
    widths = {1: (192, 160, 96), 2: (192, 192, 192)}
    inputs, state = 3, {}
    for block in range(1, blocks + 1):
        for unit, outputs in enumerate(widths.get(block, widths[2]), start=1):
            kernel = 1 if unit > 1 else 5 if block <= 2 else 3
            name = f"_feature_blocks.{block - 1}.Block{block}_ConvB{unit}.layers"
            state[f"{name}.Conv.weight"] = torch.randn(outputs, inputs, kernel, kernel)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.BatchNorm.{kind}"] = torch.rand(outputs) + 0.5
            inputs = outputs
    state[f"_feature_blocks.{blocks}.Classifier.weight"] = torch.randn(4, 192)
    state[f"_feature_blocks.{blocks}.Classifier.bias"] = torch.randn(4)
    return state


def test_official_checkpoint_loads_whole():
    reference = _official()
    task = _task("nin_cifar")
    assert task.load_reference({"epoch": 200, "network": reference}) == ([], [])
    ours = [tensor for name, tensor in task.state_dict().items() if "num_batches_tracked" not in name]
    assert len(ours) == len(reference)
    assert all(any(a.shape == b.shape and torch.equal(a, b) for b in ours) for a in reference.values())
    assert torch.equal(
        task.backbone.model.blocks[2].conv3.conv.weight, reference["_feature_blocks.2.Block3_ConvB3.layers.Conv.weight"]
    )
    assert torch.equal(task.head.bias, reference["_feature_blocks.4.Classifier.bias"])


def test_official_checkpoint_that_fits_in_part():
    reference = _official()
    del reference["_feature_blocks.0.Block1_ConvB2.layers.Conv.weight"]
    missing, unexpected = _task("nin_cifar").load_reference(reference | {"spare": torch.zeros(1)})
    assert (missing, unexpected) == (["backbone.model.blocks.0.conv2.conv.weight"], ["spare"])


def test_official_checkpoint_that_does_not_fit():
    with pytest.raises(CheckpointError, match="no tensor of RotNet's network-in-network that belongs to test_resnet"):
        _task().load_reference(_official())
    with pytest.raises(CheckpointError, match=r"Classifier.weight has shape \[4, 192\], head.weight needs \[2, 192\]"):
        _task("nin_cifar", angles=2).load_reference(_official())
