"""Settings under the names of version 0.1.0, in every place where a user may have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from unlabeled.ssl.config.composition import sweep
from unlabeled.ssl.config.renamed import RENAMED, new_name, with_new_names
from unlabeled.ssl.train.run_folder import read_config
from unlabeled.workflows.evaluate import evaluate_config
from unlabeled.workflows.finetune.run import finetune_config
from unlabeled.workflows.pretrain import pretrain_config

BASE = ["task=rotation", "data=digits", "backbone=nin_cifar", "evaluate.evaluators=[spectrum]"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("network.kwargs.depth", "model.kwargs.depth"),
        ("official", "reference"),
        ("evaluate.spectrum.pictures", "evaluate.spectrum.images"),
        ("data.network", "data.network"),
        ("officially", "officially"),
    ],
)
def test_a_key_gets_its_present_name(old: str, new: str) -> None:
    assert new_name(old) == new


def test_no_present_name_is_an_old_one() -> None:
    assert not set(RENAMED) & set(RENAMED.values())


def test_overrides_mean_the_same_under_both_names() -> None:
    old = pretrain_config(
        [*BASE, "official=a.pth", "evaluate.recalibrate_pictures=7", "++evaluate.spectrum.pictures=99"]
    )
    new = pretrain_config([*BASE, "reference=a.pth", "evaluate.recalibrate_images=7", "evaluate.spectrum.images=99"])
    assert old == new
    assert (new.reference, new.evaluate.recalibrate_images) == (Path("a.pth"), 7)


def test_sections_as_a_whole_and_values_from_python() -> None:
    assert pretrain_config([*BASE, "evaluate={recalibrate_pictures: 5}"]).evaluate.recalibrate_images == 5
    assert pretrain_config(BASE, {"evaluate": {"recalibrate_pictures": 6}}).evaluate.recalibrate_images == 6
    assert pretrain_config(BASE, {"evaluate__recalibrate_pictures": 8}).evaluate.recalibrate_images == 8


def test_finetune_and_evaluate() -> None:
    tuned = finetune_config("resnet18", ["data=digits", "network.drop_path=0.2"], {"network": {"size": 32}})
    assert (tuned.model.drop_path, tuned.model.size) == (0.2, 32)
    evaluated = evaluate_config("runs/poa", ["data=digits", "sizes=all", "beside=[runs/alone]"])
    assert evaluated.versus == (Path("runs/alone"),)


def test_a_sweep_is_labeled_by_the_present_name() -> None:
    labels = [label for _, label in sweep(["network.drop_path=0.1,0.2"])]
    assert labels == ["model.drop_path=0.1", "model.drop_path=0.2"]


def test_a_stored_configuration_is_read_under_present_names(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"task": {"name": "mae"}, "evaluate": {"recalibrate_pictures": 3}}))
    assert read_config(file)["evaluate"] == {"recalibrate_images": 3}


def test_where_both_names_meet_the_new_one_counts() -> None:
    found = with_new_names({"model": {"size": 32}, "network": {"size": 64, "drop_path": 0.1}})
    assert found == {"model": {"size": 32, "drop_path": 0.1}}
