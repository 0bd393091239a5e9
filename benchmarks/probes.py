"""The linear probe against one layer and optimizer for each head, and against logistic regression.

    python -m benchmarks.probes --threads 1
    python -m benchmarks.probes --probe-classes 10 --probe-images 10000

First the 52 heads of DINOv2's grid (4 inputs, 13 learning rates, ViT-S): a step of ours against a step of 52 linear
layers of torch with an SGD optimizer each, on the same batches; both must end at the same weights. Then the whole probe
with its default grid against scikit-learn's logistic regression over the ten C of its own cross-validation, each
choosing on a hold-out and trained anew, on features of clustered classes. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.timing import begun, machine, paired_times, relative_difference, table_head
from unlabeled.eval.base import FeatureSet, FeatureSplit
from unlabeled.eval.encoded_dataset import EncodedDataset
from unlabeled.eval.evaluators.linear import LinearConfig, LinearEvaluator, stratified_split
from unlabeled.eval.probe.heads import GroupedSgd, Setting

log = logging.getLogger(__name__)

RATES = LinearEvaluator(LinearConfig(grid="dinov2")).config.lr
WIDTH = 384
COLUMNS = ((3, 4), (0, 4), (3, 5), (0, 5))
"""First and last part of each input: class tokens of the last 4 blocks, then the average of the patches."""
BATCH = 256
TOLERANCE = 1e-4
"""Largest relative difference of the weights after the timed steps."""


@dataclass
class Grid:
    """Both sides of the first comparison, with the same first weights."""

    batches: list[tuple[Tensor, Tensor]]
    """Features (B, 5 WIDTH) and labels (B,), used in turn by each side."""
    ours: list[GroupedSgd]
    layers: list[list[nn.Linear]]
    """One list for each input."""
    optimizers: list[list[torch.optim.Optimizer]]

    @classmethod
    def of(cls, classes: int, width: int, device: torch.device) -> Grid:
        generator = torch.Generator(device).manual_seed(0)
        batches = [
            (
                torch.randn(BATCH, 5 * width, generator=generator, device=device),
                torch.randint(0, classes, (BATCH,), generator=generator, device=device),
            )
            for _ in range(4)
        ]
        grid = cls(batches, [], [], [])
        for first, last in COLUMNS:
            columns = (last - first) * width
            start = torch.randn(classes, columns, generator=generator, device=device) * 0.01
            settings = [Setting(lr, 0.0) for lr in RATES]
            grid.ours.append(GroupedSgd(columns, classes, settings, device=device, start=start))
            layers = [nn.Linear(columns, classes, device=device) for _ in RATES]
            for layer in layers:
                with torch.no_grad():
                    layer.weight.copy_(start)
                    layer.bias.zero_()
            grid.layers.append(layers)
            grid.optimizers.append(
                [torch.optim.SGD(one.parameters(), lr, momentum=0.9) for one, lr in zip(layers, RATES, strict=True)]
            )
        return grid

    def inputs(self, features: Tensor) -> list[Tensor]:
        """Contiguous features of each input."""
        width = features.shape[1] // 5
        return [features[:, first * width : last * width].contiguous() for first, last in COLUMNS]

    def step_together(self, number: int) -> None:
        features, labels = self.batches[number % len(self.batches)]
        for group, of_input in zip(self.ours, self.inputs(features), strict=True):
            group.step(of_input, labels, lr_factor=1.0)

    def step_apart(self, number: int) -> None:
        features, labels = self.batches[number % len(self.batches)]
        for layers, optimizers, of_input in zip(self.layers, self.optimizers, self.inputs(features), strict=True):
            for layer, optimizer in zip(layers, optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(of_input), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    @torch.no_grad()
    def differences(self) -> tuple[float, float]:
        """Relative difference of all weights, and the share of predictions that differ."""
        found, expected, wrong, count = [], [], 0, 0
        for group, layers, of_input in zip(self.ours, self.layers, self.inputs(self.batches[0][0]), strict=True):
            weights, biases = group.heads()
            scores = group.scores(of_input)
            for head, layer in enumerate(layers):
                found += [weights[head], biases[head]]
                expected += [layer.weight, layer.bias]
                wrong += int((scores[head].argmax(0) != layer(of_input).argmax(1)).sum())
                count += len(of_input)
        return relative_difference(found, expected), wrong / count


def counted(step: Callable[[int], None]) -> Callable[[], None]:
    """Calls `step` with 0, 1, 2, ..."""
    numbers = iter(range(2**31))
    return lambda: step(next(numbers))


def grid_row(classes: int, width: int, pairs: int, device: torch.device) -> str:
    """One row of the first table. Both sides take the same number of steps."""
    grid = Grid.of(classes, width, device)
    repeat = 10 if classes < 100 else 1
    ours, apart = paired_times(
        counted(grid.step_together), counted(grid.step_apart), pairs=pairs, warmup=2, repeat=repeat, device=device
    )
    difference, wrong = grid.differences()
    assert difference < TOLERANCE, f"weights differ by {difference:.1e}"
    ratio = statistics.median(b / a for a, b in zip(ours, apart, strict=True))
    times = [f"{1000 * statistics.median(one):.1f}" for one in (ours, apart)]
    return f"| {classes} | {' | '.join(times)} | {ratio:.1f} | {difference:.0e} | {100 * wrong:.2f} % |"


def clustered(count: int, width: int, classes: int, seed: int) -> FeatureSplit:
    """Five clusters a class, in directions of falling variance, with noise: roughly what a trained network gives."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    scales = np.arange(1, width + 1) ** -0.5
    centers = shared.normal(size=(classes * 5, width)) * scales
    mixing = np.linalg.qr(shared.normal(size=(width, width)))[0]
    labels = own.integers(0, classes, count)
    rows = centers[labels * 5 + own.integers(0, 5, count)] + 3 * own.normal(size=(count, width)) * scales
    return FeatureSplit((rows @ mixing * 3 + 0.5).astype(np.float32), labels)


def logistic_regression(data: FeatureSet) -> npt.NDArray[np.int64]:
    """Predictions for the test split: the ten C of LogisticRegressionCV, its 100 iterations, one hold-out."""
    kept, held = stratified_split(data.train.labels, LinearConfig().holdout, 0)
    scaler = StandardScaler().fit(data.train.features)
    train, labels = scaler.transform(data.train.features), data.train.labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # large C do not converge in so many
        scores = {
            strength: LogisticRegression(C=strength).fit(train[kept], labels[kept]).score(train[held], labels[held])
            for strength in np.logspace(-4, 4, 10)
        }
        final = LogisticRegression(C=max(scores, key=scores.__getitem__)).fit(train, labels)
    guesses: npt.NDArray[np.int64] = final.predict(scaler.transform(data.test.features))
    return guesses


def probe_row(images: int, classes: int, width: int, pairs: int, device: torch.device) -> str:
    """One row of the second table."""
    names = tuple(str(label) for label in range(classes))
    train, test = clustered(images, width, classes, 1), clustered(10_000, width, classes, 2)
    data = FeatureSet(train, test, names)
    found: dict[str, npt.NDArray[np.int64]] = {}

    def ours() -> None:
        found["ours"] = dict(LinearEvaluator(LinearConfig()).run(EncodedDataset(data)))["predictions"]  # type: ignore[assignment]

    def theirs() -> None:
        found["theirs"] = logistic_regression(data)

    times = paired_times(ours, theirs, pairs=pairs, warmup=0, repeat=1, device=device)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    seconds = [f"{statistics.median(one):.1f}" for one in times]
    accuracies = [f"{100 * float((found[side] == test.labels).mean()):.1f}" for side in ("ours", "theirs")]
    return f"| {images} x {width}, {classes} classes | {' | '.join(seconds)} | {ratio:.1f} | {' | '.join(accuracies)} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be chosen."""
    parser.add_argument("--probe-classes", nargs="+", type=int, default=[10, 1000], metavar="C", help="of the 52 heads")
    parser.add_argument("--probe-width", type=int, default=WIDTH, metavar="D", help="features of a token")
    parser.add_argument(
        "--probe-images", nargs="*", type=int, default=[10_000, 50_000], metavar="N", help="training images, whole"
    )
    parser.add_argument("--probe-pairs", type=int, default=5, help="turns of the 52 heads; each gives one ratio")


def run(options: argparse.Namespace) -> list[str]:
    """Measures; prints and returns the lines of the tables."""
    device = torch.device(getattr(options, "device", None) or "cpu")
    lines: list[str] = []

    def say(*words: str) -> None:
        lines.extend(words)
        log.info("%s", "\n".join(words))

    names = ["classes", "ours, ms", "52 layers, ms", "ratio", "weights differ by", "predictions that differ"]
    say(*table_head(names))
    for classes in options.probe_classes:
        say(grid_row(classes, options.probe_width, options.probe_pairs, device))
    if options.probe_images:
        names = ["features", "probe, s", "logistic regression, s", "ratio", "probe, %", "logistic regression, %"]
        say("", *table_head(names))
        for images in options.probe_images:
            say(probe_row(images, 10, options.probe_width, 1, device))
    return lines


def main(words: list[str] | None = None) -> list[str]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    add_arguments(parser)
    options = parser.parse_args(words)
    device = begun(options.device, options.threads)
    lines = run(options)
    found = machine(device)
    log.info("\n%s, %s threads, batch %d, fp32", found["device"], found["threads"], BATCH)
    return lines


if __name__ == "__main__":
    main()
