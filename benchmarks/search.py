"""kNN classification: our searches against the published loop in torch and against scikit-learn; memory of large ones.

Called by `benchmarks.eval`. Each side goes from features to the predicted class of each test image, with the weights
exp(cosine / 0.07) of the largest k; predictions must be equal.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.timing import paired_times, quartiles, table_head
from unlabeled.eval.base import FeatureSet, FeatureSplit, FloatArray, IntArray
from unlabeled.eval.evaluators.knn import KnnConfig, best_classes, class_scores, nearest_neighbors

log = logging.getLogger(__name__)

TEMPERATURE = 0.07
CHUNKS = 100
"""Parts of the test set in the published loop."""
Side = Callable[[FeatureSet, int], IntArray]


def ours(search: str) -> Side:
    """Predictions by ``evaluate.knn.search=...``."""

    def predict(data: FeatureSet, k: int) -> IntArray:
        settings = KnnConfig.model_validate({"search": search})
        neighbors, similarities = nearest_neighbors(data.train.features, data.test.features, k, settings)
        parts = []
        for start in range(0, len(neighbors), 2048):
            part = slice(start, start + 2048)
            votes = data.train.labels[neighbors[part]]
            ((_, scores),) = class_scores(votes, similarities[part], [k], TEMPERATURE, len(data.classes))
            parts.append(best_classes(scores, 1)[:, 0])
        return np.concatenate(parts)

    return predict


def published(data: FeatureSet, k: int) -> IntArray:
    """The order of operations of the kNN script of facebookresearch/dino: float32 products of a hundredth of the test
    images with all training images, topk, one-hot classes of the neighbors, their weighted sum."""
    train, test = (F.normalize(torch.from_numpy(one.features), dim=1) for one in (data.train, data.test))
    labels, classes = torch.from_numpy(data.train.labels), len(data.classes)
    columns, hot, found = train.t(), torch.zeros(k, classes), []
    for queries in test.split(max(1, len(test) // CHUNKS)):  # type: ignore[no-untyped-call]
        similarities, indices = torch.mm(queries, columns).topk(k, largest=True, sorted=True)
        neighbors = torch.gather(labels.expand(len(queries), -1), 1, indices)
        hot.resize_(len(queries) * k, classes).zero_().scatter_(1, neighbors.reshape(-1, 1), 1)
        weights = (similarities / TEMPERATURE).exp_()
        scores = (hot.view(len(queries), k, classes) * weights[:, :, None]).sum(1)
        found.append(scores.sort(1, descending=True).indices[:, 0])
    result: IntArray = torch.cat(found).numpy()
    return result


def scikit_learn(data: FeatureSet, k: int) -> IntArray:
    """Brute force over unit vectors by Euclidean distance, for which scikit-learn has faster code than for the cosine;
    both order them alike."""

    def weights(distances: FloatArray) -> FloatArray:
        weighted: FloatArray = np.exp((1 - distances**2 / 2) / TEMPERATURE)
        return weighted

    train, test = (F.normalize(torch.from_numpy(one.features), dim=1).numpy() for one in (data.train, data.test))
    model = KNeighborsClassifier(n_neighbors=k, algorithm="brute", weights=weights)
    found: IntArray = model.fit(train, data.train.labels).predict(test)
    return found


BASELINES: dict[str, Side] = {"torch": published, "scikit-learn": scikit_learn}


def made_up(train: int, test: int, width: int, classes: int, seed: int = 0) -> FeatureSet:
    """Overlapping classes with a common mean and variance in a sixth of the directions, as features of networks are."""
    shared = np.random.default_rng(0)
    centers = shared.normal(size=(classes, width))
    spread = shared.normal(size=(max(1, width // 6), width)) * 0.8 / max(1, width // 6) ** 0.5

    def split(count: int, number: int) -> FeatureSplit:
        own = np.random.default_rng([seed, number])
        labels = own.integers(0, classes, count)
        inner = own.normal(size=(count, len(spread))) @ spread * 2.5 + 0.1 * own.normal(size=(count, width))
        return FeatureSplit((0.5 * centers[labels] + inner + 2).astype(np.float32), labels)

    return FeatureSet(split(train, 1), split(test, 2), tuple(map(str, range(classes))))


def stored(files: list[Path]) -> FeatureSet:
    """Two files of ``unlabeled evaluate``'s folder ``features``: training and test images."""
    train, test = (load_file(file) for file in files)
    count = int(train["labels"].max()) + 1
    splits = [FeatureSplit(one["features"], one["labels"]) for one in (train, test)]
    return FeatureSet(splits[0], splits[1], tuple(map(str, range(count))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen."""
    parser.add_argument("--train", type=int, default=50_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--widths", nargs="+", type=int, default=[384], metavar="D", help="features of an image")
    parser.add_argument("--classes", nargs="+", type=int, default=[100], metavar="C")
    parser.add_argument(
        "--files", nargs=2, type=Path, metavar=("TRAIN", "TEST"), help="cached features to take instead"
    )
    parser.add_argument("--k", type=int, default=200, help="neighbors")
    parser.add_argument("--searches", nargs="+", default=["exact", "reduced"])
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--pairs", type=int, default=3, help="turns; each gives one ratio")
    parser.add_argument(
        "--processor-time", action="store_true", help="not the clock's: for one thread on a busy machine"
    )


def run(options: argparse.Namespace) -> list[str]:
    """Measures; prints and returns the lines of the table."""
    names = ["features, test images", "search", "against", "ours, s", "theirs, s", "ratio (quartiles)", "differ"]
    lines = table_head(names)
    log.info("%s", "\n".join(lines))
    if options.files:
        given = [stored(options.files)]
    else:
        sizes = [(width, classes) for width in options.widths for classes in options.classes]
        given = [made_up(options.train, options.test, *size) for size in sizes]
    for data in given:
        for baseline in options.baselines:
            for search in options.searches:
                lines.append(_row(data, search, baseline, options))
                log.info("%s", lines[-1])
    return lines


def _row(data: FeatureSet, search: str, baseline: str, options: argparse.Namespace) -> str:
    found: dict[str, IntArray] = {}

    def step(name: str, side: Side) -> Callable[[], None]:
        return lambda: found.update({name: side(data, options.k)})

    sides = step("ours", ours(search)), step("theirs", BASELINES[baseline])
    clock = time.process_time if options.processor_time else time.perf_counter
    times = paired_times(*sides, pairs=options.pairs, warmup=0, repeat=1, device=torch.device("cpu"), clock=clock)
    differ = int((found["ours"] != found["theirs"]).sum())
    assert differ <= len(data.test) / 10_000, (
        f"{differ} of {len(data.test)} predictions differ"
    )  # one that rounding tips
    ratio = quartiles([theirs / mine for mine, theirs in zip(*times, strict=True)])
    seconds = [f"{statistics.median(one):.2f}" for one in times]
    size = f"{len(data.train)} x {data.train.features.shape[1]}, {len(data.classes)} classes, {len(data.test)}"
    spread = f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"| {size} | {search} | {baseline} | {' | '.join(seconds)} | {spread} | {differ} |"


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen for `memory`."""
    parser.add_argument("--rows", type=int, default=1_000_000, help="training images, written to a temporary file")
    parser.add_argument("--width", type=int, default=768, help="features of an image")
    parser.add_argument("--queries", type=int, default=1000, help="test images")
    parser.add_argument("--k", type=int, default=200, help="neighbors")
    parser.add_argument("--memory-gb", nargs="+", type=float, default=[1.0, 2.0], help="evaluate.knn.memory_gb")
    parser.add_argument("--searches", nargs="+", default=["exact", "reduced"])
    parser.add_argument("--folder", type=Path, help="where the file lies meanwhile")


def memory(options: argparse.Namespace) -> list[str]:
    """Peak memory and seconds of searches in a file, each in a process of its own; returns the lines of the table."""
    lines = table_head(["search", "rows", "file, GB", "memory_gb", "peak of memory, GB", "s"])
    log.info("%s", "\n".join(lines))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "rows.npy"
        rows = np.lib.format.open_memmap(file, "w+", np.float32, (options.rows, options.width))
        for start in range(0, options.rows, 10_000):
            rows[start : start + 10_000] = made_up(
                min(10_000, options.rows - start), 1, options.width, 100
            ).train.features
        rows.flush()
        del rows
        for search in options.searches:
            for gigabytes in options.memory_gb:
                work = (file, search, gigabytes, options.queries, options.k, torch.get_num_threads())
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    peak, seconds = pool.apply(_search_in_file, work)
                size = f"{options.rows} x {options.width} | {4e-9 * options.rows * options.width:.2f}"
                lines.append(f"| {search} | {size} | {gigabytes:g} | {peak:.2f} | {seconds:.0f} |")
                log.info("%s", lines[-1])
    return lines


def _search_in_file(
    file: Path, search: str, gigabytes: float, queries: int, k: int, threads: int
) -> tuple[float, float]:
    """(1e9 bytes that the process had at most, pages of the file included; seconds)."""
    torch.set_num_threads(threads)
    rows = np.load(file, mmap_mode="r")
    settings = KnnConfig.model_validate({"search": search, "memory_gb": gigabytes})
    test = made_up(1, queries, rows.shape[1], 100).test.features
    began = time.perf_counter()
    nearest_neighbors(rows, test, k, settings)
    return most_resident(), time.perf_counter() - began


def most_resident() -> float:
    """Of this process so far, in 1e9 bytes. (On Linux the figure of `getrusage` begins with that of the parent.)"""
    listing = Path("/proc/self/status")
    if listing.is_file():
        return float(re.findall(r"VmHWM:\s+(\d+) kB", listing.read_text())[0]) * 1024 / 1e9
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 1e9
