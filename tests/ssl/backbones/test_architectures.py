"""The adapter over every architecture module of timm: the small model of each in ``architectures.json``."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import timm
import torch

from unlabeled.ssl.backbones.backbone import Backbone, create_backbone

_FILE = resources.files("unlabeled.workflows.compatibility").joinpath("architectures.json")
TABLE: dict[str, dict[str, Any]] = json.loads(_FILE.read_text())


def test_every_architecture_module_of_timm_is_in_the_table():
    assert sorted(TABLE) == sorted(timm.list_modules())
    for module, entry in TABLE.items():
        assert entry["name"] in timm.list_models(module=module)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(TABLE))
def test_adapter_tells_the_truth(module):
    entry = TABLE[module]
    backbone = create_backbone(entry["name"], size=entry["size"], **entry.get("kwargs", {})).eval()
    size = entry["size"]
    images = torch.randn(2, 3, size, size)

    assert backbone.input_size == (size, size)
    assert all(backbone.missing_reason(capability) is None for capability in ("pooled", "dense_map"))
    features = backbone.pooled(images)
    assert features.shape == (2, backbone.embed_dim)
    assert features.isfinite().all()
    features.square().sum().backward()
    reached = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert backbone.reached_by_pooled() == reached
    _check_maps(backbone, images)
    _check_layers(backbone)


@torch.no_grad()
def _check_maps(backbone: Backbone, images: torch.Tensor) -> None:
    side = images.shape[-1]
    count = len(backbone.stages)
    assert count >= 3 or "depth" in backbone.kwargs
    maps = backbone.maps(images, range(count))
    for found, stage in zip(maps, backbone.stages, strict=True):
        assert found.shape[:2] == (2, stage.channels)
        for length in found.shape[2:]:
            # networks without padding (Inception) lose up to four places at an edge
            assert length == pytest.approx(side / stage.stride, abs=4.1 if side >= 128 else 3.1, rel=0.1)
    backwards = backbone.maps(images, [-1, 0])
    assert torch.equal(backwards[0], maps[-1])
    assert torch.equal(backwards[1], maps[0])
    assert torch.equal(backbone.map(images), maps[-1])


def _check_layers(backbone: Backbone) -> None:
    layers = list(backbone.parameter_layers().values())
    assert backbone.depth >= 1
    assert layers == sorted(layers)
    assert set(range(1, backbone.depth + 1)) <= set(layers) <= set(range(backbone.depth + 2))
    assert set(backbone.parameter_layers()) == {name for name, _ in backbone.named_parameters()}
