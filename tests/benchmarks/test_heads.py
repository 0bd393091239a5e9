"""The benchmark of POA's heads runs, and the memory that it gives is that of the step."""

from __future__ import annotations

import pytest

from benchmarks.heads import main


@pytest.mark.slow
def test_the_table_has_a_row_for_each_head_and_memory_is_that_of_the_logits() -> None:
    words = ["--prototypes", "2048", "--chunks", "16", "--batch", "32", "--pairs", "1", "--device", "cpu"]
    head, _, *rows = main(words)
    assert head == "| prototypes | all at once, s | GB | 16 rows, s (to all at once) | GB |"
    assert len(rows) == 1
    prototypes, _, whole, _, parts = (cell.strip() for cell in rows[0].strip("|").split("|"))
    logits = 59 * 32 * 2048 * 4 / 1e9  # of hidden places, in one network
    assert prototypes == "2048"
    assert 4 * logits - 0.005 < float(whole) < 24 * logits  # both students' log-probabilities and their gradients
    assert float(parts) < 2 * logits
