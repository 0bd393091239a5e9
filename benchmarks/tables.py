"""Results on disk, and the tables of ``docs/results/benchmarks.md`` that are made from them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "benchmarks.md"
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"

Row = Mapping[str, Any]


def result_file(folder: Path, device: str) -> Path:
    """Where the results of the machine called `device` lie: one file a device."""
    kept = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return folder / f"masked_{kept}.json"


def add_result(file: Path, key: str, row: Row) -> None:
    """Writes `row` under `key`, beside what the file holds already."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows[key] = dict(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def write_tables(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Replaces the tables between the page's two marks by those of all results; toys are left out."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert all((begin, end)), f"{page} lacks the marks {_BEGIN} and {_END}"
    tables = [table for file in sorted(results.glob("masked_*.json")) if (table := _table(file))]
    middle = "\n\n".join(tables) or "Nothing has been measured yet."
    page.write_text(f"{before}{_BEGIN}\n\n{middle}\n\n{_END}{after}", encoding="utf-8")


def _table(file: Path) -> str:
    rows = json.loads(file.read_text(encoding="utf-8"))
    chosen = [(key, row) for key, row in rows.items() if "toy" not in key.split()]
    if not chosen:
        return ""
    machines = list(dict.fromkeys(_machine(row["machine"]) for _, row in chosen))
    head = [
        f"### {chosen[0][1]['machine']['device']}",
        "",
        *machines,
        "",
        "| model | ours / original | batch | speed-up (quartiles) | images/s, ours / original | GFLOP of a step | "
        "share of the matrix rate | peak memory, GB | loss differs by | gradients differ by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join(head + [_line(key, row) for key, row in chosen])


def _machine(found: Mapping[str, str]) -> str:
    return f"torch {found['torch']}, timm {found['timm']}, {found['threads']} threads, commit {found['commit']}."


def _line(key: str, row: Row) -> str:
    speedup, speed, work, memory = row["speedup"], row["images_per_s"], row["gigaflop"], row["peak_gb"]
    compiled = "".join(f" {word}" for word in ("compiled", "plain") if word in key.split())
    cells = [
        row["title"],
        f"{row['precision']['ours']}{compiled} / {row['precision']['original']}",
        str(row["batch"]),
        f"**{speedup['median']:.2f}** ({speedup['low']:.2f} to {speedup['high']:.2f})",
        f"{speed['ours']:.4g} / {speed['original']:.4g}",
        f"{work['ours']:.4g} / {work['original']:.4g}",
        " / ".join(f"{_share(row, side):.0%}" for side in ("ours", "original")),
        "–" if memory["ours"] is None else f"{memory['ours']:.2f} / {memory['original']:.2f}",
        f"{row['loss_difference']:.0e}",
        f"{row['gradient_difference']:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def _share(row: Row, side: str) -> float:
    """Operations a second of a side over the rate of a large matrix product in its precision."""
    rate: float = row["gigaflop"][side] / row["seconds"][side]["median"] / row["matrix_rate"][row["precision"][side]]
    return rate


if __name__ == "__main__":
    write_tables()
