"""Jigsaw puzzles: the contract, and what is particular to the task."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

import unlabeled
from unlabeled import ConfigError
from unlabeled.testing import TaskCase, check_task
from unlabeled_jigsaw.orders import distant_orders, shuffled
from unlabeled_jigsaw.task import Jigsaw, JigsawConfig, JigsawViews

SMALL = {"grid": 2, "permutations": 24}


def test_contract() -> None:
    check_task(Jigsaw, settings=SMALL)


def test_it_trains_with_its_own_recipe(tmp_path: Path) -> None:
    unlabeled.register_task("jigsaw", "unlabeled_jigsaw.task:Jigsaw")
    result = unlabeled.pretrain(
        task={"name": "jigsaw", **SMALL},
        backbone={"name": "resnet18", "size": 32, "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}},
        data={"name": "shapes", "count": 64},
        out=tmp_path / "run",
        debug=True,
        optim__weight_decay=1e-4,
    )
    assert len(result.metrics) == 4
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["optim"]["name"], config["optim"]["lr"], config["schedule"]["gamma"]) == ("sgd", 0.01, 0.1)
    assert config["optim"]["weight_decay"] == 1e-4, "what is set counts more"


def test_a_tile_is_where_its_order_says() -> None:
    tiles = torch.arange(8).view(2, 4, 1)
    orders = torch.tensor([[3, 0, 1, 2], [0, 1, 3, 2]])
    found = shuffled(tiles, orders)
    assert found.flatten(1).tolist() == [[3, 0, 1, 2], [4, 5, 7, 6]]
    assert torch.equal(shuffled(found, orders.argsort(1)), tiles)


@pytest.mark.parametrize(("tiles", "count", "least"), [(4, 24, 2), (9, 100, 5), (9, 1000, 3)])
def test_orders_are_permutations_far_from_each_other(tiles: int, count: int, least: int) -> None:
    orders = distant_orders(tiles, count)
    assert torch.equal(orders.sort(1).values, torch.arange(tiles).expand(count, tiles))
    distances = (orders[:, None] != orders[None]).sum(-1) + tiles * torch.eye(count, dtype=torch.int64)
    assert distances.min() >= least
    assert torch.equal(orders, distant_orders(tiles, count))


def test_more_orders_than_there_are_is_said() -> None:
    with pytest.raises(ConfigError, match=r"task.permutations: 25 is more than 4 tiles have; set 24 or fewer"):
        distant_orders(4, 25)


def test_tiles_lie_in_their_cells_with_a_gap_between() -> None:
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)  # a pixel says where it lies
    tiles = JigsawViews(JigsawConfig(gray=0), (64, 64))(image)["tiles"]
    assert tiles.shape == (9, 3, 64, 64)
    corners = tiles[:, :2, 0, 0].view(3, 3, 2).int()
    assert ((corners[1:, :, 0] - corners[:-1, :, 0]).sub(75).abs() <= 11).all()
    assert ((corners[:, 1:, 1] - corners[:, :-1, 1]).sub(75).abs() <= 11).all()


def test_tiles_may_be_wider_than_high() -> None:
    tiles = JigsawViews(JigsawConfig(grid=2), (32, 48))(torch.zeros(3, 40, 90, dtype=torch.uint8))["tiles"]
    assert tiles.shape == (4, 3, 32, 48)


def test_loss_is_the_logarithm_of_the_orders_when_nothing_is_known() -> None:
    case = TaskCase.of(Jigsaw, settings=SMALL)
    task = case.task()
    torch.nn.init.zeros_(task.get_parameter("head.2.weight"))
    torch.nn.init.zeros_(task.get_parameter("head.2.bias"))
    assert task(case.batch(task)).loss.item() == pytest.approx(math.log(24))


def test_brightness_and_contrast_of_a_tile_do_not_matter() -> None:
    case = TaskCase.of(Jigsaw, settings=SMALL)
    task = case.task()
    tiles = case.batch(task)["tiles"].clamp(0, 100)
    brighter = tiles.clone()
    brighter[:, 1] = 2 * tiles[:, 1] + 55
    assert torch.allclose(task.scores(tiles), task.scores(brighter), atol=1e-3)
