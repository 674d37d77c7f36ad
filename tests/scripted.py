"""A trainer with known curves in the place of the real one, for tests of the search.

``model.dim`` chooses what happens (:data:`KINDS`); ``optimizer.weight_decay`` how good
the trial is: the curve is ``quality · epoch / (epoch + 2)``, highest at 1e-4.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import EPOCH_COLUMNS
from hpcl.stages import stage_lengths

KINDS = {
    16: "plain",
    17: "late",
    18: "raises",  # an exception after epoch 2, also when it is tried again
    19: "diverges",  # at epoch 4
    20: "mistake",  # the user's: refused before the first epoch
    21: "dies",  # the process is lost after epoch 3, once
    22: "nan",  # as plain, but the curve is NaN at epoch 3
    23: "same",  # the same exception before the first epoch, in every trial
    24: "hangs",  # the process stands still after epoch 3, once
}
"""Kinds 17 to 21 have no value of the curve before epoch 5, so nothing stops them before."""


def quality(config: Config) -> float:
    return 1.0 - abs(math.log10(config.optimizer.weight_decay) + 4.0) / 4.0


def curve(config: Config, epoch: int) -> float:
    return quality(config) * epoch / (epoch + 2)


def probe(config: Config) -> float:
    """The objective: another function than the curve, so that a mix-up shows."""
    return 0.5 + quality(config) / 4


def train(
    config: Config,
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    *,
    objective: str | None = "auto",
    backbone: Callable[[], Any] | None = None,
    fork: Path | None = None,
    until_stage: int | None = None,
) -> None:
    """As :func:`hpcl.trainer.fit`; its checkpoint is the epoch's number; the file `shared` has how many were shared."""
    kind = KINDS[config.model.dim]
    if kind == "mistake":
        raise UserError("the data do not fit; choose others")
    if kind == "same":
        raise ValueError("always the same mistake")
    lengths = stage_lengths(config.stages)
    total = sum(lengths)
    end = total if until_stage is None else sum(lengths[:until_stage])
    if until_stage is not None and not 0 < end < total:
        raise ValueError(f"until_stage is {until_stage}, which ends at epoch {end} of {total}")
    checkpoint, shared_file = folder / "checkpoint.pt", folder / "shared"
    done = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    if not done and fork is not None:
        done = int(fork.read_text())
        if done >= total:
            raise UserError(f"{fork}: already holds all {done} epochs of this run; fork from a shorter one")
        shared_file.write_text(str(done))
        checkpoint.write_text(str(done))
    shared = int(shared_file.read_text()) if shared_file.is_file() else 0
    # A run that goes on repeats its last row.
    for epoch in [*([done] if done else []), *range(done + 1, end + 1)]:
        if kind == "raises" and epoch == 3 and done < 3:
            raise ValueError("the script raises\nat epoch 3")
        if kind == "dies" and epoch == 4 and done < 4 and not (folder / "died").exists():
            (folder / "died").touch()
            os._exit(1)
        if kind == "hangs" and epoch == 4 and not (folder / "hung").exists():
            (folder / "hung").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)  # this thread may run on for a moment
        value: float | None = curve(config, epoch)
        if kind in ("late", "raises", "diverges", "dies") and epoch < 5:
            value = None
        if kind == "nan" and epoch == 3:
            value = math.nan
        diverged = kind == "diverges" and epoch == 4
        state = "diverged" if diverged else "finished" if epoch == total else "running"
        stage = next(s for s in range(1, 6) if epoch <= sum(lengths[:s]))
        row: dict[str, Any] = {c.name: None for c in EPOCH_COLUMNS if c.name not in ("trial_id", "arrival", "clock")}
        row |= {"epoch": epoch, "stage": stage, "state": state, "shared": epoch <= shared}
        row |= {"seconds": 0.01, "world_size": 1, "lr": 0.1}
        row |= {"acc_proto_ref": value, "loss": math.nan if diverged else 1.0 / epoch}
        if state == "finished" and objective:
            row["objective"] = probe(config)
        checkpoint.write_text(str(epoch))
        report(row)
        if diverged:
            return
