"""What OBoW's teacher and student see."""

from __future__ import annotations

import pickle

import pytest
import torch

from unlabeled.pretext.obow import OBoW, OBoWConfig
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.core.errors import ConfigError

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def resnet(size: int | tuple[int, int], **arguments) -> Backbone:
    return create_backbone("resnet18", size=size, **({"channels": [8, 8, 16, 16], "stem_width": 8} | arguments))


def views_of(backbone: Backbone, **settings):
    return pickle.loads(pickle.dumps(OBoW.views(OBoWConfig(words=4, **settings), backbone)))


def positions(height: int, width: int) -> torch.Tensor:
    """Image (3, H, W) whose red and green are the row and the column."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)])


def test_sizes_are_those_of_the_paper_at_224_pixels():
    sizes = views_of(resnet(224)).sizes
    assert sizes == ((224, 224), (160, 160), (96, 96), (256, 256), 24, None)


@pytest.mark.parametrize(
    ("size", "stride", "crops", "patches", "base", "shift"),
    [
        (32, 8, (24, 24), (16, 16), (37, 37), 3),
        (64, 32, (32, 32), (32, 32), (73, 73), 7),
        ((96, 160), 8, (72, 112), (40, 72), (110, 183), 10),
    ],
)
def test_sizes_follow_the_input_in_multiples_of_the_stride(size, stride, crops, patches, base, shift):
    views = views_of(resnet(size, output_stride=stride))
    assert views.sizes[1:5] == (crops, patches, base, shift)
    for image in ((40, 57), (200, 90)):
        seen = views(torch.randint(0, 256, (3, *image), dtype=torch.uint8))
        assert seen["image"].shape == (3, *views.sizes.teacher)
        assert seen["crops"].shape == (2, 3, *crops)
        assert seen["patches"].shape == (5, 3, *patches)
        assert {view.dtype for view in seen.values()} == {torch.uint8}


def test_patches_of_a_transformer_fit_its_patch():
    backbone = create_backbone("vit_tiny_patch16_224", size=224, dynamic_img_size=True, **(VIT | {"patch_size": 14}))
    assert views_of(backbone).sizes[:3] == ((224, 224), (154, 154), (98, 98))


def test_a_network_of_one_size_shows_the_student_that_size(caplog):
    backbone = create_backbone("vit_tiny_patch16_224", size=32, **VIT)
    with caplog.at_level("WARNING"):
        task = OBoW(OBoWConfig(words=4), backbone)
    assert "takes images of 32x32 only" in caplog.text
    assert "dynamic_img_size=true may help" in caplog.text
    sizes = views_of(backbone).sizes
    assert (sizes.crops, sizes.patches) == ((32, 32), (32, 32))
    seen = OBoW.views(task.config, backbone)(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert task({key: torch.stack([view, view]) for key, view in seen.items()}).loss.isfinite()


@pytest.mark.parametrize("field", ["image_crops", "patches"])
def test_a_size_that_the_network_cannot_take_is_refused(field):
    backbone = create_backbone("vit_tiny_patch16_224", size=32, **VIT)
    expected = rf"task.{field}.size: vit_tiny_patch16_224 cannot take images of 16x16 \(.*\); set it to \[32, 32\], or"
    with pytest.raises(ConfigError, match=expected):
        OBoW(OBoWConfig(words=4, **{field: {"size": 16}}), backbone)
    dynamic = create_backbone("vit_tiny_patch16_224", size=32, dynamic_img_size=True, **VIT)
    assert OBoW(OBoWConfig(words=4, **{field: {"size": 16}}), dynamic)


def test_windows_must_fit():
    with pytest.raises(ConfigError, match=r"task.patches.base: patches of 16x16, shifted by up to 9, do not fit"):
        views_of(resnet(32, output_stride=8), patches={"base": 24, "shift": 9})


def test_switched_off_views_are_missing():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    backbone = resnet(32, output_stride=8)
    assert views_of(backbone, patches={"number": 0})(image).keys() == {"image", "crops"}
    assert views_of(backbone, image_crops={"number": 0})(image).keys() == {"image", "patches"}


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 192)])
def test_teacher_sees_the_center_in_its_own_colors(height, width):
    views = views_of(resnet((height * 7 // 8, width * 7 // 8)))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    inner = image[:, height // 16 : -(height // 16), width // 16 : -(width // 16)]
    inner.copy_(positions(*inner.shape[1:]))
    flipped = 0
    for _ in range(20):
        seen = views._teacher_view(image)
        upright = torch.equal(seen, inner)
        assert upright or torch.equal(seen, inner.flip(2))
        flipped += not upright
    assert 3 < flipped < 17


def test_windows_are_cut_on_a_grid_of_three_with_a_shift_each():
    views = views_of(resnet(224), patches={"number": 9})
    base = positions(256, 256)
    seen = set()
    for _ in range(40):
        windows = views._cut(base)
        corners = sorted((int(one[0, 0, 0]), int(one[1, 0, 0])) for one in windows)
        for window in windows:
            top, left = int(window[0, 0, 0]), int(window[1, 0, 0])
            assert torch.equal(window, base[:, top : top + 96, left : left + 96])
            assert top % 68 <= 24
            assert left % 68 <= 24
            seen |= {top % 68, left % 68}
        assert sorted((top // 68, left // 68) for top, left in corners) == [(i, j) for i in range(3) for j in range(3)]
    assert seen == set(range(25))


def test_kept_windows_are_drawn_again_for_each_image():
    views = views_of(resnet(224))
    kept = {tuple(int(one[0, 0, 0]) // 68 for one in views._cut(positions(256, 256))) for _ in range(20)}
    assert len(kept) > 10
    assert {len(one) for one in kept} == {5}


def test_windows_share_their_colors():
    always = {"jitter": 1.0, "gray": 0.0, "hue": 0.5}
    views = views_of(resnet(224), patches={"colors": always})
    image = torch.tensor([200, 90, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 300, 300)
    seen = [views(image)["patches"] for _ in range(3)]
    for windows in seen:
        assert (windows == windows[:1, :, :1, :1]).all()
    assert len({tuple(windows[0, :, 0, 0].tolist()) for windows in seen}) == 3
