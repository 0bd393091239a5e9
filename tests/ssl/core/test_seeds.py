from unlabeled.ssl.core.seeds import derive


def test_every_part_counts_and_nothing_collides() -> None:
    seeds = {derive("step", seed, step, rank) for seed in range(8) for step in range(100) for rank in range(4)}
    assert len(seeds) == 8 * 100 * 4
    assert derive("a", 1) != derive("b", 1)
    assert derive(1, 2) != derive(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_on_every_machine() -> None:
    assert derive() == 6510301506637419378  # BLAKE2b-64 of nothing, little endian, without its top bit
