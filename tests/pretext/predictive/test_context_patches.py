"""Context prediction's patches: grid, jitter, labels, and what is done to them before the network sees them."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.predictive import patch_cues
from unlabeled.pretext.predictive.context import Context, ContextConfig
from unlabeled.pretext.predictive.patch_grid import OFFSETS, GridLayout, GridViews, neighbor_pairs
from unlabeled.ssl.backbones.backbone import create_backbone

PAPER = GridLayout((3, 3), (96, 96), (48, 48), (7, 7))
NET = {"widths": (8, 12, 16, 16, 12), "embed_dim": 20}


def _task(
    name: str = "test_resnet", size: int | tuple[int, int] = 32, kwargs: dict | None = None, **settings
) -> Context:
    return Context(ContextConfig(**{"widths": (16, 12)} | settings), create_backbone(name, size=size, **(kwargs or {})))


def _patches(count: int = 40, size: tuple[int, int] = (24, 24)) -> Tensor:
    return torch.randint(0, 256, (count, 3, *size)).float()


# --- pairs and labels ------------------------------------------------------------------------------------------------


def test_labels_are_the_table_of_the_repository():
    table = {(-1, -1): 0, (0, -1): 1, (1, -1): 2, (-1, 0): 3, (1, 0): 4, (-1, 1): 5, (0, 1): 6, (1, 1): 7}
    assert dict(zip(OFFSETS, range(8), strict=True)) == table  # (to the right, down), of the second from the first
    pairs = neighbor_pairs(3, 4)
    for first, second, label in zip(*(column.tolist() for column in pairs), strict=True):
        assert table[second % 4 - first % 4, second // 4 - first // 4] == label


@pytest.mark.parametrize(("grid", "count"), [((3, 3), 40), ((2, 2), 12), ((1, 2), 2), ((2, 3), 22), ((3, 4), 58)])
def test_all_neighbors_in_both_directions(grid, count):
    found = {(a, b): label for a, b, label in zip(*(c.tolist() for c in neighbor_pairs(*grid)), strict=True)}
    assert len(found) == count
    assert all(found[a, b] + found[b, a] == 7 for a, b in found)
    assert all(a != b for a, b in found)


def test_labels_say_where_patches_lie_in_the_image():
    """Pixels that hold their own position: the image is its coordinates."""
    task = _task(jitter=0.2)
    down, across = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    image = torch.stack([down, across, torch.zeros_like(down)]).to(torch.uint8)
    found = GridViews(task.layout, (40_000, 40_000))(image)
    middles = found["patches"].float().mean((2, 3))  # (P, 3): row and column in the image
    for first, second, label in zip(*(column.tolist() for column in neighbor_pairs(3, 3)), strict=True):
        below, beside = (middles[second] - middles[first])[:2].tolist()
        right, down_label = OFFSETS[label]
        assert (round(beside / 48), round(below / 48)) == (right, down_label)  # a patch of 32 and a gap of 16


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_paper_s_numbers_for_patches_of_96_and_their_proportions():
    assert ContextConfig().layout((96, 96)) == PAPER
    assert ContextConfig().layout((32, 64)) == GridLayout((3, 3), (32, 64), (16, 32), (2, 5))
    assert PAPER.extent == (384, 384)
    assert GridLayout((2, 2), *PAPER[1:]).needs == (247, 247)  # below which the authors reject an image
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


@pytest.mark.parametrize("image", [(375, 500), (500, 333), (32, 32), (1, 3), (3, 900)])
def test_views_of_any_image(image):
    views = pickle.loads(pickle.dumps(Context.views(ContextConfig(), create_backbone("contextnet", **NET))))
    found = views(torch.randint(0, 256, (3, *image), dtype=torch.uint8))
    assert (found["patches"].shape, found["patches"].dtype) == ((9, 3, 96, 96), torch.uint8)
    assert (found["corners"].shape, found["corners"].dtype) == ((9, 2), torch.int64)


def test_images_keep_their_aspect_and_get_a_random_number_of_pixels():
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
    """Brightness rises to the right and downwards in the image, so it does in every patch."""
    views = Context.views(ContextConfig(), create_backbone("test_resnet", size=32))
    rising = torch.arange(0, 240, 4, dtype=torch.uint8)
    image = torch.stack([rising.expand(60, 60), rising[:, None].expand(60, 60), rising.expand(60, 60)])
    for _ in range(5):
        patches = views(image)["patches"].float()
        assert (patches[:, 0, :, -1] > patches[:, 0, :, 0]).all()
        assert (patches[:, 1, -1] > patches[:, 1, 0]).all()


# ----- what gives positions away --------------------------------------------------------------------------------------


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
    """Were one channel kept for a whole image, both patches of every pair would share it."""
    task = _task()
    torch.manual_seed(1)
    draw = task.draw({"patches": torch.zeros(400, 9, 3, 4, 4, dtype=torch.uint8)})
    first, second, _ = neighbor_pairs(3, 3)
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
    gray = torch.randn(2, 1, 6, 6, dtype=torch.double).expand(2, 3, 6, 6)
    torch.testing.assert_close(patch_cues.drop_green_magenta(gray), patch_cues.without_mean(gray))
    matrix = torch.eye(3, dtype=torch.double) - torch.outer(axis, axis) / 6  # the paper's B
    patches = _patches(2).double()
    expected = torch.einsum("dc,nchw->ndhw", matrix, patch_cues.without_mean(patches))
    torch.testing.assert_close(patch_cues.drop_green_magenta(patches), expected)


def test_colors_can_stay():
    task = _task(color="none", pixelate=0.0)
    patches = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = task.disguise(patches, torch.ones(4))
    centered = patches - patches.float().mean((2, 3), keepdim=True)
    torch.testing.assert_close(found, centered * 50 / centered.square().mean((1, 2, 3), keepdim=True).sqrt())


@pytest.mark.parametrize(("name", "kwargs", "rms"), [("contextnet", NET, 50), ("test_resnet", {}, 50 / (255 * 0.226))])
def test_backbones_get_the_contrast_of_their_own_images(name, kwargs, rms):
    task = _task(name, 32, kwargs)
    if name != "contextnet":
        task.backbone.set_statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = {"patches": torch.randint(0, 256, (1, 9, 3, 32, 32), dtype=torch.uint8)}
    seen = []
    first = next(module for module in task.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    task(batch)
    torch.testing.assert_close(seen[0].square().mean((1, 2, 3)).sqrt(), torch.full((9,), float(rms)), rtol=1e-5, atol=0)
