"""What a search says while it runs, and the Tune callback that keeps its tables.

One line per ended trial, and now and then one on the whole search. Rows reach this
callback right after the scheduler decided on them, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from hpcl.results import write_text
from hpcl.search.plan import Plan
from hpcl.search.tables import Row, Tables
from hpcl.search.trial import ERROR_FILE

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

SAY_EVERY = 30.0
"""Seconds between two lines on the whole search."""


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


class Follow(tune.Callback):
    """Fills the tables, tells how each trial ended, and prints the progress.

    Args:
        tables: where rows go.
        plan: the search.
        reasons: trial id -> why ASHA stopped it; the scheduler fills it.
        numbers: trial id -> its place in the order of drawing; the sampler fills it.
        say: prints one line.
    """

    def __init__(
        self,
        tables: Tables,
        plan: Plan,
        reasons: Mapping[str, str],
        numbers: Mapping[str, int],
        *,
        say: Callable[[str], None] = say,
    ) -> None:
        self._tables, self._plan, self._say = tables, plan, say
        self._reasons, self._numbers = reasons, numbers
        self._asked = plan.space.search.trials
        self._started = self._said = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._begin(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if self._tables.add(trial.trial_id, result):
            self._tables.write_if_due()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(f"trial {trial.trial_id} broke off and is tried again: {self._error(trial)}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        trial_id = trial.trial_id
        row = self._tables.trials[trial_id]
        state = self._tables.newest_state(trial_id)
        if trial_id in self._reasons:
            self._ended(self._tables.end(trial_id, "stopped", self._reasons[trial_id]))
        elif (trial.last_result or {}).get("state") == "failed":
            self._ended(self._tables.end(trial_id, "failed", self._error(trial)))
        elif state == "finished":
            self._ended(self._tables.end(trial_id, "finished", f"all {row['epochs']} epochs trained"))
        elif state == "diverged":
            self._ended(self._tables.end(trial_id, "diverged", f"epoch {row['epochs']}: the loss is not finite"))
        else:
            reason = f"ended after epoch {row['epochs']} without finishing its schedule"
            self._ended(self._tables.end(trial_id, "failed", reason))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._begin(trial)
        self._ended(self._tables.end(trial.trial_id, "failed", self._error(trial)))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self._said > SAY_EVERY:
            self._said = time.monotonic()
            self._say(self.overview())

    def overview(self) -> str:
        """One line on the whole search: running, ended, best so far, elapsed, time left."""
        tables, elapsed = self._tables, time.monotonic() - self._started
        running = tables.count("running")
        ended = len(tables.trials) - running
        best = tables.best()
        parts = [f"{running} running", f"{ended} of {self._asked} ended"]
        if best:
            parts.append(f"best so far {best['objective']:.4g} ({best['trial_id']})")
        parts.append(f"{duration(elapsed)} elapsed")
        if tables.epochs:
            parts.append(f"about {duration(elapsed / len(tables.epochs) * self.epochs_left())} left")
        return "... " + ", ".join(parts)

    def epochs_left(self) -> float:
        """Epochs that trials to come and running trials are expected to train."""
        trials = self._tables.trials.values()
        ended = [trial["epochs"] for trial in trials if trial["state"] != "running"]
        # Short trials end first: the plan's mean keeps the first of them from speaking for all.
        expected = self._plan.epochs_expected / self._asked
        mean = (expected + sum(ended)) / (1 + len(ended))
        running = [trial["epochs"] for trial in trials if trial["state"] == "running"]
        total = self._plan.space.epochs
        rest = sum(max(mean - epochs, (total - epochs) / 2) for epochs in running)
        return float(rest + mean * (self._asked - len(trials)))

    def _begin(self, trial: Trial) -> None:
        self._tables.begin(trial.trial_id, self._numbers[trial.trial_id], trial.config)

    def _ended(self, trial: Row) -> None:
        best = self._tables.best()
        ended = len(self._tables.trials) - self._tables.count("running")
        width = len(str(self._asked))
        parts = [trial["stop_reason"]]
        if trial["state"] == "finished":
            values = {self._tables.metric: trial.get("metric"), self._tables.chosen_by(): trial.get("objective")}
            parts += [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
            if best is trial:
                parts.append("the best so far")
        line = f"[{ended:>{width}}/{self._asked}] trial {trial['trial_id']} {trial['state']:<8} "
        self._say(f"{line} {', '.join(parts)}  ({duration(trial['seconds'])})")
        self._tables.write_if_due()

    def _error(self, trial: Trial) -> str:
        """First line of the trial's error; Ray's own words where the process died without any."""
        path = self._plan.folder / "trials" / trial.trial_id / ERROR_FILE
        if not path.is_file():
            source = Path(trial.error_file) if trial.error_file else None
            text = source.read_text(errors="replace") if source and source.is_file() else ""
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith("Failure #")] or ["no reason known"]
            # A traceback ends with its error; Ray's account of a lost process begins with it.
            line = lines[-1] if "ray::" in lines[0] else f"the trial's process was lost: {lines[0]}"
            write_text(path, f"{line}\n\n{text}")
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()


def duration(seconds: float) -> str:
    """Seconds in words, two units at most.

    >>> duration(75.2), duration(5), duration(7300)
    ('1 min 15 s', '5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
