"""One thread per test process, no network, and helpers that can be imported, by processes that tests spawn too."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

# Processes that tests start are forks of one that has imported these: 0.2 seconds each in place of 5. Names that are
# not there are passed over.
multiprocessing.set_forkserver_preload(
    [
        *("torch.distributed.fsdp", "torch.utils.tensorboard", "torchvision.transforms.v2", "timm", "accelerate"),
        *("faiss", "sklearn.linear_model", "scipy.stats", "matplotlib.pyplot", "lightly", "hydra", "pytest"),
        "unlabeled.testing",
    ]
)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count what they leave behind find it collected."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one process, so that what they share (finished runs, environments) is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
