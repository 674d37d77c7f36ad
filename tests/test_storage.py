"""Results at a URI and on disks that fail: places, what is brought and sent, parts, leases, prefixes, full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stores import Server, again, at, fill, sign_of
from test_folder import leave, space_of

from hpcl.errors import StorageError, UserError
from hpcl.results import epoch_schema, write_table
from hpcl.search import cli, storage
from hpcl.search.folder import choose_folder
from hpcl.search.journal import JOURNAL_NAME, Journal
from hpcl.search.places import is_remote, location, place, shown, told
from hpcl.search.status import read
from hpcl.search.store import PrefixStore
from hpcl.search.work import bring, keep, unreported
from hpcl.yamlio import write

# ---------------------------------------------------------------- names


def test_paths_stay_what_they_are(tmp_path: Path) -> None:
    for path in ("results/mine", str(tmp_path), "a:b/c"):
        assert place(path) == Path(path) and location(Path(path)) == path and not is_remote(place(path))
    assert place("file:///mnt/my%20disk/x") == Path("/mnt/my disk/x")
    storage.check(tmp_path / "not yet")
    storage.fetch(tmp_path), storage.push(tmp_path), storage.drop(tmp_path)
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/results",
        "s3://bucket/a/b?endpoint_override=localhost:5000&scheme=http",
        "abfs://box@account.dfs.core.windows.net/results",
        "memory://a/b",
    ],
)
def test_a_uri_has_a_place_and_a_place_its_uri(uri: str) -> None:
    folder = place(uri)
    assert folder == place(uri) and is_remote(folder) and location(folder) == shown(folder) == uri
    assert location(folder / "mine" / "trials") == at(uri, "mine", "trials")
    assert folder.is_relative_to(Path(os.environ["HPCL_CACHE"]).resolve())
    assert told(f"{folder / 'mine'}: is gone, see {folder}/x") == f"{at(uri, 'mine')}: is gone, see {at(uri, 'x')}"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nope://bucket/x", "nope://bucket: cannot be used (Protocol not known: nope); give a path, or a URI of s3"),
        ("az://bucket/x", "az://bucket: cannot be used (Install adlfs"),
        ("memory://bucket/x", "lies in one process"),
        ("s3:///x", "give one such as s3://bucket/results"),
        ("s3://bucket/../x", "give one such as s3://bucket/results"),
        ("s3://me:secret@bucket/x", "holds a password"),
        ("s3://bucket/x?nope=1", "mend the URI"),
        ("s3:/bucket/x", "a URI has two slashes"),
    ],
)
def test_a_uri_that_cannot_be_used_is_told_before_anything_starts(
    uri: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.yaml", space_of().to_tree())
    assert cli.main(["--space", "s.yaml", "--results", uri]) == 2
    said = capsys.readouterr()
    assert says in said.err and "secret" not in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_a_missing_bucket_is_told_and_a_dry_run_shows_the_uri(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s.yaml", space_of().to_tree())
    assert cli.main(["--space", str(tmp_path / "s.yaml"), "--results", uri, "--dry-run"]) == 0
    assert f"results    {at(uri, 'mine')}\n" in capsys.readouterr().out
    assert cli.main(["--space", str(tmp_path / "s.yaml"), "--results", uri.replace("bucket-", "other-")]) == 2
    assert "NO_SUCH_BUCKET" in (said := capsys.readouterr().err) and "Traceback" not in said


def test_the_scratch_folder_goes_with_its_process(tmp_path: Path) -> None:
    code = "import sys, os, signal; from hpcl.search.places import place; place('s3://b/x').mkdir(parents=True); {}"
    env = {**os.environ, "HPCL_CACHE": str(tmp_path)}
    for end, left in (("os.kill(os.getpid(), 9)", 1), ("pass", 0)):  # the second removes what the first left
        subprocess.run([sys.executable, "-c", code.format(end)], env=env, timeout=60)
        assert len([path for path in (tmp_path / "remote").iterdir() if path.is_dir()]) == left


# ---------------------------------------------------------------- files


def test_what_is_new_or_changed_is_sent_checkpoints_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    upload = storage._upload
    monkeypatch.setattr(storage, "_upload", lambda local, to: (sent.append(to.name), upload(local, to))[1])
    folder = fill(root / "t", checkpoint__pt="1", epochs__parquet="1", log__txt="1", __hidden="x", a__lock="x")
    (folder / "sub").mkdir()
    (folder / "sub" / "events").write_text("e")
    storage.push(folder, deep=True)
    assert sent == ["epochs.parquet", "log.txt", "events", "checkpoint.pt"]
    storage.push(folder, deep=True)
    assert len(sent) == 4
    os.link(folder / "checkpoint.pt", folder / "checkpoint-previous.pt")  # as a run keeps the one before
    (folder / "new").write_text("2")
    os.replace(folder / "new", folder / "checkpoint.pt")
    (folder / "log.txt").unlink()
    storage.push(folder, deep=True)
    assert sent[4:] == ["checkpoint.pt"]  # the one before was copied within the store
    again(folder, deep=True)
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"checkpoint.pt": "2", "checkpoint-previous.pt": "1", "epochs.parquet": "1", "sub/events": "e"}
    storage.push(folder, deep=True)
    assert len(sent) == 5  # what was brought is known
    storage.remove(folder)
    assert not again(folder, deep=True).exists()


def test_what_has_changed_is_brought_again(root: Path) -> None:
    folder = fill(root / "t", a="1", b="1")
    storage.push(folder)
    inode = (folder / "a").stat().st_ino
    storage.fetch(folder)
    other = fill(folder.with_name("other"), b="22")
    storage.push(other)
    storage.copy(other / "b", folder / "b")  # as another process writes it
    storage.fetch(folder)
    assert (folder / "b").read_text() == "22" and storage.exists(folder / "b") and not storage.exists(folder / "c")
    storage.fetch(folder)
    assert (folder / "a").stat().st_ino != inode  # brought once, as it was only sent before
    inode = (folder / "a").stat().st_ino
    storage.fetch(folder)
    assert (folder / "a").stat().st_ino == inode


def test_packages_of_fsspec_serve_too() -> None:
    folder = fill(place("memory://box/results/t"), a="1", checkpoint__pt="2")
    storage.push(folder)
    storage.copy(folder / "a", folder / "b")
    assert sorted(path.name for path in again(folder).iterdir()) == ["a", "b", "checkpoint.pt"]
    storage.remove(folder / "a")
    assert not storage.exists(folder / "a") and storage.exists(folder / "b")


def test_a_store_that_does_not_answer_is_told(server: Server, root: Path) -> None:
    folder = fill(root / "t", a="1")
    server.stop()
    try:
        with pytest.raises(StorageError, match=r"^s3://bucket-\d+\?\S+: cannot be used from .*; see that it is there"):
            storage.fetch(folder)
    finally:
        server.start()
    storage.push(folder)
    assert (again(folder) / "a").read_text() == "1"


# ---------------------------------------------------------------- folders, prefixes, trials


def publish(folder: Path) -> None:
    """Send a folder as a driver leaves it."""
    storage.push(folder)
    storage.push_part(folder / JOURNAL_NAME, 0, (folder / JOURNAL_NAME).stat().st_size)
    storage.drop(folder)


def test_a_search_at_a_uri_is_found_again_or_left_alone(uri: str, root: Path) -> None:
    space = space_of()
    assert choose_folder(space, None, uri).folder == root / "mine"
    publish(leave(root / "mine", space, "interrupted"))
    publish(leave(root / "mine-other", space, "interrupted"))
    choice = choose_folder(space, None, uri)
    assert (choice.folder, choice.resume) == (root / "mine", True)
    assert not (root / "mine-other").exists()  # no number: another search, which is none of its business
    assert choose_folder(space, None, uri, fresh=True).folder == root / "mine-2"
    publish(leave(root / "mine-4", space, "interrupted"))
    storage.remove(root / "mine")
    assert choose_folder(space, None, uri).folder == root / "mine-4"
    storage.remove(root / "mine-4")
    publish(leave(root / "mine", space, "interrupted"))
    with pytest.raises(UserError, match=f"^{uri.partition('?')[0]}/mine.*holds an unfinished search of another space"):
        choose_folder(space_of("clusters.first: {int: [2, 16]}"), None, uri)
    sign_of(root / "mine")
    with pytest.raises(UserError, match="a search is running there"):
        choose_folder(space, None, uri)


def test_only_a_sign_of_life_is_no_search(uri: str, root: Path) -> None:
    sign_of(root / "mine", time=0.0)
    storage.drop(root)
    assert choose_folder(space_of(), None, uri).resume is False


def test_the_status_of_a_search_at_a_uri(uri: str, root: Path) -> None:
    with pytest.raises(UserError, match=f"^{uri.partition('?')[0]}/mine.*: there is no such folder"):
        read(root / "mine")
    folder = leave(root / "mine", space_of(), "")
    (folder / JOURNAL_NAME).unlink()
    journal = Journal(folder / JOURNAL_NAME)
    journal.append("session", command="run", gpus=0, cpus=1)
    journal.close()
    (folder / "search.json").write_text(json.dumps({"hardware": {"nodes": [{"CPU": 2}]}}))
    publish(folder)
    assert read(root / "mine").state == "killed"
    sign_of(folder)
    assert read(root / "mine").state == "running"


def rows_to(epoch: int) -> list[dict[str, Any]]:
    return [{"epoch": e, "stage": 1, "state": "running", "shared": False} for e in range(1, epoch + 1)]


def test_a_prefix_at_a_uri_is_complete_with_its_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcl.search.store.ASK_EVERY", 0.0)
    store = PrefixStore(root / "prefixes", "mine")
    assert store.rows("k", 2) is None
    fill(store.work("k"), checkpoint__pt="whole")
    storage.push(store.work("k"))
    storage.drop(store.work("k"))  # a trial on another machine trained it
    store.work("k").mkdir(parents=True)
    store.publish("k", rows_to(2))
    storage.drop(root)
    other = PrefixStore(root / "prefixes", "other")
    assert [row["epoch"] for row in other.rows("k", 2) or []] == [1, 2] and other.rows("k", 3) is None
    storage.fetch(root / "prefixes" / "k")
    assert store.checkpoint("k").read_text() == "whole"
    assert not storage.exists(store.work("k") / "checkpoint.pt")
    storage.remove(root / "prefixes" / "k" / "prefix.parquet")
    assert other.rows("k", 2) is None


@pytest.mark.parametrize("remote", [False, True])
def test_a_trial_finds_what_another_process_of_it_left(uri: str, tmp_path: Path, remote: bool) -> None:
    where = uri if remote else str(tmp_path)
    home, folder, prefix = (place(at(where, *names)) for names in (("mine",), ("mine", "trials", "0"), ("p",)))
    given = {
        "folder": location(folder),
        "fork": location(prefix / "checkpoint.pt"),
        "home": location(home),
        "epochs": 1,
    }
    with pytest.raises(StorageError, match="is not there, seen from"):
        bring(given)
    fill(home, **{"journal__jsonl": "{}\n"})
    fill(prefix, checkpoint__pt="prefix")
    if remote:
        storage.push_part(home / JOURNAL_NAME, 0, 3), storage.push(prefix), storage.drop(prefix)
    first, fork = bring(given, "one")
    assert first == folder and fork is not None and fork.read_text() == "prefix"
    assert [path.name for path in folder.iterdir()] == (["attempt"] if remote else [])
    fill(folder, checkpoint__pt="4")
    write_table(folder / "epochs.parquet", rows_to(5), epoch_schema())
    keep(given, "one")
    storage.drop(folder)
    bring(given)
    assert (folder / "checkpoint.pt").read_text() == "4"
    # Of what the search does not know only the last row is repeated.
    assert [row["epoch"] for row in unreported(given, 0, 4)] == [2, 3]
    assert [row["epoch"] for row in unreported(given, 2, 4)] == [3]
    assert unreported(given, 3, 4) == unreported(given, 0, 2) == []
    assert unreported(given, 0, 4)[0].keys() >= {"epoch", "stage", "state", "shared"}
    (folder / "epochs.parquet").write_text("no table")
    keep(given, "one")
    assert unreported(given, 0, 4) == []
    if not remote:
        shutil.rmtree(home)
        with pytest.raises(StorageError, match="is not there, seen from"):
            keep(given, "one")


def test_names_load_nothing_heavy() -> None:
    code = "import sys, hpcl.search.places, hpcl.search.storage, hpcl.search.mirror, hpcl.search.work\n"
    code += "print([n for n in ('torch', 'ray', 'optuna', 'pyarrow', 'fsspec') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
