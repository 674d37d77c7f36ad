"""Which configuration is tried next: an Optuna study that is told only what is true.

TPE (Bergstra et al. 2011) models each searched field by itself (``multivariate=False``)
and does not pretend results for running trials (``constant_liar=False``): beside ASHA
this did best of the variants compared on public learning curves.

Conditions are groups of one field: a field whose `when` fails is no parameter of the
trial, so its model is made of the trials that had it alone, whatever the others did.
(Optuna's ``group=True`` does the same for joint models of several fields: it needs
``multivariate=True`` and takes the fields that always occur together as one group.) Which
trials are good is decided among all of them; a field that none of the good ones had is
drawn from its prior against the trials that did worse with it.

A draw is a function of (seed, number of the trial) and of what the study knows, because
each trial is drawn by a sampler of its own; so a search that was killed and opened again
draws what an unbroken one would have.

``optuna.journal`` is an Optuna journal file, for ``optuna-dashboard optuna.journal`` also
while the search runs. Each operation is synced to disk.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState, create_trial

from hpcl.errors import StorageError, UserError
from hpcl.files import writing
from hpcl.rng import seed_of
from hpcl.search.params import Choice, Float, Int, Param
from hpcl.search.space import Space
from hpcl.search.warm import Point

JOURNAL_NAME = "optuna.journal"

LOCK_GRACE = 3.0
"""Seconds after which a lock on the file counts as left by a process that is gone; an
operation holds it for milliseconds."""


def label(value: Any) -> str:
    """A choice as Optuna keeps it: text, for Optuna cannot keep lists or tell 1 from true."""
    return value if isinstance(value, str) else json.dumps(value)


class Suggest:
    """Asks an Optuna trial for the searched fields whose conditions (`when`) hold."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, trial: BaseTrial) -> dict[str, Any]:
        """The sampled values by config path; a field whose condition fails is left out."""
        values: dict[str, Any] = {}
        for path, param in self._space.params.items():  # parents stand before their children
            if self._space.is_active(path, values):
                values[path] = _draw(trial, path, param)
        return values

    def fixed(self, values: Mapping[str, Any]) -> FixedTrial:
        """Given values by config path as a trial that has been asked for them, with its distributions."""
        params = self._space.params
        trial = FixedTrial({path: label(v) if isinstance(params[path], Choice) else v for path, v in values.items()})
        self(trial)
        return trial


def _draw(trial: BaseTrial, path: str, param: Param) -> Any:
    if isinstance(param, Float):
        return trial.suggest_float(path, param.low, param.high, step=param.step, log=param.log)
    if isinstance(param, Int):
        return trial.suggest_int(path, param.low, param.high, step=param.step, log=param.log)
    chosen = trial.suggest_categorical(path, [label(value) for value in param.choices])
    return next(value for value in param.choices if label(value) == chosen)


class Sampler:
    """Draws trials and tells the study how they went.

    A trial is named by its `optuna_number` in the study, which `ask` returns; warm trials and
    trials that were lost have numbers too, so it is not the trial's own number. All calls by
    `optuna_number` work on a study that another process began. Best is what the results
    choose among finished trials, not ``study.best_trial``.

    Args:
        space: what is searched; the study's direction is that of its metric.
        startup: trials told as COMPLETE or PRUNED, warm ones included, before TPE replaces
            random sampling.
        journal: Optuna's journal file, opened where it exists; None keeps the study in memory.
            One process at a time may run a search on it; dashboards may read it.
        name: of the study, where the journal has none yet.
        kind: `tpe` or `random`.
        told: how a stopped trial is told: `pruned` with its values by epoch, which TPE places
            below all complete ones, later epochs first; or `complete` with its last value.

    Raises:
        UserError: the journal cannot be read or written.
    """

    def __init__(
        self,
        space: Space,
        *,
        startup: int,
        journal: Path | None = None,
        name: str = "search",
        kind: Literal["tpe", "random"] = "tpe",
        told: Literal["pruned", "complete"] = "pruned",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._suggest, self._default = Suggest(space), space.default_point()
        self._seed, self._startup, self._kind, self._told = space.search.seed, startup, kind, told
        self._path = None if journal is None else journal.absolute()
        direction = StudyDirection.MAXIMIZE if space.search.mode == "max" else StudyDirection.MINIMIZE
        with self._working():
            storage = None if self._path is None else _open(self._path)
            known = [] if storage is None else optuna.get_all_study_names(storage)
            self.study: optuna.Study
            """Optuna's study."""
            if storage is not None and known:  # under its first name, should the folder have been renamed
                self.study = optuna.load_study(study_name=known[0], storage=storage)
            else:
                self.study = optuna.create_study(study_name=name, storage=storage, direction=direction)
            self._running: dict[int, tuple[optuna.Trial, set[int]]] = {}
            for trial in self._trials(TrialState.RUNNING):
                self._begin(trial)

    def name(self, number: int) -> str:
        """Id of the trial with this number, from 0."""
        return f"{number:04d}"

    def ask(self, number: int) -> tuple[dict[str, Any], int]:
        """Draw a trial.

        Args:
            number: of the trial, from 0. Number 0 is the space's default point.

        Returns:
            The sampled values by config path, and the trial's number in the study.
        """
        trial_id = self.name(number)
        with self._working(), _without_warnings():
            if number == 0:
                self._add(self._default, state=TrialState.RUNNING, user_attrs={"trial": trial_id})
                return dict(self._default), self._begin(self._trials(TrialState.RUNNING)[-1])
            self.study.sampler = self._sampler(number)
            trial = self.study.ask()
            trial.set_user_attr("trial", trial_id)
            return self._suggest(trial), self._begin(trial)

    def report(self, optuna_number: int, value: float | None, step: int) -> None:
        """Tell a running trial's value at an epoch.

        Nothing happens if the value is missing or not finite, the step was reported before, or
        the trial has ended.

        Args:
            optuna_number: the trial.
            value: the metric.
            step: the epoch; where equal epochs are not comparable, that of a common clock. TPE
                takes the PRUNED trials with the latest steps for the better ones.
        """
        trial, steps = self._running.get(optuna_number, (None, set()))
        if trial is None or value is None or not math.isfinite(value) or step in steps:
            return
        steps.add(step)
        with self._working(), suppress(UpdateFinishedTrialError):
            trial.report(value, step)

    def tell(self, optuna_number: int, state: str, value: float | None = None) -> None:
        """Tell how a trial ended; nothing happens if the study knows already.

        Args:
            optuna_number: the trial.
            state: `finished` becomes COMPLETE (FAIL without a finite value), `stopped` PRUNED or
                what `told` says, `failed` and `diverged` FAIL. It stays in the trial's user
                attribute `state`.
            value: last value of the metric.
        """
        ends = {s: TrialState.FAIL for s in ("finished", "failed", "diverged")} | {"stopped": TrialState.PRUNED}
        if state not in ends:
            raise ValueError(f"state is {state}, but must be {', '.join(ends)}")
        complete = state == "finished" or (state == "stopped" and self._told == "complete")
        if complete and value is not None and math.isfinite(value):
            self._end(optuna_number, state, TrialState.COMPLETE, value)
        else:
            self._end(optuna_number, state, ends[state])

    def reconcile(self, known: Mapping[int, tuple[str, float | None]]) -> dict[int, int]:
        """Bring a study that was cut off into line with the search's own log.

        Trials that the log ended are told. Those that the log does not know, drawn in the last
        moment, are told as FAIL (`state` is `lost`). Trials that the log calls `running` stay
        RUNNING, to go on; one that was told nevertheless (its search was over, and goes on with a larger
        budget) goes on as a copy, for Optuna changes no trial that has ended. Rows that may be
        missing are to be reported before.

        Args:
            known: number in the study -> (state, last value of the metric), for all trials of the log.

        Returns:
            The number of each such copy by the number that the log has.

        Raises:
            UserError: the log knows a trial that the study does not have.
        """
        count = len(self.study.get_trials(deepcopy=False))
        if missing := [number for number in known if number >= count]:
            raise UserError(
                f"{self._path or 'the study'}: has {count} trials, but the search drew {len(missing)} more (Optuna's "
                f"number {missing[0]}); put the file back as it was, or start anew with --fresh"
            )
        for number in list(self._running):
            state, value = known.get(number, ("lost", None))
            if state == "lost":
                self._end(number, state, TrialState.FAIL)
            elif state != "running":
                self.tell(number, state, value)
        ended = [number for number, (state, _) in known.items() if state == "running" and number not in self._running]
        return {number: self._copy(number) for number in ended}

    def _copy(self, optuna_number: int) -> int:
        """A RUNNING trial with the values and reports of one that has ended; its number."""
        old = self.study.get_trials(deepcopy=False)[optuna_number]
        with self._working(), _without_warnings():
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=old.params,
                    distributions=old.distributions,
                    intermediate_values=old.intermediate_values,
                    user_attrs={"trial": old.user_attrs["trial"]},
                )
            )
            return self._begin(self._trials(TrialState.RUNNING)[-1])

    def close_running(self) -> None:
        """Tell all RUNNING trials as PRUNED, in a search that will not go on (`state` is `running`)."""
        for number in list(self._running):
            self._end(number, "running", TrialState.PRUNED)

    def add_finished(self, points: Iterable[Point]) -> int:
        """Add finished trials of earlier searches as COMPLETE; those that are there already are left out.

        Args:
            points: values by config path, which must lie within the space, and the metric's last
                value (`hpcl.search.warm.read_warm`); `source` becomes the user attribute `from`.

        Returns:
            How many were added.
        """
        there = {trial.user_attrs.get("from") for trial in self._trials(TrialState.COMPLETE)}
        new = [point for point in points if point.source not in there]
        with self._working(), _without_warnings():
            for point in new:
                self._add(point.values, value=point.value, user_attrs={"from": point.source})
        return len(new)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = seed_of(self._seed, "sampler", number) % 2**32  # numpy's RandomState takes 32 bits
        if self._kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(
            n_startup_trials=self._startup, multivariate=False, group=False, constant_liar=False, seed=seed
        )

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    def _begin(self, trial: FrozenTrial | optuna.Trial) -> int:
        """Take in a trial that runs; its number."""
        if isinstance(trial, FrozenTrial):
            steps, trial = set(trial.intermediate_values), optuna.Trial(self.study, trial._trial_id)
        else:
            steps = set()
        self._running[trial.number] = trial, steps
        return trial.number

    def _add(self, values: Mapping[str, Any], **facts: Any) -> None:
        """Add a trial with given values, in one line of the journal: a crash leaves all of it or nothing."""
        fixed = self._suggest.fixed(values)
        params = {
            # Optuna lowers a high end that is not a whole number of steps to the last digit.
            path: min(value, dist.high) if isinstance(dist := fixed.distributions[path], FloatDistribution) else value
            for path, value in fixed.params.items()
        }
        self.study.add_trial(create_trial(params=params, distributions=fixed.distributions, **facts))

    def _end(self, optuna_number: int, state: str, told: TrialState, value: float | None = None) -> None:
        trial, _ = self._running.pop(optuna_number, (None, None))
        if trial is None:
            return
        with self._working(), suppress(UpdateFinishedTrialError):
            trial.set_user_attr("state", state)
            self.study.tell(trial, value, told, skip_if_finished=True)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Around what Optuna writes; of a line for which the disk had no room nothing stays."""
        if self._path is None:
            yield
            return
        try:
            with writing(self._path):
                yield
        except StorageError:
            with suppress(OSError):
                _drop_torn_line(self._path, _Lock(str(self._path)))
            raise


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Lock(JournalFileOpenLock):
    """Optuna's lock beside the file, which never waits for a dead process for long.

    Optuna looks at the age of what a lock points to. The lock that a dashboard leaves when it
    is killed points from `results/x` to `results/x/optuna.journal` below that, which is
    nothing: Optuna's own locks wait for it without end. Here it is the lock's own age.
    """

    def acquire(self) -> bool:
        """Take the lock; a lock that has not changed for `LOCK_GRACE` s is broken."""
        seen, since = None, 0.0
        while True:
            with suppress(FileExistsError):
                os.close(os.open(self._lock_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
            with suppress(FileNotFoundError):
                found = os.lstat(self._lock_file)
                if (found.st_ino, found.st_mtime_ns) != seen:
                    seen, since = (found.st_ino, found.st_mtime_ns), time.monotonic()
                elif time.monotonic() - since > LOCK_GRACE:
                    self.release()
            time.sleep(0.005)

    def release(self) -> None:
        """Give the lock back; it may have been broken meanwhile."""
        with suppress(RuntimeError):
            super().release()


def _open(path: Path) -> BaseStorage:
    """The storage in a journal file.

    Raises:
        UserError: it is no journal.
    """
    lock = _Lock(str(path))
    if path.exists():
        _drop_torn_line(path, lock)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path}: is no Optuna journal, or is damaged ({error}); put a copy back, or start anew with --fresh"
        ) from error


def _drop_torn_line(path: Path, lock: _Lock) -> None:
    """Cut off a last line without its end, to which Optuna would append and then read neither."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0 or (file.seek(size - 1), file.read(1))[1] == b"\n":
            return
        lock.acquire()
        try:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            lock.release()
