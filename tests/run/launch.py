"""Runs ``unlabeled`` in processes of their own, forked from one that has imported all: ranks, and runs that are killed.

What `accelerate launch` tells its processes through their environment is told here, without a launcher that imports
torch first.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def launch(
    overrides: Sequence[str],
    log: Path,
    *,
    script: Path | None = None,
    ranks: int = 1,
    before: Callable[[], None] | None = None,
) -> list[int]:
    """Exit codes of `ranks` processes that run ``unlabeled WORDS``, or `script` with these words; all print to `log`.

    `before` is called in each of them first.
    """
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    processes = [
        context.Process(target=_run, args=(list(overrides), log, script, environment(rank, ranks, port), before))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # one that hangs
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {
        **local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _run(
    overrides: list[str], log: Path, script: Path | None, variables: dict[str, str], before: Callable[[], None] | None
) -> None:
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in a run that was started by hand
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if before is not None:
        before()
    if script is not None:
        sys.argv = [str(script), *overrides]
        runpy.run_path(str(script), run_name="__main__")
        return
    from unlabeled.cli import main

    sys.exit(main(overrides))


def die_after_step(last: int) -> None:
    """This process will kill itself after optimizer step `last`."""
    from unlabeled.ssl.train import loop as engine

    record = engine.record

    def record_and_die(run: Any, step: int, *arguments: Any) -> None:
        record(run, step, *arguments)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    engine.record = record_and_die


def die_in_cell(number: int) -> None:
    """This process will kill itself when cell `number` of a gauntlet was measured and is not written yet."""
    from unlabeled.workflows.gauntlet import job

    evaluate_features, begun = job.evaluate_features, iter(range(1, number + 1))

    def judge_and_die(*arguments: Any) -> Any:
        found = evaluate_features(*arguments)
        if next(begun) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    job.evaluate_features = judge_and_die
