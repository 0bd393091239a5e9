"""What an elastic run holds, as files that any copy of timm loads: ``unlabeled export``."""

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
    """One written file."""

    file: Path
    line: str
    """Python that loads it with timm."""


class ElasticRun(NamedTuple):
    """An elastic network and the sizes that it was trained to hold."""

    backbone: Backbone
    elastic: Elastic


def load_elastic(path: str | Path) -> ElasticRun:
    """The whole network of the run or export at `path`, and its sizes.

    Raises CheckpointError when it cannot be read, ConfigError when it was not trained as an elastic network.
    """
    _sizes_of(path)  # before the weights are read
    return with_sizes(path, load_backbone(path))


def outline_elastic(path: str | Path) -> ElasticRun:
    """As `load_elastic` without the weights, which lie on the meta device: for what sizes there are and cost."""
    _sizes_of(path)  # before anything is built
    with torch.device("meta"):
        return with_sizes(path, describe(path).build())


def with_sizes(path: str | Path, backbone: Backbone) -> ElasticRun:
    """`backbone`, which was built from the export at `path`, with the sizes that are named there; raises the same."""
    config = _sizes_of(path)
    try:
        return ElasticRun(backbone, Elastic(backbone, config))
    except ConfigError as error:
        raise CheckpointError(f"{export_files(path)[1]}: its sizes do not fit its network ({error})") from error


def choose_sizes(elastic: Elastic, asked: Sizes) -> list[SubSize]:
    """The sizes that are meant, smallest first. Raises ConfigError for one that there is not."""
    if asked == "all":
        return list(elastic.sizes)
    wanted = {find(elastic.sizes, width, depth) for width, depth in asked}
    return [size for size in elastic.sizes if size in wanted]


def export_config(run: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> ExportRun:
    """The validated settings of ``unlabeled export RUN``."""
    return compose_settings("export", overrides, ExportRun, {**(values or {}), "run": Path(run)})


def export_run(run: ExportRun, given: Backbone | None = None) -> list[Exported]:
    """Writes the network or the sub-networks that `run` asks for; each is loaded into timm's own model first.

    `given`: the network that the run's weights belong to, where only Python can build it.
    Raises, each in one line, ConfigError for sizes that there are not, and CheckpointError for a run that cannot be
    read or a place that cannot be written.
    """
    _check_out(run)
    if run.width is None and run.depth is None and run.sizes is None and run.like is None:
        backbone = load_backbone(run.run) if given is None else fill_adopted(given, run.run)
        file = export_backbone(backbone, run.out, elastic=describe(run.run).elastic)
        return [Exported(file, timm_line(backbone, file))]
    whole = load_elastic(run.run)
    if run.sizes is not None:
        sizes = choose_sizes(whole.elastic, run.sizes)
        return [_export(run, whole, size, run.out / f"{size}.safetensors") for size in sizes]
    if run.like is not None:
        return [_export(run, whole, _size_of(run.like, whole), run.out, like=run.like)]
    return [_export(run, whole, _asked_size(run, whole.elastic), run.out)]


def extract(whole: ElasticRun, size: SubSize) -> Backbone:
    """The sub-network of `size` with weights of its own; `whole.backbone` itself for the full size."""
    return whole.backbone if size == whole.elastic.full else whole.elastic.extract(whole.backbone, size)


def timm_line(backbone: Backbone, file: Path) -> str:
    """Python that builds `backbone` and loads `file` with nothing but timm (and this package, for its own networks)."""
    if backbone.custom or objects_in(plain(backbone.kwargs), "kwargs") is not None:
        return (
            f"import unlabeled; unlabeled.load_weights(module, {str(file)!r})  # module: {backbone.origin}, as it was"
        )
    ours = type(backbone.model).__module__.startswith("unlabeled.")
    arguments = "".join(f", {key}={value!r}" for key, value in backbone.kwargs.items())
    create = f"timm.create_model({backbone.name!r}, checkpoint_path={str(file)!r}{arguments})"
    return f"import timm{', unlabeled; unlabeled.register_networks()' if ours else ''}; model = {create}"


def _export(run: ExportRun, whole: ElasticRun, size: SubSize, out: Path, *, like: str | None = None) -> Exported:
    alone = extract(whole, size)
    if size != whole.elastic.full:
        alone = _with_statistics(run, alone)
    if like is not None:
        alone = _as(like, alone, whole)
    file = export_backbone(alone, out, elastic=whole.elastic.config if alone is whole.backbone else None)
    log.info("%s: width %d, blocks %s", file, size.width, "-".join(map(str, size.depths)))
    return Exported(file, timm_line(alone, file))


def _with_statistics(run: ExportRun, alone: Backbone) -> Backbone:
    """`alone` with running statistics of its own, where it has batch norms."""
    if not batch_norms(alone):
        return alone
    if not run.recalibrate:
        log.warning("recalibrate: false leaves batch norms without the statistics of this size; estimate them anew")
        return alone
    data = run.data or _data_of(run.run)
    if data is None:
        raise ConfigError(
            f"data: not given; {alone.name} has batch norms, whose statistics belong to one size: give images with "
            "data=..., or recalibrate=false and estimate them later"
        )
    device = "cuda" if run.device == "auto" and torch.cuda.is_available() else "cpu"
    return recalibrated(
        alone, open_source(data, "train"), count=run.recalibrate_images, batch_size=run.batch_size,
        workers=run.workers, device=device,
    ).cpu()  # fmt: skip


def _data_of(path: Path) -> DataConfig | None:
    """The images that the run at `path` was trained on; None for another exported backbone."""
    file = path / "config.yaml"
    return validate(read_config(file), PretrainConfig).data if file.is_file() else None


def _size_of(like: str, whole: ElasticRun) -> SubSize:
    """The size of timm model `like`. Raises ConfigError for another family or a size that the run does not hold."""
    if not timm.is_model(like.partition(".")[0]):
        raise ConfigError(f"like: {like!r} is not a timm model; {nearest(like, timm.list_models())}")
    backbone, elastic = whole
    with torch.device("meta"):
        model = _built_like(like, whole).model
    if type(model) is not elastic.family.kind:
        raise ConfigError(
            f"like: {like} is of the family {type(model).__name__}, {backbone.name} of {elastic.family.kind.__name__}; "
            "give a model of that family"
        )
    size = elastic.family.read(model)
    try:
        return find(elastic.sizes, size.width, size.depths)
    except ConfigError as error:
        raise ConfigError(f"like: {like} is {size}, which the run does not hold ({error})") from None


def _built_like(like: str, whole: ElasticRun) -> Backbone:
    """`like` with the arguments of the run that do not say its size."""
    backbone, elastic = whole
    sized = elastic.family.arguments(backbone.model, elastic.full)
    kept = {key: value for key, value in elastic.kwargs.items() if key not in sized and key != "img_size"}
    try:
        plain = create_backbone(like, **kept)
        return (
            plain if plain.input_size == elastic.input_size else create_backbone(like, size=elastic.input_size, **kept)
        )
    except ConfigError as error:
        raise ConfigError(f"like: {like} cannot be built as the run's network was ({error})") from None


def _as(like: str, alone: Backbone, whole: ElasticRun) -> Backbone:
    """The weights of `alone` in timm model `like`. Raises ConfigError unless it is the same network."""
    model = _built_like(like, whole)
    ours, theirs = _shapes(alone), _shapes(model)
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"like: {like} needs {name} {theirs.get(name, 'not at all')}, the run has it "
                f"{ours.get(name, 'not at all')}; give the size by width and depth, or pretrain with its arguments"
            )
    if not _equal(alone, _loaded(alone, model)):
        raise ConfigError(
            f"like: {like} has tensors of the same shapes but computes something else (another activation or pooling, "
            "say); give the size by width and depth"
        )
    return model


def _loaded(alone: Backbone, into: Backbone) -> Backbone:
    into.model.load_state_dict(alone.model.state_dict(), strict=True)
    into.set_statistics(alone.mean, alone.std)
    return into


def _shapes(backbone: Backbone) -> Mapping[str, Any]:
    return {name: list(tensor.shape) for name, tensor in backbone.model.state_dict().items()}


@torch.no_grad()
def _equal(first: Backbone, second: Backbone) -> bool:
    """Whether both give the same features, up to rounding."""
    x = torch.randn(2, 3, *first.input_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = first.eval().pooled(x), second.eval().pooled(x)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _asked_size(run: ExportRun, elastic: Elastic) -> SubSize:
    if run.width is None or run.depth is None:
        given, missing = ("width", "depth") if run.depth is None else ("depth", "width")
        raise ConfigError(f"{missing}: not given beside {given}; `unlabeled sizes {run.run}` lists the sizes")
    return find(elastic.sizes, run.width, run.depth)


def _check_out(run: ExportRun) -> None:
    """Raises ConfigError, before anything is computed, for words that exclude each other or a place that is taken."""
    asked = [name for name in ("width", "depth", "sizes", "like") if getattr(run, name) is not None]
    if len(asked) > 1 and asked != ["width", "depth"]:
        raise ConfigError(f"{asked[-1]}: {asked[0]} says another size; give width and depth, or sizes, or like")
    suffix, file = run.out.suffix, export_files(run.out)[0]
    if run.sizes is not None and file == run.out:
        raise ConfigError(f"out: {run.out} is one file, sizes are several; give a folder")
    if suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ConfigError(f"out: {run.out} cannot be written; give a name that ends in .safetensors, or a folder")
    if file.resolve() == export_files(run.run)[0].resolve() or (run.out / "config.yaml").is_file():
        raise ConfigError(f"out: {run.out} holds the network of a run; choose another place")


def _sizes_of(path: str | Path) -> ElasticConfig:
    config = describe(path).elastic
    if config is None:
        raise ConfigError(
            f"{path}: the run is not elastic and holds one size; `unlabeled export {path} out=...` writes it, and a "
            "run of task=poa holds several"
        )
    return config
