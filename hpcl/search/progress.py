"""What a search says while it runs, and the Tune callback that follows it.

One line per ended trial, and now and then one on the whole search; in a terminal a live
table besides. Rows are in the tables before this callback runs: the scheduler puts them
there before it decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from hpcl.errors import harmless
from hpcl.files import write_text
from hpcl.search.budget import Budget
from hpcl.search.failures import Attempts, machine_lost, same_error
from hpcl.search.forecast import elapsed, seconds_left
from hpcl.search.hung import Watch
from hpcl.search.interrupt import Draining
from hpcl.search.live import Course, Live, view
from hpcl.search.monitor import Monitor
from hpcl.search.places import place
from hpcl.search.plan import Plan, duration
from hpcl.search.queue import WorkQueue
from hpcl.search.storage import fetch, full_disk, push
from hpcl.search.tables import PREFIX, Row, Tables
from hpcl.search.trial import ERROR_FILE, STORAGE

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

LOST = "the trial's process was lost"
SAY_EVERY = 30.0
"""Seconds between two lines on the whole search."""


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(harmless(text), flush=True)


class Follow(tune.Callback):
    """Tells how each trial ended, prints the progress, and ends a search that has used up its budget.

    Args:
        tables: what is known.
        plan: the search.
        budget: what it may use.
        monitor: looks whether the curve merely reports a searched field.
        draining: asked to end the search here.
        queue: hears of trials that failed.
        say: prints one line.
        course: the order of ends, in an earlier process too.
        live: the table in a terminal; None: a line now and then instead.
    """

    def __init__(
        self,
        tables: Tables,
        plan: Plan,
        budget: Budget,
        monitor: Monitor,
        draining: Draining,
        queue: WorkQueue,
        *,
        say: Callable[[str], None] = say,
        course: Course | None = None,
        live: Live | None = None,
    ) -> None:
        self._tables, self._plan, self._say = tables, plan, say
        self._course, self._live = course or Course(), live
        self._budget, self._monitor, self._draining, self._queue = budget, monitor, draining, queue
        self._attempts = Attempts(plan.space.search.retries)
        self._watch = Watch(plan.space.search.hung_after)
        for row in tables.epochs:
            self._watch.epoch(row["seconds"])
        self._asked = plan.space.search.trials
        monitor.restore(tables.notes)
        self._looked = 0
        self._running: set[str] = set()
        """Tune's ids of the trials that have a process."""
        self._broken: dict[str, tuple[str, bool]] = {}
        """Tune's id -> the error, and whether it is tried again, of trials that broke off and wait for a process."""
        self._errors: list[str | None] = []
        """Of the trials that ended, in order: the error's first line, or None."""
        self._said = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of its callbacks, which nobody reads back: a terminal cannot be in it."""
        return {}

    @property
    def idle(self) -> bool:
        """Whether no trial has a process."""
        return not self._running

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.add(trial.trial_id)
        self._broken.pop(trial.trial_id, None)
        self._course.began(trial.config["trial"], time.time())
        self._watch_over(trial)
        # Two queues a curve, for means over the last reports that nobody asks for: most of what Tune holds of a trial.
        trial.run_metadata._n_steps = ()  # type: ignore[assignment]

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._watch.reported(trial.config["trial"], result, time.monotonic())
        if note := result.get("note"):  # it went on from the checkpoint before the newest, which was damaged
            self._say(f"{_called(trial.config['trial'])}: {note}")
        if result.get("state") == STORAGE:  # it has not failed: it goes on from its checkpoint when the search does
            self._draining.ask(result["reason"], interrupted=True, instead=True)
            self._say(f"{_called(trial.config['trial'])} could not be saved: the running epochs are finished")
        self._look()
        self._tables.write_if_due()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        ours = trial.config["trial"]
        self._broken[trial.trial_id] = error, _ = self._broke_off(trial)
        if self._tables.state_of(ours) != "running":
            return  # the process was lost after the trial's last row
        self._tries_again(ours, error)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        ours = trial.config["trial"]
        self._course.left(ours)
        self._watch.left(ours)
        state = self._tables.state_of(ours)
        if state == "running" and (trial.last_result or {}).get("state") == "failed":
            self._tables.end(ours, "failed", self._error_text(trial).split("\n", 1)[0])
        elif state == "running" and not self._draining():
            epochs = self._tables.newest(ours).get("epoch", 0)
            self._tables.end(ours, "failed", f"ended after epoch {epochs} without finishing its schedule")
        if self._tables.state_of(ours) != "running":
            self._queue.tell(ours)
            self._ended(ours)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._running.discard(trial.trial_id)
        ours = trial.config["trial"]
        # Of a process that is lost between two trials Tune tells twice; that is one attempt.
        told = self._broken.pop(trial.trial_id, None)
        error, again = told or self._broke_off(trial)
        if again and self._tables.state_of(ours) == "running":  # Tune counts lost machines too
            self._queue.again(ours)
            if not told:
                self._tries_again(ours, error)
            return
        self._queue.give_up(ours)
        self._tables.end(ours, "failed", error)
        self._queue.tell(ours)
        self._ended(ours)

    def _broke_off(self, trial: Trial) -> tuple[str, bool]:
        """Why a trial's process broke off, and whether that leaves it an attempt."""
        ours = trial.config["trial"]
        self._course.left(ours)
        if hung := self._watch.left(ours):
            folder = place(trial.config["folder"])
            write_text(folder / ERROR_FILE, f"{hung}\n")
            push(folder, {ERROR_FILE})
        text = self._error_text(trial)
        error = text.split("\n", 1)[0]
        # Maybe of our own disk: Tune takes what its callbacks raise for the trial's error.
        if trouble := full_disk(text):
            self._draining.ask(trouble, interrupted=True, instead=True)
        lost = not hung and machine_lost(text if error.startswith(LOST) else error)
        again = self._attempts.failed(ours, self._tables.newest(ours).get("epoch", 0), lost=lost)
        return error, again or trouble is not None

    def _tries_again(self, ours: str, error: str) -> None:
        self._tables.retry(ours, error)
        self._say(f"{_called(ours)} broke off and is tried again: {error}")

    def _watch_over(self, trial: Trial) -> None:
        actor = trial.temporary_state.ray_actor
        self._watch.began(trial.config["trial"], time.monotonic(), actor._actor_id.hex() if actor else None)

    def _look_after(self, iteration: int, trials: list[Trial]) -> None:
        """See to trials between two processes, of which Tune tells nothing."""
        for trial in trials:
            if not self._queue.has(trial.trial_id):
                continue
            if trial.status == trial.PENDING and trial.temporary_state.ray_actor:
                # It waits for a process that another trial leaves.
                if not self._watch.watches(trial.config["trial"]):
                    self._watch_over(trial)
            elif trial.status == trial.ERROR:  # that process did not let go of the other trial
                self._queue.on_trial_complete(trial.trial_id, error=True)
                self.on_trial_error(iteration, trials, trial)

    def _end_hung(self) -> None:
        """Kill the processes of trials that hang; Tune then finds them lost."""
        for ours in self._watch.hung(time.monotonic()):
            self._say(f"{_called(ours)} hangs: its process is killed")
            self._watch.kill(ours)

    def look_at_budget(self) -> None:
        """End the search where its budget is used up."""
        if not self._draining():
            used = self._budget.exhausted(
                trials_begun=len(self._tables.trials),
                seconds=elapsed(self._tables, time.time()),
                gpu_seconds=self._tables.total("gpu_hours") * 3600,
                epochs=self._tables.epochs_trained(),
            )
            if used:
                self._draining.ask(used)
                self._say(f"{used}: the running epochs are finished, nothing new starts")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self.look_at_budget()
        self._look_after(iteration, trials)
        self._end_hung()
        if self._live:
            self._live.update_if_due(lambda: view(self._tables, self._plan, self._course))
        elif time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            self._say(self.overview())

    def _look(self) -> None:
        """Ask the monitor about rungs that have new records."""
        new = self._tables.rungs[self._looked :]
        self._looked = len(self._tables.rungs)
        for rung in dict.fromkeys(rung for _, _, rung, _ in new):
            for text in self._monitor.look(rung, self._tables.metric, self._tables.rung_rows(rung)):
                self._tables.note(text)
                self._say(f"note: {text}")

    def overview(self) -> str:
        """One line on the whole search: running, ended, best so far, elapsed, time left."""
        tables = self._tables
        ended = len(tables.trials) - tables.count("running")
        best = tables.best()
        parts = [f"{len(self._running)} running", f"{ended} of {self._asked} ended"]
        if best:
            parts.append(f"best so far {best['objective']:.4g} ({best['trial_id']})")
        now = time.time()
        parts.append(f"{duration(elapsed(tables, now))} elapsed")
        if left := seconds_left(tables, self._plan, now):
            parts.append(f"about {duration(left[0])} left")
        return "... " + ", ".join(parts)

    def _ended(self, ours: str) -> None:
        self._course.ended(ours)
        if ours.startswith(PREFIX):
            row = self._tables.prefixes[ours]
            self._say(f"{_called(ours)} {row['stop_reason']}  ({duration(row['seconds'])})")
            return
        tables, trial = self._tables, self._tables.trials[ours]
        best = tables.best()
        ended = len(tables.trials) - tables.count("running")
        width = len(str(self._asked))
        parts = [trial["stop_reason"]]
        if trial["state"] == "finished":
            values = {tables.metric: trial["metric"], tables.chosen_by(): trial["objective"]}
            parts += [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
            if best is trial:
                parts.append("the best so far")
        if trial["state"] == "failed":
            parts.append(f"see trials/{ours}/{ERROR_FILE}")
        line = f"[{ended:>{width}}/{self._asked}] trial {ours} {trial['state']:<8} "
        self._say(f"{line} {', '.join(parts)}  ({duration(trial['seconds'])})")
        self._give_up_if_all_fail(trial)
        tables.write_if_due()

    def _give_up_if_all_fail(self, trial: Row) -> None:
        self._errors.append(trial["stop_reason"] if trial["state"] == "failed" else None)
        number = min(self._plan.space.search.give_up_after, self._asked)
        if error := same_error(self._errors, number):
            self._draining.ask(f"the first {number} trials failed with the same error: {error}", at_once=True)

    def _error_text(self, trial: Trial) -> str:
        """The trial's error, which the first line names; Ray's own words where the process died without any."""
        path = place(trial.config["folder"]) / ERROR_FILE
        fetch(path.parent, {ERROR_FILE})
        if not path.is_file():
            source = Path(trial.error_file) if trial.error_file else None
            text = source.read_text(errors="replace") if source and source.is_file() else ""
            text = text[max(text.rfind("Failure #"), 0) :]  # those of earlier attempts come first
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith("Failure #")] or ["no reason known"]
            # A traceback ends with its error; Ray's account of a lost process begins with it.
            why = "its machine does not answer" if machine_lost(text) else lines[0]
            line = lines[-1] if "ray::" in lines[0] else f"{LOST}: {why}"
            write_text(path, f"{line}\n\n{text}")
            push(path.parent, {ERROR_FILE})
        return path.read_text(encoding="utf-8")


def _called(ours: str) -> str:
    return ours.replace("-", " ", 1) if ours.startswith(PREFIX) else f"trial {ours}"
