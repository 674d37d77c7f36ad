"""What `hpcl doctor` sees: of a machine, of the images, and of a folder of results that several nodes share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stores import ENVIRONMENT, Server

from hpcl.errors import UserError
from hpcl.search import nodes, probe
from hpcl.search.facts import DataFacts, Driver

GB = 10**9
ROOT = Path(__file__).parents[1]


def test_a_function_that_hangs_is_left_to_itself() -> None:
    with pytest.raises(TimeoutError, match="no answer within"):
        probe.within(0.1, lambda: time.sleep(30))
    assert probe.within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        probe.within(60, lambda: 1 // 0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL: it uses an instruction that this CPU"),
        ("raise RuntimeError('libcudart is missing')", "RuntimeError: libcudart is missing"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_a_package_that_crashes_or_hangs_is_a_fact(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "faiss.py").write_text(code)
    found = probe.python_here("-m", "hpcl.search.probe", "faiss")
    monkeypatch.setattr(probe, "python_here", lambda *_: (found[0], {**os.environ, "PYTHONPATH": str(tmp_path)}))
    seconds = 2.0 if "sleep" in code else 100.0
    assert words in probe._ask(["faiss"], seconds)[0]["error"]


def test_drivers_as_the_system_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, kind in (("0000:01:00.0", "0x030200"), ("0000:01:00.1", "0x040300")):
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text(f"{kind}\n")
    assert probe._driver(tmp_path) == Driver(on_bus=1)  # the second is its sound
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 13.2.0"
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert probe._driver(tmp_path) == Driver(version="580.65.06", gpus=("NVIDIA GPU",), on_bus=1)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 470.57.02, Exclusive_Process'\n")
    smi.chmod(0o755)
    assert probe._driver(tmp_path) == Driver(version="470.57.02", gpus=("Tesla T4",), exclusive=True, on_bus=1)
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    assert probe._driver(tmp_path).error == "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n")
    assert probe._memory(tmp_path) == (20_480_000_000, 32_768_000_000)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in (("memory.max", "max"), ("memory.current", "3000000000")):
        (tmp_path / "sys/fs/cgroup" / name).write_text(f"{text}\n")
    assert probe._memory(tmp_path)[1] == 32_768_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("8000000000\n")
    assert probe._memory(tmp_path) == (5_000_000_000, 8_000_000_000)


def test_images_are_compared_by_names_and_sizes(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name / "cats").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "cats" / "0.png")
    Image.new("L", (8, 8)).save(tmp_path / "three" / "cats" / "1.png")
    one, two, three = (nodes.look_at_data(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three and three.files == 2 and not one.error
    assert "which does not exist" in nodes.look_at_data(str(tmp_path / "four")).error
    assert nodes.look_at_data("mnist5k") == DataFacts(digest="mnist5k")


def test_images_that_cannot_be_read_are_a_fault(tmp_path: Path) -> None:
    for name in ("texts", "some"):
        (tmp_path / name / "cats").mkdir(parents=True)
        for number in range(3):
            (tmp_path / name / "cats" / f"{number}.png").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "some" / "cats" / "9.png")
    said = nodes.look_at_data(str(tmp_path / "texts")).error
    assert "none of the first 3 images can be read (cats/0.png: " in said
    assert not nodes.look_at_data(str(tmp_path / "some")).error
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "column.parquet")
    assert "has no column `image`" in nodes.look_at_data(str(tmp_path / "column.parquet")).error
    pq.write_table(pa.table({"image": [b"x"] * 9}), tmp_path / "none.parquet")
    assert "none of the first 8 images" in nodes.look_at_data(str(tmp_path / "none.parquet")).error
    (tmp_path / "half.parquet").write_bytes((tmp_path / "none.parquet").read_bytes()[:-9])
    assert "cannot be read as Parquet" in nodes.look_at_data(str(tmp_path / "half.parquet")).error
    with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
        pass
    assert "that this project did not write" in nodes.look_at_data(str(tmp_path / "other.arrow")).error


def test_a_file_that_this_user_may_not_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats").mkdir()
    for number in range(2):
        Image.new("L", (8, 8)).save(tmp_path / "cats" / f"{number}.png")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("1.png"))  # root may read all
    said = nodes.look_at_data(str(tmp_path)).error
    assert said.endswith("cats/1.png: may not be read by this user (1 of 2 files)")


def test_marks_tell_one_folder_from_another_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOOK_AGAIN", (0.0, 0.1))
    folder = tmp_path / "not" / "yet"
    marks = nodes.Marks(str(folder), "token")
    marks.lay()
    assert nodes.Marks(str(folder), "token").meet("b") == "same" and marks.seen(["b", "c"]) == {"b"}
    assert nodes.Marks(str(tmp_path / "nowhere"), "token").meet("b") == "missing"
    assert nodes.Marks(str(tmp_path), "token").meet("b") == "other"
    assert nodes.Marks(str(folder), "another").meet("b") == "other"
    marks.remove()
    assert list(tmp_path.iterdir()) == []
    marks.lay()
    (folder / "kept").touch()
    marks.remove()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_marks_in_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyarrow.fs import FileSelector, FileSystem

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nodes, "LOOK_AGAIN", (0.0,))
    server = Server()
    try:
        uri = server.uri("doctors")
        marks = nodes.Marks(uri, "token")
        marks.lay()
        assert nodes.Marks(uri, "token").meet("b") == "same" and marks.seen(["b", "c"]) == {"b"}
        assert nodes.Marks(uri, "another").meet("b") == "other"
        marks.remove()
        files, _ = FileSystem.from_uri(uri)
        assert files.get_file_info(FileSelector("doctors", recursive=True)) == []
        with pytest.raises(UserError, match="NO_SUCH_BUCKET"):
            nodes.Marks(uri.replace("doctors", "nobody"), "token").lay()
    finally:
        server.stop()
