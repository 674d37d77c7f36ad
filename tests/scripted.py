"""A trainer with known curves in the place of the real one, for tests of the search.

``model.dim`` chooses what happens (:data:`KINDS`); ``optimizer.weight_decay`` how good
the trial is: the curve is ``quality · epoch / (epoch + 2)``, highest at 1e-4.
"""

from __future__ import annotations

import math
import os
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
}
"""All but plain have no value of the curve before epoch 5 (NaN at epoch 3), so nothing stops them before."""


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
) -> None:
    kind = KINDS[config.model.dim]
    if kind == "mistake":
        raise UserError("the data do not fit; choose others")
    total = sum(stage_lengths(config.stages))
    checkpoint = folder / "checkpoint.pt"
    done = int(checkpoint.read_text()) if checkpoint.is_file() else 0
    # A resumed run repeats its last row.
    for epoch in range(max(done, 1), total + 1):
        if kind == "raises" and epoch == 3:
            raise ValueError("the script raises\nat epoch 3")
        if kind == "dies" and epoch == 4 and not (folder / "died").exists():
            (folder / "died").touch()
            os._exit(1)
        value: float | None = curve(config, epoch)
        if kind != "plain" and epoch < 5:
            value = math.nan if epoch == 3 else None
        diverged = kind == "diverges" and epoch == 4
        state = "diverged" if diverged else "finished" if epoch == total else "running"
        row: dict[str, Any] = {c.name: None for c in EPOCH_COLUMNS if c.name not in ("trial_id", "arrival")}
        row |= {"epoch": epoch, "stage": 1, "state": state, "seconds": 0.01, "world_size": 1, "lr": 0.1}
        row |= {"acc_proto_ref": value, "loss": math.nan if diverged else 1.0 / epoch}
        if state == "finished" and objective:
            row["objective"] = probe(config)
        checkpoint.write_text(str(epoch))
        report(row)
        if diverged:
            return
