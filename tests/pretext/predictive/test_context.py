"""Context prediction against its paper's definition, trap by trap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.pretext.predictive.context import Context, ContextConfig, PairHead
from unlabeled.pretext.predictive.patch_grid import neighbor_pairs
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CapabilityError, ConfigError
from unlabeled.ssl.data.sources.shapes import ShapesConfig, ShapesSource

NET = {"widths": (8, 12, 16, 16, 12), "embed_dim": 20}


def _task(
    name: str = "test_resnet", size: int | tuple[int, int] = 32, kwargs: dict | None = None, **settings
) -> Context:
    return Context(ContextConfig(**{"widths": (16, 12)} | settings), create_backbone(name, size=size, **(kwargs or {})))


def _batch(task: Context, images: int = 3) -> dict[str, Tensor]:
    views = Context.views(task.config, task.backbone)
    rows = [views(torch.randint(0, 256, (3, 50 + i, 70), dtype=torch.uint8)) for i in range(images)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fc7(head: PairHead) -> Tensor:
    """The first layer's weight, as of one layer on two embeddings one after the other."""
    return torch.cat([head.fc7_first.weight, head.fc7_second.weight], dim=1)


# --- head and loss ---------------------------------------------------------------------------------------------------


def test_the_split_layer_is_the_layer_of_the_concatenation():
    torch.manual_seed(2)
    head = PairHead(6, (10, 7)).double()
    embeddings = torch.randn(4, 9, 6, dtype=torch.double, requires_grad=True)
    first, second, _ = neighbor_pairs(3, 3)
    weights = torch.randn(4, 40, 8, dtype=torch.double)

    def plain() -> Tensor:
        joined = torch.cat([embeddings[:, first], embeddings[:, second]], dim=-1)
        return head.fc9(head.fc8(head.bn7((joined @ fc7(head).T).flatten(0, 1)).relu()).relu()).view(4, 40, 8)

    inputs = [embeddings, *head.parameters()]
    expected = plain()
    found = head(embeddings, first, second)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


def test_the_order_of_a_pair_matters():
    head = PairHead(6, (10, 7)).eval()
    scores = head(torch.randn(1, 2, 6), torch.tensor([0, 1]), torch.tensor([1, 0]))[0]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_no_batch_norm_of_head_or_paper_s_network_can_learn():
    task = _task("contextnet", 32, NET)
    norms = [module for module in task.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 5
    assert all(not list(norm.parameters()) for norm in norms)


def test_the_head_starts_as_caffe_fills_it():
    head = PairHead(32, (64, 64))
    for weight in (fc7(head), head.fc8.weight, head.fc9.weight):
        bound = math.sqrt(3 / weight.shape[1])
        assert 0.9 * bound < weight.abs().max() <= bound
    assert not head.fc8.bias.any()
    assert not head.fc9.bias.any()


def test_parameter_count_is_the_released_models():
    """63,561,096, of which 9,216 are biases that a batch norm undoes."""
    with torch.device("meta"):
        head = PairHead(4096, (4096, 4096))
    trunk = 13_183_360
    assert trunk + sum(parameter.numel() for parameter in head.parameters()) == 63_561_096 - 9_216


def test_loss_is_the_mean_cross_entropy_over_pairs():
    task = _task().eval()
    batch = _batch(task, 2)
    draw = task.draw(batch)
    total, right = 0.0, 0
    for image in range(2):
        one = {name: values[image] for name, values in draw.items()}
        disguised = task.disguise(batch["patches"][image], **one)
        embeddings = [task.backbone.pooled(task.inputs(patch[None])) for patch in disguised]
        for first, second, label in zip(*(column.tolist() for column in neighbor_pairs(3, 3)), strict=True):
            hidden = torch.cat([embeddings[first], embeddings[second]], 1) @ fc7(task.head).T
            scores = task.head.fc9(task.head.fc8(task.head.bn7(hidden).relu()).relu())
            total += F.cross_entropy(scores, torch.tensor([label])).item() / 80
            right += int(scores.argmax().item() == label)
    output = task(batch, **draw)
    assert output.loss.item() == pytest.approx(total, rel=1e-5)
    assert output.logs["accuracy"].item() == pytest.approx(right / 80)
    assert (output.features.shape, output.features.requires_grad) == ((18, task.backbone.embed_dim), False)


def test_equal_scores_give_the_logarithm_of_eight():
    task = _task()
    torch.nn.init.zeros_(task.head.fc9.weight)
    assert task(_batch(task)).loss.item() == pytest.approx(math.log(8))


def test_every_patch_is_embedded_once():
    task = _task()
    rows = []
    task.backbone.model.conv1.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    task(_batch(task, 3))
    assert rows == [27]  # of 120 pairs


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "contextnet"])
def test_every_trainable_parameter_gets_a_gradient(name):
    task = _task(name, 64 if name == "test_vit" else 32, NET if name == "contextnet" else None)
    task(_batch(task)).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


def test_parameters_that_the_loss_does_not_reach_are_frozen():
    backbone = create_backbone("test_resnet", size=32)
    backbone.model.spare = torch.nn.Linear(2, 2)
    task = Context(ContextConfig(widths=(8, 8)), backbone)
    frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.model.spare.weight", "backbone.model.spare.bias"]


def test_non_square_patches():
    task = _task(size=(32, 64), grid=(2, 3))
    batch = _batch(task)
    assert batch["patches"].shape == (3, 6, 3, 32, 64)
    assert task(batch).loss.isfinite()


def test_a_few_images_can_be_learned_by_heart():
    """A network that silences itself stays at ln 8 = 2.08 and 12.5 %."""
    torch.manual_seed(0)
    task = _task("contextnet", 32, NET, pixelate=0.0, widths=(32, 32))
    views, source = Context.views(task.config, task.backbone), ShapesSource(ShapesConfig(count=24))
    batch = {"patches": torch.stack([views(source.read(index))["patches"] for index in range(24)])}
    draw = task.draw(batch)
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        output = task(batch, **draw)
        output.loss.backward()
        optimizer.step()
    assert output.loss < 1.0
    assert output.logs["accuracy"] > 0.6
    with torch.no_grad():
        assert task.eval()(batch, **draw).logs["accuracy"] > 0.4  # not read off the batch's statistics


# --- settings, images and checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": [1, 1]}, r"task.grid: one patch has no neighbors; give at least \[1, 2\]"),
        ({"pixels": [9, 8]}, r"task.pixels: \[9.0, 8.0\] is no range; give the smaller number first"),
        ({"color": "gray"}, r"task.color: 'gray' is not possible; choose 'drop', 'projection' or 'none'"),
        ({"smallest": 0}, r"task.smallest: 0 is not possible; give greater than 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        create_task({"name": "context", **settings}, create_backbone("test_resnet", size=32))


def test_the_backbone_must_pool():
    backbone = create_backbone("test_vit", size=32, global_pool="")
    with pytest.raises(CapabilityError, match=r"test_vit cannot do Context: it lacks pooled"):
        Context(ContextConfig(), backbone)


def test_visualize_shows_the_grid_and_every_verdict():
    task = _task()
    torch.nn.init.zeros_(task.head.fc9.weight)
    task.head.fc9.bias.data = F.one_hot(torch.tensor(4), 8).float()  # always: to the right
    modes = [module.training for module in task.modules()]
    statistics = task.head.bn7.running_mean.clone()
    batch = _batch(task, 2)
    batch["corners"] = torch.cartesian_prod(torch.arange(3), torch.arange(3)).mul(48).expand(2, 9, 2).clone()
    image = task.visualize(batch)["positions"]
    frame, step, side = 4, 3 * 48, 3 * 32
    panel = 3 * (128 + 2 * 2) + 2 * frame
    assert (image.dtype, image.shape) == (torch.uint8, (3, 2 * (panel + 8) + 8, 2 * (panel + 8) + 8))
    left = image[:, 8 : 8 + panel, 8 : 8 + panel]  # of the first image, as it was cut
    for position in range(9):
        top, across = frame + position // 3 * step, frame + position % 3 * step
        raw = batch["patches"][0, position].repeat_interleave(3, 1).repeat_interleave(3, 2)
        inside = (slice(None), slice(top + frame, top + side - frame), slice(across + frame, across + side - frame))
        assert torch.equal(left[inside], raw[:, frame:-frame, frame:-frame])
        color = left[:, top - frame // 2, across + side // 4].tolist()
        assert color == {4: [150, 150, 150], 5: [40, 170, 70]}.get(position, [210, 50, 50])
        dot = left[:, top + side // 2, across + side + frame // 2].tolist()  # on the right side of the frame
        assert (dot == [255, 255, 255]) == (position != 4)
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(task.head.bn7.running_mean, statistics)
