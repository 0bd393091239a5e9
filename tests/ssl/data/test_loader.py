"""Which images a step sees, what their views draw, and what becomes of broken ones."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.bad import BadImage, BadImages
from unlabeled.ssl.data.loader import Key, LoadedBatch, RunSampler, ViewDataset, make_loader, seeded
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 3), (4, 1), (3, 4)]


class Numbers:
    """Image i is filled with i; the images `broken` cannot be decoded."""

    classes = None

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise DecodeError(f"{self.describe(index)}: is torn")
        return torch.full((3, 4, 4), index % 256, dtype=torch.uint8)

    def labels(self) -> None:
        return None

    def describe(self, index: int) -> str:
        return f"number {index}"


def draws(image: Tensor) -> dict[str, Tensor]:
    """Views that use all three generators."""
    drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
    return {"image": image, "drawn": torch.tensor(drawn, dtype=torch.float64)}


def sampler(**settings: int) -> RunSampler:
    return RunSampler(**{"length": 50, "batch_size": 12, "total_steps": 11, "seed": 3, **settings})


def steps(world: int, accumulation: int, **settings: int) -> list[list[Key]]:
    """The keys of each optimizer step, over all ranks and micro-steps, in the order of the layout."""
    ranks = [list(sampler(world=world, accumulation=accumulation, rank=rank, **settings)) for rank in range(world)]
    micro = [[key for rank in ranks for key in rank[number]] for number in range(len(ranks[0]))]
    return [
        [key for part in micro[step : step + accumulation] for key in part]
        for step in range(0, len(micro), accumulation)
    ]


@pytest.mark.parametrize(("world", "accumulation"), LAYOUTS)
def test_steps_see_the_same_images_in_all_layouts(world: int, accumulation: int) -> None:
    assert steps(world, accumulation) == steps(1, 1)


@pytest.mark.parametrize(("world", "accumulation"), LAYOUTS)
def test_micro_steps_are_equal_parts(world: int, accumulation: int) -> None:
    lists = list(sampler(world=world, accumulation=accumulation))
    assert len(lists) == len(sampler(world=world, accumulation=accumulation)) == 11 * accumulation
    assert {len(keys) for keys in lists} == {12 // world // accumulation}


def test_an_epoch_is_a_permutation_cut_to_full_batches() -> None:
    assert sampler().steps_per_epoch == 4
    whole = [key for step in steps(1, 1) for key in step]
    for epoch in range(2):
        indices = [index for number, index in whole if number == epoch]
        assert len(indices) == len(set(indices)) == 48
        assert set(indices) < set(range(50))
    assert [epoch for epoch, _ in whole] == [0] * 48 + [1] * 48 + [2] * 36


def test_epochs_and_seeds_are_shuffled_apart() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [index for keys in sampler(seed=seed) for number, index in keys if number == epoch]

    # (seed, epoch) and (seed + 1, epoch - 1) would coincide if the two were added
    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in (-1, 0, 1, 2) for epoch in (0, 1)}
    assert len(set(orders.values())) == len(orders)
    assert orders[0, 0] != tuple(sorted(orders[0, 0]))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 10, 11, 12])
def test_a_resumed_run_is_the_rest_of_the_whole_one(world: int, accumulation: int, start: int) -> None:
    for rank in range(world):
        settings = {"world": world, "accumulation": accumulation, "rank": rank}
        whole, rest = list(sampler(**settings)), list(sampler(start_step=start, **settings))
        assert rest == whole[start * accumulation :]
        assert len(sampler(start_step=start, **settings)) == len(rest)


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size: 64 is larger than the data \(50 images\); give batch_size=50"):
        sampler(batch_size=64)
    with pytest.raises(
        ConfigError, match=r"^batch_size: 12 cannot be split over 2 processes x 4 micro-steps; give a multiple of 8$"
    ):
        sampler(world=2, accumulation=4)


def test_seeded_leaves_the_generators_as_they_were() -> None:
    def numbers() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [numbers(), numbers()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = numbers()
    with seeded(5):
        inside = numbers()
    assert [first, numbers()] == expected
    with seeded(5):
        assert numbers() == inside
    with seeded(6):
        assert all(a != b for a, b in zip(numbers(), inside, strict=True))


def test_views_depend_on_seed_epoch_and_index_alone() -> None:
    dataset = ViewDataset(Numbers(50), draws, seed=1)
    first = dataset[2, 7].views
    torch.rand(9)
    assert torch.equal(dataset[2, 7].views["drawn"], first["drawn"])
    assert first["index"].dtype == torch.int64
    assert (first["image"] == 7).all()
    others = [dataset[3, 7], dataset[2, 8], ViewDataset(Numbers(50), draws, seed=2)[2, 7]]
    assert all((other.views["drawn"] != first["drawn"]).all() for other in others)


def loaded(workers: int, broken: frozenset[int] = frozenset(), **settings: int) -> list[LoadedBatch]:
    return list(make_loader(ViewDataset(Numbers(50, broken), draws, seed=1), sampler(**settings), workers))


def assert_equal(left: list[LoadedBatch], right: list[LoadedBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        assert one.bad == other.bad


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    broken = frozenset({3, 11, 40})
    whole = loaded(0, broken)
    assert len(whole) == 11
    assert whole[0].tensors["image"].shape == (12, 3, 4, 4)
    assert torch.equal(whole[0].tensors["index"] % 256, whole[0].tensors["image"][:, 0, 0, 0].long())
    assert_equal(loaded(workers, broken), whole)
    assert_equal(loaded(workers, broken, start_step=5), whole[5:])


def test_loading_leaves_the_generators_of_the_main_process_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        loaded(workers, total_steps=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_broken_images_are_replaced_the_same_way_every_time() -> None:
    broken = frozenset(range(0, 50, 2))
    samples = [ViewDataset(Numbers(50, broken), draws, seed=1)[0, 4] for _ in range(2)]
    assert samples[0].views["index"] == samples[1].views["index"]
    assert int(samples[0].views["index"]) not in broken
    assert samples[0].bad == samples[1].bad
    assert samples[0].bad[0] == BadImage(4, "number 4", "is torn")
    assert (samples[0].views["image"] == samples[0].views["index"]).all()
    replacements = {int(ViewDataset(Numbers(50, broken), draws, seed)[0, 4].views["index"]) for seed in range(20)}
    assert len(replacements) > 5
    assert ViewDataset(Numbers(50, broken), draws, seed=1)[0, 5].bad == []


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_all_broken_stops_at_once_in_one_line(workers: int) -> None:
    with pytest.raises(DataError, match=r"^data: 16 images in a row cannot be decoded, the last is .*torn") as caught:
        loaded(workers, frozenset(range(50)))
    assert "\n" not in str(caught.value)
    assert type(caught.value) is DataError


def raises_a_bug(image: Tensor) -> dict[str, Tensor]:
    raise KeyError("a bug")


def test_bugs_keep_their_traceback_and_leave_no_workers() -> None:
    with pytest.raises(KeyError, match="raises_a_bug") as caught:
        list(make_loader(ViewDataset(Numbers(50), raises_a_bug, seed=1), sampler(), workers=1))
    assert caught.tb is not None  # which refers to torch's iterator
    assert multiprocessing.active_children() == []


def test_workers_end_with_an_iterator_that_is_dropped() -> None:
    iterator = iter(make_loader(ViewDataset(Numbers(50), draws, seed=1), sampler(), workers=2))
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    cycle = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    gc.collect()
    assert multiprocessing.active_children() == []


LEFT_OPEN = """
from unlabeled.ssl.data.loader import RunSampler, ViewDataset, make_loader
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.config.schema import DataConfig

def views(image):
    return {"image": image}

dataset = ViewDataset(open_source(DataConfig(name="digits")), views, seed=0)
iterator = iter(make_loader(dataset, RunSampler(length=len(dataset), batch_size=8, total_steps=99, seed=0), workers=2))
print(len(next(iterator).tensors["image"]))
"""


def test_python_exits_quietly_with_an_iterator_left_open() -> None:
    result = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=60, check=True)
    assert (result.stdout, result.stderr) == ("8\n", "")


def kills_itself(image: Tensor) -> dict[str, Tensor]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_killed_worker_is_an_error_for_people() -> None:
    loader = make_loader(ViewDataset(Numbers(50), kills_itself, seed=1), sampler(), workers=1)
    with pytest.raises(DataError, match=r"^engine\.workers: a loader process died, .* set engine\.workers lower$"):
        list(loader)


def signals_itself(image: Tensor) -> dict[str, Tensor]:
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), stop)
    return {"threads": torch.tensor(torch.get_num_threads())}


def test_workers_ignore_signals_and_use_one_thread() -> None:
    loader = make_loader(ViewDataset(Numbers(50), signals_itself, seed=1), sampler(total_steps=2), workers=1)
    assert [batch.tensors["threads"].unique().tolist() for batch in loader] == [[1], [1]]


def test_batches_pin_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor + 1)
    batch = LoadedBatch({"a": torch.zeros(2), "b": torch.zeros(3)}, [BadImage(1, "x", "y")])
    result = batch.pin_memory()
    assert pinned == [2, 3]
    assert result.tensors["b"].tolist() == [1, 1, 1]
    assert result.bad == batch.bad


def bad(*indices: int) -> list[BadImage]:
    return [BadImage(index, f"number {index}", "is torn") for index in indices]


def test_bad_images_are_listed_once_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_images.jsonl"
    listed = BadImages(path, total=100, max_fraction=0.05)
    assert listed.add([]) == 0
    assert not path.exists()
    assert listed.add(bad(3, 5, 3)) == 2
    assert listed.add(bad(5, 9)) == 1
    assert listed.count == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"index": 3, "name": "number 3", "reason": "is torn"}
    assert [line["index"] for line in lines] == [3, 5, 9]


def test_a_resumed_run_continues_the_list(tmp_path: Path) -> None:
    path = tmp_path / "bad_images.jsonl"
    BadImages(path, total=100, max_fraction=0.05).add(bad(3, 5))
    with path.open("a") as file:
        file.write('{"index": 7, "na')  # cut short by a kill
    resumed = BadImages(path, total=100, max_fraction=0.05)
    assert resumed.count == 2
    assert resumed.add(bad(5, 7, 8)) == 2
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3, 5, 7, 8]


def test_too_many_bad_images_stop_a_run(tmp_path: Path) -> None:
    listed = BadImages(tmp_path / "bad_images.jsonl", total=40, max_fraction=0.05)
    listed.add(bad(1, 2))
    listed.check()
    listed.add(bad(3))
    expected = r"^data: 3 of 40 images \(7\.5%\) cannot be decoded, more than data\.max_bad_fraction=0\.05; see .*jsonl"
    with pytest.raises(DataError, match=expected):
        listed.check()


def test_a_folder_with_some_torn_files_from_disk_to_list(tmp_path: Path) -> None:
    for index in range(40):
        path = tmp_path / "data" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    torn = [tmp_path / "data" / name for name in ("07.png", "31.png")]
    for path in torn:
        path.write_bytes(path.read_bytes()[:50])
    source = open_source(DataConfig(name="folder", path=tmp_path / "data"))
    epoch = RunSampler(length=40, batch_size=10, total_steps=4, seed=0)
    listed = BadImages(tmp_path / "bad_images.jsonl", total=len(source), max_fraction=0.05)
    counts = Counter[int]()
    for batch in make_loader(ViewDataset(source, draws, seed=0), epoch, workers=2):
        listed.add(batch.bad)
        listed.check()
        assert torch.equal(batch.tensors["image"][:, 0, 0, 0], batch.tensors["index"].to(torch.uint8))
        counts.update(batch.tensors["index"].tolist())
    assert counts.total() == 40
    assert set(range(40)) - set(counts) == {7, 31}
    lines = [json.loads(line) for line in listed.path.read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == [str(path) for path in torn]
    assert all(line["reason"].startswith("cannot be decoded (") for line in lines)
