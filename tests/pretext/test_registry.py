"""Tasks by name: where they come from, and what is said of those that cannot be had."""

from __future__ import annotations

from importlib.metadata import Distribution, EntryPoint

import pytest

from unlabeled.cli import main
from unlabeled.pretext import registry
from unlabeled.pretext.registry import tasks_for
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core import registry as core_registry
from unlabeled.ssl.core.errors import ConfigError


class Plugin(Distribution):
    """An installed package, as far as entry points ask."""

    @property
    def name(self) -> str:
        return "some-tasks"

    @property
    def version(self) -> str:
        return "2.1"

    def read_text(self, filename):
        return None

    def locate_file(self, path):
        return path


@pytest.fixture
def install(monkeypatch):
    """Makes packages bring entry points, for one test."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry.REGISTRY, "targets", dict(registry.TASKS))
    monkeypatch.setattr(
        core_registry,
        "entry_points",
        lambda group, name=None: [point for point in points if group == point.group and name in (None, point.name)],
    )

    def bring(name: str, target: str) -> None:
        points.append(EntryPoint(name, target, "unlabeled.tasks")._for(Plugin()))

    return bring


def test_a_task_of_a_package_is_found_and_says_where_it_is_from(install):
    install("turned", "unlabeled.pretext.predictive.rotation:Rotation")
    assert "turned" in registry.task_names()
    assert registry.task_class("turned").__name__ == "Rotation"
    assert registry.task_origin("turned") == "some-tasks 2.1"
    assert registry.task_origin("rotation") == "built in"
    registry.register_task("mine", "my_module:Task")
    assert registry.task_origin("mine") == "my_module"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Task", "No module named 'no_such_module'"),
        ("json:Task", "module 'json' has no attribute 'Task'"),
    ],
)
def test_a_task_that_cannot_be_imported_is_one_line_and_the_others_work(install, capsys, target, reason):
    install("broken", target)
    with pytest.raises(
        ConfigError, match=rf"task: 'broken' cannot be imported \({reason}\); install some-tasks 2.1 again"
    ):
        registry.task_class("broken")
    able = tasks_for(create_backbone("test_vit", size=32))
    assert "rotation" in able
    assert "broken" not in able
    assert main(["tasks", "--json"]) == 0
    listed = capsys.readouterr().out
    assert f"task: 'broken' cannot be imported ({reason}); install some-tasks 2.1 again" in listed
    assert "Predicts by how many right angles an image was rotated" in listed


def test_a_name_that_is_taken_is_refused(install):
    install("rotation", "my_module:Task")
    with pytest.raises(
        ConfigError, match=r"'rotation' is already unlabeled.pretext.predictive.rotation:Rotation; give my_mod"
    ):
        registry.task_names()
