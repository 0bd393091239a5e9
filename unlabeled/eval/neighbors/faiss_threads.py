"""faiss, imported on demand and with as many threads as torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def faiss_threads() -> Iterator[Any]:
    """Yields the faiss module, which uses as many threads as torch within the block."""
    import faiss  # here, since it loads an OpenMP runtime of its own that most runs do not need

    before = faiss.omp_get_max_threads()
    # on macOS, the OpenMP runtimes of torch and faiss crash if both use several threads
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
