"""A search in a process of its own whose trials write down what they train: the driver of faults.py and soak.py.

    python benchmarks/driver.py [--pause SECONDS] [--lag FACTOR] [--least SECONDS] [--real] ARGUMENTS

It is `run_search.py`, whose arguments it takes, with a trainer that sleeps, sums over the ranks, saves and reports,
or, with `--real`, with the real one. With `--lag` the worse trials are slower; `--least` replaces the five minutes
of silence that are never taken as hung.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NOTES = "begun.jsonl"
"""In a trial's folder: one line per epoch that a process began or ended."""
BUSY = "busy"
"""A trial that finds a file of this name in its folder removes it and never comes back from its loop."""

Row = dict[str, Any]


def noted(train: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer that writes down every epoch that it begins, ends, or merely reports once more."""

    def trial(config: Any, folder: Path, *, report: Callable[[Row], None], fork: Any = None, **options: Any) -> None:
        import torch

        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        resumes = fork is not None or any(folder.glob("checkpoint*"))

        def note(what: str, epoch: int) -> None:
            line = json.dumps({"what": what, "epoch": epoch, "rank": rank, "pid": os.getpid(), "at": time.time()})
            with suppress(OSError), open(folder / NOTES, "a") as file:  # a full disk is the search's to tell
                file.write(line + "\n")

        def noting(row: Row) -> None:
            nonlocal resumes
            note("again" if resumes else "done", row["epoch"])
            resumes = False
            report(row)
            if row["state"] == "running":
                note("begin", row["epoch"] + 1)

        note("start", 0)
        if not resumes:
            note("begin", 1)
        train(config, folder, report=noting, fork=fork, **options)

    return trial


def scripted(
    config: Any,
    folder: Path,
    *,
    report: Callable[[Row], None],
    pause: float,
    lag: float = 0.0,
    fork: Path | None = None,
    until_stage: int | None = None,
    **others: Any,
) -> None:
    """A trainer with a known curve, highest at a weight decay of 1e-4: per epoch a sleep, a sum over ranks, a save."""
    import torch

    from hpcl.checkpoint import CHECKPOINT_NAME, save_checkpoint
    from hpcl.dist import current_world
    from hpcl.files import claim
    from hpcl.results import EPOCH_COLUMNS
    from hpcl.resume import find_start
    from hpcl.stages import stage_lengths

    world = current_world("cpu")
    lengths = stage_lengths(config.stages)
    total = sum(lengths)
    end = total if until_stage is None else sum(lengths[:until_stage])
    quality = 1.0 - abs(math.log10(config.optimizer.weight_decay) + 4.0) / 4.0
    pause *= 1.0 + lag * (1.0 - quality)

    def row(epoch: int) -> Row:
        stage = next(stage for stage in range(1, 6) if epoch <= sum(lengths[:stage]))
        made: Row = dict.fromkeys(column.name for column in EPOCH_COLUMNS)
        made |= {"epoch": epoch, "stage": stage, "state": "finished" if epoch == total else "running", "shared": False}
        made |= {"acc_proto_ref": quality * epoch / (epoch + 2), "loss": 1.0 / epoch, "seconds": pause}
        return made | {"objective": quality if epoch == total else None, "world_size": world.size}

    def state(rows: list[Row]) -> dict[str, Any]:
        data = {"source": "none", "hash": "none", "shape": [1, 8, 8]}
        kept = {"config": config.model_dump(mode="json"), "backbone": None, "data": data, "growth": {}}
        return {**kept, "pair": {"weights": torch.zeros(1000)}, "rows": rows}

    through = claim(folder) if world.rank == 0 else None
    world.barrier()
    start = find_start(folder, fork, state([]), config, world)
    rows: list[Row] = start.state["rows"] if start else []
    if rows:
        report(rows[-1])
    for epoch in range(len(rows) + 1, end + 1):
        time.sleep(pause)
        if world.rank == 0 and (folder / BUSY).exists():
            (folder / BUSY).unlink()
            while True:
                pass
        if world.size > 1:
            torch.distributed.all_reduce(torch.ones(1))
        rows.append(row(epoch))
        if world.rank == 0:
            save_checkpoint(folder / CHECKPOINT_NAME, state(rows), through)
        world.barrier()
        report(rows[-1])


def main() -> int:
    import argparse

    from hpcl.search import cli, hung, runner

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--pause", type=float, default=0.3)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--lag", type=float, default=0.0)
    parser.add_argument("--least", type=float)
    own, arguments = parser.parse_known_args()
    if own.least is not None:
        hung.LEAST = own.least
    train: Any = functools.partial(scripted, pause=own.pause, lag=own.lag)
    if own.real:
        from hpcl.trainer import fit as train  # type: ignore[no-redef]
    runner.run = functools.partial(runner.run, train=noted(train))  # type: ignore[assignment]
    sys.argv = ["run_search.py", *arguments]
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
