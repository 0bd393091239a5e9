"""Sinkhorn's offsets against the published iteration on exponentials, in chunks, and over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from unlabeled.pretext.self_distillation.self_distillation import assignments, sinkhorn_offsets

ROWS, CHANNELS, PROTOTYPES, TEMPERATURE = 23, 8, 12, 0.05
SPLIT = {"uneven": 17, "one without any": ROWS}
"""Case → rows of the first of two ranks."""
PADDING = 4


def published(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The iteration on exponentials (DINOv2's formula): (n, K) → assignments (n, K)."""
    plan = torch.exp(logits / temperature).t()  # (K, n)
    prototypes, rows = plan.shape
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / prototypes
        plan = plan / plan.sum(0, keepdim=True) / rows
    return (plan * rows).t()


def drawn(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Directions (n, C) that favor some prototypes (K, C), which have various lengths."""
    generator = torch.Generator().manual_seed(3)
    units = torch.randn(rows, CHANNELS, generator=generator, dtype=torch.float64) + 0.7
    prototypes = torch.randn(PROTOTYPES, CHANNELS, generator=generator, dtype=torch.float64)
    lengths = 0.5 + torch.rand(PROTOTYPES, 1, generator=generator, dtype=torch.float64)
    normalize = torch.nn.functional.normalize
    return normalize(units, dim=1).to(dtype), (lengths * normalize(prototypes, dim=1)).to(dtype)


def assigned(units: Tensor, prototypes: Tensor, **options) -> Tensor:
    offsets = sinkhorn_offsets(units, prototypes, TEMPERATURE, **options)
    return assignments(units @ prototypes.t(), TEMPERATURE, offsets)


@pytest.mark.parametrize("iterations", [1, 3, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_assignments_are_those_of_the_published_iteration(iterations, dtype, tolerance):
    units, prototypes = drawn(dtype)
    expected = published(units.double() @ prototypes.double().t(), TEMPERATURE, iterations)
    found = assigned(units, prototypes, iterations=iterations)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance * 1e-3)


def test_many_iterations_use_all_prototypes_alike_and_none_are_a_softmax():
    units, prototypes = drawn()
    plain = (units @ prototypes.t() / TEMPERATURE).softmax(1)
    assert torch.allclose(assigned(units, prototypes, iterations=0), plain)
    assert plain.sum(0).max() > 2 * ROWS / PROTOTYPES
    assert plain.sum(0).min() < 0.1 * ROWS / PROTOTYPES
    even = assigned(units, prototypes, iterations=500).sum(0)
    assert torch.allclose(even, torch.full_like(even, ROWS / PROTOTYPES), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_prototypes_do_not_overflow(dtype):
    units, prototypes = drawn(dtype)
    scale = 1000 / float((units @ prototypes.t()).max())
    logits = scale * units @ prototypes.t()  # over the temperature: 20 000, whose exponential no float holds
    assert not published(logits, TEMPERATURE).isfinite().all()
    found = assigned(units, scale * prototypes)
    assert found.isfinite().all()
    assert torch.allclose(found.sum(1), torch.ones(ROWS, dtype=dtype))
    exact = sinkhorn_offsets(units.double(), scale * prototypes.double(), TEMPERATURE)
    double = assignments(scale * units.double() @ prototypes.double().t(), TEMPERATURE, exact)
    assert torch.allclose(found.double(), double, atol=0.02)  # 20 000 has steps of 0.002 in float32


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 100])
def test_chunks_change_nothing(chunk):
    units, prototypes = drawn()
    whole, parts = (sinkhorn_offsets(units, prototypes, TEMPERATURE, chunk=size) for size in (None, chunk))
    assert torch.allclose(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 5])
def test_rows_of_no_weight_take_no_part(chunk):
    units, prototypes = drawn()
    valid = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) > 0.4
    padded = torch.where(valid[:, None], units, torch.full_like(units, torch.nan))
    weights = torch.where(valid, 0.25, 0.0)
    expected = published(units[valid] @ prototypes.t(), TEMPERATURE)
    offsets = sinkhorn_offsets(padded, prototypes, TEMPERATURE, chunk=chunk, weights=weights)
    assert torch.allclose(assignments(units[valid] @ prototypes.t(), TEMPERATURE, offsets), expected)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("chunk", [None, 2])
def test_without_any_row_offsets_are_zero(rows, chunk):
    units, prototypes = drawn()
    found = sinkhorn_offsets(units[:rows], prototypes, TEMPERATURE, chunk=chunk, weights=torch.zeros(rows))
    assert torch.equal(found, torch.zeros(PROTOTYPES, dtype=torch.float64))


def test_autocast_and_half_precision_are_left():
    units, prototypes = drawn(torch.float32)
    expected = sinkhorn_offsets(units, prototypes, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_offsets(units, prototypes, TEMPERATURE), expected)
    assert sinkhorn_offsets(units.bfloat16(), prototypes.bfloat16(), TEMPERATURE).dtype == torch.float32


def test_the_temperature_may_be_a_tensor_and_nothing_has_a_gradient():
    units, prototypes = drawn()
    found = sinkhorn_offsets(units, prototypes.requires_grad_(), torch.tensor(TEMPERATURE, dtype=torch.float64))
    assert not found.requires_grad
    assert torch.allclose(found, sinkhorn_offsets(units, prototypes, TEMPERATURE))


def shares(case: str, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of a rank, `PADDING` more that are none, and their weights."""
    units, _ = drawn()
    own = units[: SPLIT[case]] if rank == 0 else units[SPLIT[case] :]
    padding = torch.full((PADDING, CHANNELS), 9.0, dtype=units.dtype)
    return torch.cat([own, padding]), torch.cat([torch.ones(len(own)), torch.zeros(PADDING)])


def _worker(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {}
    for case in SPLIT:
        units, weights = shares(case, rank)
        for chunk in (None, 4):
            key = f"{case}, chunk {chunk}"
            found[key] = sinkhorn_offsets(units, drawn()[1], TEMPERATURE, chunk=chunk, weights=weights)
    own = drawn()[0][rank::2]  # without weights: 12 rows and 11
    found["no weights, chunk 5"] = sinkhorn_offsets(own, drawn()[1], TEMPERATURE, chunk=5)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_for_all_rows(tmp_path: Path):
    units, prototypes = drawn()
    expected = published(units @ prototypes.t(), TEMPERATURE)
    mp.start_processes(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert len(first) == 2 * len(SPLIT) + 1
    for key, offsets in first.items():
        assert torch.equal(offsets, second[key]), key
        found = assignments(units @ prototypes.t(), TEMPERATURE, offsets)
        assert torch.allclose(found, expected, rtol=3e-7, atol=1e-12), key
    alone = assigned(units[: SPLIT["uneven"]], prototypes)  # of one rank's rows only: trap 13
    assert not torch.allclose(alone, expected[: SPLIT["uneven"]], atol=0.05)
