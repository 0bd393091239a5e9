"""Self-supervised vision pretraining: any backbone, any pretext task, and results that show whether it worked.

>>> import unlabeled
>>> result = unlabeled.pretrain(task="mae", backbone="vit_small_patch16_224", data="path/to/images", out="runs/x")

The public API is what this module exports; submodules may move. Names are imported on first use, so that
``import unlabeled`` stays fast.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from unlabeled import _moved
from unlabeled._version import __version__

_moved.install()

_PUBLIC = {
    # Functions, one for each command.
    "evaluate": "unlabeled.api",
    "export": "unlabeled.api",
    "finetune": "unlabeled.api",
    "load_backbone": "unlabeled.api",
    "pretrain": "unlabeled.api",
    # What the functions return.
    "EncoderResults": "unlabeled.eval.results",
    "Results": "unlabeled.eval.results",
    "Exported": "unlabeled.workflows.export",
    "FinetuneResult": "unlabeled.workflows.finetune.run",
    "PretrainResult": "unlabeled.workflows.pretrain",
    # Backbones.
    "Backbone": "unlabeled.ssl.backbones.backbone",
    "create_backbone": "unlabeled.ssl.backbones.backbone",
    "create_classifier": "unlabeled.workflows.finetune.classifier",
    "load_elastic": "unlabeled.workflows.export",
    "load_weights": "unlabeled.ssl.backbones.weights",
    "modes_kept": "unlabeled.ssl.backbones.shapes",
    "register_networks": "unlabeled.ssl.backbones.networks",
    # Settings.
    "BackboneConfig": "unlabeled.ssl.config.schema",
    "DataConfig": "unlabeled.ssl.config.schema",
    "DoctorRun": "unlabeled.ssl.config.schema",
    "EngineConfig": "unlabeled.ssl.config.schema",
    "EvaluateConfig": "unlabeled.ssl.config.schema",
    "EvaluateRun": "unlabeled.ssl.config.schema",
    "ExportRun": "unlabeled.ssl.config.schema",
    "FinetuneConfig": "unlabeled.workflows.finetune.config",
    "LogConfig": "unlabeled.ssl.config.schema",
    "OptimConfig": "unlabeled.ssl.config.schema",
    "PretrainConfig": "unlabeled.ssl.config.schema",
    "ScheduleConfig": "unlabeled.ssl.config.schema",
    # Images and data sources.
    "DecodeError": "unlabeled.ssl.data.source",
    "ImageSource": "unlabeled.ssl.data.source",
    "MaskSource": "unlabeled.ssl.data.source",
    "SourceConfig": "unlabeled.ssl.data.source",
    "Split": "unlabeled.ssl.data.source",
    "Views": "unlabeled.ssl.data.views",
    "check_source": "unlabeled.testing",
    "decode_rgb": "unlabeled.ssl.data.decode",
    "holdout": "unlabeled.ssl.data.sources.layout",
    "open_source": "unlabeled.ssl.data.registry",
    "register_source": "unlabeled.ssl.data.registry",
    "source_names": "unlabeled.ssl.data.registry",
    # Pretext tasks.
    "Batch": "unlabeled.ssl.task",
    "ContractError": "unlabeled.testing",
    "NamedParameter": "unlabeled.ssl.task",
    "Paper": "unlabeled.ssl.task",
    "PretextTask": "unlabeled.ssl.task",
    "Recipe": "unlabeled.ssl.task",
    "StepOutput": "unlabeled.ssl.task",
    "TaskConfig": "unlabeled.ssl.task",
    "check_task": "unlabeled.testing",
    "cosine_momentum": "unlabeled.pretext.common.teacher",
    "create_task": "unlabeled.pretext.registry",
    "derive": "unlabeled.ssl.core.seeds",
    "ema_update": "unlabeled.ssl.nn.ema",
    "frozen_copy": "unlabeled.pretext.common.teacher",
    "gather_across_ranks": "unlabeled.ssl.core.distributed",
    "register_task": "unlabeled.pretext.registry",
    "task_names": "unlabeled.pretext.registry",
    # Evaluators.
    "Estimate": "unlabeled.eval.base",
    "Evaluator": "unlabeled.eval.base",
    "EvaluatorConfig": "unlabeled.eval.base",
    "FeatureSet": "unlabeled.eval.base",
    "FeatureSplit": "unlabeled.eval.base",
    "FloatArray": "unlabeled.eval.base",
    "Measure": "unlabeled.eval.base",
    "Measured": "unlabeled.eval.base",
    "Point": "unlabeled.eval.base",
    "EncodedDataset": "unlabeled.eval.encoded_dataset",
    "Value": "unlabeled.eval.base",
    "check_evaluator": "unlabeled.testing",
    "check_features": "unlabeled.eval.base",
    "evaluator_names": "unlabeled.eval.registry",
    "register_evaluator": "unlabeled.eval.registry",
    # Reading runs and evaluations.
    "CAPTIONS": "unlabeled.eval.dense.maps",
    "Comparison": "unlabeled.eval.comparison",
    "EvalTransform": "unlabeled.eval.features.extract",
    "LayerSimilarity": "unlabeled.eval.evaluators.layers",
    "Summary": "unlabeled.eval.comparison",
    "cka_between": "unlabeled.eval.evaluators.layers",
    "compare": "unlabeled.eval.comparison",
    "evaluate_backbone": "unlabeled.eval.runner",
    "extract_features": "unlabeled.eval.features.extract",
    "summarize": "unlabeled.eval.comparison",
    "map_images": "unlabeled.eval.dense.maps",
    "random_twin": "unlabeled.eval.encoded_dataset",
    "read_metrics": "unlabeled.ssl.train.monitor",
    "read_report": "unlabeled.report.document",
    # Errors.
    "CapabilityError": "unlabeled.ssl.core.errors",
    "CheckpointError": "unlabeled.ssl.core.errors",
    "ConfigError": "unlabeled.ssl.core.errors",
    "DataError": "unlabeled.ssl.core.errors",
    "DivergedError": "unlabeled.ssl.core.errors",
    "UnlabeledError": "unlabeled.ssl.core.errors",
}
"""Name → the module that defines it, sorted within each group. Keep the imports for type checkers below in sync."""

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from unlabeled.api import evaluate as evaluate
    from unlabeled.api import export as export
    from unlabeled.api import finetune as finetune
    from unlabeled.api import load_backbone as load_backbone
    from unlabeled.api import pretrain as pretrain
    from unlabeled.eval.base import Estimate as Estimate
    from unlabeled.eval.base import Evaluator as Evaluator
    from unlabeled.eval.base import EvaluatorConfig as EvaluatorConfig
    from unlabeled.eval.base import FeatureSet as FeatureSet
    from unlabeled.eval.base import FeatureSplit as FeatureSplit
    from unlabeled.eval.base import FloatArray as FloatArray
    from unlabeled.eval.base import Measure as Measure
    from unlabeled.eval.base import Measured as Measured
    from unlabeled.eval.base import Point as Point
    from unlabeled.eval.base import Value as Value
    from unlabeled.eval.base import check_features as check_features
    from unlabeled.eval.comparison import Comparison as Comparison
    from unlabeled.eval.comparison import Summary as Summary
    from unlabeled.eval.comparison import compare as compare
    from unlabeled.eval.comparison import summarize as summarize
    from unlabeled.eval.dense.maps import CAPTIONS as CAPTIONS
    from unlabeled.eval.dense.maps import map_images as map_images
    from unlabeled.eval.encoded_dataset import EncodedDataset as EncodedDataset
    from unlabeled.eval.encoded_dataset import random_twin as random_twin
    from unlabeled.eval.evaluators.layers import LayerSimilarity as LayerSimilarity
    from unlabeled.eval.evaluators.layers import cka_between as cka_between
    from unlabeled.eval.features.extract import EvalTransform as EvalTransform
    from unlabeled.eval.features.extract import extract_features as extract_features
    from unlabeled.eval.registry import evaluator_names as evaluator_names
    from unlabeled.eval.registry import register_evaluator as register_evaluator
    from unlabeled.eval.results import EncoderResults as EncoderResults
    from unlabeled.eval.results import Results as Results
    from unlabeled.eval.runner import evaluate_backbone as evaluate_backbone
    from unlabeled.pretext.common.teacher import cosine_momentum as cosine_momentum
    from unlabeled.pretext.common.teacher import frozen_copy as frozen_copy
    from unlabeled.pretext.registry import create_task as create_task
    from unlabeled.pretext.registry import register_task as register_task
    from unlabeled.pretext.registry import task_names as task_names
    from unlabeled.report.document import read_report as read_report
    from unlabeled.ssl.backbones.backbone import Backbone as Backbone
    from unlabeled.ssl.backbones.backbone import create_backbone as create_backbone
    from unlabeled.ssl.backbones.networks import register_networks as register_networks
    from unlabeled.ssl.backbones.shapes import modes_kept as modes_kept
    from unlabeled.ssl.backbones.weights import load_weights as load_weights
    from unlabeled.ssl.config.schema import BackboneConfig as BackboneConfig
    from unlabeled.ssl.config.schema import DataConfig as DataConfig
    from unlabeled.ssl.config.schema import DoctorRun as DoctorRun
    from unlabeled.ssl.config.schema import EngineConfig as EngineConfig
    from unlabeled.ssl.config.schema import EvaluateConfig as EvaluateConfig
    from unlabeled.ssl.config.schema import EvaluateRun as EvaluateRun
    from unlabeled.ssl.config.schema import ExportRun as ExportRun
    from unlabeled.ssl.config.schema import LogConfig as LogConfig
    from unlabeled.ssl.config.schema import OptimConfig as OptimConfig
    from unlabeled.ssl.config.schema import PretrainConfig as PretrainConfig
    from unlabeled.ssl.config.schema import ScheduleConfig as ScheduleConfig
    from unlabeled.ssl.core.distributed import gather_across_ranks as gather_across_ranks
    from unlabeled.ssl.core.errors import CapabilityError as CapabilityError
    from unlabeled.ssl.core.errors import CheckpointError as CheckpointError
    from unlabeled.ssl.core.errors import ConfigError as ConfigError
    from unlabeled.ssl.core.errors import DataError as DataError
    from unlabeled.ssl.core.errors import DivergedError as DivergedError
    from unlabeled.ssl.core.errors import UnlabeledError as UnlabeledError
    from unlabeled.ssl.core.seeds import derive as derive
    from unlabeled.ssl.data.decode import decode_rgb as decode_rgb
    from unlabeled.ssl.data.registry import open_source as open_source
    from unlabeled.ssl.data.registry import register_source as register_source
    from unlabeled.ssl.data.registry import source_names as source_names
    from unlabeled.ssl.data.source import DecodeError as DecodeError
    from unlabeled.ssl.data.source import ImageSource as ImageSource
    from unlabeled.ssl.data.source import MaskSource as MaskSource
    from unlabeled.ssl.data.source import SourceConfig as SourceConfig
    from unlabeled.ssl.data.source import Split as Split
    from unlabeled.ssl.data.sources.layout import holdout as holdout
    from unlabeled.ssl.data.views import Views as Views
    from unlabeled.ssl.nn.ema import ema_update as ema_update
    from unlabeled.ssl.task import Batch as Batch
    from unlabeled.ssl.task import NamedParameter as NamedParameter
    from unlabeled.ssl.task import Paper as Paper
    from unlabeled.ssl.task import PretextTask as PretextTask
    from unlabeled.ssl.task import Recipe as Recipe
    from unlabeled.ssl.task import StepOutput as StepOutput
    from unlabeled.ssl.task import TaskConfig as TaskConfig
    from unlabeled.ssl.train.monitor import read_metrics as read_metrics
    from unlabeled.testing import ContractError as ContractError
    from unlabeled.testing import check_evaluator as check_evaluator
    from unlabeled.testing import check_source as check_source
    from unlabeled.testing import check_task as check_task
    from unlabeled.workflows.export import Exported as Exported
    from unlabeled.workflows.export import load_elastic as load_elastic
    from unlabeled.workflows.finetune.classifier import create_classifier as create_classifier
    from unlabeled.workflows.finetune.config import FinetuneConfig as FinetuneConfig
    from unlabeled.workflows.finetune.run import FinetuneResult as FinetuneResult
    from unlabeled.workflows.pretrain import PretrainResult as PretrainResult


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    # names of version 0.1.0 keep working, with a warning
    if name in _moved.RENAMED and (current := _moved.RENAMED[name]) in _PUBLIC:
        warnings.warn(f"unlabeled.{name} is now unlabeled.{current}", DeprecationWarning, stacklevel=2)
        return __getattr__(current)
    raise AttributeError(f"module 'unlabeled' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
