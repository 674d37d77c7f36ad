"""The log of a search: every event appended, nothing ever changed.

``results/<name>/journal.jsonl`` holds one JSON object a line, its kind under ``event`` and
the seconds since 1970 under ``time``:

    session  command, gpus, cpus       a process began to run the search; what a trial of it holds
    trial    trial, number, values, optuna              a trial was drawn
    retold   trial, optuna             Optuna had been told of its end, and it goes on under another number
    fork     trial, prefix             it goes on from a prefix, whose rows become its first rows
    row      trial, row                an epoch was reported
    rung     trial, bracket, rung, value                ASHA compared the trial there
    end      trial, state, reason      a trial ended; synced to disk before anything acts on it
    retry    trial, reason             its process broke off and it is tried again
    note     text                      something the reader of the results should know
    state    state, reason             the search finished, or was interrupted

All tables are made of it, and a search that was killed goes on from it: whatever Tune's
own snapshot says, which is up to ten seconds old, is not asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcl.errors import StorageError, UserError
from hpcl.files import writing
from hpcl.results import clean
from hpcl.search.events import problem_of

if TYPE_CHECKING:
    from hpcl.search.mirror import Mirror

JOURNAL_NAME = "journal.jsonl"

Event = dict[str, Any]


class Journal:
    """The file, open for appending by the one process that runs the search.

    Args:
        path: the file.
        mirror: sends it to a store, where results lie in one.

    Raises:
        UserError: another process runs this search, or the file cannot be written.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self._path, self._mirror = path, mirror
        with writing(path):
            # Without a buffer: what a full disk refuses is not tried again when the file is closed.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed in close()
        for attempt in range(5):  # `hpcl status` holds a lock for a moment
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt < 4:
                    time.sleep(0.05)
                    continue
                self._file.close()
                raise UserError(
                    f"{path.parent}: another process runs this search; wait for it, or give another --name"
                ) from None
        self._file.truncate(_whole_lines(self._file.read() if not self._file.seek(0) else b""))
        self._file.seek(0, os.SEEK_END)

    def append(self, event: str, *, sync: bool = False, **facts: Any) -> Event:
        """Add one event; with `sync` it is on disk when this returns. Gives the event as it will be read back.

        Raises:
            StorageError: the disk is full, or the file is not there any more; then nothing was added.
        """
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, default=_plain)
        self._look()
        with writing(self._path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                rest = line.encode() + b"\n"
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(size)
                raise
        if sync:
            self.sync()
        entry: Event = json.loads(line)
        return entry

    def sync(self) -> None:
        """All events are on disk when this returns, and in the store where there is one."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        if self._mirror is not None:
            self._mirror.sync()

    def _look(self) -> None:
        """See that the file is still where it was: a mount that is gone leaves an open file that nobody finds."""
        if self._mirror is not None:
            self._mirror.look()
        try:
            ours, there = os.fstat(self._file.fileno()), self._path.stat()
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return
            reason = "another file is there"
        except OSError as error:
            reason = error.strerror or str(error)
        raise StorageError(f"{self._path}: is gone ({reason}); was its disk unmounted? Bring the folder back")

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of what it is given, which nobody reads back: an open file cannot be in it."""
        return {"_path": self._path}

    def close(self) -> None:
        """Close the file and let others have it; safe to call twice."""
        self._file.close()


def read_events(path: Path) -> list[Event]:
    """All events so far, also while a search writes them; a line that a crash cut off is left out.

    Raises:
        UserError: there is no such file, or it is not a journal; names the line and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a search (results/<name>)")
    return list(_events(path))


def _events(path: Path) -> Iterator[Event]:
    content, begun = path.read_bytes(), set[str]()
    for number, line in enumerate(content[: _whole_lines(content)].splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or too deep
            entry = None
        if why := problem_of(entry, begun):
            raise UserError(
                f"{path}:{number}: not an event of a search ({why}); the file is damaged from here on: "
                "put a copy back, or leave this folder aside (--fresh, or another --name)"
            )
        yield entry


def is_locked(path: Path) -> bool:
    """Whether a process holds this journal open, which is: runs the search."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _whole_lines(content: bytes) -> int:
    """Bytes up to and with the last line break."""
    return content.rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    """numpy scalars as plain numbers."""
    plain = clean(value)
    if plain is value:
        raise TypeError(f"{type(value).__name__} cannot stand in the journal")
    return plain
