"""Checkpoints: what a run goes on from after a kill, a full disk or a file that broke."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FORKS, curve, run_in_process, state, timeless

from hpcl.checkpoint import load_checkpoint, previous_of, save_checkpoint
from hpcl.config import Config
from hpcl.errors import StorageError, UnreadableCheckpoint, UserError
from hpcl.results import read_rows
from hpcl.runlog import RunLog
from hpcl.trainer import fit

Rows = list[dict[str, Any]]


def stop_after(epoch: int, seen: Rows | None = None) -> Callable[[dict[str, Any]], None]:
    """A report that interrupts the run after an epoch."""

    def report(row: dict[str, Any]) -> None:
        if seen is not None:
            seen.append(row)
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    return report


def epochs_in(path: Path) -> int:
    return len(load_checkpoint(path)["rows"])


# ---------------------------------------------------------------- kills


def _die_after(epoch: int, folder: Path, config: Config) -> None:
    def report(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            os._exit(9)

    fit(config, folder, report=report)


def test_a_run_killed_after_each_epoch_equals_an_unbroken_one(
    unbroken: tuple[Path, Rows], tiny: Config, tmp_path: Path
) -> None:
    for epoch in range(1, 9):
        assert run_in_process(_die_after, epoch, tmp_path, tiny) == 9
        assert epochs_in(tmp_path / "checkpoint.pt") == epoch
        if epoch > 1:
            assert epochs_in(tmp_path / "checkpoint-previous.pt") == epoch - 1
    rows = fit(tiny, tmp_path).rows
    assert timeless(rows) == timeless(unbroken[1])
    assert timeless(read_rows(tmp_path / "epochs.parquet"))[0]["loss"] == rows[0]["loss"]
    assert not (tmp_path / "checkpoint-previous.pt").exists()  # a run that has ended needs it no more


def test_a_run_killed_while_it_writes_its_last_epoch_ends_with_a_whole_table(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("hpcl.runlog.write_table", "hpcl.trainer.save_checkpoint"):
        with monkeypatch.context() as patch:
            report = lambda row: patch.setattr(name, killed) if row["epoch"] == 4 else None  # noqa: B023, E731
            with pytest.raises(KeyboardInterrupt):
                fit(tiny.with_values({"stages.total": 5}), tmp_path / name, report=report)
        rows = fit(tiny.with_values({"stages.total": 5}), tmp_path / name).rows
        assert [row["epoch"] for row in read_rows(tmp_path / name / "epochs.parquet")] == [1, 2, 3, 4, 5]
        assert rows[-1]["state"] == "finished"
        points = curve(tmp_path / name, "loss")
        assert points == [(row["epoch"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


def test_resuming_reports_the_last_row_again(tiny: Config, tmp_path: Path) -> None:
    config = tiny.with_values({"stages.total": 5})
    seen: list[int] = []
    fit(config, tmp_path, report=lambda row: seen.append(row["epoch"]))
    fit(config, tmp_path, report=lambda row: seen.append(row["epoch"]))
    assert seen == [*range(1, 6), 5]


def test_a_folder_of_another_run_is_refused(tiny: Config, tmp_path: Path) -> None:
    short = tiny.with_values({"stages.total": 5})
    fit(short, tmp_path)
    with pytest.raises(UserError, match=r"another configuration \(it differs at clusters\.first\)"):
        fit(short.with_values({"clusters.first": 3}), tmp_path)
    other = short.with_values({"runtime.threads": None})  # where it runs is no part of what it is
    assert len(fit(other, tmp_path).rows) == 5
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 24))
    with pytest.raises(UserError, match="another backbone than this Sequential"):
        fit(short, tmp_path, backbone=own)


# ---------------------------------------------------------------- a kill at each step of a write

STEPS = ("open", "os.link", "os.rename", "os.remove", "os.chmod")


def _save_until(step: int, path: Path, links: bool) -> None:
    """Write a checkpoint in a process that ends before a step on the disk; exit code 9, or 0 where it has no more."""
    steps = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in STEPS and str(path.parent) in str(arguments):
            steps += 1
            if steps == step:
                os._exit(9)

    if not links:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("no hard links here")

        os.link = refuse
    sys.addaudithook(hook)
    save_checkpoint(path, state(3))
    os._exit(0)


def _each_step(folder: Path, links: bool) -> None:
    """Kill a writer at each of its steps; writes what lay there afterwards, one line a step."""
    lines = []
    code, step = 9, 0
    while code:
        step += 1
        path = folder / str(step) / "checkpoint.pt"
        for number in (1, 2):
            save_checkpoint(path, state(number))
        child = os.fork()
        if not child:
            _save_until(step, path, links)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = [epochs_in(each) if each.exists() else 0 for each in (path, previous_of(path))]
        lines.append(f"{code} {left[0]} {left[1]}\n")
    (folder / "left").write_text("".join(lines))


@pytest.mark.parametrize("links", [True, False])
def test_a_writer_killed_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, links: bool) -> None:
    process = FORKS.Process(target=_each_step, args=(tmp_path, links))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    left = [tuple(map(int, line.split())) for line in (tmp_path / "left").read_text().splitlines()]
    assert len(left) > 6  # so many steps on the disk
    assert left[0] == (9, 2, 1) and left[-1] == (0, 3, 2)
    for _, newest, before in left:
        assert newest >= 2 and before >= 1  # the last one that was whole is under its name at every moment


# ---------------------------------------------------------------- files that broke


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, interrupted after epoch 4."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(KeyboardInterrupt):
        fit(Config.model_validate(TINY), folder, report=stop_after(4))
    return folder


@pytest.fixture
def broken(half: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def sector(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(bytes(512))


def mixed(path: Path) -> None:
    old, new = previous_of(path).read_bytes(), path.read_bytes()
    path.write_bytes(old[: len(old) // 2] + new[len(old) // 2 :])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "a lost sector": sector,
    "half of it an older file's": mixed,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_previous_checkpoint_is_used_and_it_is_said(
    broken: Path, tiny: Config, unbroken: tuple[Path, Rows], damage: str
) -> None:
    newest = broken / "checkpoint.pt"
    DAMAGE[damage](newest)
    seen: Rows = []
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, broken, report=stop_after(3, seen))
    note = seen[0].pop("note")
    why = "is missing" if damage == "missing" else r"cannot be read \(.+\)"
    assert re.fullmatch(rf"checkpoint\.pt {why}: went on from checkpoint-previous\.pt, after epoch 3", note), note
    assert timeless(seen) == timeless(unbroken[1][2:3])
    assert note in (broken / "log.txt").read_text()
    assert epochs_in(newest) == 3  # it has its name now, and is not lost to the next write
    assert not previous_of(newest).exists()


def test_a_run_that_fell_back_equals_an_unbroken_one(broken: Path, tiny: Config, unbroken: tuple[Path, Rows]) -> None:
    flip(broken / "checkpoint.pt", 50_000)
    (broken / ".checkpoint.pt.x1y2.tmp").write_bytes(b"left by a process that was killed while it wrote")
    seen: Rows = []
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, broken, report=stop_after(5, seen))
    assert [row["epoch"] for row in seen] == [3, 4, 5] and ["note" in row for row in seen] == [True, False, False]
    assert [epochs_in(broken / name) for name in ("checkpoint.pt", "checkpoint-previous.pt")] == [5, 4]
    flip(broken / "checkpoint.pt", 50_000, bit=7)  # and once more
    rows = fit(tiny, broken).rows
    assert timeless(rows) == timeless(unbroken[1])
    assert not any("note" in row for row in rows)
    table = read_rows(broken / "epochs.parquet")
    assert [(row["epoch"], row["loss"]) for row in table] == [(row["epoch"], row["loss"]) for row in rows]
    assert [epoch for epoch, _ in curve(broken, "loss")] == list(range(1, 9))  # each once
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt")["pair"] for folder in (broken, unbroken[0]))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert not [path.name for path in broken.iterdir() if "previous" in path.name or path.suffix == ".tmp"]


def test_where_none_can_be_read_it_says_what_to_do(broken: Path, tiny: Config) -> None:
    newest, before = broken / "checkpoint.pt", broken / "checkpoint-previous.pt"
    os.truncate(newest, 1000)
    flip(before, 50_000)
    files = {path.name: path.read_bytes() for path in (newest, before)}
    with pytest.raises(UserError) as error:
        fit(tiny, broken)
    assert str(newest) in str(error.value) and str(before) in str(error.value)
    assert f"or remove {broken} to train the run anew" in str(error.value)
    assert {path.name: path.read_bytes() for path in (newest, before)} == files
    before.unlink()
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read .*remove .* to train the run anew"):
        fit(tiny, broken)


def test_only_damage_makes_it_fall_back(broken: Path, tiny: Config) -> None:
    newest = broken / "checkpoint.pt"
    with pytest.raises(UserError, match="another configuration"):
        fit(tiny.with_values({"clusters.first": 3}), broken)
    state = load_checkpoint(newest)
    torch.save(state | {"format": 2}, newest)
    with pytest.raises(UserError, match="written in format 2"):
        fit(tiny, broken)
    assert epochs_in(previous_of(newest)) == 3


def test_a_fork_from_a_damaged_checkpoint_is_refused(broken: Path, tiny: Config, tmp_path: Path) -> None:
    flip(broken / "checkpoint.pt", 50_000)
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a readable checkpoint"):
        fit(tiny, tmp_path / "fork", fork=broken / "checkpoint.pt")
    assert not (tmp_path / "fork").exists()


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    """A bit that makes no difference may flip; torch.load alone would take most others for the truth."""
    path = tmp_path / "a.pt"
    rows = [{"epoch": 1, "world_size": 1, "loss": 2.5}]
    given = state(1, rows=rows, pair={"w": torch.arange(40.0), "b": torch.ones(3)})
    save_checkpoint(path, given)
    whole = path.read_bytes()
    flips = [(at, bit) for at in range(len(whole)) for bit in range(8)]
    found, silent = 0, 0
    for at, bit in random.Random(0).sample(flips, 1500):
        flip(path, at, bit)
        try:
            read = load_checkpoint(path)
        except UserError:
            found += 1
        else:
            assert read["rows"] == rows, (at, bit)
            for name, value in given["pair"].items():
                assert torch.equal(read["pair"][name], value), (name, at, bit)
            silent += 1
        path.write_bytes(whole)
    assert found > 500 and silent > 100


def test_a_file_that_claims_to_hold_more_than_it_has_is_not_unpacked(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", state(1, pair={"w": torch.zeros(100_000)}))
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    assert "w" in torch.load(tmp_path / "b.pt", weights_only=True)["pair"]  # torch unpacks it
    with pytest.raises(UnreadableCheckpoint) as refused:
        load_checkpoint(tmp_path / "b.pt")
    assert "not as torch.save writes it" in str(refused.value.__cause__)


# ---------------------------------------------------------------- full disks


def test_a_file_that_may_grow_no_more_is_told_and_leaves_the_last_checkpoints(tiny: Config, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:  # the table fits below the limit, the checkpoint does not
            resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, limits[1]))

    config = tiny.with_values({"stages.total": 5})
    try:
        with pytest.raises(StorageError, match=r"checkpoint.pt: cannot be written \(.*\); free space there"):
            fit(config, tmp_path, report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [epochs_in(tmp_path / name) for name in ("checkpoint.pt", "checkpoint-previous.pt")] == [2, 1]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert fit(config, tmp_path).rows[-1]["state"] == "finished"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs (a container without CAP_SYS_ADMIN)")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def fill_disk(disk: Path, left: int) -> None:
    with open(disk / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("left", "what"), [(0, "run"), (80_000, "checkpoint.pt")])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoints(disk: Path, tiny: Config, left: int, what: str) -> None:
    config, folder = tiny.with_values({"stages.total": 5}), disk / "run"
    with pytest.raises(StorageError, match=rf"{what}.*: cannot be written \(.*No space left.*\); free space there"):
        fit(config, folder, report=lambda row: fill_disk(disk, left) if row["epoch"] == 3 else None)
    assert [epochs_in(folder / name) for name in ("checkpoint.pt", "checkpoint-previous.pt")] == [3, 2]
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    (disk / "filler").unlink()
    rows = fit(config, folder).rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["state"] == "finished"


@pytest.mark.timeout(60)
def test_a_log_on_a_full_disk_raises_and_does_not_wait(disk: Path) -> None:
    log = RunLog(disk / "run", 1)
    fill_disk(disk, 0)
    row = {"epoch": 1, "stage": 1, **dict.fromkeys(("loss", "acc_inst", "seconds", "lr", "knn"), 0.5)}
    with pytest.raises(StorageError, match="No space left"):
        for _ in range(200):
            log.add([row])
    (disk / "filler").unlink()
    log.close()
