"""Every setting says what it means; types, defaults and units are those of the fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from unlabeled.eval.registry import evaluator_names
from unlabeled.pretext.registry import task_class, task_names
from unlabeled.ssl.config.docstrings import field_texts, first_sentence, split_unit
from unlabeled.ssl.config.readable import choices_in, readable_type, typed_value
from unlabeled.ssl.config.schema import Depth, Size, Sizes
from unlabeled.ssl.core.errors import ConfigError
from unlabeled.ssl.data.registry import source_names
from unlabeled.ssl.task import TaskConfig
from unlabeled.workflows.describe_settings import (
    COMMANDS,
    GROUPS,
    command_settings,
    describe,
    evaluator_settings,
    group_settings,
    overview,
    source_settings,
    task_recipe,
    task_settings,
)
from unlabeled.workflows.finetune.config import FinetuneConfig, FinetuneOptim
from unlabeled.workflows.pretrain import pretrain_config

TOPICS = [
    *dict.fromkeys([*GROUPS, *COMMANDS]),
    *(f"task={name}" for name in task_names()),
    *(f"evaluator={name}" for name in evaluator_names()),
    *(f"data={name}" for name in source_names()),
]
PRIVATE = re.compile(
    r"\bpictures?\b|colour|\banew\b|\bbeside\b|normalis|\bhidden (place|cell|patch)|\bevidence\b|``|None"
)
"""Words that users should not meet in the meaning of a setting, and marks that a terminal does not render."""


@pytest.mark.parametrize("topic", TOPICS)
def test_every_setting_says_what_it_means(topic: str) -> None:
    for table in describe(topic):
        assert table.summary.endswith("."), table.summary
        assert [one.name for one in table.settings if not one.meaning] == []
        for one in table.settings:
            assert one.type
            assert not PRIVATE.search(one.meaning), f"{one.name}: {one.meaning}"
            assert one.meaning[0].isupper() or re.match(r"\w+:|timm|torchvision", one.meaning), one.meaning
            assert one.meaning.endswith((".", ")")) or "See: unlabeled settings" in one.meaning, one.meaning
        names = [one.name for one in table.settings]
        assert len(set(names)) == len(names)


def found(settings: list[Any], name: str) -> tuple[str, str, str]:
    one = next(one for one in settings if one.name == name)
    return one.type, one.default, one.unit


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        (lambda: group_settings("optim"), "optim.lr", ("number", "1.5e-4", "")),
        (lambda: group_settings("optim"), "optim.lr_scaling", ("one of: linear, sqrt, none", "linear", "")),
        (lambda: group_settings("schedule"), "schedule.milestones", ("list of numbers", "[]", "epochs")),
        (lambda: group_settings("engine"), "engine.sync_bn", ("true/false or null", "null", "")),
        (lambda: group_settings("backbone"), "backbone.size", ("integer or two integers or null", "null", "pixels")),
        (lambda: group_settings("run"), "batch_size", ("integer", "256", "images")),
        (lambda: command_settings("finetune"), "optim.lr", ("number", "5e-4", "")),
        (lambda: command_settings("finetune"), "target", ("text", "required", "")),
        (lambda: command_settings("pretrain"), "out", ("path", "runs/pretrain", "")),
        (lambda: command_settings("gauntlet"), "backbones[N].target", ("text", "required", "")),
        (lambda: command_settings("export"), "depth", ("integer or list of integers or null", "null", "blocks")),
        (lambda: task_settings("mae"), "task.decoder.depth", ("integer", "8", "blocks")),
        (lambda: task_settings("dino"), "task.first_colors.blur", ("number", "1", "")),
        (lambda: task_settings("simmim"), "task.mask_ratio", ("number", "0.6", "fraction")),
        (lambda: evaluator_settings("knn"), "evaluate.knn.k", ("list of integers", "[10,20,100,200]", "neighbors")),
        (lambda: source_settings("folder"), "data.labels", ("true/false", "false", "")),
        (lambda: source_settings("shapes"), "data.count", ("integer", "2048", "images")),
    ],
)
def test_type_default_and_unit(settings: Any, name: str, expected: tuple[str, str, str]) -> None:
    assert found(settings(), name) == expected


def test_a_shared_group_is_one_line_of_a_command() -> None:
    settings = command_settings("pretrain")
    assert [one.name for one in settings if one.name.startswith("engine")] == ["engine.*"]
    assert next(one for one in settings if one.name == "engine.*").meaning.endswith("See: unlabeled settings engine")


def test_what_a_run_writes_is_no_setting() -> None:
    assert not {"backbone.module", "backbone.fingerprint"} & {one.name for one in group_settings("backbone")}


@pytest.mark.parametrize("task", task_names())
def test_recipe_and_defaults_are_those_of_a_run(task: str) -> None:
    config = pretrain_config([f"task={task}"])
    for name, value in task_recipe(task):
        if not name.startswith("task."):
            kept: Any = config
            for part in name.split("."):
                kept = getattr(kept, part)
            assert typed_value(kept) == value


@pytest.mark.parametrize("task", task_names())
def test_tasks_name_paper_and_use(task: str) -> None:
    cls = task_class(task)
    assert cls.good_for
    assert len(cls.good_for) <= 120
    assert cls.paper is not None
    assert 2010 < cls.paper.year < 2030
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", cls.paper.url)
    sentence = first_sentence(cls.__doc__)
    assert sentence.endswith(".")
    assert len(sentence) <= 120


def test_the_overview_has_everything() -> None:
    kinds = overview()
    assert list(kinds["Commands"]) == list(COMMANDS)
    assert list(kinds["Evaluators"]) == evaluator_names()
    assert all(text for entries in kinds.values() for text in entries.values())


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="'optin' is no group of settings; did you mean 'optim'"):
        group_settings("optin")
    with pytest.raises(ConfigError, match="'pretrian' is no command with settings; did you mean 'pretrain'"):
        command_settings("pretrian")


class Plugin(TaskConfig):
    """Settings of a task of a package of its own."""

    speed: float = Field(0.1, gt=0)
    """How fast
    it `goes`. [pixels per step]"""
    said: int = Field(1, description="Described otherwise. [times]")
    silent: int = 1


class Child(Plugin):
    """Another default, and the meaning of the parent's field."""

    speed: float = Field(0.5, gt=0)


def test_docstrings_of_fields_are_found_and_inherited() -> None:
    assert field_texts(Plugin)["speed"] == ("How fast it goes.", "pixels per step")
    assert field_texts(Child)["speed"] == ("How fast it goes.", "pixels per step")
    assert field_texts(Plugin)["said"] == ("Described otherwise.", "times")
    assert "silent" not in field_texts(Plugin)
    assert field_texts(FinetuneOptim)["lr"].meaning.startswith("Base learning rate")
    assert list(field_texts(FinetuneConfig)) == [
        name for name in FinetuneConfig.model_fields if name in field_texts(FinetuneConfig)
    ]


def test_units_and_sentences() -> None:
    assert split_unit("A list such as [1,2].") == ("A list such as [1,2].", "")
    assert split_unit("Side of a crop. [pixels]") == ("Side of a crop.", "pixels")
    assert first_sentence("Does `this`.\nAnd that.") == "Does this."
    assert first_sentence("See arXiv 2111.06377 for it. More.") == "See arXiv 2111.06377 for it."
    assert first_sentence(None) == ""


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "integer"),
        (float | None, "number or null"),
        (Annotated[bool, Field()], "true/false"),
        (Literal["a", "b"], "one of: a, b"),
        (Literal["auto"] | bool, "one of: auto, true/false"),
        (tuple[float, float], "two numbers"),
        (tuple[Annotated[int, Field(ge=1)], ...], "list of integers"),
        (Size, "integer or two integers"),
        (Depth, "integer or list of integers"),
        (Sizes, "one of: all, list of pairs"),
        (dict[str, Any], "mapping"),
        (TaskConfig | None, "settings or null"),
    ],
)
def test_types_are_readable(annotation: Any, expected: str) -> None:
    assert readable_type(annotation) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (25.0, "25"),
        (1e-6, "1e-6"),
        (1.5e-4, "1.5e-4"),
        (0.996, "0.996"),
        (0.0, "0"),
        (1e9, "1e9"),
        ((0.2, 1.0), "[0.2,1]"),
        ({"name": "mae"}, "{name: mae}"),
        (Plugin(speed=2), "{speed: 2}"),
        ("", "''"),
    ],
)
def test_values_are_as_they_are_typed(value: Any, expected: str) -> None:
    assert typed_value(value) == expected


def test_choices_are_words() -> None:
    assert choices_in(Literal["auto"] | bool | None) == ["auto", "true", "false", "null"]
    assert choices_in(int | None) == []
