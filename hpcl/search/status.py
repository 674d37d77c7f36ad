"""``hpcl status results/<name>``: how a search stands, read from its folder by another process.

Only ``journal.jsonl``, ``space.yaml`` and ``search.json`` are read, without Ray and without
torch, so it answers at once and disturbs nothing. Whether a search runs there is told by
the lock on its journal, which its process holds and the system takes away when it dies; in a
store by the sign of life that its process renews there (:mod:`hpcl.search.mirror`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.text import Text

from hpcl.errors import UserError, harmless
from hpcl.files import read_object
from hpcl.search.elastic import machines
from hpcl.search.forecast import elapsed
from hpcl.search.journal import JOURNAL_NAME, Event, read_events
from hpcl.search.live import Course, Live, is_terminal, one_line, view
from hpcl.search.mirror import is_running
from hpcl.search.places import location, place, shown
from hpcl.search.plan import Plan, duration, make_plan
from hpcl.search.space import load
from hpcl.search.storage import fetch
from hpcl.search.tables import Tables

WATCH_EVERY = 2.0
"""Seconds between two looks with `--watch`."""

State = Literal["running", "finished", "interrupted", "failed", "killed"]
"""What a search does: it runs, or it ended in one of these ways; killed is one that ended without a word."""


@dataclass(frozen=True)
class Status:
    """A search as its folder shows it."""

    folder: Path
    plan: Plan
    tables: Tables
    course: Course
    state: State
    reason: str
    """Why it ended, in words; empty for one that runs."""
    last: float
    """When it last wrote an event, in seconds since 1970."""


def read(folder: Path) -> Status:
    """What a search's folder says of it now.

    Args:
        folder: ``results/<name>``; for a URI its place (:func:`hpcl.search.places.place`).

    Raises:
        UserError: there is no such folder, or no search of this version was run in it.
    """
    fetch(folder)
    if not folder.is_dir():
        raise UserError(f"{location(folder)}: there is no such folder; give that of a search, results/<name>")
    journal = folder / JOURNAL_NAME
    if not journal.is_file():
        old = (folder / "trials.parquet").is_file() or (folder / "search.json").is_file()
        raise UserError(
            f"{location(folder)}: there is no {JOURNAL_NAME}, so an older version made these results; read its "
            "trials.parquet"
            if old
            else f"{location(folder)}: there is no {JOURNAL_NAME}, so no search was run here; give results/<name>"
        )
    # First the lock: a search that ends in between has then written all its events.
    running = is_running(folder)
    fetch(folder)
    events = read_events(journal)
    if not any(event["event"] == "session" for event in events):
        raise UserError(f"{location(journal)}: no search has begun here yet; look again in a moment, or start it anew")
    plan = _plan(folder)
    tables, course = Tables(folder, plan.space), Course()
    tables.replay(events)
    for event in events:
        course.take(event)
    state, reason = _state(events, running)
    return Status(folder, plan, tables, course, state, reason, events[-1]["time"])


def picture(status: Status, *, now: float | None = None, fits: bool = False) -> Group:
    """A search's state in words, its table, and what to do next.

    Args:
        status: the search.
        now: seconds since 1970; None: the time it is.
        fits: leave out trials that are too many for the height of the console.
    """
    now = time.time() if now is None else now
    tables, running = status.tables, status.state == "running"
    ran = duration(elapsed(tables, now if running else None))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(tables.sessions[0]["time"]))
    ago = f"{duration(max(0.0, now - status.last))} ago"
    sessions = f", in {len(tables.sessions)} sessions" if len(tables.sessions) > 1 else ""
    lines = [f"{shown(status.folder)}: begun {when}{sessions}"]
    if running:
        lines.append(f"running for {ran}, last event {ago}")
    else:
        why = "" if status.reason == status.state else f": {status.reason}"
        lines.append(f"{status.state} {ago} after {ran}{why}")
    after = [f"note     {note}" for note in tables.notes]
    ended = [tables.trials[trial] for trial in status.course.order if trial in tables.trials]
    if failed := [trial for trial in ended if trial["state"] == "failed"]:
        after.append(f"failed   trial {failed[-1]['trial_id']}: {failed[-1]['stop_reason']}")
    if status.state not in ("running", "finished"):
        after.append(f"resume   {tables.sessions[-1].get('command', 'with the command that began it')}")
    beside = len(lines) + len(after) if fits else None
    table = view(tables, status.plan, status.course, now=now, running=running, beside=beside)
    plain = [Text(harmless(line)) for line in (*lines, *after)]
    texts = [one_line(line) if fits else line for line in plain]
    return Group(*texts[: len(lines)], table, *texts[len(lines) :])


def main(where: str | Path, *, watch: bool = False) -> None:
    """Print how the search in a folder or at a URI stands; with `watch` every two seconds anew, until Ctrl-C.

    Raises:
        UserError: as :func:`read`; or `watch` without a terminal.
    """
    folder = place(where)
    if not watch:
        Console(highlight=False, markup=False, emoji=False).print(picture(read(folder)), soft_wrap=True)
        return
    if not is_terminal():
        raise UserError("--watch: standard output is no terminal; leave it out, and call hpcl status again")
    try:
        first = read(folder)
        with Live() as live:
            live.update(picture(first, fits=True))
            while True:
                time.sleep(WATCH_EVERY)
                live.update(picture(read(folder), fits=True))
    except KeyboardInterrupt:
        return


def _plan(folder: Path) -> Plan:
    """The plan of the search, of its space and the machines that it found."""
    path = folder / "search.json"
    try:
        found = read_object(path)["hardware"]["nodes"]
        if any(isinstance(n, bool) or not 0 <= n < 1e18 for each in found for n in each.values()):
            raise ValueError("what machines have must be numbers >= 0")
        nodes = machines([{"Resources": each} for each in found])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{location(path)}: cannot be read ({reason}); a search writes it at its start") from None
    return make_plan(load(folder / "space.yaml"), nodes, cluster="its cluster", folder=folder.resolve())


def _state(events: list[Event], running: bool) -> tuple[State, str]:
    """Whether the search runs, else how its newest session ended, and why."""
    if running:
        return "running", ""
    for event in reversed(events):
        if event["event"] == "state":
            return event["state"], event["reason"]
        if event["event"] == "session":
            break
    return "killed", "its process ended without a word"
