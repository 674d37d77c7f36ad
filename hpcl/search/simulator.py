"""Whole searches in virtual time: scheduler and sampler alone, without Ray's processes and without training.

Trials are learning curves that are known in full (:mod:`hpcl.search.synthetic`, or a table); an epoch
takes its seconds of a clock that only counts. What is simulated is a stack of a scheduler and a
sampler, called in the order in which Tune calls them: :class:`Shipped` is this project's, others can be
set beside it (``benchmarks/rays_own.py``). The same arguments give the same result.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from hpcl.search.asha import STOP, StageASHA, finite
from hpcl.search.clock import reached
from hpcl.search.plan import startup_trials
from hpcl.search.sampler import Sampler
from hpcl.search.space import Space
from hpcl.search.synthetic import Curve

Row = dict[str, Any]


class Task(Protocol):
    """Curves to search, for one run of one stack."""

    space: Space
    """What is searched, and the settings of the search."""
    total: float
    """Canonical time at the end of a schedule."""
    longest: int
    """Epochs of the longest schedule."""
    best: float
    """The best final value there is."""
    size: int | None
    """Most trials there are curves for; None: any number."""

    def curve(self, number: int, values: Mapping[str, Any]) -> Curve:
        """The curve of the trial drawn in this place with these values."""


class Stack(Protocol):
    """A scheduler and a sampler under test."""

    rungs: tuple[float, ...]
    """Times of the rungs, ascending; empty where nothing is stopped early."""
    stage_clock: bool
    """Whether rungs count canonical time; else epochs."""

    def ask(self, number: int) -> dict[str, Any]:
        """The values of the next trial by config path."""

    def begin(self, number: int, curve: Curve) -> None:
        """The trial starts."""

    def row(self, number: int, row: Row) -> bool:
        """Take a row; whether the trial is stopped."""

    def complete(self, number: int, row: Row) -> None:
        """The trial ended with this row: stopped, or by itself."""

    def choose(self) -> int | None:
        """The best trial so far, as the stack says at the end of a search."""


class MemoryLedger:
    """The scheduler's log in memory: what a search's journal keeps."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}
        """Trial id -> its rows."""
        self.rungs: list[tuple[str, int, float, float]] = []
        """(trial id, bracket, rung, value) in order."""
        self.ends: dict[str, tuple[str, str]] = {}
        """Trial id -> (state, reason)."""

    def add(self, trial_id: str, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take a row; None if it is here already."""
        rows = self.rows.setdefault(trial_id, [])
        if rows and result["epoch"] <= rows[-1]["epoch"]:
            return None
        rows.append(dict(result))
        return result

    def rung(self, trial_id: str, bracket: int, rung: float, value: float) -> None:
        """Take a record of a rung."""
        self.rungs.append((trial_id, bracket, rung, value))

    def end(self, trial_id: str, state: str, reason: str) -> None:
        """Take an end.

        Raises:
            ValueError: the trial has ended before.
        """
        if trial_id in self.ends:
            raise ValueError(f"trial {trial_id} ended twice: {self.ends[trial_id]}, then {(state, reason)}")
        self.ends[trial_id] = (state, reason)


class Shipped:
    """:class:`StageASHA` and :class:`Sampler` with the settings of ``space.search``.

    Best is the trial with the best last value among those that finished.

    Args:
        task: what is searched.
        at_a_time: trials at a time, for ``startup: auto``.
        journal: Optuna's journal file; None keeps the study in memory.
        before: the stack of a search that broke off, whose ledger and journal this one goes on from.
    """

    def __init__(
        self, task: Task, at_a_time: int = 4, *, journal: Path | None = None, before: Shipped | None = None
    ) -> None:
        search = task.space.search
        self.ledger: MemoryLedger = before.ledger if before else MemoryLedger()
        self.stage_clock = search.clock == "stage"
        self._curves: dict[str, Curve] = before._curves if before else {}
        self._optuna: dict[str, int] = before._optuna if before else {}
        self._metric, self._sign = search.metric, 1.0 if search.mode == "max" else -1.0
        self.scheduler = StageASHA(
            search.metric,
            search.mode,
            total=task.total,
            grace=search.grace,
            factor=search.factor,
            min_peers=search.min_peers,
            brackets=search.brackets,
            seed=search.seed,
            clock=self._time,
            ledger=self.ledger,
        )
        self.rungs = self.scheduler.rungs[0]
        startup = startup_trials(search.trials, at_a_time) if search.startup == "auto" else search.startup
        self.sampler = Sampler(task.space, startup=startup, journal=journal, kind=search.sampler, told=search.told)
        if before:
            self.scheduler.restore(self.ledger.rungs, ended=self.ledger.ends)
            known = {self._optuna[trial_id]: self._state(trial_id) for trial_id in self._optuna}
            self.sampler.reconcile(known)

    def ask(self, number: int) -> dict[str, Any]:
        """Draw a trial."""
        values, self._optuna[name(number)] = self.sampler.ask(number)
        return values

    def begin(self, number: int, curve: Curve) -> None:
        """Add the trial to the scheduler."""
        self._curves[name(number)] = curve
        self.scheduler.on_trial_add(None, trial_of(number))  # type: ignore[arg-type]

    def row(self, number: int, row: Row) -> bool:
        """Ask the scheduler, tell the sampler."""
        decision = self.scheduler.on_trial_result(None, trial_of(number), row)  # type: ignore[arg-type]
        step = math.ceil(self._time(name(number), row["epoch"]) - 1e-9)
        self.sampler.report(self._optuna[name(number)], finite(row[self._metric]), step)
        return decision == STOP

    def complete(self, number: int, row: Row) -> None:
        """Tell the sampler how the trial ended."""
        self.scheduler.on_trial_complete(None, trial_of(number), row)  # type: ignore[arg-type]
        self.sampler.tell(self._optuna[name(number)], *self._state(name(number)))

    def choose(self) -> int | None:
        """The best finished trial; the earlier one of equals."""
        finished = [trial_id for trial_id, (state, _) in self.ledger.ends.items() if state == "finished"]
        values = {trial_id: finite(self.ledger.rows[trial_id][-1][self._metric]) for trial_id in finished}
        scores = {trial_id: self._sign * value for trial_id, value in values.items() if value is not None}
        return int(max(scores, key=lambda trial_id: (scores[trial_id], -int(trial_id)))) if scores else None

    def _state(self, trial_id: str) -> tuple[str, float | None]:
        values = (finite(row[self._metric]) for row in reversed(self.ledger.rows.get(trial_id, [])))
        last = next((value for value in values if value is not None), None)
        return self.ledger.ends.get(trial_id, ("running", ""))[0], last

    def _time(self, trial_id: str, epoch: int) -> float:
        return self._curves[trial_id].times[epoch - 1] if self.stage_clock else float(epoch)


@dataclass(frozen=True)
class Outcome:
    """What a search came to."""

    trials: int
    """Trials drawn within the budget."""
    epochs: int
    """Epochs spent within the budget."""
    seconds: float
    """Virtual time at the end of the budget."""
    chosen: int | None
    """The trial that the stack calls best."""
    value: float | None
    """Final value of the chosen trial, without noise, whether or not it was trained to its end."""
    regret: float
    """How much worse that is than the best there is, 0 or more; infinite without a chosen trial."""
    finished: bool
    """Whether the chosen trial was trained to its end."""
    was_best: bool
    """Whether no trained trial would have ended better."""
    states: dict[str, int]
    """Trials by state once those that ran at the end of the budget had been led to theirs."""
    realised: int
    """Epochs of all trials, then."""
    ideal: float
    """Epochs of synchronous successive halving over the same trials; see `ideal_epochs`."""


class Simulation:
    """One search, event by event.

    The budget ends a search between epochs: all stacks train exactly as many. The outcome is taken
    there; then trials that run are led to their end without new ones, so that what the scheduler
    lets through can be counted over whole trials.

    Args:
        stack: what decides.
        task: what is decided about.
        epochs: epochs of all trials together; None: no limit.
        trials: most trials; None: as many as the budget allows. One of the two must be given.
        at_a_time: trials at a time.
    """

    def __init__(
        self, stack: Stack, task: Task, *, epochs: int | None = None, trials: int | None = None, at_a_time: int = 4
    ) -> None:
        if epochs is None and trials is None:
            raise ValueError("a simulation needs a number of epochs or of trials")
        self.stack, self._task, self._slots = stack, task, at_a_time
        self._left = math.inf if epochs is None else epochs
        self._trials = min(math.inf if most is None else most for most in (trials, task.size))
        self._queue: list[tuple[float, int, int, int]] = []  # (time, order, trial, epoch)
        self._waiting: list[tuple[int, int]] = []  # (trial, epoch) for which the budget had no room
        self._order = 0
        self.now = 0.0
        """Virtual time in seconds."""
        self.curves: list[Curve] = []
        """The drawn trials' curves."""
        self.values: list[dict[str, Any]] = []
        """The drawn trials' values by config path."""
        self.trained: Counter[int] = Counter()
        """Epochs by trial."""
        self.states: dict[int, str] = {}
        """How trials ended: stopped, finished or diverged."""

    def run(self, events: int | None = None) -> bool:
        """Go on until the budget is spent, or for so many epochs; whether there is more to come."""
        count = 0
        while events is None or count < events:
            self._fill()
            if not self._queue:
                return False
            self._advance()
            count += 1
        return bool(self._queue)

    def finish(self) -> Outcome:
        """Run to the end of the budget, say what came of it, and lead the running trials to theirs."""
        self.run()
        seconds, epochs, trials = self.now, sum(self.trained.values()), len(self.curves)
        chosen = self.stack.choose()
        sign = 1.0 if self._task.space.search.mode == "max" else -1.0
        value = None if chosen is None else self.curves[chosen].final
        regret = math.inf if value is None else max(0.0, sign * (self._task.best - value))
        top = max(sign * curve.final for curve in self.curves)
        finished = chosen is not None and self.trained[chosen] == len(self.curves[chosen].values)
        self._left, self._trials = math.inf, 0
        for number, epoch in self._waiting:
            self._start(number, epoch)
        while self._queue:
            self._advance()
        return Outcome(
            trials=trials,
            epochs=epochs,
            seconds=seconds,
            chosen=chosen,
            value=value,
            regret=regret,
            finished=finished,
            was_best=value is not None and sign * value >= top,
            states=dict(Counter(self.states.values())),
            realised=sum(self.trained.values()),
            ideal=ideal_epochs(
                self.curves, self.stack.rungs, self._task.space.search.factor, sign, self.stack.stage_clock
            ),
        )

    def _fill(self) -> None:
        """Start trials while there is room for them."""
        while len(self._queue) < self._slots and len(self.curves) < self._trials and self._left > 0:
            number = len(self.curves)
            values = self.stack.ask(number)
            self.values.append(values)
            self.curves.append(self._task.curve(number, values))
            self.stack.begin(number, self.curves[number])
            self._start(number, 1)

    def _start(self, number: int, epoch: int) -> None:
        if self._left <= 0:
            self._waiting.append((number, epoch))
            return
        self._left -= 1
        self._order += 1
        end = self.now + self.curves[number].seconds[epoch - 1]
        heapq.heappush(self._queue, (end, self._order, number, epoch))

    def _advance(self) -> None:
        """The epoch that ends next is reported, and the trial goes on or ends."""
        self.now, _, number, epoch = heapq.heappop(self._queue)
        curve = self.curves[number]
        self.trained[number] = epoch
        last = epoch == len(curve.values)
        state = ("diverged" if curve.diverges else "finished") if last else "running"
        value = curve.values[epoch - 1]
        metric = self._task.space.search.metric
        row = {"epoch": epoch, "training_iteration": epoch, "state": state, metric: value}
        stopped = self.stack.row(number, row)
        if not stopped and not last:
            self._start(number, epoch + 1)
            return
        self.states[number] = state if last else "stopped"
        self.stack.complete(number, row)


def ideal_epochs(
    curves: Sequence[Curve], rungs: Sequence[float], factor: float, sign: float, stage_clock: bool = True
) -> float:
    """Epochs that synchronous successive halving trains these curves.

    All come to the first rung; of the n with a value there the best n / factor, rounded up, go on,
    and so from rung to rung. Trials that diverge before a rung have trained until then.

    Args:
        curves: the trials.
        rungs: times, ascending.
        factor: about 1 in `factor` goes on.
        sign: 1 where more is better, else -1.
        stage_clock: whether `rungs` are canonical times; else epochs.
    """
    trained = [len(curve.values) for curve in curves]
    alive = list(range(len(curves)))
    for rung in rungs:
        scores: dict[int, float] = {}
        at: dict[int, int] = {}
        for i in alive:
            curve = curves[i]
            for epoch, (time, value) in enumerate(zip(curve.times, curve.values, strict=True), start=1):
                if epoch < len(curve.values) and reached(time if stage_clock else epoch, rung) and value is not None:
                    scores[i], at[i] = sign * value, epoch
                    break
        ranked = sorted(scores, key=lambda i: (-scores[i], i))
        out = set(ranked[math.ceil(len(ranked) / factor) :])
        for i in out:
            trained[i] = at[i]
        alive = [i for i in alive if i not in out]
    return float(sum(trained))


def name(number: int) -> str:
    """The id of the trial drawn in this place."""
    return f"{number:04d}"


def trial_of(number: int) -> SimpleNamespace:
    """What the schedulers ask of Tune's trial."""
    return SimpleNamespace(trial_id=name(number), config={"trial": name(number)})
