"""Images of the backbone's dense features and attention for a few test images, for the report."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unlabeled.eval.dense.maps import CAPTIONS, map_images
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.features.extract import EvalTransform
from unlabeled.ssl.core.errors import CapabilityError
from unlabeled.ssl.core.seeds import derive


def backbone_maps(dataset: EncodedDataset, count: int) -> dict[str, Tensor]:
    """Caption → uint8 (3, H, W) for `count` random test images; {} for a backbone without feature maps."""
    if count == 0:
        return {}
    backbone, (_, source), test = dataset.require_backbone(), dataset.require_sources(), dataset.features.test
    drawn = np.sort(np.random.default_rng(derive("maps", dataset.seed)).permutation(len(test))[:count])
    indices = drawn if test.indices is None else test.indices[drawn]
    transform = EvalTransform(backbone.input_size)
    images = torch.stack([transform(source.read(int(index))) for index in indices])
    try:
        found = map_images(backbone, images, device=dataset.device)
    except CapabilityError:
        return {}
    return {CAPTIONS[name]: image for name, image in found.items()}
