"""What the backbone looks at, in a few test pictures: the one place where the report meets `unlabeled.eval.maps`."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.features import EvalTransform, evaluating
from unlabeled.eval.subject import Subject
from unlabeled.ssl.errors import CapabilityError
from unlabeled.ssl.seeds import derive


def backbone_maps(subject: Subject, count: int) -> dict[str, Tensor]:
    """Name → uint8 (3, H, W) of `count` readable test pictures, drawn by seed; {} for a network without a map."""
    if count == 0 or importlib.util.find_spec("unlabeled.eval.maps") is None:
        return {}
    backbone, (_, source), test = subject.network(), subject.pictures(), subject.features.test
    drawn = np.sort(np.random.default_rng(derive("maps", subject.seed)).permutation(len(test))[:count])
    indices = drawn if test.indices is None else test.indices[drawn]
    transform = EvalTransform(backbone.input_size)
    images = torch.stack([transform(source.read(int(index))) for index in indices]).to(subject.device)
    draw = importlib.import_module("unlabeled.eval.maps").map_pictures
    try:
        with evaluating(backbone), torch.inference_mode():
            found: dict[str, Tensor] = draw(backbone.to(subject.device), images)
    except CapabilityError:
        return {}
    return found
