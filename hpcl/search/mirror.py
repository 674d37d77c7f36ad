"""The driver's files on their way to the store, and the sign there that it is alive.

The journal and Optuna's study are sent before Tune acts on an end and before a job is handed
out; rows follow within a second or two, and the tables with them. Whatever is lost with the
driver's machine is then found again: the rows of the last moment stand in the trials' own
tables (:mod:`hpcl.search.trial`), as far as their checkpoints go.

The study is sent before the journal, so that the store's study knows at least the trials
that its journal does.

A file in ``running/`` says who runs the search, and is written anew every few seconds. Each
process writes its own and then looks for others, so that of two at most one goes on; a file
that is old counts as left by a process that is gone. By the store's clock, not by ours.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcl.errors import StorageError, UserError
from hpcl.files import write_text
from hpcl.search.journal import JOURNAL_NAME, is_locked
from hpcl.search.places import is_remote, location
from hpcl.search.storage import APPENDED, PART, changed, drop, exists, fetch, push, push_part, remove, remove_parts

STUDY_NAME = APPENDED[1]
RUNNING = "running"
"""Folder of the files that say who runs a search."""
LEASE = 30.0
"""Seconds after which such a file counts as old."""
_BEAT = 5.0
"""Seconds between two signs of life."""
_EVERY = 1.0
"""Seconds between two looks for new rows."""
_FILES_EVERY = 10.0
"""Seconds between two looks for changed tables."""


class Lease:
    """Says in the store that this process runs the search in a folder.

    Raises:
        UserError: another process does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / RUNNING / f"{platform.node()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.newest = 0.0
        """When it last gave a sign of life, by :func:`_now`."""
        self._write()
        others = holders(folder, now=changed(self._file), without=self._file)
        if others:
            self.give_back()
            raise UserError(
                f"{location(folder)}: another process runs this search ({', '.join(others)}); wait for its end, or "
                f"give another --name; where it was killed, its sign there is old after {LEASE:g} seconds"
            )
        for left in (folder / RUNNING).iterdir():
            if left != self._file:
                remove(left)

    def beat(self) -> None:
        """Give a sign of life.

        Raises:
            StorageError: the file is gone, so another process took this one for dead.
        """
        if not exists(self._file):
            raise StorageError(
                f"{location(self._folder)}: another process has taken over this search, as this one gave no sign for "
                "too long; look there with hpcl status"
            )
        self._write()

    def give_back(self) -> None:
        """Let others have the folder."""
        remove(self._file)

    def _write(self) -> None:
        said = {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "time": time.time()}
        write_text(self._file, json.dumps(said) + "\n")
        push(self._file.parent, {self._file.name})
        self.newest = _now()


def holders(folder: Path, *, now: float | None = None, without: Path | None = None) -> list[str]:
    """The processes that run the search in a folder of a store, such as ``process 71 on node3``.

    Args:
        folder: of the search.
        now: seconds since 1970 by the store's clock; None: by ours.
        without: the file of this process.
    """
    drop(folder / RUNNING)  # some may be gone
    fetch(folder / RUNNING)
    found = []
    for file in sorted((folder / RUNNING).glob("*")):
        said: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            said = dict(json.loads(file.read_text(encoding="utf-8")))
        written = changed(file) or float(said.get("time", 0))
        if file != without and (now or time.time()) - written < LEASE and not _has_died(said):
            found.append(f"process {said.get('pid', '?')} on {said.get('host', '?')}")
    return found


def is_running(folder: Path) -> bool:
    """Whether a process runs the search in a folder."""
    return bool(holders(folder)) if is_remote(folder) else is_locked(folder / JOURNAL_NAME)


def _has_died(said: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    if said.get("machine") != _machine() or not isinstance(said.get("pid"), int):
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """This boot of this machine, and the space of process numbers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{platform.node()} {os.getppid()}"


class Mirror:
    """Sends a search's files to the store; where the folder is no copy of one, nothing happens.

    Args:
        folder: of the search, in the scratch folder; what the store has is brought.
        new: there must be no search yet.

    Raises:
        UserError: another process runs this search, or has begun one here meanwhile.
    """

    def __init__(self, folder: Path, *, new: bool) -> None:
        self._folder = folder
        self._broken: StorageError | None = None
        self._thread: threading.Thread | None = None
        if not is_remote(folder):
            return
        self._lease = Lease(folder)
        if new and exists(folder / JOURNAL_NAME):
            self._lease.give_back()
            raise UserError(f"{location(folder)}: another process has begun a search there; give the command again")
        fetch(folder)
        self._there = {name: _whole_lines(folder / name) // PART * PART for name in APPENDED}
        """Bytes that the store surely has of what is appended to."""
        self._newest = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def sync(self, *, all_files: bool = False) -> None:
        """Send what was appended to, or all files; they are in the store when this returns.

        Raises:
            StorageError: the store did not answer for too long, now or before.
        """
        if self._thread is not None:
            with self._lock:
                self.look()
                self._send(all_files)

    def look(self) -> None:
        """Raise what broke the connection, if something did."""
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """Let others have the folder; safe to call twice."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self._broken is None:
            with suppress(StorageError):  # all was sent before; the sign of life is old soon
                self._lease.give_back()

    def _follow(self) -> None:
        while not self._stop.wait(_EVERY):
            with self._lock, suppress(StorageError):  # which stands in `_broken`
                if self._broken is None:
                    self._send(time.monotonic() - self._newest > _FILES_EVERY)

    def _send(self, all_files: bool) -> None:
        try:
            if _now() - self._lease.newest > _BEAT:
                self._lease.beat()
            sizes = {name: _size(self._folder / name) for name in APPENDED}  # the journal's first, which goes last
            for name in (STUDY_NAME, JOURNAL_NAME, *(APPENDED if all_files else ())):
                self._send_parts(name, sizes[name])
            if all_files:
                push(self._folder)
                self._newest = time.monotonic()
        except StorageError as error:
            self._broken = error
            raise
        except Exception as error:  # in a thread nobody would hear of it
            self._broken = StorageError(f"{location(self._folder)}: cannot be kept up to date ({error})")
            raise self._broken from error

    def _send_parts(self, name: str, size: int) -> None:
        there = self._there[name]
        if size > there:
            for number in range(there // PART, (size - 1) // PART + 1):
                push_part(self._folder / name, number, size)
            self._there[name] = size


def _now() -> float:
    """Seconds of a clock that also goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _whole_lines(path: Path) -> int:
    """Cut off a last line without its end, here and in the store; the bytes that are left."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        remove_parts(path, above=max(0, whole - 1) // PART)
    return whole
