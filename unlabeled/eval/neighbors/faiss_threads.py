"""faiss, loaded when it is needed and as parallel as torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def faiss_threads() -> Iterator[Any]:
    """The module, with as many threads as torch; one on macOS, where a second OpenMP runtime with several crashes."""
    import faiss  # loads that runtime, which a run without it does not need

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
