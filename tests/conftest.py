"""One thread per test process, and no network: set before torch and the hub are imported."""

import multiprocessing
import os
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# Processes that tests start are forks of one that has imported these: 0.2 seconds each in place of 5. Names that are
# not there are passed over.
multiprocessing.set_forkserver_preload(
    [
        *("torch.distributed.fsdp", "torch.utils.tensorboard", "torchvision.transforms.v2", "timm", "accelerate"),
        *("faiss", "sklearn.linear_model", "scipy.stats", "matplotlib.pyplot", "lightly", "hydra", "pytest"),
        "unlabeled.testing",
    ]
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one process, so that what they share (finished runs, environments) is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
