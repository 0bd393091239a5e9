"""Rules for the interface of a task: views, encoder, visualizations, settings, documentation."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from unlabeled.ssl.backbones.backbone import Backbone
from unlabeled.ssl.backbones.weights import export_backbone
from unlabeled.ssl.config.docstrings import field_texts, has_source
from unlabeled.ssl.core.errors import CheckpointError
from unlabeled.ssl.data.loader import seeded
from unlabeled.ssl.task import TaskConfig
from unlabeled.testing.case import TaskCase, images, listed, require
from unlabeled.testing.state import changed


def views_pickle_and_have_fixed_shapes(case: TaskCase) -> None:
    """Views run in loader workers: they pickle, accept images of any size, and use the generators seeded there."""
    task = case.task()
    views = case.cls.views(task.config, task.backbone)
    try:
        views = pickle.loads(pickle.dumps(views))
    except Exception as error:  # whatever a __reduce__ raises
        reason = f"{type(error).__name__}: {error}"
        require(False, f"the views do not pickle ({reason})", "make them an instance of a class at module level")
    shapes: list[dict[str, Any]] = []
    for image in images():
        kept = image.clone()
        with seeded(1):
            found = views(image)
        with seeded(1):
            again = views(image)
        require(torch.equal(image, kept), "the views write into the image", "work on a copy")
        others = [name for name in found if not torch.equal(found[name], again[name])]
        seeds = "draw from the global generators of torch, numpy or random, not from one of your own"
        require(not others, f"views[{others and others[0]!r}] differs under the same seed", seeds)
        shapes.append({name: (tuple(value.shape), value.dtype) for name, value in found.items()})
    differing = [name for name in shapes[0] if any(other.get(name) != shapes[0][name] for other in shapes)]
    sizes = "resize or crop to backbone.input_size, since a batch is stacked"
    require(not differing, f"views[{differing and differing[0]!r}] depends on the image's size", sizes)
    require(all(other.keys() == shapes[0].keys() for other in shapes), "the views' names depend on the image", sizes)
    require("index" not in shapes[0], "the views give an 'index'", "choose another name; the loader adds one")
    images_given = [shape for shape, dtype in shapes[0].values() if dtype == torch.uint8]
    require(bool(images_given), "no view is uint8", "give images as uint8 and normalize them in forward")
    flat = [shape for shape in images_given if len(shape) < 3 or shape[-3] != 3]
    require(not flat, f"a uint8 view has shape {flat and flat[0]}", "give images as (..., 3, h, w), the rest as int64")


def encoder_loads_into_timm(case: TaskCase) -> None:
    """A timm model that loads the exported file strictly gives the same features as the encoder."""
    encoder = case.task().encoder().eval()
    given = f"encoder() gives {type(encoder).__name__}"
    require(isinstance(encoder, Backbone), given, "return the Backbone, such as self.backbone")
    x = torch.randn(2, 3, *encoder.input_size)
    with torch.no_grad():
        features = encoder.pooled(x)
    wrong = f"it gives features {tuple(features.shape)}"
    require(features.shape == (2, encoder.embed_dim), wrong, "leave the backbone's head unchanged")
    if encoder.custom or not timm.is_model(encoder.name):  # a module of the user's own, which timm cannot rebuild
        return
    with tempfile.TemporaryDirectory() as folder:
        state = load_file(export_backbone(encoder, Path(folder)))
    plain = timm.create_model(encoder.name, **encoder.kwargs).eval()
    remedy = "put new layers outside self.backbone, and leave the layers of the backbone as they were"
    try:
        plain.load_state_dict(state, strict=True)
    except RuntimeError as error:
        require(False, f"timm's {encoder.name} does not load it ({' '.join(str(error).split())[:200]})", remedy)
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(x), pre_logits=True).flatten(1)
    require(torch.equal(expected, features), f"timm's {encoder.name} gives other features", remedy)


def visualize_gives_images(case: TaskCase) -> None:
    """`visualize` returns uint8 (3, H, W) and leaves modes and state as they were."""
    task = case.task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    modes = [module.training for module in task.modules()]
    shown = task.visualize(case.batch(task))
    require(bool(shown), "visualize gives nothing", "show what the loss compares: views, targets, predictions")
    for name, image in shown.items():
        fits = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        found = f"visualize[{name!r}] is {getattr(image, 'dtype', type(image))} {tuple(getattr(image, 'shape', ()))}"
        require(fits and image.shape[0] == 3, found, "give uint8 (3, H, W)")
    kept = modes == [module.training for module in task.modules()]
    require(kept, "visualize leaves modules in a different mode", "use unlabeled.modes_kept")
    moved = changed(before, task.state_dict())
    require(not moved, f"visualize changes {listed(moved)}", "call self.eval() inside modes_kept(self)")


def unknown_settings_are_refused(case: TaskCase) -> None:
    """A misspelled setting is an error, not ignored."""
    config = case.cls.Config
    require(issubclass(config, TaskConfig), f"Config is {config.__name__}", "derive it from TaskConfig")
    try:
        config.model_validate({**case.settings, "no_such_field": 1})
    except ValidationError:
        return
    require(False, "an unknown setting is accepted silently", 'keep extra="forbid" of TaskConfig')


def foreign_checkpoints_are_refused(case: TaskCase) -> None:
    """`load_reference` raises CheckpointError for tensors that do not belong to the task."""
    task = case.task()
    try:
        task.load_reference({"something.else": torch.zeros(1)})
    except CheckpointError:
        return
    require(False, "load_reference accepts a foreign file", "raise CheckpointError when no tensor fits")


def task_and_settings_are_documented(case: TaskCase) -> None:
    """The task, its Config and every setting have a docstring; a section documents itself."""
    require_documented(case.cls, case.cls.Config, "its first line is what `unlabeled tasks` shows")


def require_documented(cls: Any, config: type[BaseModel], first_line: str) -> None:
    """Raises ContractError if `cls`, its Config or a setting has no docstring; `first_line` is the remedy for `cls`."""
    for one, say in ((cls, first_line), (config, "say whose defaults these are")):
        require(bool((one.__doc__ or "").strip()), f"{one.__name__} has no docstring", say)
    bare = undocumented(config)
    require(not bare, f"no docstring under {listed(bare)}", "say what it is, with unit and source")


def undocumented(config: type[BaseModel]) -> list[str]:
    """Settings without a docstring, apart from sections, which are documented themselves."""
    if not has_source(config):  # typed into an interpreter, so there are no docstrings to read
        return []
    texts, fields = field_texts(config), config.model_fields.items()
    return [name for name, one in fields if not (name in texts or _section(one.annotation))]


def _section(annotation: Any) -> bool:
    """Whether a field holds settings with a docstring of their own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and bool(annotation.__doc__)
