"""What the backbone looks at, in a few test pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.dense.maps import CAPTIONS, map_pictures
from unlabeled.eval.features.extract import EvalTransform
from unlabeled.eval.subject import Subject
from unlabeled.ssl.core.errors import CapabilityError
from unlabeled.ssl.core.seeds import derive


def backbone_maps(subject: Subject, count: int) -> dict[str, Tensor]:
    """Caption → uint8 (3, H, W) of `count` readable test pictures, drawn by seed; {} for a network without a map."""
    if count == 0:
        return {}
    backbone, (_, source), test = subject.network(), subject.pictures(), subject.features.test
    drawn = np.sort(np.random.default_rng(derive("maps", subject.seed)).permutation(len(test))[:count])
    indices = drawn if test.indices is None else test.indices[drawn]
    transform = EvalTransform(backbone.input_size)
    images = torch.stack([transform(source.read(int(index))) for index in indices])
    try:
        found = map_pictures(backbone, images, device=subject.device)
    except CapabilityError:
        return {}
    return {CAPTIONS[name]: picture for name, picture in found.items()}
