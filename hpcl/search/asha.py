"""When a trial is stopped early: Ray's ASHA on a clock that knows stages, with a log of its own.

ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"): at the
times grace, grace·factor, grace·factor², ... (the rungs) a trial goes on only if its
curve is within the top 1/factor of the trials that came to this rung before it. Ray's
class decides; this one asks it only what it answers rightly, which adds:

- the clock is canonical time (:mod:`hpcl.search.clock`), not Tune's count of reports,
  which starts again when a trial is retried;
- a row without a value (a curve that has not begun) is no question. A value that is not
  finite would pass every rung of Ray's: here it ends the trial as diverged;
- a trial answers at the highest rung it has come to, once, and never at a lower one
  later, whatever epochs its reports skip or repeat;
- the row of a finished trial is no question: nothing is left to stop;
- records of rungs go to a ledger as they are made and come back from it
  (:meth:`StageASHA.restore`): Tune does not keep its scheduler;
- the bracket is a function of seed and trial; Ray's draw is another one at each retry;
- each trial that ends is written to the ledger with a reason in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from hpcl.rng import seed_of
from hpcl.search.clock import reached, rung_times

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

Mode = Literal["max", "min"]
CONTINUE, STOP = str(TrialScheduler.CONTINUE), str(TrialScheduler.STOP)

PREFIX = "prefix-"
"""How the ids of shared prefixes begin; they are no trials and no rung asks them."""

_NOT_KEPT = ("_clock", "_ledger", "_draining", "_exhausted")


class Ledger(Protocol):
    """Where the scheduler writes what it sees and decides, before Tune acts on it."""

    def add(self, trial_id: str, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take a row; None where the trial's row of this epoch is here already (a resumed trial repeats it)."""

    def rung(self, trial_id: str, bracket: int, rung: float, value: float) -> None:
        """A trial came to a rung (its time) of a bracket (from 0) with this value of the metric, as reported."""

    def end(self, trial_id: str, state: str, reason: str) -> Any:
        """A trial is finished, stopped or diverged, and why."""


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or not finite."""
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def never() -> bool:
    """No: the search is not being cut short."""
    return False


class StageASHA(AsyncHyperBandScheduler):
    """Ray's asynchronous successive halving with the rules above.

    Trials are known by ``trial.config["trial"]``, which a resumed search keeps; with
    several brackets it must be the trial's number ("0003").

    Args:
        metric: the curve, a column of ``epochs.parquet``.
        mode: ``max`` or ``min``, the better end of the curve.
        total: end of the schedule on the clock, above 0.
        grace: time from the fork to the first rung; None: no trial is stopped early.
        factor: a trial goes on if it is in the top 1/factor; also the rungs' ratio. Above 1.
        fork: time up to which all trials share one run.
        min_peers: with fewer other values at its rung a trial goes on; 1 is Ray's own rule.
        brackets: bracket s has no rung before ``fork + grace * factor^s``.
        seed: seed of the draw of brackets, with Ray's probabilities.
        clock: (id of a trial or prefix, epoch) -> time after that epoch.
        ledger: takes rows, rungs and ends, in this order.
        draining: whether the search is being cut short; a trial then stops after its epoch
            without having ended, so that it can be resumed.
        exhausted: whether no trial is left to begin.
    """

    def __init__(
        self,
        metric: str,
        mode: Mode,
        *,
        total: float,
        grace: float | None,
        factor: float,
        fork: float = 0.0,
        min_peers: int = 1,
        brackets: int = 1,
        seed: int = 0,
        clock: Callable[[str, int], float],
        ledger: Ledger,
        draining: Callable[[], bool] = never,
        exhausted: Callable[[], bool] = never,
    ) -> None:
        first = total if grace is None else grace
        super().__init__(
            time_attr="clock",
            metric=metric,
            mode=mode,
            max_t=max(total, first),  # type: ignore[arg-type]  # Ray's hints say int; it only divides them
            grace_period=first,  # type: ignore[arg-type]
            reduction_factor=factor,
            brackets=brackets,
            stop_last_trials=False,  # as in the searches this class is compared with; no rung lies at max_t
        )
        self.rungs: tuple[tuple[float, ...], ...] = tuple(
            rung_times(grace, factor, total, fork=fork, bracket=s) for s in range(brackets)
        )
        """The rungs' times by bracket, ascending."""
        for bracket, times in zip(self._brackets, self.rungs, strict=True):
            bracket._rungs = [(time, {}) for time in reversed(times)]
        self._curve, self._sign = metric, 1.0 if mode == "max" else -1.0
        self._min_peers, self._seed = min_peers, seed
        self._clock, self._ledger, self._draining, self._exhausted = clock, ledger, draining, exhausted
        self._over: dict[str, str] = {}
        """Trial id -> the answer to whatever a trial that has ended still reports."""
        self._waited: set[str] = set()
        """Tune's ids of the trials that have waited for a process."""
        self._owed: dict[str, str] = {}
        """Trial id -> why it is to be stopped: decided, but the search broke off before the ledger had it."""

    def restore(self, rungs: Iterable[tuple[str, int, float, float]], ended: Iterable[str] = ()) -> None:  # type: ignore[override]
        """Take up an earlier session's rungs; replaces Ray's method, which reads a pickled file.

        Args:
            rungs: (trial id, bracket, rung, value) as the ledger got them, in this order.
            ended: ids of the trials that ended; they are asked no more.

        Raises:
            ValueError: a record names a rung that this search does not have.
        """
        self._over |= dict.fromkeys(ended, STOP)
        for trial_id, number, rung, value in rungs:
            if not 0 <= number < len(self.rungs) or rung not in self.rungs[number]:
                raise ValueError(
                    f"the log has trial {trial_id} at rung {rung:g} of bracket {number}, but this search's rungs are "
                    f"{' / '.join(', '.join(f'{time:g}' for time in times) or 'none' for times in self.rungs)}; "
                    "resume it with the space that it began with"
                )
            self._trial_info[trial_id] = self._brackets[number]
            against = self._decide(trial_id, rung, value)
            if against and trial_id not in self._over:
                self._owed[trial_id] = against

    def bracket(self, trial_id: str) -> int:
        """A trial's bracket, from 0; where it has none yet, drawn with Ray's probabilities."""
        if trial_id not in self._trial_info:
            number = 0
            if len(self._brackets) > 1:
                sizes = np.array([len(times) for times in self.rungs])
                weights = np.e ** (sizes - sizes.max())
                chance = np.random.default_rng(seed_of(self._seed, "bracket", int(trial_id)))
                number = int(chance.choice(len(sizes), p=weights / weights.sum()))
            self._trial_info[trial_id] = self._brackets[number]
        return int(self._brackets.index(self._trial_info[trial_id]))

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Give a trial its bracket; one that is retried or resumed keeps the one it has."""
        trial_id = _id(trial)
        if not trial_id.startswith(PREFIX):
            self.bracket(trial_id)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE or STOP for a trial's newest row; what has no ``epoch`` is no row."""
        trial_id, epoch = _id(trial), result.get("epoch")
        if epoch is None:
            return CONTINUE
        if trial_id not in self._over:
            self._take(trial_id, epoch, result)
        return self._over.get(trial_id) or (STOP if self._draining() else CONTINUE)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """The first trial that has just been drawn, else the newest that waits; None where none does.

        Tune gives the process of a trial that has ended to this one. Given to the oldest, as
        Ray's schedulers would have it, it takes the place of a process that is just starting
        for that one: with short trials a machine that has joined would never get one.

        Where the search is being cut short, those that wait are stopped without having begun.

        Besides, frees what Tune keeps of ended trials where no next one comes: one process
        with its place, until the search has ended, for a searcher that may still suggest something.
        """
        trials = tune_controller.get_trials()  # type: ignore[no-untyped-call]
        waiting = [trial for trial in trials if trial.status == "PENDING"]
        drawn = [trial for trial in waiting if trial.trial_id not in self._waited]
        self._waited.update(trial.trial_id for trial in drawn)
        for trial in drawn:
            trial.init_local_path()  # Tune asks for it of trials that never began, too
        if self._draining():  # else they would begin in the places of those that end their last epoch
            for trial in waiting:
                if trial.temporary_state.ray_actor is None:
                    tune_controller.stop_trial(trial)  # type: ignore[no-untyped-call]
            return None
        chosen = drawn[0] if drawn else waiting[-1] if waiting else None
        if chosen is None and self._exhausted():
            with suppress(AttributeError):  # inside Ray; kept a while longer where it looks different
                tune_controller._tune_controller._cleanup_cached_actors(force_all=True)  # type: ignore[attr-defined]
        return chosen

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Nothing: unlike Ray's, a last row is not written into a rung it was not asked at."""

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Nothing: Ray's fails for a trial that it does not know."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its settings and never reads them here; an open ledger could not be pickled."""
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_KEPT}

    def _take(self, trial_id: str, epoch: int, result: dict[str, Any]) -> None:
        """Write a row to the ledger, then what follows from it.

        A repeated row is no new one, but what it calls for is done if it was not: the
        search may have broken off between a row and its rung.
        """
        prefix = trial_id.startswith(PREFIX)
        time = self._clock(trial_id, epoch)
        self._ledger.add(trial_id, {**result, "clock": time})
        state, value = result.get("state"), None if prefix else _number(result.get(self._curve))
        if trial_id in self._owed:
            self._end(trial_id, "stopped", f"epoch {epoch}: {self._owed.pop(trial_id)}", STOP)
        elif state == "diverged":
            self._end(trial_id, "diverged", f"epoch {epoch}: the loss is not finite", CONTINUE)
        elif value is not None and not math.isfinite(value):
            self._end(trial_id, "diverged", f"epoch {epoch}: {self._curve} is not finite ({value})", STOP)
        elif state == "finished":
            self._end(trial_id, "finished", f"all {epoch} epochs trained", CONTINUE)
        elif value is not None and not result.get("shared"):
            self._ask(trial_id, epoch, time, value)

    def _ask(self, trial_id: str, epoch: int, time: float, value: float) -> None:
        """Let a trial answer at the highest rung it has come to, unless it has answered there or higher."""
        number = self.bracket(trial_id)
        for rung, recorded in self._brackets[number]._rungs:  # descending
            if trial_id in recorded:
                return
            if reached(time, rung):
                against = self._decide(trial_id, rung, value)
                self._ledger.rung(trial_id, number, rung, value)
                if against:
                    self._end(trial_id, "stopped", f"epoch {epoch}: {against}", STOP)
                return

    def _decide(self, trial_id: str, rung: float, value: float) -> str | None:
        """Record a value at a rung; why Ray's class stops the trial there, None where it goes on."""
        bracket = self._trial_info[trial_id]
        recorded = dict(bracket._rungs)[rung]
        peers, cutoff = len(recorded), bracket.cutoff(recorded)
        if peers < self._min_peers:
            recorded[trial_id] = self._sign * value
            return None
        row = {"clock": rung, self._curve: value}
        # Ray knows its trials by Tune's id, which a resumed search gives anew.
        if super().on_trial_result(None, SimpleNamespace(trial_id=trial_id), row) != STOP:  # type: ignore[arg-type]
            return None
        own, bound = _apart(value, self._sign * float(cutoff))
        side = "below" if self._sign > 0 else "above"
        return f"{self._curve} {own}, {side} the rung's top 1/{self._reduction_factor:g} at {bound} (n = {peers})"

    def _end(self, trial_id: str, state: str, reason: str, answer: str) -> None:
        self._ledger.end(trial_id, state, reason)
        self._over[trial_id] = answer


def _id(trial: Trial) -> str:
    """Our own id of a trial."""
    return str(trial.config["trial"])


def _number(value: Any) -> float | None:
    """The value as a float, also NaN and infinities; None where it is missing or not a number."""
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _apart(a: float, b: float) -> tuple[str, str]:
    """Two different numbers with as many digits, four or more, as show the difference."""
    texts = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in range(4, 18))
    return next(pair for pair in texts if pair[0] != pair[1])
