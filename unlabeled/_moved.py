"""Import paths of version 0.1.0: each leads to where its contents live now, with a warning that says so.

A finder at the end of Python's list answers for modules that nothing else knows, so that no room holds an empty file
for a name that is gone. What is public is best imported from `unlabeled` itself, which does not move.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WITH_SETTINGS = (
    "cluster",
    "corruption",
    "duplicates",
    "few_shot",
    "invariance",
    "knn",
    "layers",
    "linear",
    "logistic",
    "low_label",
    "objects",
    "retrieval",
    "segmentation",
    "spectrum",
)
MOVED: dict[str, str] = {
    "eval.cache": "eval.features.cache",
    "eval.command": "workflows.evaluate",
    "eval.finetune": "workflows.finetune",
    "eval.gauntlet": "workflows.gauntlet",
    "eval.neighbours": "eval.neighbors",
    "eval.places": "eval.dense",
    "eval.dense.look": "eval.dense.feature_maps",
    "eval.dense.places": "eval.dense.dense_features",
    "eval.places.dense": "eval.dense.dense_features",
    "eval.recalibrate": "eval.features.recalibrate",
    "eval.report": "report",
    "eval.report.compare": "report.compare workflows.compare",
    "eval.report.gallery": "eval.gallery",
    "eval.report.look": "eval.dense.feature_maps",
    "eval.report.sections": "report.sections eval.comparison",
    "eval.report.tables": "eval.tables",
    "eval.report.verdict": "eval.comparison",
    "eval.subject": "eval.encoded_dataset",
    "eval.suite": "eval.runner",
    "eval.settings": " ".join(f"eval.evaluators.{name}" for name in _WITH_SETTINGS),
    "eval.sizes": "workflows.elastic_sizes",
    "pretext.base": "ssl.task ssl.data.views",
    "pretext.byol": "pretext.two_views.byol",
    "pretext.common.autoencoder": "pretext.masked_image.autoencoder",
    "pretext.common.balance": "pretext.mixture.balance",
    "pretext.common.chunked": "pretext.self_distillation.poa_losses",
    "pretext.common.convnext_names": "pretext.masked_image.convnext_names",
    "pretext.common.decoder": "pretext.masked_image.mae",
    "pretext.common.hidden_places": "pretext.self_distillation.masked_patches",
    "pretext.common.level_map": "ssl.backbones.level_map",
    "pretext.common.masked_image": "pretext.masked_image.masked_image",
    "pretext.common.masking": "ssl.backbones.masked.masking",
    "pretext.common.mixture": "pretext.mixture.mixture",
    "pretext.common.pair_pictures": "pretext.dense_contrast.pair_images",
    "pretext.common.patch_cues": "pretext.predictive.patch_cues",
    "pretext.common.patch_grid": "pretext.predictive.patch_grid",
    "pretext.common.patches": "pretext.common.precision pretext.masked_image.masked_image",
    "pretext.common.pixel_pairs": "pretext.dense_contrast.pixel_pairs",
    "pretext.common.poa_losses": "pretext.self_distillation.poa_losses",
    "pretext.common.self_distillation": "pretext.self_distillation.self_distillation",
    "pretext.common.simmim_names": "pretext.masked_image.simmim_names",
    "pretext.common.sinkhorn": "pretext.self_distillation.self_distillation",
    "pretext.common.two_views": "pretext.two_views.two_views",
    "pretext.context": "pretext.predictive.context",
    "pretext.convmae": "pretext.masked_image.convmae",
    "pretext.dino": "pretext.self_distillation.dino",
    "pretext.fcmae": "pretext.masked_image.fcmae",
    "pretext.ibot": "pretext.self_distillation.ibot",
    "pretext.mae": "pretext.masked_image.mae",
    "pretext.multi": "pretext.mixture.multi",
    "pretext.obow.head": "pretext.obow.vocabulary pretext.obow.task",
    "pretext.dense_contrast.pair_pictures": "pretext.dense_contrast.pair_images",
    "pretext.obow.official": "pretext.obow.reference",
    "pretext.obow.pictures": "pretext.obow.drawing",
    "pretext.self_distillation.hidden_places": "pretext.self_distillation.masked_patches",
    "report.pictures": "report.images",
    "testing.subject": "testing.case",
    "pretext.pixcontrast": "pretext.dense_contrast.pixcontrast",
    "pretext.pixpro": "pretext.dense_contrast.pixpro",
    "pretext.poa": "pretext.self_distillation.poa",
    "pretext.rotation": "pretext.predictive.rotation",
    "pretext.simclr": "pretext.two_views.simclr",
    "pretext.simmim": "pretext.masked_image.simmim",
    "pretext.spark": "pretext.masked_image.spark",
    "pretext.vicreg": "pretext.two_views.vicreg",
    "ssl.api": "api workflows.pretrain",
    "ssl.backbone": "ssl.backbones.backbone",
    "ssl.batch_norm": "ssl.nn.batch_norm",
    "ssl.checkpoint": "ssl.train.checkpoint ssl.core.files",
    "ssl.cli": "cli cli.main",
    "ssl.collapse": "ssl.train.collapse",
    "ssl.compose": "ssl.config.composition workflows.settings workflows.pretrain",
    "ssl.cpu": "ssl.core.cpu",
    "ssl.curriculum": "ssl.train.curriculum",
    "ssl.data.doctor": "workflows.inspect_data",
    "ssl.data.embedded": "ssl.data.sources.digits ssl.data.sources.shapes",
    "ssl.data.folder": "ssl.data.sources.folder",
    "ssl.data.layout": "ssl.data.sources.layout",
    "ssl.data.table": "ssl.data.sources.parquet ssl.data.sources.hf ssl.data.sources.tables",
    "ssl.data.tar": "ssl.data.sources.tar",
    "ssl.data.vision": "ssl.data.sources.torchvision",
    "ssl.data.voc": "ssl.data.sources.voc",
    "ssl.drop_path": "ssl.nn.drop_path",
    "ssl.elastic": "ssl.backbones.elastic",
    "ssl.ema": "ssl.nn.ema",
    "ssl.engine": "ssl.train.loop",
    "ssl.errors": "ssl.core.errors",
    "ssl.evidence": "workflows.pretrain",
    "ssl.export": "ssl.backbones.weights",
    "ssl.lars": "ssl.nn.lars",
    "ssl.layers": "ssl.backbones.layer_index",
    "ssl.matrix": "workflows.compatibility.measure",
    "ssl.matrix_page": "workflows.compatibility.page",
    "ssl.messages": "ssl.config.messages",
    "ssl.monitor": "ssl.train.monitor",
    "ssl.networks": "ssl.backbones.networks",
    "ssl.optim": "ssl.train.optimizer",
    "ssl.probe": "ssl.backbones.shapes",
    "ssl.ranks": "ssl.core.distributed ssl.train.accelerator",
    "ssl.run": "ssl.train.run_folder",
    "ssl.saving": "ssl.train.saver",
    "ssl.schedule": "ssl.train.schedule",
    "ssl.schema": "ssl.config.schema",
    "ssl.section": "ssl.config.base",
    "ssl.seeds": "ssl.core.seeds",
    "ssl.setup": "ssl.train.build workflows.pretrain",
    "ssl.signals": "ssl.core.signals",
    "ssl.sparse": "ssl.backbones.masked.sparse",
    "ssl.stages": "ssl.backbones.masked.stages",
    "ssl.stem": "ssl.backbones.stem",
    "ssl.subnetworks": "workflows.export",
    "ssl.tokens.gather": "ssl.backbones.masked.tokens.family",
    "ssl.tokens": "ssl.backbones.masked.tokens",
}
"""Old module or package, without ``unlabeled.`` → the module that has its names now, or several."""

RENAMED: dict[str, str] = {
    "EncoderEvidence": "EncoderResults",
    "Evidence": "Results",
    "Judge": "EvaluatorInfo",
    "LacksCapabilityError": "MissingCapabilityError",
    "Subject": "EncodedDataset",
    "Verdict": "Summary",
    "evidence_table": "results_table",
    "gather_rows": "gather_across_ranks",
    "judge": "summarize",
    "map_pictures": "map_images",
}
"""Old name of a class or function → its present one, in `unlabeled` and in the modules of `MOVED`."""


class _Moved(ModuleType):
    """Looks names up in the modules that have them now."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for target in self.__dict__.get("_targets", ()):
                for current in (name, RENAMED.get(name, name)):
                    if hasattr(target, current):
                        return getattr(target, current)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({name for target in self._targets for name in dir(target)})


class _Finder(MetaPathFinder, Loader):
    """Answers for the old names, and for modules inside of old packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _targets_of(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        targets = _targets_of(module.__name__)
        warnings.warn(
            f"{module.__name__} is now {' and '.join(targets)}; import from `unlabeled` itself what it offers",
            DeprecationWarning,
            stacklevel=2,  # Python leaves its own import machinery out of the count
        )
        module.__dict__["_targets"] = [importlib.import_module(target) for target in targets]


def _targets_of(fullname: str) -> tuple[str, ...]:
    """New names of module `fullname`; () when it did not move."""
    parts = fullname.split(".")
    for length in range(len(parts), 1, -1):
        moved = MOVED.get(".".join(parts[1:length])) if parts[0] == "unlabeled" else None
        if moved:
            inside = parts[length:]  # a module of an old package lies in the package that took its place
            return tuple(".".join(["unlabeled", new, *inside]) for new in moved.split()[: 1 if inside else None])
    return ()


def install() -> None:
    """Lets the old names be imported; once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
