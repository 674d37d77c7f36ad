"""Searches over known landscapes: results folders of trials whose objective is a function of their values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcl.results import (
    SearchResults,
    epoch_schema,
    load_search,
    retrain_schema,
    trial_schema,
    write_table,
)
from hpcl.results.fields import shown
from hpcl.search.params import Choice, Float, Int
from hpcl.search.space import Space, from_tree
from hpcl.yamlio import read_tree, write

_COLUMN: dict[str, Any] = {"float": "float64", "int": "int64", "choice": "string"}


def space_of_text(text: str) -> Space:
    """The space in a YAML text, checked."""
    return from_tree(read_tree(text))


def drawn(space: Space, trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many points: the base's, then points by chance, each evenly on the field's scale."""
    rng = np.random.default_rng(seed)
    points = [space.default_point()]
    while len(points) < trials:
        values: dict[str, Any] = {}
        for path, param in space.params.items():
            if not space.is_active(path, values):
                continue
            if isinstance(param, Choice):
                values[path] = param.choices[int(rng.integers(len(param.choices)))]
            elif param.log:
                value = math.exp(rng.uniform(math.log(param.low), math.log(param.high)))
                values[path] = round(value) if isinstance(param, Int) else value
            else:
                values[path] = param.nearest(rng.uniform(param.low, param.high))
        points.append(values)
    return points


def write_landscape(
    folder: Path,
    space: Space,
    objective: Callable[[dict[str, Any]], float] | Sequence[float | None],
    *,
    trials: int = 24,
    seed: int = 0,
    points: Sequence[dict[str, Any]] | None = None,
    retrained: Mapping[str, Sequence[float]] | None = None,
    retrained_epochs: int = 150,
    facts: Mapping[str, Any] | None = None,
    seconds: float = 36.0,
    shared: int = 0,
    chosen_by: str = "auto",
) -> SearchResults:
    """Write the folder of a search of two epochs a trial, and read it.

    Args:
        folder: made where it is not there.
        space: what was searched.
        objective: of a trial's values; or one for each trial, None for those that were stopped.
        trials: number of them, where `points` does not give them.
        seed: of the draw.
        points: searched values of each trial.
        retrained: trial -> objectives of its seeds.
        retrained_epochs: epochs of each of these runs.
        facts: for ``search.json``.
        seconds: of an epoch, on one CPU; 0: no times are known.
        shared: how many of the two epochs all trials share.
        chosen_by: what the search was told to choose by.
    """
    points = list(points or drawn(space, trials, seed))
    values = [objective(point) for point in points] if callable(objective) else list(objective)
    kinds = {path: _COLUMN[param.kind] for path, param in space.params.items()}
    rows: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    for number, (point, value) in enumerate(zip(points, values, strict=True)):
        trial_id, last = f"{number:04d}", 2 if value is not None else 1
        own = seconds * max(0, last - shared)
        searched = {f"config.{path}": _cell(space, point, path) for path in space.params}
        state = "finished" if value is not None else "stopped"
        rows.append(
            {
                "trial_id": trial_id, "number": number, "state": state, "stop_reason": state, "epochs": last,
                "objective": value, "metric": 0.5, "seconds": own, "gpu_hours": 0.0, "cpu_hours": own / 3600,
                "retries": 0, **searched,
            }
        )  # fmt: skip
        epochs += [
            {
                "trial_id": trial_id, "epoch": e + 1, "stage": 3, "clock": e + 1.0, "shared": e < shared,
                "acc_proto_ref": 0.4 + 0.1 * e, "objective": value if e == 1 and chosen_by == "auto" else None,
                "seconds": seconds or None, "arrival": 2 * number + e, "state": state if e + 1 == last else "running",
            }
            for e in range(last)
        ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "trials.parquet", rows, trial_schema(kinds))
    write_table(folder / "epochs.parquet", epochs, epoch_schema())
    if retrained is not None:
        runs = [
            {
                "trial_id": trial, "seed": seed, "state": "finished" if math.isfinite(value) else "diverged",
                "objective": value, "epochs": retrained_epochs, "stop_reason": "a test",
            }
            for trial, each in retrained.items()
            for seed, value in enumerate(each)
        ]  # fmt: skip
        write_table(folder / "retrain.parquet", runs, retrain_schema())
    write(folder / "space.yaml", space.to_tree())
    known = {
        "name": folder.name, "state": "finished", "metric": "acc_proto_ref", "objective": chosen_by, "seconds": 720.0,
        "data": "mnist5k", "data_hash": "abc", "rungs": [], "prefixes": _prefixes(shared, seconds), **(facts or {}),
    }  # fmt: skip
    (folder / "search.json").write_text(json.dumps(known))
    return load_search(folder)


def with_objectives(search: SearchResults, objectives: Sequence[float]) -> SearchResults:
    """The folder read again after these objectives, which need not be finite, were put in its table."""
    search.trials.assign(objective=list(objectives)).to_parquet(search.folder / "trials.parquet")
    return load_search(search.folder)


def _cell(space: Space, point: Mapping[str, Any], path: str) -> Any:
    """A field's value in the table: the base's where it did not act."""
    value = point.get(path, space.base.at(path))
    param = space.params[path]
    if isinstance(param, Choice):
        return shown(value)
    return float(value) if isinstance(param, Float) else int(value)


def _prefixes(shared: int, seconds: float) -> list[dict[str, Any]]:
    cost = shared * seconds
    return [{"epochs": shared, "seconds": cost, "gpu_hours": 0.0, "cpu_hours": cost / 3600}] if shared else []
