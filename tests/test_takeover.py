"""A process that was cut off, and wakes when another one trains in its place, writes nothing more there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import state
from stores import at, fill

from hpcl.checkpoint import load_checkpoint, previous_of, save_checkpoint
from hpcl.config import Config
from hpcl.errors import StorageError, TakenOver
from hpcl.files import claim
from hpcl.results import read_rows
from hpcl.search import storage, work
from hpcl.search.places import place

CODE = """
import sys, json, time
from hpcl.config import Config
from hpcl.trainer import fit
def report(row):
    print(row["epoch"], flush=True)
    time.sleep({pause})
fit(Config.model_validate(json.loads({config!r})), {folder!r}, report=report)
"""


def test_the_first_of_two_processes_ends_and_leaves_the_second_ones_files(tiny: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def command(pause: float) -> list[str]:
        code = CODE.format(pause=pause, config=tiny.model_dump_json(), folder=str(folder))
        return [sys.executable, "-c", code]

    first = subprocess.Popen(command(0.5), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.strip() == "3":
            break
    os.kill(first.pid, signal.SIGSTOP)
    second = subprocess.run(command(0), capture_output=True, text=True, check=True)
    assert second.stdout.split() == ["3", "4", "5", "6", "7", "8"]
    before = {name: (folder / name).read_bytes() for name in ("checkpoint.pt", "epochs.parquet")}
    os.kill(first.pid, signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and "TakenOver" in said and "another process trains there since" in said
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert len(load_checkpoint(folder / "checkpoint.pt")["rows"]) == len(read_rows(folder / "epochs.parquet")) == 8
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".attempt", ".gone"))]


@pytest.mark.parametrize("links", [True, False])
def test_nothing_comes_to_stand_at_any_moment_after_a_claim(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim falls between any two steps of a save."""
    path = tmp_path / "checkpoint.pt"
    steps = {"os.fsync": os.fsync, "os.replace": os.replace, "os.link": os.link}
    if not links:

        def link(*names: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr("os.link", link)
        del steps["os.link"]
        steps["shutil.copyfile"] = shutil.copyfile
    for name, real in steps.items():
        for left in tmp_path.glob("*.pt"):
            left.unlink()
        old = claim(tmp_path)
        save_checkpoint(path, state(1), old)
        save_checkpoint(path, state(2), old)

        def taken(*arguments: Any, name: str = name, real: Any = real) -> Any:
            monkeypatch.setattr(name, real)
            save_checkpoint(path, state(3), claim(tmp_path))
            return real(*arguments)

        monkeypatch.setattr(name, taken)
        with pytest.raises(TakenOver, match="another process trains there since"):
            save_checkpoint(path, state(4), old)
        assert load_checkpoint(path) == {"format": 1, **state(3)}, name
        assert load_checkpoint(previous_of(path)) == {"format": 1, **state(2)}, name


def test_a_folder_that_is_gone_is_no_takeover(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    through = claim(folder)
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match="was its disk unmounted"):
        save_checkpoint(folder / "checkpoint.pt", state(1), through)


def test_in_a_store_the_older_process_sends_nothing_more(uri: str, root: Path) -> None:
    home = fill(root / "mine", **{"journal__jsonl": ""})
    storage.push_part(home / "journal.jsonl", 0, 0)
    trial = at(uri, "mine", "trials", "0001")
    given = {"home": at(uri, "mine"), "folder": trial, "fork": None, "epochs": 0}
    folder, _ = work.bring(given, "old")
    (folder / "checkpoint.pt").write_text("epoch 1")
    work.keep(given, "old")
    code = f"""
from hpcl.search import work
folder, _ = work.bring({given!r}, "new")
assert (folder / "checkpoint.pt").read_text() == "epoch 1"
(folder / "checkpoint.pt").write_text("epoch 2 of the new one")
work.keep({given!r}, "new")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    (folder / "checkpoint.pt").write_text("epoch 2 of the old one")
    with pytest.raises(TakenOver, match=f"{re.escape(trial)}: another process trains there since"):
        work.keep(given, "old")
    storage.drop(folder)
    storage.fetch(folder)
    assert (folder / "checkpoint.pt").read_text() == "epoch 2 of the new one"
    assert place(given["folder"]) == folder
