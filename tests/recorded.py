"""Searches that never ran: results folders written from curves that are known in full."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hpcl.results import SearchResults, epoch_schema, load_search, trial_schema, write_table

_TYPES: dict[str, Any] = {"f": "float64", "i": "int64", "u": "int64", "b": "bool"}


def write_search(
    folder: Path,
    curves: Mapping[str, Any],
    objective: Any,
    fields: Mapping[str, Any] | None = None,
    *,
    metric: str = "acc_proto_ref",
    chosen_by: str = "auto",
    rungs: Sequence[float] = (),
    factor: int = 2,
    fork: int = 0,
    stopped: Mapping[int, int] | None = None,
    diverged: Mapping[int, int] | None = None,
    seconds: Any = 1.0,
    clock: Any = None,
    shared: bool = True,
    at_a_time: int = 1,
    hours: Any = None,
) -> SearchResults:
    """Write the folder of a search with real tables, and read it.

    Args:
        folder: made where it is not there.
        curves: column of ``epochs.parquet`` -> (trials, epochs); NaN and infinities: no value.
        objective: (trials,), of the trials that finish.
        fields: searched path -> (trials,); numbers lie between their extremes, texts are a choice.
        metric: the curve that stopped trials.
        chosen_by: `auto` (there was a linear probe) or a curve.
        rungs: times, ascending; empty: nothing was stopped.
        factor: ASHA's reduction factor.
        fork: epochs that all trials share, where `shared`.
        stopped: number -> epoch after which the search stopped the trial.
        diverged: number -> epoch after which the trial diverged.
        seconds: of an epoch, in any shape that fits (trials, epochs).
        clock: (trials, epochs); None: the epoch.
        shared: whether the epochs before the fork are marked as shared.
        at_a_time: trials at a time.
        hours: (trials,) CPU-hours; None: the trial's own seconds.
    """
    grids = {name: np.asarray(curve, dtype=float) for name, curve in curves.items()}
    trials, epochs = next(iter(grids.values())).shape
    objective, searched = np.asarray(objective, dtype=float), dict(fields or {})
    every = np.broadcast_to(np.asarray(seconds, dtype=float), (trials, epochs))
    times = np.broadcast_to(np.arange(1.0, epochs + 1) if clock is None else np.asarray(clock), (trials, epochs))
    stopped, diverged = stopped or {}, diverged or {}
    probed = chosen_by == "auto"
    trial_rows, epoch_rows = [], []
    counts = {each.name for each in epoch_schema() if str(each.type) == "int64"}
    for i in range(trials):
        last = stopped.get(i) or diverged.get(i) or epochs
        state = "stopped" if i in stopped else "diverged" if i in diverged else "finished"
        value = float(objective[i]) if state == "finished" else None
        own = [every[i, e] for e in range(last) if not (shared and e < fork)]
        trial_rows.append(
            {
                "trial_id": f"{i:04d}",
                "number": i,
                "state": state,
                "stop_reason": state,
                "epochs": last,
                "objective": value,
                "metric": grids[metric][i, last - 1] if metric in grids else None,
                "seconds": float(np.nansum(own)),
                "gpu_hours": 0.0,
                "cpu_hours": float(np.nansum(own)) / 3600 if hours is None else float(hours[i]),
                "retries": 0,
                **{f"config.{path}": _item(values[i]) for path, values in searched.items()},
            }
        )
        epoch_rows += [
            {
                "trial_id": f"{i:04d}",
                "epoch": e + 1,
                "stage": 3,
                "state": state if e + 1 == last and state != "stopped" else "running",
                "clock": float(times[i, e]),
                "shared": shared and e < fork,
                "seconds": float(every[i, e]),
                "arrival": i * epochs + e,
                "objective": value if probed and e + 1 == last else None,
                **{name: _measured(grid[i, e], whole=name in counts) for name, grid in grids.items()},
            }
            for e in range(last)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {path: _TYPES.get(np.asarray(values).dtype.kind, "string") for path, values in searched.items()}
    write_table(folder / "trials.parquet", trial_rows, trial_schema(kinds))
    write_table(folder / "epochs.parquet", epoch_rows, epoch_schema())
    grace = rungs[0] - fork if len(rungs) else None
    settings = {"trials": trials, "metric": metric, "objective": chosen_by, "grace": grace, "factor": factor}
    space = {path: _spec(np.asarray(values)) for path, values in searched.items()}
    (folder / "space.yaml").write_text(yaml.safe_dump({"base": {}, "space": space, "search": settings}))
    facts = {
        "name": folder.name,
        "state": "finished",
        "metric": metric,
        "objective": chosen_by,
        "rungs": list(rungs),
        "factor": factor,
        "trials_at_a_time": at_a_time,
    }
    (folder / "search.json").write_text(json.dumps(facts))
    return load_search(folder)


def _spec(values: Any) -> dict[str, Any]:
    if values.dtype.kind == "f":
        return {"float": [float(values.min()), float(values.max())]}
    if values.dtype.kind in "iu":
        return {"int": [int(values.min()), int(values.max())]}
    return {"choice": sorted({_item(value) for value in values})}


def _measured(value: float, *, whole: bool) -> Any:
    """A count as a whole number, null where there is none."""
    if whole:
        return int(value) if np.isfinite(value) else None
    return float(value)


def known_search(folder: Path, n: int = 40, *, best: str = "inst_ref", seed: int = 0, **more: Any) -> SearchResults:
    """Curves that follow the objective: `best` at 0.9, acc_proto_ref, the one in use, at 0.3, others at less."""
    chance = np.random.default_rng(seed)
    quality = chance.normal(size=n)
    strength = {"acc_proto_ref": 0.3, "acc_proto": 0.2, "inst_ref": 0.3, "nce_ref": 0.3, "loss": 0.0, "knn": 0.95}
    strength[best] = 0.9
    curves = {}
    for name, part in strength.items():
        curve = part * quality[:, None] + math.sqrt(1 - part**2) * chance.normal(size=(n, 12))
        curves[name] = -curve if name in ("nce_ref", "loss") else curve
    curves["clusters"] = np.round(np.exp(chance.uniform(1, 5, (n, 12))))
    fields = {"moco.temperature": chance.random(n), "topk.mode": chance.choice(["add", "none", "replace"], n)}
    return write_search(folder, curves, quality, fields, **more)


def like(strength: dict[str, float], n: int, seed: int) -> tuple[dict[str, Any], Any]:
    """Curves that are as good as said, at three rungs that differ little, and the objective."""
    chance = np.random.default_rng(seed)
    quality = chance.normal(size=n)
    return {
        m: (s * quality + math.sqrt(1 - s * s) * chance.normal(size=n))[:, None] + 0.3 * chance.normal(size=(n, 3))
        for m, s in strength.items()
    }, quality


def run_script(path: Path, arguments: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a script's `main`, run in this process: another Python takes two seconds to start."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    found: int = runpy.run_path(str(path), run_name="a_script")["main"]()
    return found


def _item(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
