"""The rows of a running search, and the files made of them.

:class:`Tables` takes rows in the order in which the scheduler saw them, keeps one per
trial and epoch, and writes ``epochs.parquet`` and ``trials.parquet``. It knows nothing
of Ray; :mod:`hpcl.search.progress` feeds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hpcl.results import EPOCH_COLUMNS, LOWER_IS_BETTER, clean, epoch_schema, trial_schema, write_table
from hpcl.search.params import Choice, Int, Param
from hpcl.search.space import Space

Row = dict[str, Any]
Kind = Literal["int64", "float64", "string", "bool"]
_NAMES = tuple(column.name for column in EPOCH_COLUMNS)
_COUNTS = frozenset(column.name for column in EPOCH_COLUMNS if column.type == "int64")
WRITE_EVERY = 10.0
"""Seconds between two writes of the tables while trials run."""


class Tables:
    """One row per trial and per trial and epoch, and the choice of the best trial.

    Args:
        folder: where the Parquet files go.
        space: each of its searched fields becomes a column ``config.<path>``, which holds the
            base's value where the field was not sampled.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self.epochs: list[Row] = []
        self.trials: dict[str, Row] = {}
        self.values: dict[str, dict[str, Any]] = {}
        """Trial id -> its sampled values by config path."""
        self.metric, self.objective = space.search.metric, space.search.objective
        self._folder = folder
        self._kinds = {path: _kind(param) for path, param in space.params.items()}
        self._base = {path: space.base.at(path) for path in space.params}
        self._newest: dict[str, int] = {}
        self._measured: set[str] = set()
        self._written = time.monotonic()
        self._pause = WRITE_EVERY

    def begin(self, trial_id: str, number: int, values: Mapping[str, Any]) -> Row:
        """A trial was started with these sampled values; known trials are left as they are."""
        if trial_id not in self.trials:
            self.values[trial_id] = dict(values)
            cells = {**self._base, **values}
            columns = {f"config.{path}": _cell(cells[path], kind) for path, kind in self._kinds.items()}
            self.trials[trial_id] = {
                "trial_id": trial_id,
                "number": number,
                "state": "running",
                "stop_reason": None,
                "epochs": 0,
                "objective": None,
                "metric": None,
                "seconds": 0.0,
                **columns,
            }
        return self.trials[trial_id]

    def add(self, trial_id: str, result: Mapping[str, Any]) -> Row | None:
        """Take a reported row; None if it is none, or one that is already here (a resumed trial repeats it)."""
        epoch = result.get("epoch")
        if epoch is None or epoch <= self._newest.get(trial_id, 0):
            return None
        self._newest[trial_id] = epoch
        row = {name: clean(result.get(name)) for name in _NAMES}
        for name in _COUNTS:
            row[name] = None if row[name] is None else int(row[name])
        row |= {"trial_id": trial_id, "arrival": len(self.epochs)}
        self.epochs.append(row)
        trial = self.trials[trial_id]
        trial["epochs"] = epoch
        trial["seconds"] += row["seconds"] or 0.0
        if row[self.metric] is not None:
            trial["metric"] = row[self.metric]
        if row["state"] == "finished":
            # `auto` falls back to the metric where the trainer has no labels to probe with.
            by_metric = row[self.metric] if self.objective == "auto" else None
            trial["objective"] = by_metric if row["objective"] is None else row["objective"]
            if row["objective"] is not None:
                self._measured.add(trial_id)
        return row

    def newest_state(self, trial_id: str) -> str | None:
        """The state in a trial's newest row."""
        return next((row["state"] for row in reversed(self.epochs) if row["trial_id"] == trial_id), None)

    def end(self, trial_id: str, state: str, reason: str) -> Row:
        """A trial ended."""
        trial = self.trials[trial_id]
        trial |= {"state": state, "stop_reason": reason}
        if state != "finished":
            trial["objective"] = None
            self._measured.discard(trial_id)
        return trial

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(1 for trial in self.trials.values() if trial["state"] == state)

    def chosen_by(self) -> str:
        """What chooses the best trial: `linear probe`, or a curve (the metric where `auto` finds no labels)."""
        if self.objective == "auto" and not self._measured:
            return self.metric
        return "linear probe" if self.objective in ("auto", "linear") else self.objective

    def best(self) -> Row | None:
        """The best trial by the objective among those that finished their schedule; the earlier one of equals."""
        finished = [t for t in self.trials.values() if t["state"] == "finished" and t.get("objective") is not None]
        # A probe's accuracy and the metric that stands in for it are not on one scale.
        finished = [t for t in finished if t["trial_id"] in self._measured] or finished
        if not finished:
            return None
        sign = -1.0 if self.chosen_by() in LOWER_IS_BETTER else 1.0
        return max(finished, key=lambda trial: (sign * trial["objective"], -trial["number"]))

    def write(self) -> None:
        """Write both tables, each atomically."""
        start = time.monotonic()
        write_table(self._folder / "epochs.parquet", self.epochs, epoch_schema())
        trials = sorted(self.trials.values(), key=lambda trial: trial["number"])
        write_table(self._folder / "trials.parquet", trials, trial_schema(self._kinds))
        self._written = time.monotonic()
        # A long search has large tables: writing them takes 2 % of the time at most.
        self._pause = max(WRITE_EVERY, 50 * (self._written - start))

    def write_if_due(self) -> None:
        """Write both tables if the last write was a while ago."""
        if time.monotonic() - self._written > self._pause:
            self.write()


def _kind(param: Param) -> Kind:
    """The column type of a searched field: numbers and booleans as such, any mixture as text."""
    if isinstance(param, Int):
        return "int64"
    if not isinstance(param, Choice):
        return "float64"
    kinds = {type(value) for value in param.choices if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int64"
    return "float64" if kinds in ({float}, {int, float}) else "string"


def _cell(value: Any, kind: Kind) -> Any:
    """A sampled value as its column holds it."""
    if value is None:
        return None
    if kind == "string":
        return value if isinstance(value, str) else json.dumps(value)
    return {"int64": int, "float64": float, "bool": bool}[kind](value)
