"""Tables of learning curves as something to search: `python benchmarks/search.py --table FILE`.

A table is a Parquet file with one row per trial and epoch: `trial` (or `trial_id`), `epoch`, the metric,
and the trial's parameters as columns `config.<name>` or `params.<name>`; these may also stand in a file
`trials.parquet` beside it, as in the results folder of a search. Optional columns: `seconds` (else 1 an
epoch), `clock` (canonical time, else the epoch), and `state` in `trials.parquet`.

A proposal gets the nearest row that the search has not used. Numbers are searched and compared by their
rank in the table (0 to 1), so it does not matter on which scale they were drawn; other values by equality.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcl.config import Config
from hpcl.errors import UserError
from hpcl.results import read_rows
from hpcl.rng import seed_of
from hpcl.search.params import Choice, Float, Param, Resources, Search
from hpcl.search.space import Space
from hpcl.search.synthetic import Curve

Row = dict[str, Any]
PREFIXES = ("config.", "params.")
UNKNOWN = 0.5
"""Distance of a row without a value from every value."""


@dataclass(frozen=True)
class TableSpace(Space):
    """The columns of a table; its first point is that of a row."""

    first: Mapping[str, Any] = field(default_factory=dict)

    def default_point(self) -> dict[str, Any]:
        return dict(self.first)


class CurveTable:
    """The curves of a table whose outcome is known.

    A trial counts if it was trained to its end or diverged: by its `state`, or, where there is none, if
    it has as many epochs as the longest or has no value after some epoch. Others are left out.

    Args:
        path: the table, or a results folder.
        metric: the column of the curve.
        mode: `max` or `min`, its better end.

    Raises:
        UserError: a column is missing, or fewer than 8 trials count.
    """

    def __init__(self, path: Path, metric: str, mode: str) -> None:
        path = path / "epochs.parquet" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--table {path}: no such file; give a Parquet table or a results folder")
        rows = read_rows(path)
        names = set(rows[0]) if rows else set()
        key = next((name for name in ("trial", "trial_id") if name in names), None)
        if missing := [name for name in ("epoch", metric) if name not in names] + ([] if key else ["trial"]):
            raise UserError(f"{path}: has no column {' and none '.join(missing)}; it has {', '.join(sorted(names))}")
        assert key is not None
        self.name, self.metric, self.mode = _title(path), metric, mode
        trials = _trials(path, rows, key)
        by_trial: dict[Any, list[Row]] = {}
        for row in rows:
            by_trial.setdefault(row[key], []).append(row)
        longest = max(len(each) for each in by_trial.values())
        sign = 1.0 if mode == "max" else -1.0
        self.curves: list[Curve] = []
        kept: list[Row] = []
        for trial, each in by_trial.items():
            curve = _curve(sorted(each, key=lambda row: row["epoch"]), metric, trials[trial].get("state"), longest)
            if curve is not None:
                self.curves.append(curve)
                kept.append(trials[trial])
        self.left_out = len(by_trial) - len(self.curves)
        """Trials whose outcome is not known."""
        finals = [sign * curve.final for curve in self.curves if not curve.diverges]
        if len(finals) < 8:
            raise UserError(f"{path}: {len(finals)} trials were trained to their end, but at least 8 are needed")
        self.best, self.scale = sign * max(finals), max(finals) - float(np.median(finals)) or 1.0
        # A trial that diverges is worth as much as the worst one.
        worst = sign * min(finals)
        self.curves = [Curve(c.values, c.times, c.seconds, worst) if c.diverges else c for c in self.curves]
        self.longest = max(len(curve.values) for curve in self.curves)
        self.total = max(curve.times[-1] for curve in self.curves)
        self.columns = _columns(kept)
        if not self.columns:
            raise UserError(f"{path}: no column {' or '.join(f'{p}<name>' for p in PREFIXES)} with different values")

    def task(self, seed: int, search: Search) -> TableTask:
        """All rows unused, for one run; `seed` chooses the row of trial 0 and is the sampler's."""
        return TableTask(self, seed, search)


@dataclass(frozen=True)
class _Column:
    param: Param
    cells: np.ndarray
    """float[trials]: the rank of each trial's value, or the number of its choice; NaN without a value."""


class TableTask:
    """A table in the course of one search (a `Task` of `hpcl.search.simulator`)."""

    def __init__(self, table: CurveTable, seed: int, search: Search) -> None:
        self.total, self.longest, self.best = table.total, table.longest, table.best
        self.size: int | None = len(table.curves)
        self._table, self._unused = table, np.ones(len(table.curves), dtype=bool)
        row = random.Random(seed_of(seed, "table")).randrange(len(table.curves))
        first = {name: _value(column, column.cells[row]) for name, column in table.columns.items()}
        params = {name: column.param for name, column in table.columns.items()}
        # The metric of any table: it need not be a curve of this project.
        chosen = search.model_copy(update={"seed": seed, "metric": table.metric, "mode": table.mode})
        self.space: Space = TableSpace(table.name, Config(), params, chosen, Resources(), first=first)

    def curve(self, number: int, values: Mapping[str, Any]) -> Curve:
        """The curve of the nearest unused row, the first one of equals."""
        far = np.zeros(len(self._unused))
        for name, column in self._table.columns.items():
            if isinstance(column.param, Choice):
                off = (column.cells != column.param.choices.index(values[name])).astype(float)
            else:
                off = np.abs(column.cells - values[name])
            far += np.where(np.isnan(column.cells), UNKNOWN, off) ** 2
        row = int(np.argmin(np.where(self._unused, far, np.inf)))
        self._unused[row] = False
        return self._table.curves[row]


def _title(path: Path) -> str:
    return path.parent.name if path.name == "epochs.parquet" and path.parent.name else path.stem


def _trials(path: Path, rows: Sequence[Row], key: str) -> dict[Any, Row]:
    """Trial -> its parameters, and its state where it is known."""
    if any(name.startswith(PREFIXES) for name in rows[0]):
        return {row[key]: {n: v for n, v in row.items() if n.startswith(PREFIXES)} for row in rows}
    beside = path.with_name("trials.parquet")
    if not beside.is_file():
        raise UserError(f"{path}: has no columns config.<name> or params.<name>, and there is no {beside}")
    found = {row["trial_id" if "trial_id" in row else "trial"]: row for row in read_rows(beside)}
    if missing := [str(row[key]) for row in rows if row[key] not in found]:
        raise UserError(f"{beside}: has no trial {missing[0]}, which stands in {path}")
    return found


def _curve(rows: Sequence[Row], metric: str, state: str | None, longest: int) -> Curve | None:
    """The curve of a trial's rows in order; None where its outcome is not known."""
    values = [row[metric] if row[metric] is None or math.isfinite(row[metric]) else None for row in rows]
    with_value = [i for i, value in enumerate(values) if value is not None]
    filled = with_value[-1] + 1 if with_value else 0
    if state is None:
        state = "finished" if filled == longest else "diverged" if filled < len(values) else "running"
    if state == "diverged":
        values = [*values[: min(filled, len(values) - 1)], math.nan]
    elif state != "finished" or filled < len(values):
        return None
    times = tuple(float(epoch if row.get("clock") is None else row["clock"]) for epoch, row in enumerate(rows, start=1))
    seconds = tuple(float(row.get("seconds") or 1.0) for row in rows)
    length = len(values)
    return Curve(tuple(values), times[:length], seconds[:length], float(values[-1] or 0.0))


def _columns(trials: Sequence[Row]) -> dict[str, _Column]:
    """The parameters that differ among the trials."""
    columns: dict[str, _Column] = {}
    for name in trials[0]:
        cells = [trial[name] for trial in trials]
        given = [cell for cell in cells if cell is not None]
        if not name.startswith(PREFIXES) or len({str(cell) for cell in given}) < 2:
            continue
        if all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in given):
            ordered = np.sort(np.array(given, dtype=float))
            known = np.array([math.nan if cell is None else cell for cell in cells], dtype=float)
            middle = np.searchsorted(ordered, known, "left") + np.searchsorted(ordered, known, "right") - 1
            ranks = np.where(np.isnan(known), math.nan, middle / 2 / (len(ordered) - 1))
            columns[name] = _Column(Float(low=0.0, high=1.0), ranks)
        else:
            labels = sorted({str(cell) for cell in given})
            numbers = [math.nan if cell is None else float(labels.index(str(cell))) for cell in cells]
            columns[name] = _Column(Choice(choices=tuple(labels)), np.array(numbers))
    return columns


def _value(column: _Column, cell: float) -> Any:
    """A cell as a sampled value; the middle, or the first choice, where it is empty."""
    if isinstance(column.param, Choice):
        return column.param.choices[0 if math.isnan(cell) else int(cell)]
    return 0.5 if math.isnan(cell) else float(cell)
