"""Images in the page and in the run folder."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.report import images
from unlabeled.report.images import data_uri, read_images, save_images, shown_images
from unlabeled.ssl.core.errors import DataError


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def decoded(uri: str) -> torch.Tensor:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_images_come_back_from_the_run_as_they_were(tmp_path: Path) -> None:
    drawn = {"views": noise(12, 30), "masked/../patches": noise(8, 8, 1)}
    save_images(tmp_path, drawn)
    found = read_images(tmp_path)
    assert list(found) == ["masked_.._patches", "views"]
    assert torch.equal(found["views"], drawn["views"])
    save_images(tmp_path, {"others": noise(8, 8)})
    assert list(read_images(tmp_path)) == ["others"]
    assert read_images(tmp_path / "nowhere") == {}
    (tmp_path / "pictures" / "others.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"report: .*others\.png cannot be read .*; remove it"):
        read_images(tmp_path)


def test_small_images_are_kept_and_photographs_are_packed() -> None:
    assert torch.equal(decoded(data_uri(noise(32, 32))), noise(32, 32))
    assert data_uri(noise(200, 300)).startswith("data:image/jpeg")
    flat = torch.full((3, 200, 300), 7, dtype=torch.uint8)
    assert data_uri(flat).startswith("data:image/png")
    assert torch.equal(decoded(data_uri(flat)), flat)


def test_many_large_images_are_shrunk_together_until_the_page_is_light(monkeypatch: pytest.MonkeyPatch) -> None:
    few = shown_images({"task": {"views": noise(120, 600)}})["task"][0]
    assert decoded(few["uri"]).shape == (3, 120, 600)
    assert few["wide"]
    monkeypatch.setattr(images, "_BUDGET", 220_000)
    many = shown_images({"task": {str(seed): noise(400, 400, seed) for seed in range(2)}, "maps": {}})
    assert sum(len(image["uri"]) for image in many["task"]) <= 220_000
    assert [decoded(image["uri"]).shape for image in many["task"]] == [(3, 320, 320)] * 2
    assert many["maps"] == []
