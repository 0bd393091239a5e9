"""What the evaluators cost, against the usual ways to compute the same.

    python -m benchmarks.eval knn --threads 1        # nearest neighbors, against torch and scikit-learn
    python -m benchmarks.eval probe --threads 1      # the linear probe
    python -m benchmarks.eval memory --threads 1     # nearest neighbors in a million rows on disk

Both sides of a row are timed in turns in one process. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from benchmarks.timing import begun, machine

log = logging.getLogger(__name__)

PARTS = {
    "knn": ("benchmarks.search", "add_arguments", "run"),
    "probe": ("benchmarks.probes", "add_arguments", "run"),
    "memory": ("benchmarks.search", "add_memory_arguments", "memory"),
}
"""Module, what adds its arguments, what runs it."""


def main(words: list[str] | None = None) -> list[str]:
    """Measures what the command line names and prints the table; returns its lines."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eval", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS), help="its name and --help say what can be chosen")
    parser.add_argument("--threads", type=int, help="CPU threads")
    if words and words[0] in PARTS:  # the others are not even imported
        module, arguments, _ = PARTS[words[0]]
        getattr(importlib.import_module(module), arguments)(parser)
    options = parser.parse_args(words)
    device = begun("cpu", options.threads)
    logging.getLogger("faiss").setLevel(logging.WARNING)
    module, _, function = PARTS[options.part]
    lines: list[str] = getattr(importlib.import_module(module), function)(options)
    found = machine(device)
    log.info("\n%s, %s threads, torch %s, fp32", found["device"], found["threads"], found["torch"])
    return lines


if __name__ == "__main__":
    main()
