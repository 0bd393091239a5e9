from pathlib import Path

import pytest
import torch
import yaml

from unlabeled.ssl.config.composition import validate
from unlabeled.ssl.config.schema import DataConfig, PretrainConfig
from unlabeled.ssl.core.errors import CheckpointError, ConfigError
from unlabeled.ssl.data.registry import filled, source_config
from unlabeled.ssl.train.checkpoint import save_checkpoint
from unlabeled.ssl.train.run_folder import Plan, claim_folder, read_config, write_config


def config(out: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig.model_validate({"out": out, **changes})


def begin(out: Path, **changes: object) -> None:
    write_config(config(out, **changes))
    save_checkpoint(out / "checkpoints", 4, model={"w": torch.ones(1)}, optimizer={}, state={"step": 4}, keep=1)


def test_a_new_folder_is_free_and_an_own_one_resumes(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    assert claim_folder(config(out)) is None
    begin(out)
    assert claim_folder(config(out)) == out / "checkpoints" / "step_00000004"
    assert read_config(out / "config.yaml")["epochs"] == 100.0


def test_settings_that_do_not_touch_the_result_may_change(tmp_path: Path) -> None:
    begin(tmp_path / "x")
    changed = config(tmp_path / "x", engine={"workers": 7, "keep": 9}, log={"every": 3}, evaluate={"final": False})
    assert claim_folder(changed) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "rotation"}}, r"another run \(task.name: mae there, rotation here\)"),
        ({"epochs": 7}, r"another run \(epochs: 100 there, 7 here\)"),
        ({"engine": {"seed": 1}}, r"another run \(engine.seed: 0 there, 1 here\)"),
        ({"backbone": {"name": "x", "kwargs": {"a": 1}}}, r"another run \(backbone.name"),
        ({"resume": "never"}, r"already holds step_00000004; resume=auto continues"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    begin(tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        claim_folder(config(tmp_path / "x", **changes))


ONCE_COMMON = {
    "path": None, "test_path": None, "test_fraction": 0.2, "labels": False, "dataset": None, "image_column": None,
    "label_column": None, "limit": None, "count": 2048, "max_bad_fraction": 0.05,
}  # fmt: skip
"""What every run's section of data held before sources had settings of their own."""


def begin_earlier(out: Path, **data: object) -> None:
    """A run's folder as earlier versions wrote it."""
    begin(out)
    record = yaml.safe_load((out / "config.yaml").read_text())
    record["data"] = record["evaluate"]["data"] = {**ONCE_COMMON, **data}
    (out / "config.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


EARLIER = [
    ({"name": "folder", "path": "images", "labels": True}, {"path", "test_path", "test_fraction", "labels"}),
    ({"name": "shapes", "count": 64, "labels": True}, {"count"}),
    (
        {"name": "parquet", "path": "a/*.parquet", "image_column": "img"},
        {"path", "test_path", "test_fraction", "image_column", "label_column"},
    ),
]


@pytest.mark.parametrize(("data", "known"), EARLIER, ids=[str(data["name"]) for data, _ in EARLIER])
def test_an_earlier_runs_folder_is_read_and_goes_on(tmp_path: Path, data: dict[str, object], known: set[str]) -> None:
    begin_earlier(tmp_path / "x", **data)
    stored = read_config(tmp_path / "x" / "config.yaml")
    expected = {name: value for name, value in {**ONCE_COMMON, **data}.items() if name in known}
    common = {"name": data["name"], "limit": None, "max_bad_fraction": 0.05}
    assert stored["data"] == stored["evaluate"]["data"] == {**common, **expected}
    run = validate(stored, PretrainConfig)
    source_config(run.data)  # no setting is refused
    assert run.evaluate.data == run.data
    given = {name: value for name, value in data.items() if name in known | {"name"}}
    for here in (DataConfig(**given), filled(DataConfig(**given))):
        assert claim_folder(config(tmp_path / "x", data=here)) == tmp_path / "x" / "checkpoints" / "step_00000004"
    with pytest.raises(CheckpointError, match=r"holds another run \(data.name: .* there, digits here\)"):
        claim_folder(config(tmp_path / "x", data={"name": "digits"}))


def test_a_setting_of_the_source_may_not_differ(tmp_path: Path) -> None:
    begin_earlier(tmp_path / "x", name="shapes", count=64)
    with pytest.raises(CheckpointError, match=r"holds another run \(data.count: 64 there, 2048 here\)"):
        claim_folder(config(tmp_path / "x", data={"name": "shapes"}))


def test_the_folder_of_a_source_that_is_not_installed_is_read_as_it_is(tmp_path: Path) -> None:
    begin(tmp_path / "x", data={"name": "gone", "count": 3, "path": "x"})
    assert read_config(tmp_path / "x" / "config.yaml")["data"]["count"] == 3


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        claim_folder(config(tmp_path / "photos"))
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        claim_folder(config(tmp_path / "photos" / "a.jpg"))
    (tmp_path / "photos" / "config.yaml").write_text("[: not yaml")
    with pytest.raises(CheckpointError, match="is not a run's configuration"):
        claim_folder(config(tmp_path / "photos"))


def test_plan_counts_steps_and_refuses_impossible_batches(tmp_path: Path) -> None:
    plan = Plan.of(config(tmp_path, batch_size=32, epochs=2.5), images=100, world=2)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 8)
    assert plan.epoch(6) == 2.0
    with pytest.raises(ConfigError, match=r"batch_size: 256 is larger than the data \(100 images\)"):
        Plan.of(config(tmp_path), images=100, world=1)
    with pytest.raises(
        ConfigError, match=r"batch_size: 32 cannot be split over 3 processes x 1 micro-steps; .*multiple of 3"
    ):
        Plan.of(config(tmp_path, batch_size=32), images=100, world=3)
