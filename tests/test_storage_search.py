"""Whole searches whose results lie in a store, or on a disk that fails: real Ray processes, drivers that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import ENVIRONMENT, PAUSE, Server, at

from hpcl.results import read_rows
from hpcl.search import storage
from hpcl.search.journal import JOURNAL_NAME, read_events
from hpcl.search.places import place

pytestmark = pytest.mark.timeout(900)

SPACE = """
name: mine
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  optimizer.weight_decay: {choice: [1.0e-4, 1.0e-2]}
  stages.stage4.lr: {float: [0.01, 0.1]}
search: {trials: 5, grace: 2, factor: 2, startup: 5, max_concurrent: 2, seed: 3}
"""

DRIVER = """
import functools, sys
import stores
from hpcl.search import cli, runner
runner.run = functools.partial(runner.run, train=stores.train)
sys.argv = ["run_search.py", *{arguments!r}]
raise SystemExit(cli.main())
"""


class Driver:
    """A search in a process of its own, with a cache of its own, as on another machine."""

    def __init__(self, folder: Path, results: str, *arguments: str, pause: float = 0.2) -> None:
        (folder / "space.yaml").write_text(SPACE)
        all_of_them = ["--space", str(folder / "space.yaml"), "--results", results, *arguments]
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        self.cache = folder / f"cache-{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER.format(arguments=all_of_them)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "HPCL_CACHE": str(self.cache), PAUSE: str(pause)},
        )
        self.said: list[str] = []

    def until(self, beginning: str) -> None:
        """Read what it says up to the line with this beginning."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError("".join(self.said))

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        assert self.process.stdout is not None
        self.said += self.process.stdout
        return self.process.wait(), "".join(self.said)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "HPCL_STORAGE_PATIENCE": "0"}.items():
            patch.setenv(name, value)
        server = Server()
        yield server
        server.stop()


def check_whole(folder: Path, trials: int = 5) -> None:
    """Nothing was lost and nothing counted twice: in the tables, in the journal, and in what was trained."""
    storage.fetch(folder)
    rows, table = read_rows(folder / "epochs.parquet"), read_rows(folder / "trials.parquet")
    assert sorted(trial["number"] for trial in table) == list(range(trials))
    assert {trial["state"] for trial in table} <= {"finished", "stopped"} and any(t["epochs"] == 12 for t in table)
    ends = Counter(event["trial"] for event in read_events(folder / JOURNAL_NAME) if event["event"] == "end")
    assert set(ends.values()) == {1} and {trial["trial_id"] for trial in table} <= ends.keys()
    for trial in table:
        own = [row for row in rows if row["trial_id"] == trial["trial_id"]]
        assert [row["epoch"] for row in own] == list(range(1, trial["epochs"] + 1))
        storage.fetch(folder / "trials" / trial["trial_id"])
        lines = (folder / "trials" / trial["trial_id"] / "trained").read_text().split("\n")
        trained = Counter(int(line.split()[0]) for line in lines if line.endswith("False"))
        # A process that goes on repeats its last row; an epoch is never trained anew that was reported.
        assert all(trained[row["epoch"]] >= 1 for row in own if not row["shared"])


def draws(folder: Path) -> bool:
    """Whether the store's journal has a trial."""
    storage.fetch(folder, {JOURNAL_NAME})
    path = folder / JOURNAL_NAME
    return path.is_file() and any(event["event"] == "trial" for event in read_events(path))


def rows_of_running(folder: Path) -> set[int]:
    """Numbers of the events in the store's journal that a running trial has reported, where one has three epochs."""
    storage.fetch(folder)
    events = read_events(folder / JOURNAL_NAME)
    ended = {event["trial"] for event in events if event["event"] == "end"}
    of_trial = {
        trial: {n for n, event in enumerate(events) if event["event"] in ("row", "rung") and event["trial"] == trial}
        for trial in {event["trial"] for event in events if event["event"] == "trial"} - ended
    }
    return max(of_trial.values(), key=len) if any(len(rows) > 2 for rows in of_trial.values()) else set()


def drop_newest_rows(folder: Path) -> int:
    """Take from the store's journal the rows of the last moment, as a driver's machine does that is lost; how many."""
    rows = rows_of_running(folder)
    lines = (folder / JOURNAL_NAME).read_text().splitlines()
    kept = [line for number, line in enumerate(lines) if number not in rows]
    (folder / JOURNAL_NAME).write_text("\n".join(kept) + "\n")
    storage.push_part(folder / JOURNAL_NAME, 0, (folder / JOURNAL_NAME).stat().st_size)
    storage.drop(folder)
    return len(rows)


@pytest.mark.slow
def test_a_search_in_a_store_goes_on_from_another_machine(server: Server, tmp_path: Path) -> None:
    uri = server.uri("killed")
    folder = place(at(uri, "mine"))
    first = Driver(tmp_path, uri, pause=0.3)
    while not draws(folder):
        time.sleep(0.05)
    assert all(storage.exists(folder / name) for name in ("space.yaml", "search.json"))  # else nothing could go on
    first.until("[")
    while not rows_of_running(folder):
        time.sleep(0.1)
    first.process.kill()
    first.end()
    assert drop_newest_rows(folder) >= 3
    code, said = Driver(tmp_path, uri, pause=0.02).end()
    assert code == 0, said
    assert f"going on with {at(uri, 'mine')}: " in said and "Traceback" not in said
    check_whole(folder)
    rows = [event for event in read_events(folder / JOURNAL_NAME) if event["event"] == "row"]
    shared = Counter((row["trial"], row["row"]["epoch"]) for row in rows if row["trial"].startswith("prefix-"))
    assert len(shared) == 12 and set(shared.values()) == {1}  # six epochs each of two, by one process or the other
    storage.fetch(folder, deep=True)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"trials"}  # no sign of life, nothing of Tune's


def outage(tmp_path: Path, results: str, break_it: Callable[[], Any], mend_it: Callable[[], Any]) -> str:
    """A search that meets an outage and is gone on with; what it said when it ended early."""
    driver = Driver(tmp_path, results, pause=0.5)
    driver.until("[")
    break_it()
    code, said = driver.end()
    assert code == 3, said
    assert (
        "Traceback" not in said and "\ninterrupted after " in said and f"--results {results}" in said.replace("'", "")
    )
    assert "\nresume   python run_search.py " in said
    mend_it()
    code, after = Driver(tmp_path, results).end()
    assert code == 0 and "going on with " in after, after
    check_whole(place(at(results, "mine")))
    return said


@pytest.mark.slow
def test_a_bucket_that_is_gone_for_a_while(server: Server, tmp_path: Path) -> None:
    said = outage(tmp_path, server.uri("gone"), server.stop, server.start)
    assert "s3://gone?" in said and "see that it is there" in said


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Mounts; all are taken away afterwards."""
    points: list[Path] = []

    def mount(*arguments: str, on: Path) -> None:
        on.mkdir(exist_ok=True)
        made = subprocess.run(["mount", *arguments, on], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"disks can be mounted by root only ({made.stderr.strip()})")
        points.append(on)

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", point], capture_output=True)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(mounted: Callable[..., None], tmp_path: Path) -> None:
    disk = tmp_path / "small"
    mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", on=disk)

    def fill() -> None:
        size = 1 << 16
        with (disk / "filler").open("wb", buffering=0) as file:
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size //= 2

    said = outage(tmp_path, str(disk), fill, (disk / "filler").unlink)
    assert "No space left on device" in said and "free space there" in said


@pytest.mark.slow
def test_a_mount_that_is_gone_for_a_while(mounted: Callable[..., None], tmp_path: Path) -> None:
    (real := tmp_path / "real").mkdir()
    point = tmp_path / "mnt"
    mounted("--bind", str(real), on=point)
    said = outage(
        tmp_path,
        str(point),
        lambda: subprocess.run(["umount", "-l", point], check=True),
        lambda: mounted("--bind", str(real), on=point),
    )
    assert "was its disk unmounted?" in said
