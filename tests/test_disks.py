"""Disks that are full, mounts that are gone, checkpoints that cannot be read: none of it is a trial's fault."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import state
from stores import again, fill
from test_folder import space_of

from hpcl.checkpoint import save_checkpoint
from hpcl.config import Config
from hpcl.dist import current_world
from hpcl.errors import StorageError, UnreadableCheckpoint
from hpcl.resume import find_start
from hpcl.search import storage, trial
from hpcl.search.journal import JOURNAL_NAME, Journal, read_events
from hpcl.search.sampler import Sampler
from hpcl.search.work import begin, set_aside


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk can be mounted by root only ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_an_event_that_finds_the_disk_full_leaves_none_of_it(small_disk: Path) -> None:
    journal = Journal(small_disk / JOURNAL_NAME)
    journal.append("note", text="first")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(StorageError, match=r"journal\.jsonl: cannot be written .*No space left.*; free space there"):
        for _ in range(100):
            journal.append("note", sync=True, text="x" * 1000)
    known = len(read_events(small_disk / JOURNAL_NAME))
    assert (small_disk / JOURNAL_NAME).read_bytes().endswith(b"\n")
    filler.unlink()
    journal.append("note", text="goes on")
    journal.close()
    texts = [event["text"] for event in read_events(small_disk / JOURNAL_NAME)]
    assert texts == ["first", *["x" * 1000] * (known - 1), "goes on"]


def test_a_journal_whose_folder_is_gone_is_not_written_on(tmp_path: Path) -> None:
    folder = fill(tmp_path / "results" / "mine")
    journal = Journal(folder / JOURNAL_NAME)
    journal.append("note", text="first")
    folder.parent.rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=r"is gone \(No such file or directory\)"):
        journal.append("note", text="lost")
    fill(folder, **{"journal__jsonl": ""})
    with pytest.raises(StorageError, match="another file is there"):
        journal.append("note", text="lost")
    shutil.rmtree(folder.parent)
    (tmp_path / "unmounted").rename(folder.parent)
    journal.append("note", text="found")
    journal.close()
    assert [event["text"] for event in read_events(folder / JOURNAL_NAME)] == ["first", "found"]


def test_a_study_whose_folder_is_gone_says_so_too(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine")
    sampler = Sampler(space_of(), startup=2, journal=folder / "optuna.journal")
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match=r"optuna\.journal: cannot be written .*; was its disk unmounted\?"):
        sampler.ask(0)


def test_of_a_line_for_which_optuna_had_no_room_nothing_stays(small_disk: Path) -> None:
    sampler = Sampler(space_of(), startup=2, journal=small_disk / "optuna.journal")
    filler = small_disk / "filler"
    left = 4096 - (small_disk / "optuna.journal").stat().st_size % 4096  # of the file's last page
    sampler.study.set_user_attr("pad", "x" * (left - 150))
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(StorageError, match=r"optuna\.journal: cannot be written .*No space left"):
        for _ in range(100):
            sampler.ask(0)
    assert (small_disk / "optuna.journal").read_bytes().endswith(b"\n")
    filler.unlink()
    number = sampler.ask(1)[1]
    sampler.tell(number, "finished", 0.5)
    again = Sampler(space_of(), startup=2, journal=small_disk / "optuna.journal")
    assert again.study.trials[number].value == 0.5


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ENOENT])
def test_a_mount_that_has_gone_is_no_failure_of_a_trial(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Config
) -> None:
    given = {"home": str(tmp_path), "folder": str(tmp_path / "trials" / "0001"), "fork": None, "epochs": 0}
    (tmp_path / "journal.jsonl").touch()
    begin(given)
    world = current_world("cpu")

    def gone(path: Path, **options: Any) -> Any:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "stat", gone)
    with pytest.raises(StorageError, match="is not there, seen from"):
        begin(given)
    if error != errno.ENOENT:  # else there is just no checkpoint yet
        with pytest.raises(StorageError, match="cannot be written"):
            find_start(Path(given["folder"]), None, {}, tiny, world)


def test_the_trouble_is_found_inside_what_ray_raises() -> None:
    try:
        try:
            raise StorageError("results: cannot be written")
        except StorageError:
            raise RuntimeError("Traceback ...")  # noqa: B904 - as Tune does
    except RuntimeError as error:
        assert storage.storage_trouble(error) == "results: cannot be written"
    inside = RuntimeError("Traceback\n  File x\nOSError: [Errno 28] No space left on device: '/tmp/ray/x'\n")
    assert "No space left on device: '/tmp/ray/x'; free space there" in str(storage.storage_trouble(inside))
    assert storage.storage_trouble(ValueError("a bug")) is None


def test_a_disk_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Config
) -> None:
    """The checkpoint stays where it is, and the search ends to be gone on with."""
    save_checkpoint(tmp_path / "checkpoint.pt", state(1))

    def fails(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("zipfile.ZipFile.testzip", fails)
    with pytest.raises(StorageError, match=r"checkpoint\.pt: cannot be read \(.*Input/output error"):
        find_start(tmp_path, None, {}, tiny, current_world("cpu"))


def test_where_no_checkpoint_can_be_read_the_trial_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search loses the epochs, not the trial; `hpcl train` asks its user."""
    given = {"home": str(tmp_path), "folder": str(tmp_path / "trials" / "0001"), "fork": None, "epochs": 3}
    given |= {"values": {}, "until": None}
    (tmp_path / "journal.jsonl").touch()
    folder = fill(Path(given["folder"]), checkpoint__pt="torn")
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.tune, "report", told.append)
    search = SimpleNamespace(objective=None)
    job: Any = SimpleNamespace(space=SimpleNamespace(search=search, params={}), backbone=None, workers=1, gpus=0)
    monkeypatch.setattr(trial, "make_config", lambda values, job: Config())

    def unreadable(*arguments: Any) -> None:
        raise UnreadableCheckpoint(f"{folder / 'checkpoint.pt'} cannot be read (it is torn)")

    monkeypatch.setattr(trial, "_train_here", unreadable)
    with pytest.raises(UnreadableCheckpoint):  # so that Tune tries again
        trial.run_trial(given, job)
    left = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".hparams"))
    assert left == ["checkpoint-damaged.pt", "error.txt"]
    trial.run_trial(given, job)  # it was the prefix's that cannot be read: no use to try again
    assert told[-1] == {"state": "failed"}


def test_checkpoints_in_a_store_are_set_aside_too(uri: str, root: Path) -> None:
    """The process that found them damaged has dropped its copies already."""
    folder = fill(root / "mine" / "trials" / "0001", checkpoint__pt="torn")
    (folder / "checkpoint-previous.pt").write_text("torn as well")
    (folder / "log.txt").write_text("stays")
    storage.push(folder)
    storage.drop(folder)
    assert set_aside(folder)
    assert not set_aside(folder)
    left = {path.name: path.read_text() for path in again(folder).iterdir()}
    assert left == {
        "checkpoint-damaged.pt": "torn",
        "checkpoint-previous-damaged.pt": "torn as well",
        "log.txt": "stays",
    }
