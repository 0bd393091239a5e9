"""Self-supervised vision pretraining: any backbone, any pretext task, and evidence that it worked.

>>> import unlabeled
>>> result = unlabeled.pretrain(task="mae", backbone="vit_small_patch16_224", data="path/to/images", out="runs/x")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unlabeled import _moved
from unlabeled._version import __version__

_moved.install()

_PUBLIC = {
    "pretrain": "unlabeled.api",
    "evaluate": "unlabeled.api",
    "finetune": "unlabeled.api",
    "FinetuneResult": "unlabeled.workflows.finetune.run",
    "PretrainResult": "unlabeled.workflows.pretrain",
    "create_backbone": "unlabeled.ssl.backbones.backbone",
    "Backbone": "unlabeled.ssl.backbones.backbone",
    "PretextTask": "unlabeled.ssl.task",
    "StepOutput": "unlabeled.ssl.task",
    "TaskConfig": "unlabeled.ssl.task",
    "create_task": "unlabeled.pretext.registry",
    "task_names": "unlabeled.pretext.registry",
    "UnlabeledError": "unlabeled.ssl.core.errors",
    "Estimate": "unlabeled.eval.base",
    "Evaluator": "unlabeled.eval.base",
    "EvaluatorConfig": "unlabeled.eval.base",
    "FeatureSet": "unlabeled.eval.base",
    "FeatureSplit": "unlabeled.eval.base",
    "FloatArray": "unlabeled.eval.base",
    "Measure": "unlabeled.eval.base",
    "Measured": "unlabeled.eval.base",
    "Point": "unlabeled.eval.base",
    "Value": "unlabeled.eval.base",
    "check_features": "unlabeled.eval.base",
    "evaluator_names": "unlabeled.eval.registry",
    "register_evaluator": "unlabeled.eval.registry",
    "Subject": "unlabeled.eval.subject",
    "ConfigError": "unlabeled.ssl.core.errors",
    "DataError": "unlabeled.ssl.core.errors",
    "check_evaluator": "unlabeled.testing.check",
    "DataConfig": "unlabeled.ssl.config.schema",
    "DecodeError": "unlabeled.ssl.data.source",
    "ImageSource": "unlabeled.ssl.data.source",
    "MaskSource": "unlabeled.ssl.data.source",
    "SourceConfig": "unlabeled.ssl.data.source",
    "Split": "unlabeled.ssl.data.source",
    "decode_rgb": "unlabeled.ssl.data.decode",
    "holdout": "unlabeled.ssl.data.sources.layout",
    "open_source": "unlabeled.ssl.data.registry",
    "register_source": "unlabeled.ssl.data.registry",
    "source_names": "unlabeled.ssl.data.registry",
    "check_source": "unlabeled.testing",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from unlabeled.api import evaluate as evaluate
    from unlabeled.api import finetune as finetune
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
    from unlabeled.eval.registry import evaluator_names as evaluator_names
    from unlabeled.eval.registry import register_evaluator as register_evaluator
    from unlabeled.eval.subject import Subject as Subject
    from unlabeled.pretext.registry import create_task as create_task
    from unlabeled.pretext.registry import task_names as task_names
    from unlabeled.ssl.backbones.backbone import Backbone as Backbone
    from unlabeled.ssl.backbones.backbone import create_backbone as create_backbone
    from unlabeled.ssl.config.schema import DataConfig as DataConfig
    from unlabeled.ssl.core.errors import ConfigError as ConfigError
    from unlabeled.ssl.core.errors import DataError as DataError
    from unlabeled.ssl.core.errors import UnlabeledError as UnlabeledError
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
    from unlabeled.ssl.task import PretextTask as PretextTask
    from unlabeled.ssl.task import StepOutput as StepOutput
    from unlabeled.ssl.task import TaskConfig as TaskConfig
    from unlabeled.testing import check_source as check_source
    from unlabeled.testing.check import check_evaluator as check_evaluator
    from unlabeled.workflows.finetune.run import FinetuneResult as FinetuneResult
    from unlabeled.workflows.pretrain import PretrainResult as PretrainResult


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'unlabeled' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
