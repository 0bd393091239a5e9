import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ConfigDict
from torch import nn

import unlabeled
from unlabeled.eval.evaluators.knn import KnnConfig
from unlabeled.pretext.registry import task_names
from unlabeled.ssl.config.composition import GROUPS, config_folder, options, parse, sweep
from unlabeled.ssl.config.schema import (
    DataConfig,
    DoctorRun,
    EvaluateConfig,
    EvaluateRun,
    OptimConfig,
    PretrainConfig,
    ScheduleConfig,
)
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.registry import REGISTRY, register_source, source_names
from unlabeled.ssl.data.source import SourceConfig
from unlabeled.ssl.data.sources.digits import DigitsSource
from unlabeled.ssl.data.sources.folder import FolderConfig
from unlabeled.workflows.settings import compose_settings, data_values, tiny


def compose(*overrides: str) -> PretrainConfig:
    return compose_settings("pretrain", overrides, PretrainConfig)


def test_the_words_of_the_readme() -> None:
    config = compose(
        "task=mae",
        "data=folder",
        "data.path=some/images",
        "backbone=vit_small_patch16_224",
        "out=runs/x",
        "epochs=100",
    )
    assert config.task == {"name": "mae"}
    assert config.backbone.name == "vit_small_patch16_224"
    assert config.data.model_extra == FolderConfig(path=Path("some/images")).model_dump(exclude={"limit"})
    assert str(config.out) == "runs/x"
    assert config.epochs == 100


def test_a_task_brings_its_published_recipe_and_words_override_it() -> None:
    rotation = compose("task=rotation")
    assert (rotation.optim.name, rotation.optim.lr, rotation.optim.weight_decay) == ("sgd", 0.1, 5e-4)
    assert rotation.schedule.milestones == (60, 120, 160)
    assert compose("task=rotation", "optim.lr=0.2").optim.lr == 0.2
    assert compose("optim.lr=0.2", "task=rotation").optim.lr == 0.2
    assert compose("task=mae").optim.betas == (0.9, 0.95)


def test_fields_of_a_section_can_be_set_along_with_its_short_form() -> None:
    config = compose("backbone=resnet18", "backbone.size=[64,96]", "backbone.kwargs.stem_width=32")
    assert config.backbone.name == "resnet18"
    assert config.backbone.size == (64, 96)
    assert config.backbone.kwargs == {"stem_width": 32}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task=rotatoin", r"task: 'rotatoin' is not a pretext task; did you mean 'rotation'\?"),
        ("optim.lrr=1", r"optim.lrr: there is no such setting in optim; did you mean 'lr'\?"),
        ("epoch=3", r"epoch: there is no such setting; did you mean 'epochs'\?"),
        ("engin.seed=1", r"engin: there is no such setting; did you mean 'engine'\?"),
        ("epochs=ten", r"epochs: 'ten' is not possible; give a valid number"),
        ("epochs=0", r"epochs: 0 is not possible; give greater than 0"),
        ("engine.precision=fp8", r"engine.precision: 'fp8' is not possible; choose 'fp32', 'bf16' or 'fp16'"),
        ("engine.workers=-1", r"engine.workers: -1 is not possible; give greater than or equal to 0"),
        ("data=fodler", r"data: 'fodler' is not a data source; did you mean 'folder'\?"),
        ("data=./images", r"data: './images' is a path; write data=folder data.path=./images"),
        ("data.pth=x", r"^data.pth: there is no such setting in data; did you mean 'path'\?$"),
        ("data.count=3", r"^data.count: 3 has no effect with data=folder, it is a setting of shapes; remove it$"),
        (
            "data.dataset=x",
            r"^data.dataset: x has no effect .* it is a setting of hf, torchvision, voc; remove it$",
        ),
        ("data.labels=perhaps", r"^data.labels: 'perhaps' is not possible; give a valid boolean"),
        ("data.path=[1]", r"^data.path: \[1\] is not possible; give "),
        ("data.limit=0", r"^data.limit: 0 is not possible; give greater than or equal to 1$"),
        ("evaluate.data=fodler", r"^evaluate.data: 'fodler' is not a data source; did you mean 'folder'\?$"),
        ("evaluate.data=a/b", r"^evaluate.data: 'a/b' is a path; write evaluate.data=folder evaluate.data.path=a/b$"),
        (
            "evaluate.data={name: digits, cuont: 3}",
            r"^evaluate.data.cuont: there is no such setting in evaluate.data",
        ),
        ("evaluate.data={name: digits, count: 3}", r"^evaluate.data.count: 3 has no effect with evaluate.data=digits"),
        ("evaluate.evaluators=knn", r"^evaluate.evaluators: 'knn' is not possible; choose 'all' or a list$"),
        ("evaluate.recalibrate=x", r"^evaluate.recalibrate: 'x' is not possible; choose 'auto' or a valid boolean$"),
        ("evaluate.evaluators=[3]", r"^evaluate.evaluators.0: 3 is not possible; give a valid string$"),
        ("recipe=cifar10/nothing", r"recipe: 'cifar10/nothing' does not exist"),
        ("epochs", r"'epochs' is not a setting; write key=value"),
        ("optim.lr=[1,", r"'optim.lr=\[1,' cannot be read"),
        ("optim.lr=1e-3,1e-4", r"asks for a sweep; add --multirun"),
    ],
)
def test_a_fault_is_one_line_that_names_field_value_and_remedy(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose(word)
    assert "\n" not in str(caught.value)


def test_every_option_of_every_group_composes() -> None:
    overrides = [(group, option) for group in GROUPS for option in options(group)]
    overrides += [("task", name) for name in task_names()] + [("data", name) for name in source_names()]
    assert len(overrides) > 8
    for group, option in overrides:
        compose(f"{group}={option}")


def test_sweep_is_the_product_of_its_choices() -> None:
    runs = list(sweep(["task=mae", "optim.lr=1e-3,1e-4", "engine.seed=range(2)"]))
    assert [label for _, label in runs] == [
        "optim.lr=0.001,engine.seed=0",
        "optim.lr=0.001,engine.seed=1",
        "optim.lr=0.0001,engine.seed=0",
        "optim.lr=0.0001,engine.seed=1",
    ]
    assert compose(*runs[3][0]).optim.lr == 1e-4


def test_python_settings_mean_the_same_as_words() -> None:
    values = {
        "task": {"name": "mae", "mask_ratio": 0.5},
        "data": {"name": "folder", "path": Path("/a b/c's"), "labels": True},
        "backbone": {"name": "resnet18", "kwargs": {"stem_width": 32}},
        "optim__lr": 1e-3,
        "engine": {"clip": None},
        "schedule": ScheduleConfig(milestones=(1, 2)),
    }
    config = compose_settings("pretrain", [], PretrainConfig, values)
    assert config.task == {"name": "mae", "mask_ratio": 0.5}
    assert config.data.model_extra["path"] == Path("/a b/c's")
    assert config.data.model_extra["labels"] is True
    assert config.optim.lr == 1e-3
    assert config.schedule.milestones == (1, 2)
    assert config.backbone.kwargs == {"stem_width": 32}


@pytest.mark.parametrize(
    "name",
    ["plain", "with space", 'it\'s "quoted"', "grün/日本", "two\nlines", "a=b", "a,b", "${x}", "[1", "~x", "1e-3"],
)
def test_any_path_passes(name: str) -> None:
    for path in (Path(name), name):
        config = compose_settings("pretrain", [], PretrainConfig, {"out": path, "data": {"path": path}})
        assert (config.out, config.data.path) == (Path(name), Path(name))


def test_values_are_never_parsed() -> None:
    config = compose_settings(
        "pretrain",
        [],
        PretrainConfig,
        {
            "log": {"wandb": "1e-3"},
            "engine.clip": None,
            "epochs": np.float32(2),
            "batch_size": np.int64(8),
            "optim": OptimConfig(betas=(0.9, 0.99), kwargs={"eps": np.float64(1e-6)}),
            "optim__lr": torch.tensor(0.5),
            "evaluate": EvaluateConfig(knn=KnnConfig(k=(5,)), evaluators=("knn",)),
            "evaluate__data": "digits",
            "task": {"name": "multi", "tasks": ({"name": "mae"}, {"name": "rotation"})},
        },
    )
    assert config.log.wandb == "1e-3"
    assert (config.epochs, config.batch_size, config.optim.lr, config.optim.betas) == (2, 8, 0.5, (0.9, 0.99))
    assert type(config.optim.kwargs["eps"]) is float
    assert config.evaluate.data is not None
    assert (config.evaluate.data.name, config.evaluate.evaluators) == ("digits", ("knn",))
    assert config.evaluate.model_extra == {"knn": {"k": (5,)}}, "checked by the evaluator itself"
    assert [task["name"] for task in config.task["tasks"]] == ["mae", "rotation"]


def test_objects_pass_and_files_name_them() -> None:
    smooth = functools.partial(nn.LayerNorm, eps=1e-5)
    kwargs = {"norm_layer": smooth, "act_layer": nn.GELU, "init": Path("x"), "depths": (1, 2), "made": object()}
    config = compose_settings("pretrain", [], PretrainConfig, {"backbone": {"name": "test_vit", "kwargs": kwargs}})
    assert config.backbone.kwargs["norm_layer"] is smooth
    written = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))["backbone"]["kwargs"]
    assert written["act_layer"] == "python:torch.nn.modules.activation:GELU"
    assert written["norm_layer"].startswith("python:functools:partial functools.partial(<class 'torch.nn.modules.nor")
    assert (written["init"], written["depths"], written["made"]) == ("x", [1, 2], "python:builtins:object")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__lr": 1, "optim.lr": 2}, r"^optim.lr: given twice, as optim__lr and as optim.lr; give it once$"),
        ({"optim": 5, "optim__lr": 1}, r"^optim: given twice, 5 and \{'lr': 1\}; give it once$"),
        ({"optim": 5}, r"^optim: 5 is not possible; give a mapping of settings"),
        ({"optim": {1: 2}}, r"^optim.1: 1 is not the name of a setting; names are text"),
        ({"optim": {"lrr": 1}}, r"^optim.lrr: there is no such setting in optim; did you mean 'lr'\?"),
        ({"optim__": 1}, r"^optim.: there is no such setting in optim"),
        ({"optm__lr": 1}, r"^optm: there is no such setting; did you mean 'optim'\?"),
        ({"task": "a b,c"}, r"^task: 'a b,c' is not a pretext task"),
        ({"task": None}, r"^task: None is not possible"),
        ({"recipe": "x=y"}, r"^recipe: 'x=y' does not exist"),
        ({"data": {"name": "fol=der"}}, r"^data: 'fol=der' is not a data source; did you mean 'folder'\?"),
        ({"out": nn.Sequential(nn.ReLU())}, r"^out: Sequential\( \(0\): ReLU\(\) \) is not possible"),
    ],
)
def test_a_fault_of_python_values_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_settings("pretrain", [], PretrainConfig, values)
    assert "\n" not in str(caught.value)


def test_a_key_that_reaches_inside_stands_above_the_section() -> None:
    section, inside = {"optim": OptimConfig(lr=2, name="sgd")}, {"optim__lr": 1}
    for values in ({**section, **inside}, {**inside, **section}):
        config = compose_settings("pretrain", [], PretrainConfig, values)
        assert (config.optim.lr, config.optim.name) == (1, "sgd")
    both = {"backbone": "resnet18", "backbone__name": "resnet34", "task__mask_ratio": 0.5, "task": "mae"}
    config = compose_settings("pretrain", [], PretrainConfig, both)
    assert (config.backbone.name, config.task) == ("resnet34", {"name": "mae", "mask_ratio": 0.5})


def test_data_is_a_path_a_name_or_settings() -> None:
    assert data_values("digits") == {"name": "digits"}
    assert data_values("a folder") == data_values(Path("a folder")) == {"name": "folder", "path": Path("a folder")}
    assert data_values(DataConfig(name="shapes", count=3)) == {"name": "shapes", "count": 3}
    assert data_values(DataConfig(labels=True)) == {"name": "folder", "labels": True}
    with pytest.raises(ConfigError, match=r"data: \['a', 'b'\] is not possible; give a path, the name of a source"):
        data_values(["a", "b"])


def test_what_is_no_network_no_run_and_no_data_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^target: Linear is not possible; build it: Linear\(\.\.\.\)$"):
        unlabeled.evaluate(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^run: Linear\(.*\) is not possible; give a run folder, and its model as"):
        unlabeled.export(nn.Linear(2, 2), "x.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^backbone: \[\] is not an nn.Module; build it, and give that$"):
        unlabeled.load_weights([], "x.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^classes: 0 is not possible; give a number from 1$"):
        unlabeled.create_classifier(nn.Linear(2, 2), classes=0)
    with pytest.raises(ConfigError, match=r"^data: \{'name': 'shapes'\} is not possible; give an unlabeled.DataConfig"):
        unlabeled.open_source({"name": "shapes"})  # type: ignore[arg-type]


def test_evaluate_and_doctor_take_the_same_data_words() -> None:
    evaluated = compose_settings("evaluate", ["target=resnet18", "data=shapes", "data.count=64"], EvaluateRun)
    assert evaluated.data is not None
    assert (evaluated.data.name, evaluated.data.model_extra) == ("shapes", {"count": 64})
    assert compose_settings("evaluate", ["target=runs/x"], EvaluateRun).data is None
    assert compose_settings("doctor", ["data=digits"], DoctorRun).data.name == "digits"


def test_the_data_for_evaluation_is_a_name_alone_or_a_name_and_settings() -> None:
    config = compose("evaluate.data=shapes", "evaluate.data.count=8")
    assert config.evaluate.data is not None
    assert (config.evaluate.data.name, config.evaluate.data.model_extra) == ("shapes", {"count": 8})
    folder = compose("evaluate.data=folder", "evaluate.data.path=x", "evaluate.data.labels=true").evaluate.data
    assert folder is not None
    assert folder.model_extra is not None
    assert (folder.model_extra["path"], folder.model_extra["labels"]) == (Path("x"), True)
    assert compose().evaluate.data is None


def test_a_run_says_all_settings_of_its_source_and_none_of_others() -> None:
    written = compose("data=torchvision", "data.path=x", "evaluate.data=shapes").model_dump(mode="json")
    assert written["data"] == {
        "name": "torchvision", "limit": None, "max_bad_fraction": 0.05, "path": "x", "dataset": "CIFAR10",
        "test_fraction": 0.2,
    }  # fmt: skip
    assert written["evaluate"]["data"]["count"] == 2048


def test_a_recipe_that_begins_with_another_one_has_its_task_and_data() -> None:
    config = compose("recipe=cifar10/rotation_resnet18_efficienttrain", "data.path=cifar10")
    assert (config.task["name"], config.data.name, config.engine.curriculum) == (
        "rotation", "parquet", "efficienttrain"
    )  # fmt: skip


def test_tiny_mode_takes_what_the_source_makes_smaller() -> None:
    config = compose("data=shapes", "data.count=9000")
    assert tiny(config)["data"] == DataConfig(name="shapes", limit=64, count=256)
    assert tiny(compose("data=digits"))["data"] == DataConfig(name="digits", limit=64)


class Opaque:
    """A value that no word of a command line could name."""


class OpaqueConfig(SourceConfig):
    """Settings with such a value."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    made_by: Opaque
    """Required."""


class OpaqueSource(DigitsSource):
    Config = OpaqueConfig


def test_a_registered_source_is_chosen_by_its_name_and_takes_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "targets", dict(REGISTRY.targets))
    monkeypatch.setitem(sys.modules, "opaque", sys.modules[__name__])
    register_source("opaque", "opaque:OpaqueSource")
    value = Opaque()
    config = compose_settings("pretrain", [], PretrainConfig, {"data": {"name": "opaque", "made_by": value}})
    assert config.data.model_extra == {"made_by": value}
    with pytest.raises(ConfigError, match=r"^data.made_by: not given; set data.made_by=\.\.\.$"):
        compose("data=opaque")
    with pytest.raises(ConfigError, match=r"^data: 'opaque' is already opaque:OpaqueSource; give x:Y another name$"):
        register_source("opaque", "x:Y")


def test_a_word_that_hydra_would_misread_is_kept() -> None:
    assert parse(["data.path='a=b, c'"])[0].value() == "a=b, c"
    assert config_folder().name == "configs"
