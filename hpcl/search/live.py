"""A search as one table: what runs, who ended last, the best so far, what is used and what is left.

:func:`view` makes it of what is known (:class:`hpcl.search.tables.Tables`); ``hpcl status``
prints it once, :class:`Live` keeps it at the bottom of a terminal, with the search's lines
scrolling above it. It fits 80 columns, and the height of the terminal in :class:`Live`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import rich.live
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from hpcl.errors import harmless
from hpcl.results import LOWER_IS_BETTER
from hpcl.search.clock import StageClock, reached
from hpcl.search.forecast import elapsed, lengths_of, seconds_left
from hpcl.search.journal import Event
from hpcl.search.plan import Plan, duration
from hpcl.search.tables import PREFIX, Row, Tables

ENDED_SHOWN = 5
"""Ended trials in the table, the newest ones."""
MOST_LEVELS = 15
"""Characters of the counts of clusters by level; of longer ones the first and the last are shown."""
EVERY = 0.5
"""Seconds between two pictures of a live table at least."""
_STYLES = {"finished": "green", "stopped": "dim", "failed": "red", "diverged": "red", "waiting": "dim"}


class Course:
    """Which trials have a process since when, and the order in which they ended.

    The process that runs the search says so itself; another one takes it from the journal.
    """

    def __init__(self) -> None:
        self.since: dict[str, float] = {}
        """Trial or prefix that runs -> when it began or was taken up again, in seconds since 1970."""
        self.order: list[str] = []
        """Trials and prefixes that ended, in order."""

    def began(self, trial_id: str, now: float) -> None:
        """A trial or prefix got a process."""
        self.since[trial_id] = now

    def left(self, trial_id: str) -> None:
        """It has none any more; it may get another one."""
        self.since.pop(trial_id, None)

    def ended(self, trial_id: str) -> None:
        """It ended."""
        self.left(trial_id)
        self.order.append(trial_id)

    def take(self, event: Event) -> None:
        """What an event of the journal says of this, if anything."""
        kind, trial_id = event["event"], event.get("trial", "")
        if kind == "session":
            self.since.clear()  # nothing of an earlier process runs any more
        elif kind in ("trial", "fork"):
            self.began(trial_id, event["time"])
        elif kind == "row" and trial_id not in self.since:
            # One that was cut short says nothing before its first new epoch is over.
            self.began(trial_id, event["time"] - (event["row"].get("seconds") or 0.0))
        elif kind == "retry":
            self.left(trial_id)
        elif kind == "end":
            self.ended(trial_id)


@dataclass(frozen=True)
class View:
    """A picture of a search, for rich to print."""

    name: str
    metric: str
    running: tuple[tuple[str, ...], ...]
    """Cells of the trials that run, then of those that wait."""
    ended: tuple[tuple[str, ...], ...]
    """Cells of the newest trials that ended, the newest last."""
    facts: tuple[tuple[str, str], ...]
    """Label and text of each line below the table."""
    beside: int | None
    """Lines of the console's height that others use, which leaves it the rest; None: as high as it needs."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        most = len(self.running) + len(self.ended)
        if self.beside is not None:
            # Besides the rows: rule, header, facts, a line on rows left out, and one for the cursor.
            most = max(1, options.size.height - self.beside - len(self.facts) - 4)
        running = self.running[:most]
        ended = self.ended[max(0, len(self.ended) - (most - len(running))) :]
        yield Rule(Text(harmless(self.name)), style="dim")
        if running or ended:
            yield self._table([*running, *ended])
        if len(self.running) > len(running):
            yield Text(f"and {len(self.running) - len(running)} more", style="dim")
        for label, text in self.facts:
            line = Text.assemble((f"{label:<9}", "bold"), harmless(text))
            yield line if self.beside is None else one_line(line)

    def _table(self, rows: list[tuple[str, ...]]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("trial", "stage", "epoch", "clusters", self.metric, "state", "time"):
            right = name in ("stage", "epoch", self.metric, "time")
            table.add_column(name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        for row in rows:
            *cells, state, seconds = map(harmless, row)
            style = _STYLES.get(state.split()[0], "")
            table.add_row(*map(Text, cells), Text(state, style), Text(seconds), style="dim" if style == "dim" else "")
        return table


def view(
    tables: Tables,
    plan: Plan,
    course: Course,
    *,
    now: float | None = None,
    running: bool = True,
    beside: int | None = 0,
) -> View:
    """The search at a moment, as something that rich prints.

    Args:
        tables: what is known.
        plan: the search.
        course: what runs and who ended, of the same events as `tables`.
        now: seconds since 1970; None: the time it is.
        running: whether the search runs; else its time stands still and trials are cut short.
        beside: lines of the console's height that others use: rows that do not fit into the rest are
            left out. None: all rows.
    """
    now = time.time() if now is None else now
    clock = StageClock(plan.space.base, plan.space.search.clock)
    brackets = {trial: bracket for trial, bracket, _, _ in tables.rungs}
    prefixes = [row for row in tables.prefixes.values() if row["state"] == "running"] if running else []
    trials = sorted((tables.trials[t] for t in tables.unfinished()), key=lambda t: t["trial_id"] not in course.since)
    rows = []
    for trial in (*prefixes, *trials):
        trial_id = trial["trial_id"]
        state = "cut short" if not running else _state(trial, tables, plan, course, clock, brackets)
        seconds = trial["seconds"]
        if running and trial_id in course.since and state != "waiting":
            seconds = now - course.since[trial_id]
        rows.append(_cells(trial, tables, plan, state, seconds))
    ended = [tables.trials[t] for t in course.order if t in tables.trials][-ENDED_SHOWN:]
    return View(
        name=f"search {plan.folder.name}",
        metric=tables.metric,
        running=tuple(rows),
        ended=tuple(_cells(t, tables, plan, _ending(t), t["seconds"]) for t in ended),
        facts=tuple(_facts(tables, plan, now if running else None)),
        beside=beside,
    )


def _state(
    trial: Row, tables: Tables, plan: Plan, course: Course, clock: StageClock, brackets: Mapping[str, int]
) -> str:
    """What a trial of a running search does: it waits, begins, or comes to a rung at an epoch of its own."""
    trial_id, newest = trial["trial_id"], tables.newest(trial["trial_id"])
    if trial_id.startswith(PREFIX):
        return f"shared {trial_id.removeprefix(PREFIX)[:8]}"
    if trial_id not in course.since:
        return "waiting"
    if not newest:
        shared = any(prefix["state"] == "running" for prefix in tables.prefixes.values())
        return "waiting" if shared else "starting"
    if not plan.rungs or (plan.space.search.brackets > 1 and trial_id not in brackets):
        return "running"
    lengths, time_now = lengths_of(tables, plan, trial_id), newest["clock"] or 0.0
    ahead = [rung for rung in plan.rungs[brackets.get(trial_id, 0) :] if not reached(time_now, rung)]
    for epoch in range(newest["epoch"] + 1, sum(lengths)):
        if ahead and reached(clock.time(lengths, epoch), ahead[0]):
            return f"rung at {epoch}"
    return "no rung left"


def _ending(trial: Row) -> str:
    if trial["objective"] is not None:
        return f"{trial['state']} {trial['objective']:.4g}"
    return str(trial["state"])


def _cells(trial: Row, tables: Tables, plan: Plan, state: str, seconds: float) -> tuple[str, ...]:
    trial_id = trial["trial_id"]
    newest = tables.newest(trial_id)
    prefix = trial_id.startswith(PREFIX)
    epoch = str(trial["epochs"]) if prefix else f"{trial['epochs']}/{sum(lengths_of(tables, plan, trial_id))}"
    return (
        "prefix" if prefix else trial_id,
        _text(newest.get("stage")),
        epoch,
        _levels(newest.get("level_clusters")),
        _value(trial["metric"]),
        state,
        _short(seconds),
    )


def _facts(tables: Tables, plan: Plan, now: float | None) -> list[tuple[str, str]]:
    """The lines below the table; `now` is None where the search does not run."""
    counts = {state: tables.count(state) for state in ("finished", "stopped", "failed", "diverged")}
    ended, open_ = sum(counts.values()), tables.count("running")
    kinds = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    trials = f"{open_} running, " if now is not None else f"{open_} cut short, " if open_ else ""
    trials += f"{ended} of {plan.space.search.trials} ended{f': {kinds}' if kinds else ''}"
    used, trained, limit = elapsed(tables, now), tables.epochs_trained(), plan.space.search.max_epochs
    left, why = (now is not None and seconds_left(tables, plan, now)) or (0.0, None)
    to_come = left / used if left else 0.0  # relative to what is done: epochs and cost keep their pace
    epochs = f"{trained}{f' of {limit}' if limit else ''} trained"
    return [
        ("best", _best(tables)),
        ("trials", trials),
        ("epochs", epochs + (f", about {round(trained * to_come)} to come" if to_come else "")),
        ("time", _time(used, plan.space.search.max_hours, left, why, now)),
        ("cost", _cost(tables, plan.space.search.max_gpu_hours, to_come)),
    ]


def _best(tables: Tables) -> str:
    if best := tables.best():
        return f"trial {best['trial_id']} with {tables.chosen_by()} {best['objective']:.4g}"
    known = [trial for trial in tables.trials.values() if trial["metric"] is not None]
    if not known:
        return "-"
    pick = min if tables.metric in LOWER_IS_BETTER else max
    ahead = pick(known, key=lambda trial: trial["metric"])
    return (
        f"none has finished; ahead is trial {ahead['trial_id']} with {tables.metric} {ahead['metric']:.4g} "
        f"(epoch {ahead['epochs']})"
    )


def _time(used: float, limit: float | None, left: float, why: str | None, now: float | None) -> str:
    text = duration(used) + (f" of {limit:g} h" if limit else "")
    if now is None or not left:
        return text
    clock = "%H:%M" if left < 12 * 3600 else "%a %H:%M" if left < 6 * 86400 else "%d %b"
    end = time.strftime(clock, time.localtime(now + left))
    return f"{text}, about {duration(left)} {f'until {why}' if why else 'left'} ({end})"


def _cost(tables: Tables, limit: float | None, to_come: float) -> str:
    """Hours of GPUs, of CPUs where trials hold none: used, left of the budget, and to come."""
    gpus = limit is not None or any(session.get("gpus") for session in tables.sessions)
    used = tables.total("gpu_hours" if gpus else "cpu_hours")
    text = f"{_hours(used)} {'GPU-hours' if gpus else 'CPU-hours'}"
    if limit is not None:
        text = f"{_hours(used)} of {_hours(limit)} GPU-hours, {_hours(max(0.0, limit - used))} left"
    return text + (f", about {_hours(used * to_come)} to come" if to_come else "")


def _hours(hours: float) -> str:
    return f"{hours:.3g}" if hours < 1000 else f"{hours:.0f}"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _short(seconds: float) -> str:
    """Seconds in six characters."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _levels(counts: str | None) -> str:
    if counts is None or len(counts) <= MOST_LEVELS:
        return _text(counts)
    levels = counts.split("/")
    return f"{levels[0]}/…/{levels[-1]}"


def one_line(text: Text) -> Text:
    """The text cut at the console's width, so that the height of a picture is what was counted."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def is_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")


class Live:
    """One table that stays at the bottom of the terminal, and lines that scroll above it.

    To be used where :func:`is_terminal`. What other code prints meanwhile, to standard
    output or standard error, comes out above the table as well. After :meth:`stop`, and
    after an exception in a ``with`` block, the last table stays and the cursor is back.
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        # Without a thread of its own: it draws when it is told, so that nothing is read while it changes.
        self._live = rich.live.Live(console=self._console, auto_refresh=False)
        self._next = 0.0

    def start(self) -> None:
        """Begin; the cursor is hidden from here on."""
        self._live.start()

    def update(self, renderable: RenderableType) -> None:
        """Draw this in place of what stands there."""
        self._live.update(renderable, refresh=True)

    def update_if_due(self, make: Callable[[], RenderableType]) -> None:
        """Draw what `make` gives, if the newest such picture is long enough ago."""
        start = time.monotonic()
        if start >= self._next:
            self.update(make())
            # Twice a second; a picture of many trials takes 5 % of the time at most.
            self._next = time.monotonic() + max(EVERY, 20 * (time.monotonic() - start))

    def say(self, text: str) -> None:
        """Print a line above the table; it stays when the table moves on."""
        self._console.print(harmless(text), soft_wrap=True)

    def stop(self) -> None:
        """Leave the last table where it is and give the cursor back; safe to call twice."""
        self._live.stop()

    def __enter__(self) -> Live:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
