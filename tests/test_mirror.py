"""The driver's files on their way to a store, in parts; and that of two drivers one runs a search."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stores import again, fill, sign_of

from hpcl.errors import StorageError, UserError
from hpcl.search import mirror, storage
from hpcl.search.journal import JOURNAL_NAME, Journal, read_events
from hpcl.search.mirror import Lease, Mirror, is_running

# ---------------------------------------------------------------- the driver's files


def test_what_is_appended_is_sent_in_parts_and_put_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART", 1000)
    monkeypatch.setattr(mirror, "PART", 1000)
    folder = root / "mine"
    search = Mirror(folder, new=True)
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / JOURNAL_NAME, search)
    for number in range(100):
        journal.append("note", sync=number % 7 == 0, text=f"{number}")
    search.sync(all_files=True)
    journal.close(), search.close()
    whole = (folder / JOURNAL_NAME).read_bytes()
    assert len(whole) > 4000
    assert (again(folder) / JOURNAL_NAME).read_bytes() == whole

    # A process was killed in the middle of a line, which reached into a part of its own.
    torn = whole[:2990] + whole[2990:3010].replace(b"\n", b"")
    (folder / JOURNAL_NAME).write_bytes(torn)
    storage.push_part(folder / JOURNAL_NAME, 2, len(torn)), storage.push_part(folder / JOURNAL_NAME, 3, len(torn))
    storage.remove_parts(folder / JOURNAL_NAME, above=3)
    storage.drop(folder)
    search = Mirror(folder, new=False)
    lines = torn[: torn.rfind(b"\n") + 1]
    assert (folder / JOURNAL_NAME).read_bytes() == lines and len(lines) < 3000
    journal = Journal(folder / JOURNAL_NAME, search)
    journal.append("note", sync=True, text="goes on")
    journal.close(), search.close()
    events = read_events(again(folder) / JOURNAL_NAME)
    assert [event["text"] for event in events] == [str(n) for n in range(len(events) - 1)] + ["goes on"]


def test_the_study_in_the_store_knows_what_the_journal_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(root / "mine")
    search = Mirror(folder, new=True)
    sent: list[str] = []
    monkeypatch.setattr(mirror, "push_part", lambda path, number, size: sent.append(f"{path.name} {size}"))
    fill(folder, **{"journal__jsonl": "one\n", "optuna__journal": "study\n"})
    search.sync()
    assert sent == ["optuna.journal 6", "journal.jsonl 4"]
    search.close()


def test_rows_and_tables_follow_by_themselves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_EVERY", 0.05)
    monkeypatch.setattr(mirror, "_FILES_EVERY", 0.05)
    folder = root / "mine"
    search = Mirror(folder, new=True)
    fill(folder, trials__parquet="t")
    journal = Journal(folder / JOURNAL_NAME, search)
    journal.append("note", text="not synced")
    looked = threading.Event()
    for _ in range(200):
        if storage.exists(folder / JOURNAL_NAME) and storage.exists(folder / "trials.parquet"):
            break
        looked.wait(0.05)
    assert storage.exists(folder / JOURNAL_NAME) and storage.exists(folder / "trials.parquet")
    journal.close(), search.close()


# ---------------------------------------------------------------- one driver at a time


def test_of_two_processes_one_runs_a_search(root: Path) -> None:
    folder = root / "mine"
    assert not is_running(folder)
    search = Mirror(folder, new=True)
    assert is_running(folder)
    with pytest.raises(UserError, match=rf"another process runs this search \(process {os.getpid()} on "):
        Mirror(folder, new=False)
    search.sync()  # and is not disturbed by the attempt
    search.close()
    assert not is_running(folder)
    Mirror(folder, new=False).close()


def test_a_sign_of_life_that_is_old_or_of_a_dead_process_counts_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "mine"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = sign_of(folder, machine=mirror._machine(), pid=dead.pid)
    Lease(folder).give_back()
    assert not storage.exists(file)
    file = sign_of(folder)
    with pytest.raises(UserError, match="process 71 on other"):
        Lease(folder)
    monkeypatch.setattr(mirror, "LEASE", -5.0)
    Lease(folder).give_back()
    assert not storage.exists(file)


def test_a_process_that_was_taken_for_dead_writes_nothing_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "mine"
    search = Mirror(folder, new=True)
    journal = Journal(folder / JOURNAL_NAME, search)
    journal.append("note", sync=True, text="mine")
    monkeypatch.setattr(mirror, "LEASE", -5.0)
    monkeypatch.setattr(mirror, "_machine", lambda: "another")
    other = Lease(folder)
    monkeypatch.setattr(mirror, "_BEAT", -1.0)
    with pytest.raises(StorageError, match="another process has taken over this search"):
        journal.append("note", sync=True, text="too late")
    with pytest.raises(StorageError):  # and for good
        journal.append("note", text="too late")
    journal.close(), search.close(), other.give_back()
    assert [event["text"] for event in read_events(again(folder) / JOURNAL_NAME)] == ["mine"]


def test_a_search_that_was_begun_meanwhile_is_not_written_over(root: Path) -> None:
    folder = fill(root / "mine")
    (folder / JOURNAL_NAME).write_text("{}\n")
    storage.push_part(folder / JOURNAL_NAME, 0, 3)
    with pytest.raises(UserError, match="another process has begun a search there"):
        Mirror(folder, new=True)
    assert not is_running(folder)
