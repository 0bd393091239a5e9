"""The released Caffe model of context prediction, by the names of its blobs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretext.predictive.context import Context, ContextConfig
from unlabeled.ssl.backbones.backbone import create_backbone
from unlabeled.ssl.core.errors import CheckpointError

NET = {"widths": (8, 12, 16, 16, 12), "embed_dim": 20}


def _task(**settings) -> Context:
    return Context(ContextConfig(**{"widths": (16, 12)} | settings), create_backbone("contextnet", **NET))


def _official(widths: tuple[int, ...] = NET["widths"], fc: int = 20) -> dict[str, Tensor]:
    """The released model's blobs by name, of a narrow network."""
    shapes = dict(
        zip(("conv1", "conv2", "conv3", "conv4", "conv5"), zip(widths, (3, *widths), strict=False), strict=True)
    )
    kernels = {"conv1": 11, "conv2": 5}
    state = {f"{name}.weight": torch.randn(*shape, *2 * [kernels.get(name, 3)]) for name, shape in shapes.items()}
    state |= {"fc6.weight": torch.randn(fc, widths[-1] * 9), "fc7.weight": torch.randn(16, 2 * fc)}
    state |= {"fc8.weight": torch.randn(12, 16), "fc9.weight": torch.randn(8, 12)}
    state |= {name.replace("weight", "bias"): torch.randn(len(weight)) for name, weight in state.items()}
    for number in range(3, 8):
        width = len(state[f"{'conv' if number < 6 else 'fc'}{number}.weight"])
        scale = torch.tensor([900.0])
        state |= {f"bn{number}.0": scale * torch.randn(width), f"bn{number}.2": scale}
        state[f"bn{number}.1"] = scale * (torch.rand(width) + 0.5)
    return state


def _reference(state: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Scores of pairs of patches (N, 3, 96, 96), layer by layer with the released model's own blobs."""

    def norm(x: Tensor, number: int) -> Tensor:
        mean, variance = (state[f"bn{number}.{blob}"] / state[f"bn{number}.2"] for blob in (0, 1))
        shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
        return (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()

    def trunk(x: Tensor) -> Tensor:
        for number, (stride, padding) in enumerate([(4, 5), (1, 2), (1, 1), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, state[f"conv{number}.weight"], state[f"conv{number}.bias"], stride, padding)
            x = (norm(x, number) if number > 2 else x).relu()
            if number in (1, 2, 5):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            if number < 3:
                x = F.local_response_norm(x, 5, 1e-4, 0.75, 1.0)
        return norm(F.linear(x.flatten(1), state["fc6.weight"], state["fc6.bias"]), 6).relu()

    pair = torch.cat([trunk(first), trunk(second)], 1)
    hidden = norm(F.linear(pair, state["fc7.weight"], state["fc7.bias"]), 7).relu()
    hidden = F.linear(hidden, state["fc8.weight"], state["fc8.bias"]).relu()
    return F.linear(hidden, state["fc9.weight"], state["fc9.bias"])


@pytest.mark.parametrize("folded", [False, True])
def test_the_released_model_gives_its_own_scores(folded):
    torch.manual_seed(4)
    state = _official()
    task = _task(grid=(1, 2)).eval()
    patches = 50 * torch.randn(6, 3, 96, 96)
    expected = _reference(state, patches[:3], patches[3:])
    if folded:  # the norms become part of their layers, and eps is gone
        for number in range(3, 8):
            layer = f"{'conv' if number < 6 else 'fc'}{number}"
            mean, variance, scale = (state.pop(f"bn{number}.{blob}") for blob in range(3))
            gain = (variance / scale + 1e-5).rsqrt()
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            state[f"{layer}.bias"] = gain * (state[f"{layer}.bias"] - mean / scale)
    assert task.load_reference(state) == ([], [])
    scores, _ = task.classify(torch.stack([patches[:3], patches[3:]], 1).flatten(0, 1), 3)
    torch.testing.assert_close(scores[:, 0], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_official_checkpoint_that_fits_in_part():
    state = _official()
    del state["conv4.weight"]
    missing, unexpected = _task().load_reference(state | {"spare.weight": torch.zeros(1)})
    assert (missing, unexpected) == (["backbone.model.blocks.3.conv.weight"], ["spare.weight"])


def test_official_checkpoint_that_does_not_fit():
    with pytest.raises(CheckpointError, match=r"head.fc8.weight is \(12, 16\) in the file and \(13, 16\) here"):
        _task(widths=(16, 13)).load_reference(_official())
    with pytest.raises(CheckpointError, match=r"fc6.weight is \(7, 10\) in the file and \(20, 12, 3, 3\) here"):
        _task().load_reference({"fc6.weight": torch.zeros(7, 10)})
