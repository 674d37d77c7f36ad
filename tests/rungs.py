"""For tests of the stopping rule: a ledger in memory, trials as Tune hands them over, and the rule written plainly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from hpcl.search.asha import StageASHA

Row = dict[str, Any]
NO_CONTROLLER: Any = None


class Killed(Exception):
    """The search is gone."""


class Log:
    """A ledger that keeps what it is told, and can break off before any of it."""

    def __init__(self, lives: float = math.inf) -> None:
        self.rows: list[Row] = []
        self.rungs: list[tuple[str, int, float, float]] = []
        self.ends: dict[str, tuple[str, str]] = {}
        self.order: list[str] = []
        self.lives = lives
        self._newest: dict[str, int] = {}

    def add(self, trial_id: str, result: Mapping[str, Any]) -> Row | None:
        if result["epoch"] <= self._newest.get(trial_id, 0):
            return None
        self._note("row")
        self._newest[trial_id] = result["epoch"]
        self.rows.append({**result, "trial_id": trial_id})
        return self.rows[-1]

    def rung(self, trial_id: str, bracket: int, rung: float, value: float) -> None:
        self._note("rung")
        self.rungs.append((trial_id, bracket, rung, value))

    def end(self, trial_id: str, state: str, reason: str) -> None:
        self._note("end")
        assert trial_id not in self.ends, "a trial ends once"
        self.ends[trial_id] = (state, reason)

    def _note(self, what: str) -> None:
        if self.lives <= 0:
            raise Killed
        self.lives -= 1
        self.order.append(what)

    @property
    def stopped(self) -> dict[str, str]:
        return {trial_id: reason for trial_id, (state, reason) in self.ends.items() if state == "stopped"}


def fake(trial_id: str) -> Any:
    """A trial as Tune hands it over; its own id is another one in each session."""
    return SimpleNamespace(trial_id=f"tune-{trial_id}", config={"trial": trial_id})


def asha(log: Log | None = None, mode: Any = "max", **kwargs: Any) -> StageASHA:
    defaults: Row = {"total": 16.5, "grace": 2, "factor": 2.0, "clock": lambda trial_id, epoch: float(epoch)}
    return StageASHA("m", mode, **{**defaults, "ledger": log or Log(), **kwargs})


def add(scheduler: Any, trial_id: str) -> None:
    scheduler.on_trial_add(NO_CONTROLLER, fake(trial_id))


def report(scheduler: Any, trial_id: str, row: Row) -> str:
    return str(scheduler.on_trial_result(NO_CONTROLLER, fake(trial_id), row))


def feed(scheduler: Any, trial_id: str, epoch: int, value: Any = None, **more: Any) -> str:
    return report(scheduler, trial_id, {"epoch": epoch, "m": value, "state": "running"} | more)


def complete(scheduler: Any, trial_id: str, row: Row) -> None:
    scheduler.on_trial_complete(NO_CONTROLLER, fake(trial_id), row)


class Again(NamedTuple):
    """What the rule says of a search's rows."""

    stops: dict[str, int]
    """Trial id -> epoch at which it is to be stopped."""
    rungs: list[tuple[str, int, float, float]]
    """(trial id, bracket, rung, value) in order."""


def decide_again(
    rows: Iterable[Mapping[str, Any]],
    rungs: Sequence[Sequence[float]],
    factor: float,
    *,
    metric: str = "m",
    mode: str = "max",
    min_peers: int = 1,
    bracket_of: Callable[[str], int] = lambda trial_id: 0,
) -> Again:
    """All decisions of a search from its rows: a plain reference that shares nothing with the scheduler.

    Args:
        rows: rows of ``epochs.parquet`` in order of arrival; of each are used trial_id, epoch, clock,
            state (running where it is missing), shared (likewise false) and the metric's column.
        rungs: the rungs' times by bracket, as ``StageASHA.rungs``; of one bracket: ``[times]``.
        factor: 1 in `factor` goes on.
        metric: the curve's column.
        mode: max or min.
        min_peers: other values at a rung that a decision needs.
        bracket_of: trial id -> its bracket (``StageASHA.bracket``).
    """
    sign = 1.0 if mode == "max" else -1.0
    values: dict[tuple[int, float], list[float]] = {}
    answered: dict[str, float] = {}
    newest: dict[str, int] = {}
    again = Again({}, [])
    for row in rows:
        trial_id, epoch, value = row["trial_id"], row["epoch"], row.get(metric)
        if trial_id.startswith("prefix-") or trial_id in again.stops or epoch <= newest.get(trial_id, 0):
            continue
        newest[trial_id] = epoch
        if row.get("state", "running") != "running" or row.get("shared") or value is None or not np.isfinite(value):
            continue
        bracket = bracket_of(trial_id)
        reached = [rung for rung in rungs[bracket] if row["clock"] > rung - 1e-6]
        if not reached or max(reached) <= answered.get(trial_id, -math.inf):
            continue
        answered[trial_id] = max(reached)
        peers = values.setdefault((bracket, max(reached)), [])
        if len(peers) >= min_peers and sign * value < np.percentile(peers, 100 * (1 - 1 / factor)):
            again.stops[trial_id] = epoch
        peers.append(sign * value)
        again.rungs.append((trial_id, bracket, max(reached), value))
    return again
