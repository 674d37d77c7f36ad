"""What a search leaves behind, and what is said of it at the end."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcl.config import Config
from hpcl.errors import StorageError
from hpcl.search.places import shown
from hpcl.search.plan import duration
from hpcl.search.space import Space
from hpcl.search.storage import fetch
from hpcl.search.tables import Row
from hpcl.search.trial import ERROR_FILE
from hpcl.validation import show

ALL_ENDED = "all trials have ended"
"""Why a search ended that was not cut short."""


@dataclass(frozen=True)
class Found:
    """What a search leaves behind."""

    folder: Path
    """``results/<name>``; where that is a URI, this process's copy of its files."""
    trials: list[Row]
    """Rows of ``trials.parquet``."""
    epochs: list[Row]
    """Rows of ``epochs.parquet``, in the order in which the scheduler saw them."""
    prefixes: list[Row]
    """The prefixes that trials share, with the columns of a trial that they have."""
    epochs_trained: int
    """Epochs trained in all, those of a prefix once."""
    best_trial: Row | None
    """The best trial among those that finished their schedule."""
    best: Config | None
    """Its configuration."""
    chosen_by: str
    """What the best trial is best in: `linear probe`, or the name of a curve."""
    seconds: float
    """How long this process ran the search."""
    state: str
    """finished, failed, or interrupted (Ctrl-C, SIGTERM, results that cannot be written): the same command goes on."""
    reason: str
    """Why it ended, in words."""
    notes: list[str]
    """What the reader of the results should know."""
    command: str
    """The command that goes on with this search."""

    @property
    def interrupted(self) -> bool:
        """Whether the search was cut short, and the same command goes on with it."""
        return self.state == "interrupted"

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 where there is a best configuration, 1 where there is none, 3 where
        results could not be written any more, 130 after Ctrl-C or SIGTERM, as shells have it."""
        if self.interrupted:
            return 130 if self.reason == "interrupted" else 3
        return 0 if self.best_trial is not None and self.state == "finished" else 1

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(1 for trial in self.trials if trial["state"] == state)

    @property
    def states(self) -> dict[str, int]:
        """State -> trials in it; those that were cut short are `running`."""
        return {state: self.count(state) for state in ("finished", "stopped", "failed", "diverged", "running")}

    def cost(self) -> str:
        """What was used, in words: GPU-hours, or CPU-hours where there was no GPU."""
        gpu_hours = self.total("gpu_hours")
        return f"{gpu_hours:.3g} GPU-hours" if gpu_hours else f"{self.total('cpu_hours'):.3g} CPU-hours"

    def total(self, column: str) -> float:
        """Sum of a cost (`seconds`, `gpu_hours`, `cpu_hours`) over trials and prefixes."""
        return float(sum(row[column] for row in (*self.trials, *self.prefixes)))


def summary(space: Space, found: Found) -> str:
    """What a search found, where everything lies, and the next command."""
    counts = ", ".join(f"{n} {'cut short' if s == 'running' else s}" for s, n in found.states.items() if n)
    shared = ", shared ones counted once" if found.prefixes else ""
    ended = "done" if found.state == "finished" else found.state
    lines = [
        "",
        f"{ended} after {duration(found.seconds)}: {len(found.trials)} of {space.search.trials} trials "
        f"({counts or 'none ended'}), {found.epochs_trained} epochs trained{shared}, {found.cost()}",
    ]
    if found.reason not in ("interrupted", ALL_ENDED):
        lines.append(found.reason)
    lines += [*(f"note     {note}" for note in found.notes), *_best_lines(space, found)]
    if found.interrupted:
        lines.append(f"resume   {found.command}")
    return "\n".join(lines)


def _best_lines(space: Space, found: Found) -> list[str]:
    folder = shown(found.folder)
    if found.best_trial is None or found.best is None:
        finished = found.count("finished")
        why = f"no finished trial has a value of {found.chosen_by}" if finished else "no trial finished its schedule"
        lines = [f"{why}, so there is no best configuration"]
        if error := first_error(found):
            lines += ["the first failed trial:", "", error.rstrip(), ""]
        return [*lines, f"results  {folder}"]
    best = found.best_trial
    lines = [f"best     trial {best['trial_id']} with {found.chosen_by} {best['objective']:.4g}"]
    values = {path: found.best.at(path) for path in space.params}
    active = [path for path in space.params if space.is_active(path, values)]
    width = max(len(path) for path in active)
    for path in active:
        value, base = found.best.at(path), space.base.at(path)
        note = "" if value == base else f"   (base: {show(base)})"
        lines.append(f"           {path:<{width}}  {show(value)}{note}")
    if base_trial := next((t for t in found.trials if t["number"] == 0 and t is not best), None):
        lines.append(f"base     trial {base_trial['trial_id']}: {_came_to(base_trial, found.chosen_by)}")
    return [
        *lines,
        f"results  {folder}  (trials.parquet, epochs.parquet, best.yaml, trials/{best['trial_id']}/)",
        f"look     hpcl report {shlex.quote(folder)}   (one page: how sure, why, and what to search next)",
        f"then     hpcl retrain {shlex.quote(folder)}   (the best ones at full length, with several seeds)",
        f"or       hpcl train {shlex.quote(shown(found.folder / 'best.yaml'))}",
    ]


def _came_to(trial: Row, chosen_by: str) -> str:
    """How far a trial came."""
    if trial["state"] == "finished":
        return "no value" if trial["objective"] is None else f"{chosen_by} {trial['objective']:.4g}"
    return "cut short" if trial["state"] == "running" else f"{trial['state']}, {trial['stop_reason']}"


def header(space: Space, found: Found, best: Row, backbone: str | None) -> str:
    states = ", ".join(f"{count} {state}" for state, count in found.states.items() if count)
    values = {found.chosen_by: best["objective"], space.search.metric: best.get("metric")}
    measured = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if value is not None)
    use = "Train it: hpcl train best.yaml"
    if backbone:
        use = f"Found with a backbone of your own ({backbone}). Train it: hpcl.fit(config, folder, backbone=...)"
    return (
        f"Best of the {found.count('finished')} finished trials of search {found.folder.name}: trial "
        f"{best['trial_id']} (number {best['number']}).\n"
        f"After {best['epochs']} epochs: {measured}.\n"
        f"The search: {len(found.trials)} trials ({states}), sampler seed {space.search.seed}; "
        f"written {time.strftime('%Y-%m-%d %H:%M:%S')}.\n{use}"
    )


def first_error(found: Found) -> str | None:
    """The text of the first failed trial's ``error.txt``."""
    for trial in found.trials:
        if trial["state"] == "failed":
            path = found.folder / "trials" / trial["trial_id"] / ERROR_FILE
            with suppress(StorageError):
                fetch(path.parent, {ERROR_FILE})
            if path.is_file():
                text: str = path.read_text(encoding="utf-8")
                return text
    return None
