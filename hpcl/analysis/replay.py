"""What successive halving would have done with other curves, rungs and factors: replayed on recorded curves.

Replayed are the trials whose outcome is known: those that finished with an objective, and those that diverged.
Of a trial that the search itself stopped only a prefix is known, so it is left out; where there are such trials the
others are survivors, and :attr:`Recording.notes` says so.

The rule is that of :class:`hpcl.search.asha.StageASHA` with one bracket: at the rungs ``fork + grace * factor^k`` a
trial goes on unless its value is below the ``1 - 1/factor`` quantile of the values that came to this rung before it.
A trial answers once at a rung, with its first value there, and only at the highest rung that it has come to; epochs
without a value, shared epochs and the last epoch of a trial ask nothing.

The order of arrival is that of `at_a_time` places: trials begin in the order of their number, an epoch takes its
recorded seconds, a trial that ends or is stopped frees its place at once, and of epochs that end at the same moment
that of the trial with the lower number comes first.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hpcl.errors import UserError
from hpcl.results.search import SearchResults
from hpcl.search.clock import TOLERANCE, rung_times

if TYPE_CHECKING:
    from numpy.typing import NDArray

FACTOR = 2.0
"""The shipped reduction factor, for searches that stopped nothing."""

MOST_RUNGS = 1000
"""Rungs of a replay, at most: a factor near 1 would give any number of them."""


@dataclass(frozen=True)
class Recording:
    """The trials of a search whose outcome is known, as arrays: n trials in the order of their numbers, E epochs."""

    search: SearchResults
    rows: NDArray[np.int64]
    """(n,) their places in ``search.trials`` (``iloc``)."""
    clock: NDArray[np.float64]
    """(n, E) time after each epoch; NaN where there is none."""
    own: NDArray[np.bool_]
    """(n, E) epochs that the trial trained itself: not shared."""
    last: NDArray[np.int64]
    """(n,) column of the last epoch."""
    spent: NDArray[np.float64]
    """(n, E) seconds from the trial's beginning to the end of each epoch."""
    hours: NDArray[np.float64]
    """(n,) hours of the whole trial, in ``search.cost_unit``; what trials share is not in them."""
    good: NDArray[np.float64]
    """(n,) objective, larger for better ones; NaN where the trial diverged."""
    ranking: NDArray[np.int64]
    """Places in these arrays of the trials with an objective, the best first."""
    stopped: int
    """Trials that the search stopped, which are left out."""

    @classmethod
    def of(cls, search: SearchResults) -> Recording:
        """The recording of a search; n may be 0."""
        trials, ids = search.trials, search.trials["trial_id"]
        done = search.finished
        done = done[np.isfinite(done["objective"].to_numpy(dtype=np.float64, na_value=np.nan))]
        finished = list(done["trial_id"])
        clock, epochs = search.curves("clock"), search.curves("epoch")
        usable = (ids.isin(finished) | (trials["state"] == "diverged")).to_numpy() & np.isfinite(epochs).any(axis=1)
        order = np.argsort(trials["number"].to_numpy(dtype=np.float64, na_value=np.inf), kind="stable")
        rows = order[usable[order]].astype(np.int64)
        clock, epochs = clock[rows], epochs[rows]
        clock = np.where(np.isnan(clock), epochs, clock)  # an older version's table lacks the clock
        there = np.isfinite(epochs)
        shared = search.epochs["shared"].fillna(False).astype(float)
        own = there & ~(replace(search, epochs=search.epochs.assign(shared=shared)).curves("shared")[rows] == 1)
        width = epochs.shape[1]
        last = width - 1 - np.argmax(there[:, ::-1], axis=1) if width else np.zeros(0, np.int64)
        seconds = search.curves("seconds")[rows]
        known = seconds[own & np.isfinite(seconds)]
        seconds = np.where(np.isnan(seconds), np.median(known) if len(known) else 1.0, seconds)
        place = {str(trial_id): i for i, trial_id in enumerate(ids.iloc[rows])}
        ranking = np.array([place[t] for t in finished if t in place], dtype=np.int64)
        objective = trials["objective"].to_numpy(dtype=np.float64, na_value=np.nan)[rows]
        good = np.full(len(rows), np.nan)
        good[ranking] = search.sign * objective[ranking]
        return cls(
            search=search,
            rows=rows,
            clock=clock,
            own=own,
            last=last.astype(np.int64),
            spent=np.cumsum(np.where(own, seconds, 0.0), axis=1),
            hours=trials[search.cost_column].to_numpy(dtype=np.float64, na_value=0.0)[rows],
            good=good,
            ranking=ranking,
            stopped=int((trials["state"] == "stopped").sum()),
        )

    @property
    def n(self) -> int:
        """Trials that finished with an objective."""
        return len(self.ranking)

    @property
    def diverged(self) -> int:
        """Trials that diverged."""
        return len(self.rows) - self.n

    @property
    def total(self) -> float:
        """Time at the end of the longest schedule; 0 without trials."""
        return float(np.nanmax(self.clock)) if self.clock.size else 0.0

    @property
    def at_a_time(self) -> int:
        """Trials at a time in the recorded search; 1 where it is not known."""
        known = self.search.about.facts.get("trials_at_a_time")
        return known if isinstance(known, int) and known > 0 else 1

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a replay, or of statistics over these trials, must know."""
        if not self.stopped:
            return ()
        metric, of_all = self.search.about.metric or "a curve", f"{self.stopped} of {len(self.search.trials)} trials"
        if self.search.about.kind == "tune":
            return (
                f"{of_all} ended after fewer reports than others (stopped, or a shorter schedule) and are left out: if "
                f"they were stopped on {metric}, the others are its survivors, among which it tends to look worse than "
                "it is",
            )
        return (
            f"the search stopped {of_all} on {metric}: those that finished are its survivors, a sample without the "
            f"trials that {metric} put last, in which it tends to look worse than it is; to judge curves, train random "
            "configurations to their end (search.grace: null)",
        )

    def values(self, metric: str) -> NDArray[np.float64]:
        """A curve of these trials, (n, E), larger for better values; NaN where there is none.

        Which end is better is for the search to say (:meth:`SearchResults.sign_of`).

        Raises:
            UserError: there is no such numeric column.
        """
        grid = self.search.sign_of(metric) * self.search.curves(metric)[self.rows]
        grid[~np.isfinite(grid)] = np.nan
        return np.asarray(grid)

    def answers(self, values: NDArray[np.float64], rungs: Sequence[float]) -> NDArray[np.int64]:
        """The columns of the epochs at which trials answer at rungs: the first value from a rung to the next one.

        Args:
            values: (n, E), NaN where there is no value.
            rungs: times, ascending.

        Returns:
            int64 (n, rungs), -1 where a trial has no value there.
        """
        times = np.asarray(rungs, dtype=np.float64)
        bounds = times - TOLERANCE * np.maximum(1.0, np.abs(times))
        reached = np.searchsorted(bounds, self.clock, side="right") - 1
        asked = self.own & np.isfinite(values) & np.isfinite(self.clock)
        found = np.full((len(self.rows), len(times)), -1, dtype=np.int64)
        for r in range(len(times)):
            here = asked & (reached == r)
            found[:, r] = np.where(here.any(axis=1), here.argmax(axis=1), -1)
        return found

    def rungs(self, grace: float | None = None, factor: float | None = None) -> tuple[float, ...]:
        """The rungs for a grace and a factor: what is None is as in the search.

        Where the search stopped nothing, grace is a quarter of the way from the fork to the end, in whole epochs and
        at least 1, and factor is 2: rungs at a quarter and at half of the way.

        Raises:
            UserError: `grace` is not above 0, `factor` not above 1, or they give more than 1,000 rungs.
        """
        about = self.search.about
        if grace is None and factor is None and about.rungs:
            return about.rungs
        step, ratio = self.grace if grace is None else grace, self.factor if factor is None else factor
        way = self.total - about.fork
        if step > 0 and ratio > 1 and way > 0:
            count = (math.log(way) - math.log(step)) / math.log(ratio) + 1
            if count > MOST_RUNGS:
                raise UserError(
                    f"grace is {step:g} and factor {ratio!r}, but they must give at most {MOST_RUNGS} rungs up to "
                    f"{self.total:g}, not {count:.3g}; give a larger grace or factor"
                )
        try:
            return rung_times(step, ratio, self.total, fork=about.fork)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def grace(self) -> float:
        """Way from the fork to the first rung, as :meth:`rungs` has it."""
        about = self.search.about
        own = about.rungs[0] - about.fork if about.rungs else 0.0
        return own if own > 0 and math.isfinite(own) else max(1.0, float(round((self.total - about.fork) / 4)))

    @property
    def factor(self) -> float:
        """The reduction factor of the search; 2 where it has none, or none that can be (a number above 1)."""
        known: object = self.search.about.factor
        possible = isinstance(known, (int, float)) and not isinstance(known, bool) and 1 < known < math.inf
        return float(known) if possible else FACTOR  # type: ignore[arg-type]


@dataclass(frozen=True)
class Replay:
    """What came of a replay: n trials as in the recording."""

    metric: str
    rungs: tuple[float, ...]
    factor: float
    min_peers: int
    at_a_time: int
    stopped_at: NDArray[np.float64]
    """(n,) time of the rung at which a trial is stopped; NaN: it is kept, that is trained to its end."""
    epochs: int
    """Epochs that are trained, shared ones not counted."""
    epochs_share: float
    """The same over those of all these trials trained to their end, 0..1; NaN without trials."""
    hours: float
    """Hours that are spent, in the search's unit, what trials share not counted."""
    quarter: int
    """Trials in the best quarter by the final objective: a quarter of those that have one, rounded up."""
    lost: int
    """How many of them are stopped."""
    best_rank: int | None
    """Rank of the best kept trial by the final objective, 1: the best of all is kept; None: none is kept."""
    regret: float
    """How much worse its objective is than the best of all, 0 or more; NaN where none is kept."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,) whether a trial is trained to its end (or until it diverges)."""
        return np.isnan(self.stopped_at)


def replay(
    recording: Recording,
    metric: str,
    *,
    grace: float | None = None,
    factor: float | None = None,
    min_peers: int = 1,
    at_a_time: int | None = None,
) -> Replay:
    """What successive halving on a curve would have kept, lost and spent.

    Args:
        recording: of :meth:`Recording.of`.
        metric: numeric column of ``epochs``.
        grace: way from the fork to the first rung; None: as :meth:`Recording.rungs` has it.
        factor: a trial goes on if it is in the top 1/factor; None: the search's own, or 2.
        min_peers: with fewer values before it at a rung a trial goes on, at least 1.
        at_a_time: trials at a time; None: as in the search.

    Raises:
        UserError: there is no such column, or an argument is out of range.
    """
    places = recording.at_a_time if at_a_time is None else at_a_time
    if min_peers < 1 or places < 1:
        raise UserError(f"min_peers is {min_peers} and at_a_time {places}, but both must be at least 1")
    rungs = recording.rungs(grace, factor)
    share = recording.factor if factor is None else factor
    values = recording.values(metric)
    asked = values.copy()
    every = np.arange(len(recording.rows))
    asked[every, recording.last] = np.nan  # nothing is left to stop
    asks = recording.answers(asked, rungs)
    at = _decide(asks, values, recording.spent, recording.last, share, min_peers, places)
    stopped = at >= 0
    end = np.where(stopped, asks[every, at], recording.last) if len(rungs) else recording.last
    own = recording.own.cumsum(axis=1)
    epochs, whole = own[every, end], own[every, recording.last]
    seconds, all_seconds = recording.spent[every, end], recording.spent[every, recording.last]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(all_seconds > 0, seconds / all_seconds, epochs / np.maximum(whole, 1))
    ranking = recording.ranking
    quarter = math.ceil(len(ranking) / 4)
    kept = np.flatnonzero(~stopped[ranking])
    times = np.asarray([*rungs, np.nan])  # -1, not stopped, is its last element
    return Replay(
        metric=metric,
        rungs=rungs,
        factor=share,
        min_peers=min_peers,
        at_a_time=places,
        stopped_at=times[at],
        epochs=int(epochs.sum()),
        epochs_share=float(epochs.sum() / whole.sum()) if whole.sum() else math.nan,
        hours=float((recording.hours * part).sum()),
        quarter=quarter,
        lost=int(stopped[ranking[:quarter]].sum()),
        best_rank=int(kept[0]) + 1 if len(kept) else None,
        regret=float(recording.good[ranking[0]] - recording.good[ranking[kept[0]]]) if len(kept) else math.nan,
    )


def _decide(
    asks: NDArray[np.int64],
    values: NDArray[np.float64],
    spent: NDArray[np.float64],
    last: NDArray[np.int64],
    factor: float,
    min_peers: int,
    at_a_time: int,
) -> NDArray[np.int64]:
    """(n,) the rung's number at which each trial is stopped, -1 where it is not.

    Only epochs that are asked matter, so a trial goes from one of them to the next, not from epoch to epoch.
    """
    n, rungs = asks.shape
    every = np.arange(n)[:, None]
    offered = values[every, asks].tolist() if rungs else [[]] * n
    moments = spent[every, asks].tolist() if rungs else [[]] * n
    whole = spent[np.arange(n), last].tolist()
    questions: list[list[int]] = [[r for r in range(rungs) if row[r] >= 0] for row in asks.tolist()]
    recorded: list[list[float]] = [[] for _ in range(rungs)]  # ascending
    stopped = [-1] * n
    begun = [0.0] * n
    step = [0] * n
    running: list[tuple[float, int]] = []
    waiting = iter(range(min(at_a_time, n), n))

    def await_next(i: int) -> None:
        """The trial runs on to its next question, or to its end."""
        left = moments[i][questions[i][step[i]]] if step[i] < len(questions[i]) else whole[i]
        heapq.heappush(running, (begun[i] + left, i))

    for i in range(min(at_a_time, n)):
        await_next(i)
    while running:
        now, i = heapq.heappop(running)
        if step[i] < len(questions[i]):
            r = questions[i][step[i]]
            value, peers = offered[i][r], recorded[r]
            out = len(peers) >= min_peers and value < cutoff(peers, factor)
            insort(peers, value)
            step[i] += 1
            if not out:
                await_next(i)
                continue
            stopped[i] = r
        following = next(waiting, None)
        if following is not None:
            begun[following] = now
            await_next(following)
    return np.array(stopped, dtype=np.int64)


def cutoff(ascending: Sequence[float], factor: float) -> float:
    """``numpy.percentile(values, (1 - 1/factor) * 100)`` of sorted values, to the last bit, without its overhead.

    Args:
        ascending: at least one value.
        factor: above 1.
    """
    place = (len(ascending) - 1) * ((1 - 1 / factor) * 100 / 100)
    below = math.floor(place)
    low, high = ascending[below], ascending[min(below + 1, len(ascending) - 1)]
    part = place - below
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part
