"""What a search knows: its trials, their epochs and rungs, and the files made of them.

:class:`Tables` is the journal's events put together. Everything that happens goes
through one of its methods, which first appends the event and then takes it in, so the
same state comes out of the file after a crash (:meth:`Tables.replay`). It knows nothing
of Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from hpcl.errors import UserError
from hpcl.results import EPOCH_COLUMNS, LOWER_IS_BETTER, clean, epoch_schema, trial_schema, write_table
from hpcl.search.journal import JOURNAL_NAME, Event, Journal
from hpcl.search.params import Choice, Int, Param
from hpcl.search.space import Space

Row = dict[str, Any]
Kind = Literal["int64", "float64", "string", "bool"]
_NAMES = tuple(column.name for column in EPOCH_COLUMNS)
_COUNTS = frozenset(column.name for column in EPOCH_COLUMNS if column.type == "int64")
_ENDS = ("finished", "stopped", "failed", "diverged")
WRITE_EVERY = 10.0
"""Seconds between two writes of the tables while trials run."""
PREFIX = "prefix-"
"""What the id of a prefix that trials share begins with."""


class Tables:
    """One row per trial and per trial and epoch, and the choice of the best trial.

    Args:
        folder: where the Parquet files go.
        space: each of its searched fields becomes a column ``config.<path>``, which holds the
            base's value where the field was not sampled.
        journal: where events are appended; None keeps them in memory only.
    """

    def __init__(self, folder: Path, space: Space, journal: Journal | None = None) -> None:
        self.epochs: list[Row] = []
        """Rows of trials in the order in which the scheduler saw them."""
        self.trials: dict[str, Row] = {}
        self.prefixes: dict[str, Row] = {}
        """Prefix id -> its row, with the columns of a trial that it has."""
        self.values: dict[str, dict[str, Any]] = {}
        """Id of a trial or prefix -> its sampled values by config path."""
        self.optuna: dict[str, int] = {}
        """Trial id -> its number in Optuna's study."""
        self.rungs: list[tuple[str, int, float, float]] = []
        """(trial, bracket, rung on the clock, value of the metric), in order."""
        self.notes: list[str] = []
        self.sessions: list[Event] = []
        """Each process that ran the search: its command, when, and what a trial held."""
        self.metric, self.objective = space.search.metric, space.search.objective
        self._folder, self._journal, self._space = folder, journal, space
        self._kinds = {path: _kind(param) for path, param in space.params.items()}
        self._newest: dict[str, Row] = {}
        self._prefix_rows: dict[str, list[Row]] = {}
        self._rung_rows: dict[tuple[str, float], Row] = {}
        self._measured: set[str] = set()
        self._written = time.monotonic()
        self._pause = WRITE_EVERY

    # ---------------------------------------------------------------- events

    def session(self, **facts: Any) -> None:
        """A process begins to run the search; `gpus` and `cpus` are what a trial of it holds."""
        self._happened("session", **facts)

    def begin(
        self,
        trial_id: str,
        number: int,
        values: Mapping[str, Any],
        *,
        optuna: int | None = None,
    ) -> Row:
        """A trial was drawn, or a prefix is to be trained; one that is known is left as it is.

        Args:
            trial_id: its id.
            number: order of drawing.
            values: sampled values by config path.
            optuna: number of the trial in Optuna's study.
        """
        if trial_id not in self.values:
            self._happened("trial", trial=trial_id, number=number, values=dict(values), optuna=optuna)
        return self._row_of(trial_id)

    def retold(self, trial_id: str, optuna: int) -> None:
        """A trial that Optuna had been told as ended goes on under another number of its study."""
        self._happened("retold", trial=trial_id, optuna=optuna)

    def fork(self, trial_id: str, prefix: str) -> None:
        """A trial or prefix goes on from a prefix, whose rows become its first rows if it has none yet."""
        if not self.newest(trial_id):
            self._happened("fork", trial=trial_id, prefix=prefix)

    def add(self, trial_id: str, result: Mapping[str, Any]) -> Row | None:
        """Take a reported row; None if it is none, or one that is already here (a resumed trial repeats it)."""
        epoch = result.get("epoch")
        if epoch is None or epoch <= self.newest(trial_id).get("epoch", 0):
            return None
        row = {name: clean(result.get(name)) for name in _NAMES}
        for name in _COUNTS:
            row[name] = None if row[name] is None else int(row[name])
        self._happened("row", trial=trial_id, row={name: v for name, v in row.items() if v is not None})
        return self.newest(trial_id)

    def rung(self, trial_id: str, bracket: int, rung: float, value: float) -> None:
        """ASHA compared a trial at a rung."""
        self._happened("rung", trial=trial_id, bracket=bracket, rung=rung, value=value)

    def end(self, trial_id: str, state: str, reason: str) -> Row:
        """A trial ended; on disk when this returns. One that has ended already stays as it is."""
        if self._row_of(trial_id)["state"] not in _ENDS:
            self._happened("end", sync=True, trial=trial_id, state=state, reason=reason)
        return self._row_of(trial_id)

    def retry(self, trial_id: str, reason: str) -> None:
        """A trial's process broke off and it is tried again."""
        self._happened("retry", trial=trial_id, reason=reason)

    def note(self, text: str) -> None:
        """Something that the reader of the results should know."""
        self._happened("note", text=text)

    def conclude(self, state: str, reason: str) -> None:
        """The search itself ended: finished, interrupted or failed."""
        self._happened("state", sync=True, state=state, reason=reason)

    def sync(self) -> None:
        """All that has happened is on disk when this returns, and in the store where there is one."""
        if self._journal is not None:
            self._journal.sync()

    def replay(self, events: Iterable[Event]) -> None:
        """Take in events of an earlier process, in order.

        Raises:
            UserError: a trial has values that no trial can have: the journal is another space's, or damaged.
        """
        for event in events:
            if event["event"] == "trial":
                self._check(event)
            self.take(event)

    def _check(self, event: Event) -> None:
        try:
            self._space.config_for(event["values"])
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            why = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"{self._folder / JOURNAL_NAME}: trial {event['trial']} has values that no configuration has ({why}); "
                "put a copy back, or leave this folder aside (--fresh, or another --name)"
            ) from None

    def _happened(self, event: str, *, sync: bool = False, **facts: Any) -> None:
        if self._journal is None:
            self.take({"event": event, "time": time.time(), **facts})
        else:
            self.take(self._journal.append(event, sync=sync, **facts))

    def take(self, event: Event) -> None:
        """Take in one event of an earlier process."""
        kind = event["event"]
        if kind == "session":
            self.sessions.append(dict(event))
        elif kind == "trial":
            self._take_trial(event)
        elif kind == "retold":
            self.optuna[event["trial"]] = event["optuna"]
        elif kind == "fork":
            for row in self.prefix_rows(event["prefix"]):
                self._take_row(event["trial"], {**row, "shared": True})
        elif kind == "row":
            self._take_row(event["trial"], dict(event["row"]))
        elif kind == "rung":
            self.rungs.append((event["trial"], event["bracket"], event["rung"], event["value"]))
            self._rung_rows[event["trial"], event["rung"]] = self.newest(event["trial"])
        elif kind == "end":
            self._take_end(event["trial"], event["state"], event["reason"])
        elif kind == "retry":
            self._row_of(event["trial"])["retries"] += 1
        elif kind == "note":
            self.notes.append(event["text"])
        if self.sessions:
            self.sessions[-1]["until"] = event["time"]

    def _take_trial(self, event: Event) -> None:
        trial_id, values = event["trial"], event["values"]
        self.values[trial_id] = dict(values)
        base = self._space.base_with(values)
        cells = {**{path: base.at(path) for path in self._space.params}, **values}
        row: Row = {
            "trial_id": trial_id,
            "number": event["number"],
            "state": "running",
            "stop_reason": None,
            "epochs": 0,
            "objective": None,
            "metric": None,
            "seconds": 0.0,
            "gpu_hours": 0.0,
            "cpu_hours": 0.0,
            "retries": 0,
            **{f"config.{path}": _cell(cells[path], kind) for path, kind in self._kinds.items()},
        }
        if trial_id.startswith(PREFIX):
            self.prefixes[trial_id] = row
        else:
            self.trials[trial_id] = row
        if event["optuna"] is not None:
            self.optuna[trial_id] = event["optuna"]

    def _take_row(self, trial_id: str, given: Row) -> None:
        row = {**dict.fromkeys(_NAMES), **given, "trial_id": trial_id, "shared": bool(given.get("shared"))}
        self._newest[trial_id] = row
        if trial_id in self.prefixes:
            self._prefix_rows.setdefault(trial_id, []).append(row)
        else:
            row["arrival"] = len(self.epochs)
            self.epochs.append(row)
        trial = self._row_of(trial_id)
        trial["epochs"] = row["epoch"]
        if not row["shared"]:
            seconds = row["seconds"] or 0.0
            held = self.sessions[-1] if self.sessions else {}
            trial["seconds"] += seconds
            trial["gpu_hours"] += seconds * held.get("gpus", 0.0) / 3600
            trial["cpu_hours"] += seconds * held.get("cpus", 0.0) / 3600
        if row[self.metric] is not None:
            trial["metric"] = row[self.metric]
        if row["state"] == "finished":
            # `auto` falls back to the metric where the trainer has no labels to probe with.
            by_metric = row[self.metric] if self.objective == "auto" else None
            trial["objective"] = by_metric if row["objective"] is None else row["objective"]
            if row["objective"] is not None:
                self._measured.add(trial_id)

    def _take_end(self, trial_id: str, state: str, reason: str) -> None:
        trial = self._row_of(trial_id)
        trial |= {"state": state, "stop_reason": reason}
        if state != "finished":
            trial["objective"] = None
            self._measured.discard(trial_id)

    # ---------------------------------------------------------------- what is known

    def _row_of(self, trial_id: str) -> Row:
        return self.prefixes[trial_id] if trial_id.startswith(PREFIX) else self.trials[trial_id]

    def newest(self, trial_id: str) -> Row:
        """The newest row of a trial or prefix; empty where there is none."""
        return self._newest.get(trial_id, {})

    def prefix_rows(self, prefix: str) -> list[Row]:
        """The rows of a prefix, those of the prefix that it goes on from first."""
        return self._prefix_rows.get(prefix, [])

    def state_of(self, trial_id: str) -> str:
        """The state of a trial or prefix."""
        return str(self._row_of(trial_id)["state"])

    def unfinished(self) -> list[str]:
        """Trials that have not ended, in the order of drawing."""
        return [trial_id for trial_id, trial in self.trials.items() if trial["state"] == "running"]

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(1 for trial in self.trials.values() if trial["state"] == state)

    def total(self, column: str) -> float:
        """Sum of a cost (`seconds`, `gpu_hours`, `cpu_hours`) over trials and the prefixes they share."""
        return float(sum(row[column] for part in (self.trials, self.prefixes) for row in part.values()))

    def epochs_trained(self) -> int:
        """Epochs that were trained, those of a shared prefix once."""
        own = sum(1 for row in self.epochs if not row["shared"])
        return own + sum(1 for rows in self._prefix_rows.values() for row in rows if not row["shared"])

    def seconds_before(self) -> float:
        """How long earlier processes ran the search."""
        return float(sum(session["until"] - session["time"] for session in self.sessions[:-1]))

    def rung_rows(self, rung: float) -> list[Row]:
        """One row per trial that was compared at a rung: `value`, its `clusters` then, and its searched fields."""
        return [
            {
                "value": value,
                "clusters": self._rung_rows[trial, at].get("clusters"),
                **{path: self.trials[trial][f"config.{path}"] for path in self._space.params},
            }
            for trial, _, at, value in self.rungs
            if at == rung
        ]

    def chosen_by(self) -> str:
        """What chooses the best trial: `linear probe`, or a curve (the metric where `auto` finds no labels)."""
        if self.objective == "auto" and not self._measured:
            return self.metric
        return "linear probe" if self.objective in ("auto", "linear", "linear@val") else self.objective

    def best(self) -> Row | None:
        """The best trial by the objective among those that finished their schedule; the earlier one of equals."""
        return next(iter(self.ranking()), None)

    def ranking(self) -> list[Row]:
        """Trials that finished their schedule and have an objective, the best first."""
        finished = [t for t in self.trials.values() if t["state"] == "finished" and t["objective"] is not None]
        # A probe's accuracy and the metric that stands in for it are not on one scale.
        finished = [t for t in finished if t["trial_id"] in self._measured] or finished
        sign = 1.0 if self.chosen_by() in LOWER_IS_BETTER else -1.0
        return sorted(finished, key=lambda trial: (sign * trial["objective"], trial["number"]))

    # ---------------------------------------------------------------- files

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
        """Write both tables if the last time is long enough ago."""
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
