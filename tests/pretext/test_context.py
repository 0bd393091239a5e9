"""Context prediction against its paper's definition, trap by trap."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.pretext.common import patch_cues
from unlabeled.pretext.common.patch_grid import OFFSETS, GridLayout, GridViews, neighbour_pairs
from unlabeled.pretext.context import Context, ContextConfig, PairHead
from unlabeled.pretext.registry import create_task
from unlabeled.ssl.backbone import create_backbone
from unlabeled.ssl.data.embedded import ShapesSource
from unlabeled.ssl.errors import CapabilityError, CheckpointError, ConfigError
from unlabeled.ssl.schema import DataConfig

PAPER = GridLayout((3, 3), (96, 96), (48, 48), (7, 7))
NET = {"widths": (8, 12, 16, 16, 12), "embed_dim": 20}


def _task(
    name: str = "test_resnet", size: int | tuple[int, int] = 32, kwargs: dict | None = None, **settings
) -> Context:
    return Context(ContextConfig(**{"widths": (16, 12)} | settings), create_backbone(name, size=size, **(kwargs or {})))


def _batch(task: Context, pictures: int = 3) -> dict[str, Tensor]:
    views = Context.views(task.config, task.backbone)
    rows = [views(torch.randint(0, 256, (3, 50 + i, 70), dtype=torch.uint8)) for i in range(pictures)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _patches(count: int = 40, size: tuple[int, int] = (24, 24)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size)).float()


# --- pairs and labels ------------------------------------------------------------------------------------------------


def test_labels_are_the_table_of_the_repository():
    table = {(-1, -1): 0, (0, -1): 1, (1, -1): 2, (-1, 0): 3, (1, 0): 4, (-1, 1): 5, (0, 1): 6, (1, 1): 7}
    assert dict(zip(OFFSETS, range(8), strict=True)) == table  # (to the right, down), of the second from the first
    pairs = neighbour_pairs(3, 4)
    for first, second, label in zip(*(column.tolist() for column in pairs), strict=True):
        assert table[second % 4 - first % 4, second // 4 - first // 4] == label


@pytest.mark.parametrize(("grid", "count"), [((3, 3), 40), ((2, 2), 12), ((1, 2), 2), ((2, 3), 22), ((3, 4), 58)])
def test_all_neighbours_in_both_directions(grid, count):
    found = {(a, b): label for a, b, label in zip(*(c.tolist() for c in neighbour_pairs(*grid)), strict=True)}
    assert len(found) == count
    assert all(found[a, b] + found[b, a] == 7 for a, b in found)
    assert all(a != b for a, b in found)


def test_labels_say_where_patches_lie_in_the_picture():
    """Pixels that hold their own place: the picture is its coordinates."""
    task = _task(jitter=0.2)
    down, across = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    picture = torch.stack([down, across, torch.zeros_like(down)]).to(torch.uint8)
    found = GridViews(task.layout, (40_000, 40_000))(picture)
    middles = found["patches"].float().mean((2, 3))  # (P, 3): row and column in the picture
    for first, second, label in zip(*(column.tolist() for column in neighbour_pairs(3, 3)), strict=True):
        below, beside = (middles[second] - middles[first])[:2].tolist()
        right, down_label = OFFSETS[label]
        assert (round(beside / 48), round(below / 48)) == (right, down_label)  # a patch of 32 and a gap of 16


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_paper_s_numbers_for_patches_of_96_and_their_proportions():
    assert ContextConfig().layout((96, 96)) == PAPER
    assert ContextConfig().layout((32, 64)) == GridLayout((3, 3), (32, 64), (16, 32), (2, 5))
    assert PAPER.extent == (384, 384)
    assert GridLayout((2, 2), *PAPER[1:]).needs == (247, 247)  # below which the authors reject a picture
    views = Context.views(ContextConfig(), create_backbone("contextnet", **NET))
    assert views.pixels == (150_000, 450_000)
    assert Context.views(ContextConfig(), create_backbone("test_resnet", size=32)).pixels == pytest.approx(
        (150_000 / 9, 50_000)
    )


def test_jitter_is_drawn_for_each_patch_and_axis_and_gaps_stay_open():
    shifts = set()
    for _ in range(40):
        corners = PAPER.draw((500, 600)).view(3, 3, 2)
        across = corners[:, 1:, 1] - corners[:, :-1, 1]
        down = corners[1:, :, 0] - corners[:-1, :, 0]
        assert len(set(across.flatten().tolist())) > 1  # inside one grid
        assert len(set(down.flatten().tolist())) > 1
        gaps = torch.cat([across.flatten(), down.flatten()]) - 96
        assert (gaps.min() >= 34, gaps.max() <= 62) == (True, True)
        shifts |= set(gaps.tolist())
    assert len(shifts) > 20
    assert not torch.equal(corners[..., 0] - corners[..., :1, 0], torch.zeros(3, 3, dtype=torch.int64))


def test_grids_lie_anywhere_and_patches_stay_inside():
    corners = torch.stack([PAPER.draw((391, 520)) for _ in range(150)])
    assert corners.amin((0, 1)).tolist() == [0, 0]
    assert corners.amax((0, 1)).tolist() == [391 - 96, 520 - 96]
    assert len(set(corners[:, 0, 1].tolist())) > 60


@pytest.mark.parametrize("picture", [(375, 500), (500, 333), (32, 32), (1, 3), (3, 900)])
def test_views_of_any_picture(picture):
    views = pickle.loads(pickle.dumps(Context.views(ContextConfig(), create_backbone("contextnet", **NET))))
    found = views(torch.randint(0, 256, (3, *picture), dtype=torch.uint8))
    assert (found["patches"].shape, found["patches"].dtype) == ((9, 3, 96, 96), torch.uint8)
    assert (found["corners"].shape, found["corners"].dtype) == ((9, 2), torch.int64)


def test_pictures_keep_their_aspect_and_get_a_random_number_of_pixels():
    views = GridViews(PAPER, (150_000, 450_000))
    sizes = [views.resize(torch.zeros(3, 40, 60, dtype=torch.uint8)).shape[1:] for _ in range(60)]
    assert all(abs(width / height - 1.5) < 0.01 for height, width in sizes)
    counts = [height * width for height, width in sizes]
    assert min(counts) >= 391 * 586  # 150,000 pixels of this aspect are too low for the grid
    assert max(counts) <= 450_000
    assert max(counts) > 400_000
    small = GridViews(GridLayout((1, 2), *PAPER[1:]), (150_000, 450_000))
    counts = [math.prod(small.resize(torch.zeros(3, 60, 40, dtype=torch.uint8)).shape[1:]) for _ in range(60)]
    assert (min(counts) > 148_000, min(counts) < 170_000, max(counts) <= 450_000) == (True, True, True)


def test_patches_are_never_mirrored():
    """Brightness rises to the right and downwards in the picture, so it does in every patch."""
    views = Context.views(ContextConfig(), create_backbone("test_resnet", size=32))
    rising = torch.arange(0, 240, 4, dtype=torch.uint8)
    picture = torch.stack([rising.expand(60, 60), rising[:, None].expand(60, 60), rising.expand(60, 60)])
    for _ in range(5):
        patches = views(picture)["patches"].float()
        assert (patches[:, 0, :, -1] > patches[:, 0, :, 0]).all()
        assert (patches[:, 1, -1] > patches[:, 1, 0]).all()


# --- what gives places away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (20, 33)])
def test_pixelation_is_two_bilinear_resizes(size):
    patches = _patches(6, size).double()
    shrink = torch.tensor([10 / 96 + 1e-6, 0.3, 0.5, 0.73, 0.99, 1.0])
    found = patch_cues.pixelate(patches, shrink)
    for patch, part, result in zip(patches, shrink, found, strict=True):
        small = [max(2, int(length * part)) for length in size]
        reduced = F.interpolate(patch[None], small, mode="bilinear", align_corners=False)
        expected = F.interpolate(reduced, list(size), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result, expected, atol=5e-3, rtol=0)
    assert torch.equal(found[-1], patches[-1])


def test_pixelated_values_keep_their_range():
    patches = _patches()
    found = patch_cues.pixelate(patches, torch.linspace(0.1, 1, len(patches)))
    assert found.min() >= patches.min() - 1e-3
    assert found.max() <= patches.max() + 1e-3
    assert found[0].std() < 0.7 * patches[0].std()  # but lose detail
    torch.testing.assert_close(
        patch_cues.pixelate(torch.full((1, 3, 9, 9), 200.0), torch.tensor([0.4])).min().item(), 200.0
    )


def test_a_third_is_pixelated_to_an_area_drawn_evenly():
    task = _task("contextnet", 96, NET, color="none")
    torch.manual_seed(0)
    drawn = task.draw({"patches": torch.zeros((), dtype=torch.uint8).expand(500, 9, 3, 96, 96)})
    assert drawn.keys() == {"shrink"}
    shrink = drawn["shrink"].flatten()
    reduced = shrink[shrink < 1]
    assert len(reduced) / 4500 == pytest.approx(0.33, abs=0.025)
    sides = (96 * reduced).trunc()
    assert (sides.min() >= 10, sides.max() <= 95) == (True, True)
    areas = ((96 * reduced) ** 2 - 100) / (95**2 - 100)  # uniform on 0..1: mean 1/2, variance 1/12
    assert areas.mean().item() == pytest.approx(0.5, abs=0.03)
    assert areas.var().item() == pytest.approx(1 / 12, abs=0.01)
    never = _task(color="none", pixelate=0.0).draw({"patches": torch.zeros(2, 9, 3, 32, 32, dtype=torch.uint8)})
    assert (never["shrink"] == 1).all()


def test_one_channel_stays_without_its_mean_and_noise_replaces_the_others():
    patches, noise = _patches(3), torch.rand(3, 3, 24, 24) - 0.5
    found = patch_cues.keep_one_channel(patches, torch.tensor([0, 1, 2]), noise)
    for k, (before, after) in enumerate(zip(patches, found, strict=True)):
        torch.testing.assert_close(after[k], before[k] - before[k].mean())
        others = [channel for channel in range(3) if channel != k]
        assert torch.equal(after[others], noise[k][others])


def test_every_patch_has_rms_50_and_its_kept_channel_86_6():
    task = _task()
    batch = {"patches": torch.randint(0, 256, (4, 9, 3, 32, 32), dtype=torch.uint8)}
    draw = {name: values.flatten(0, 1) for name, values in task.draw(batch).items()}
    found = task.disguise(batch["patches"].flatten(0, 1), **draw)
    torch.testing.assert_close(found.square().mean((1, 2, 3)).sqrt(), torch.full((36,), 50.0), atol=1e-3, rtol=0)
    channels = found.square().mean((2, 3)).sqrt()
    kept = channels.gather(1, draw["kept"][:, None])[:, 0]
    torch.testing.assert_close(kept, torch.full((36,), 50 * math.sqrt(3)), atol=0.1, rtol=0)  # 86.6
    others = channels.masked_fill(F.one_hot(draw["kept"], 3).bool(), 0)
    assert others.max() < 2
    assert others.topk(2, 1).values.min() > 0  # noise, no zeros


def test_the_kept_channel_and_the_noise_are_drawn_for_each_patch():
    """Were one channel kept for a whole picture, both patches of every pair would share it."""
    task = _task()
    torch.manual_seed(1)
    draw = task.draw({"patches": torch.zeros(400, 9, 3, 4, 4, dtype=torch.uint8)})
    first, second, _ = neighbour_pairs(3, 3)
    equal = (draw["kept"][:, first] == draw["kept"][:, second]).float().mean().item()
    assert equal == pytest.approx(1 / 3, abs=0.03)
    assert draw["kept"].unique().tolist() == [0, 1, 2]
    noise = draw["noise"]
    assert (noise.abs().max() <= 0.5, noise.var().item() == pytest.approx(1 / 12, rel=0.02)) == (True, True)


@pytest.mark.parametrize("color", ["drop", "projection", "none"])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_patch_stays_finite(color, value):
    task = _task(color=color).train()
    batch = {"patches": torch.full((2, 9, 3, 32, 32), value, dtype=torch.uint8)}
    output = task(batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_projection_removes_green_against_magenta_and_nothing_else():
    found = patch_cues.drop_green_magenta(_patches(5).double())
    axis = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.double)
    assert (found * axis.view(1, 3, 1, 1)).sum(1).abs().max() < 1e-10
    torch.testing.assert_close(patch_cues.drop_green_magenta(found), found)
    grey = torch.randn(2, 1, 6, 6, dtype=torch.double).expand(2, 3, 6, 6)
    torch.testing.assert_close(patch_cues.drop_green_magenta(grey), patch_cues.without_mean(grey))
    matrix = torch.eye(3, dtype=torch.double) - torch.outer(axis, axis) / 6  # the paper's B
    patches = _patches(2).double()
    expected = torch.einsum("dc,nchw->ndhw", matrix, patch_cues.without_mean(patches))
    torch.testing.assert_close(patch_cues.drop_green_magenta(patches), expected)


def test_colours_can_stay():
    task = _task(color="none", pixelate=0.0)
    patches = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = task.disguise(patches, torch.ones(4))
    centred = patches - patches.float().mean((2, 3), keepdim=True)
    torch.testing.assert_close(found, centred * 50 / centred.square().mean((1, 2, 3), keepdim=True).sqrt())


@pytest.mark.parametrize(("name", "kwargs", "rms"), [("contextnet", NET, 50), ("test_resnet", {}, 50 / (255 * 0.226))])
def test_backbones_get_the_contrast_of_their_own_pictures(name, kwargs, rms):
    task = _task(name, 32, kwargs)
    if name != "contextnet":
        task.backbone.set_statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = _batch(task, 1)
    seen = []
    first = next(module for module in task.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    task(batch)
    torch.testing.assert_close(seen[0].square().mean((1, 2, 3)).sqrt(), torch.full((9,), float(rms)), rtol=1e-5, atol=0)


# --- head and loss ---------------------------------------------------------------------------------------------------


def test_the_split_layer_is_the_layer_of_the_concatenation():
    torch.manual_seed(2)
    head = PairHead(6, (10, 7)).double()
    embeddings = torch.randn(4, 9, 6, dtype=torch.double, requires_grad=True)
    first, second, _ = neighbour_pairs(3, 3)
    weights = torch.randn(4, 40, 8, dtype=torch.double)

    def plain() -> Tensor:
        joined = torch.cat([embeddings[:, first], embeddings[:, second]], dim=-1)
        return head.fc9(head.fc8(head.bn7(head.fc7(joined).flatten(0, 1)).relu()).relu()).view(4, 40, 8)

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
    for layer in (head.fc7, head.fc8, head.fc9):
        bound = math.sqrt(3 / layer.in_features)
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None or not layer.bias.any()


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
    for picture in range(2):
        one = {name: values[picture] for name, values in draw.items()}
        disguised = task.disguise(batch["patches"][picture], **one)
        embeddings = [task.backbone.pooled(task.inputs(patch[None])) for patch in disguised]
        for first, second, label in zip(*(column.tolist() for column in neighbour_pairs(3, 3)), strict=True):
            hidden = task.head.fc7(torch.cat([embeddings[first], embeddings[second]], 1))
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


def test_a_few_pictures_can_be_learnt_by_heart():
    """A network that silences itself stays at ln 8 = 2.08 and 12.5 %."""
    torch.manual_seed(0)
    task = _task("contextnet", 32, NET, pixelate=0.0, widths=(32, 32))
    views, source = Context.views(task.config, task.backbone), ShapesSource(DataConfig(name="shapes", count=24))
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


# --- settings, pictures and checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": [1, 1]}, r"task.grid: one patch has no neighbours; give at least \[1, 2\]"),
        ({"pixels": [9, 8]}, r"task.pixels: \[9.0, 8.0\] is no range; give the smaller number first"),
        ({"color": "grey"}, r"task.color: 'grey' is not possible; choose 'drop', 'projection' or 'none'"),
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
    picture = task.visualize(batch)["positions"]
    frame, step, side = 4, 3 * 48, 3 * 32
    panel = 3 * (128 + 2 * 2) + 2 * frame
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, 2 * (panel + 2) + 2, 2 * (panel + 2) + 2))
    left = picture[:, 2 : 2 + panel, 2 : 2 + panel]  # of the first picture, as it was cut
    for place in range(9):
        top, across = frame + place // 3 * step, frame + place % 3 * step
        raw = batch["patches"][0, place].repeat_interleave(3, 1).repeat_interleave(3, 2)
        inside = (slice(None), slice(top + frame, top + side - frame), slice(across + frame, across + side - frame))
        assert torch.equal(left[inside], raw[:, frame:-frame, frame:-frame])
        color = left[:, top - frame // 2, across + side // 4].tolist()
        assert color == {4: [150, 150, 150], 5: [40, 170, 70]}.get(place, [210, 50, 50])
        dot = left[:, top + side // 2, across + side + frame // 2].tolist()  # on the right side of the frame
        assert (dot == [255, 255, 255]) == (place != 4)
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(task.head.bn7.running_mean, statistics)


def _official(widths: tuple[int, ...] = NET["widths"], fc: int = 20) -> dict[str, Tensor]:
    """The released model's blobs by name, of a narrow network."""
    shapes = dict(
        zip(("conv1", "conv2", "conv3", "conv4", "conv5"), zip(widths, (3, *widths), strict=False), strict=True)
    )
    kernels = {"conv1": 11, "conv2": 5}
    state = {f"{name}.weight": torch.randn(*shape, *2 * [kernels.get(name, 3)]) for name, shape in shapes.items()}
    state |= {"fc6.weight": torch.randn(fc, widths[-1] * 9), "fc7.weight": torch.randn(16, 2 * fc)}
    state |= {"fc8.weight": torch.randn(12, 16), "fc9.weight": torch.randn(8, 12)}
    state |= {name.replace("weight", "bias"): torch.randn(len(weight)) for name, weight in state.items()}
    for number in range(3, 8):
        width = len(state[f"{'conv' if number < 6 else 'fc'}{number}.weight"])
        scale = torch.tensor([900.0])
        state |= {f"bn{number}.0": scale * torch.randn(width), f"bn{number}.2": scale}
        state[f"bn{number}.1"] = scale * (torch.rand(width) + 0.5)
    return state


def _reference(state: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Scores of pairs of patches (N, 3, 96, 96), layer by layer with the released model's own blobs."""

    def norm(x: Tensor, number: int) -> Tensor:
        mean, variance = (state[f"bn{number}.{blob}"] / state[f"bn{number}.2"] for blob in (0, 1))
        shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
        return (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()

    def trunk(x: Tensor) -> Tensor:
        for number, (stride, padding) in enumerate([(4, 5), (1, 2), (1, 1), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, state[f"conv{number}.weight"], state[f"conv{number}.bias"], stride, padding)
            x = (norm(x, number) if number > 2 else x).relu()
            if number in (1, 2, 5):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            if number < 3:
                x = F.local_response_norm(x, 5, 1e-4, 0.75, 1.0)
        return norm(F.linear(x.flatten(1), state["fc6.weight"], state["fc6.bias"]), 6).relu()

    pair = torch.cat([trunk(first), trunk(second)], 1)
    hidden = norm(F.linear(pair, state["fc7.weight"], state["fc7.bias"]), 7).relu()
    hidden = F.linear(hidden, state["fc8.weight"], state["fc8.bias"]).relu()
    return F.linear(hidden, state["fc9.weight"], state["fc9.bias"])


@pytest.mark.parametrize("folded", [False, True])
def test_the_released_model_gives_its_own_scores(folded):
    torch.manual_seed(4)
    state = _official()
    task = _task("contextnet", 96, NET, grid=(1, 2)).eval()
    patches = 50 * torch.randn(6, 3, 96, 96)
    expected = _reference(state, patches[:3], patches[3:])
    if folded:  # the norms become part of their layers, and eps is gone
        for number in range(3, 8):
            layer = f"{'conv' if number < 6 else 'fc'}{number}"
            mean, variance, scale = (state.pop(f"bn{number}.{blob}") for blob in range(3))
            gain = (variance / scale + 1e-5).rsqrt()
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            state[f"{layer}.bias"] = gain * (state[f"{layer}.bias"] - mean / scale)
    assert task.load_official(state) == ([], [])
    scores, _ = task.judge(torch.stack([patches[:3], patches[3:]], 1).flatten(0, 1), 3)
    torch.testing.assert_close(scores[:, 0], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_official_checkpoint_that_fits_in_part():
    state = _official()
    del state["conv4.weight"]
    missing, unexpected = _task("contextnet", 96, NET).load_official(state | {"spare.weight": torch.zeros(1)})
    assert (missing, unexpected) == (["backbone.model.blocks.3.conv.weight"], ["spare.weight"])


def test_official_checkpoint_that_does_not_fit():
    with pytest.raises(CheckpointError, match=r"head.fc8.weight is \(12, 16\) in the file and \(13, 16\) here"):
        _task("contextnet", 96, NET, widths=(16, 13)).load_official(_official())
    with pytest.raises(CheckpointError, match=r"fc6.weight is \(7, 10\) in the file and \(20, 12, 3, 3\) here"):
        _task("contextnet", 96, NET).load_official({"fc6.weight": torch.zeros(7, 10)})
