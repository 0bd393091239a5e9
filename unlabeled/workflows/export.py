"""``unlabeled export``: writes the backbone of a run, or sizes of an elastic run, as files that timm loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from unlabeled.eval.features.recalibrate import batch_norms, recalibrated
from unlabeled.ssl.backbones.backbone import Backbone, create_backbone
from unlabeled.ssl.backbones.elastic import Elastic, ElasticConfig, SubSize
from unlabeled.ssl.backbones.elastic.sizes import find
from unlabeled.ssl.backbones.given import fill_adopted
from unlabeled.ssl.backbones.weights import describe, export_backbone, export_files, load_backbone
from unlabeled.ssl.config.composition import validate
from unlabeled.ssl.config.schema import DataConfig, ExportRun, PretrainConfig, Sizes
from unlabeled.ssl.core.errors import CheckpointError, ConfigError, nearest
from unlabeled.ssl.core.plain import objects_in, plain
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.train.run_folder import read_config
from unlabeled.workflows.settings import compose_settings

log = logging.getLogger(__name__)


class Exported(NamedTuple):
    """One exported file."""

    file: Path
    line: str
    """A line of Python that loads it with timm."""


class ElasticRun(NamedTuple):
    """An elastic model and the sizes it was trained for."""

    backbone: Backbone
    elastic: Elastic


def load_elastic(path: str | Path) -> ElasticRun:
    """Loads the full-size model of the run or export at `path`, and its sizes.

    Raises CheckpointError if it cannot be read, ConfigError if it was not trained as an elastic model.
    """
    _sizes_of(path)  # raises before the weights are read
    return with_sizes(path, load_backbone(path))


def outline_elastic(path: str | Path) -> ElasticRun:
    """Like `load_elastic`, but on the meta device and without weights: enough to list the sizes and their cost."""
    _sizes_of(path)  # raises before anything is built
    with torch.device("meta"):
        return with_sizes(path, describe(path).build())


def with_sizes(path: str | Path, backbone: Backbone) -> ElasticRun:
    """Adds the sizes described at `path` to `backbone`, which was built from there. Raises like `load_elastic`."""
    config = _sizes_of(path)
    try:
        return ElasticRun(backbone, Elastic(backbone, config))
    except ConfigError as error:
        raise CheckpointError(f"{export_files(path)[1]}: its sizes do not fit its backbone ({error})") from error


def choose_sizes(elastic: Elastic, asked: Sizes) -> list[SubSize]:
    """The requested sizes, smallest first. Raises ConfigError for a size that the model does not have."""
    if asked == "all":
        return list(elastic.sizes)
    wanted = {find(elastic.sizes, width, depth) for width, depth in asked}
    return [size for size in elastic.sizes if size in wanted]


def export_config(run: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> ExportRun:
    """Returns the validated settings of ``unlabeled export RUN``. Raises ConfigError."""
    return compose_settings("export", overrides, ExportRun, {**(values or {}), "run": Path(run)})


def export_run(run: ExportRun, given: Backbone | None = None) -> list[Exported]:
    """Writes the backbone or the sizes that `run` requests, and returns the files.

    `given`: the model for the run's weights, if only Python code can build it. Raises ConfigError for sizes that the
    run does not have, CheckpointError for a run that cannot be read or files that cannot be written.
    """
    _check_out(run)
    # no size requested: the backbone itself, elastic or not
    if run.width is None and run.depth is None and run.sizes is None and run.like is None:
        backbone = load_backbone(run.run) if given is None else fill_adopted(given, run.run)
        file = export_backbone(backbone, run.out, elastic=describe(run.run).elastic)
        return [Exported(file, timm_line(backbone, file))]
    elastic_run = load_elastic(run.run)
    if run.sizes is not None:
        sizes = choose_sizes(elastic_run.elastic, run.sizes)
        return [_export(run, elastic_run, size, run.out / f"{size}.safetensors") for size in sizes]
    if run.like is not None:
        return [_export(run, elastic_run, _size_of(run.like, elastic_run), run.out, like=run.like)]
    return [_export(run, elastic_run, _asked_size(run, elastic_run.elastic), run.out)]


def extract(elastic_run: ElasticRun, size: SubSize) -> Backbone:
    """The sub-network of `size` with its own copy of the weights; `elastic_run.backbone` itself for the full size."""
    backbone, elastic = elastic_run
    return backbone if size == elastic.full else elastic.extract(backbone, size)


def timm_line(backbone: Backbone, file: Path) -> str:
    """A line of Python that loads `file` with timm, and with this package for its own architectures."""
    # a model passed from Python, or arguments that have no literal: only the user's code can build it
    if backbone.custom or objects_in(plain(backbone.kwargs), "kwargs") is not None:
        return (
            f"import unlabeled; unlabeled.load_weights(module, {str(file)!r})  # module: an identical {backbone.origin}"
        )
    ours = type(backbone.model).__module__.startswith("unlabeled.")
    arguments = "".join(f", {key}={value!r}" for key, value in backbone.kwargs.items())
    create = f"timm.create_model({backbone.name!r}, checkpoint_path={str(file)!r}{arguments})"
    return f"import timm{', unlabeled; unlabeled.register_networks()' if ours else ''}; model = {create}"


def _export(run: ExportRun, elastic_run: ElasticRun, size: SubSize, out: Path, *, like: str | None = None) -> Exported:
    backbone = extract(elastic_run, size)
    if size != elastic_run.elastic.full:
        backbone = _with_statistics(run, backbone)
    if like is not None:
        backbone = _as(like, backbone, elastic_run)
    # only the full-size model can be split into sizes again
    config = elastic_run.elastic.config if backbone is elastic_run.backbone else None
    file = export_backbone(backbone, out, elastic=config)
    log.info("%s: width %d, blocks %s", file, size.width, "-".join(map(str, size.depths)))
    return Exported(file, timm_line(backbone, file))


def _with_statistics(run: ExportRun, backbone: Backbone) -> Backbone:
    """Recomputes the batch-norm statistics of a sub-network: those of the full-size model are not valid for it."""
    if not batch_norms(backbone):
        return backbone
    if not run.recalibrate:
        log.warning("recalibrate: false keeps batch-norm statistics that are not valid for this size; recompute them")
        return backbone
    data = run.data or _data_of(run.run)
    if data is None:
        raise ConfigError(
            f"data: not given; {backbone.name} has batch norms with statistics that depend on the size: give images "
            "with data=..., or set recalibrate=false and recompute them later"
        )
    device = "cuda" if run.device == "auto" and torch.cuda.is_available() else "cpu"
    return recalibrated(
        backbone, open_source(data, "train"), count=run.recalibrate_images, batch_size=run.batch_size,
        workers=run.workers, device=device,
    ).cpu()  # fmt: skip


def _data_of(path: Path) -> DataConfig | None:
    """The data that the run at `path` was trained on; None for an exported backbone, which does not record it."""
    file = path / "config.yaml"
    return validate(read_config(file), PretrainConfig).data if file.is_file() else None


def _size_of(like: str, elastic_run: ElasticRun) -> SubSize:
    """The size of timm model `like`. Raises ConfigError for another family or a size that the run does not have."""
    if not timm.is_model(like.partition(".")[0]):
        raise ConfigError(f"like: {like!r} is not a timm model; {nearest(like, timm.list_models())}")
    backbone, elastic = elastic_run
    with torch.device("meta"):  # its shapes are enough
        model = _built_like(like, elastic_run).model
    if type(model) is not elastic.family.kind:
        raise ConfigError(
            f"like: {like} is of the family {type(model).__name__}, {backbone.name} of {elastic.family.kind.__name__}; "
            "give a model of that family"
        )
    size = elastic.family.read(model)
    try:
        return find(elastic.sizes, size.width, size.depths)
    except ConfigError as error:
        raise ConfigError(f"like: {like} is {size}, which the run does not have ({error})") from None


def _built_like(like: str, elastic_run: ElasticRun) -> Backbone:
    """Builds `like` with those arguments of the run that do not determine the size."""
    backbone, elastic = elastic_run
    sized = elastic.family.arguments(backbone.model, elastic.full)
    kept = {key: value for key, value in elastic.kwargs.items() if key not in sized and key != "img_size"}
    try:
        plain = create_backbone(like, **kept)
        return (
            plain if plain.input_size == elastic.input_size else create_backbone(like, size=elastic.input_size, **kept)
        )
    except ConfigError as error:
        raise ConfigError(f"like: {like} cannot be built with the arguments of the run's backbone ({error})") from None


def _as(like: str, backbone: Backbone, elastic_run: ElasticRun) -> Backbone:
    """Loads the weights of `backbone` into timm model `like`. Raises ConfigError unless both compute the same."""
    model = _built_like(like, elastic_run)
    ours, theirs = _shapes(backbone), _shapes(model)
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"like: {name} has shape {theirs.get(name, 'none')} in {like} and {ours.get(name, 'none')} in the run; "
                "give the size by width and depth, or pretrain with the arguments of that model"
            )
    # equal shapes do not imply equal models: activation, norm or pooling may differ
    if not _equal(backbone, _loaded(backbone, model)):
        raise ConfigError(
            f"like: {like} has tensors of the same shapes but computes different features (for example, with another "
            "activation or pooling); give the size by width and depth"
        )
    return model


def _loaded(backbone: Backbone, into: Backbone) -> Backbone:
    into.model.load_state_dict(backbone.model.state_dict(), strict=True)
    into.set_statistics(backbone.mean, backbone.std)
    return into


def _shapes(backbone: Backbone) -> Mapping[str, Any]:
    return {name: list(tensor.shape) for name, tensor in backbone.model.state_dict().items()}


@torch.no_grad()
def _equal(first: Backbone, second: Backbone) -> bool:
    """Whether both give the same features for random images, up to rounding."""
    x = torch.randn(2, 3, *first.input_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = first.eval().pooled(x), second.eval().pooled(x)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _asked_size(run: ExportRun, elastic: Elastic) -> SubSize:
    if run.width is None or run.depth is None:
        given, missing = ("width", "depth") if run.depth is None else ("depth", "width")
        raise ConfigError(f"{missing}: not given, but needed with {given}; `unlabeled sizes {run.run}` lists the sizes")
    return find(elastic.sizes, run.width, run.depth)


def _check_out(run: ExportRun) -> None:
    """Raises ConfigError, before anything is computed, for conflicting settings or an `out` that cannot be used."""
    asked = [name for name in ("width", "depth", "sizes", "like") if getattr(run, name) is not None]
    if len(asked) > 1 and asked != ["width", "depth"]:
        raise ConfigError(f"{asked[-1]}: conflicts with {asked[0]}; give width and depth, or sizes, or like")
    suffix, file = run.out.suffix, export_files(run.out)[0]
    if run.sizes is not None and file == run.out:
        raise ConfigError(f"out: {run.out} is a single file, but sizes are several files; give a folder")
    if suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ConfigError(
            f"out: {run.out} has a suffix that is not supported; give a name that ends in .safetensors, or a folder"
        )
    if file.resolve() == export_files(run.run)[0].resolve() or (run.out / "config.yaml").is_file():
        raise ConfigError(f"out: {run.out} would overwrite the backbone of a run; choose another folder or file")


def _sizes_of(path: str | Path) -> ElasticConfig:
    config = describe(path).elastic
    if config is None:
        raise ConfigError(
            f"{path}: the run is not elastic and has a single size; `unlabeled export {path} out=...` writes it, and a "
            "run with task=poa has several"
        )
    return config
