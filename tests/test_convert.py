"""Converting a source into one file: what is in it, and what happens when the conversion is cut off or hindered."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import class_folders, png, problem_of, random_pixels, save, table
from PIL import Image, ImageOps

from hpcl import sources
from hpcl.cli import main
from hpcl.data import DataError, blocks, convert, load, progress, scratch, store
from hpcl.data.convert import convert_file
from hpcl.decode import Item, decode
from hpcl.errors import UserError
from hpcl.sections import Data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))


def hpcl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line with these arguments."""
    monkeypatch.setattr("sys.argv", ["hpcl", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def small_blocks(monkeypatch: pytest.MonkeyPatch, items: int = 4) -> list[Item]:
    """Blocks of so many images; the list has the items that are decoded from now on."""
    seen: list[Item] = []
    result = blocks._result

    def counted(item: Item, *arguments: object) -> object:
        seen.append(item)
        return result(item, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "_ITEMS", items)
    monkeypatch.setattr(blocks, "_result", counted)
    return seen


# --- what is in the file -----------------------------------------------------------


def test_the_command_converts_says_what_is_there_and_is_done_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = class_folders(tmp_path / "set", height=20, width=30), tmp_path / "mine.arrow"
    assert hpcl(monkeypatch, "data", "convert", str(root), str(out), "--size", "8") == 0
    assert capsys.readouterr().out.startswith(f"{out}: 30 images 3x8x8, 3 classes; train 24, val 3, test 3; ")
    before = out.stat()
    assert hpcl(monkeypatch, "data", "convert", str(root), str(out), "--size", "8") == 0
    assert f"{out} is up to date\n" in capsys.readouterr().out and out.stat() == before
    ours, there = load(Data(source=str(out))), load(Data(source=str(root), size=8))
    assert (ours.images == there.images).all() and ours.content_hash == there.content_hash
    assert hpcl(monkeypatch, "data", "convert", str(root), str(out), "--size", "10") == 0  # our own file: overwritten
    assert load(Data(source=str(out))).images.shape == (30, 3, 10, 10)
    assert sorted(tmp_path.glob(".*")) == []  # no scratch is left


def test_files_that_are_not_ours_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = class_folders(tmp_path / "set"), tmp_path / "notes.txt"
    out.write_text("mine")
    assert hpcl(monkeypatch, "data", "convert", str(root), str(out)) == 2
    assert "is there already, and not written by `hpcl data convert`" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert hpcl(monkeypatch, "data", "convert", str(root), str(out), "--force") == 0
    assert len(load(Data(source=str(out))).images) == 30
    for wrong, said in ((root, "is a folder"), (tmp_path / "none" / "a.arrow", "there is no folder")):
        with pytest.raises(UserError, match=said):
            convert_file(str(root), wrong)
    with pytest.raises(UserError, match="is the source itself"):
        convert_file(str(out), out, 8)


def coarse_items(source: object) -> Iterator[Item]:
    for i in range(6):
        yield Item(f"image {i}", random_pixels(i), i % 3, 0, coarse=["animal", "animal", "thing"][i % 3])


def test_coarse_labels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "set")
    plain = load(Data(source=str(root)))
    assert plain.coarse_labels is None and plain.coarse_classes == () and "coarse ones" not in plain.describe()
    monkeypatch.setattr(sources, "items", coarse_items)
    convert_file(str(root), tmp_path / "a.arrow")
    found = load(Data(source=str(tmp_path / "a.arrow")))
    assert found.coarse_labels is not None and found.coarse_labels.tolist() == [0, 0, 1, 0, 0, 1]
    assert found.coarse_classes == ("animal", "thing") and "3 classes in 2 coarse ones" in found.describe()
    again = load(Data(source=str(tmp_path / "a.arrow"), size=8))  # through another conversion
    assert again.coarse_labels is not None and again.coarse_labels.tolist() == found.coarse_labels.tolist()
    assert again.coarse_classes == found.coarse_classes


def test_images_of_the_first_format_are_read_as_a_source_and_written_anew_in_the_cache(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    new = load(Data(source=str(root)))
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    batch = pa.ipc.open_file(cached).get_batch(0)
    facts = json.loads(batch.schema.metadata[b"hpcl"])
    del facts["coarse_classes"], facts["size"]
    old = pa.record_batch({name: batch.column(name) for name in batch.schema.names if name != "coarse"})
    old = old.replace_schema_metadata({"hpcl.format": "1", "hpcl": json.dumps(facts)})
    own = tmp_path / "own.arrow"
    with pa.OSFile(str(own), "wb") as sink, pa.ipc.new_file(sink, old.schema) as writer:
        writer.write_batch(old)
    given = load(Data(source=str(own)))
    assert given.content_hash == new.content_hash and given.coarse_labels is None
    assert (given.images == new.images).all() and np.array_equal(given.val, new.val)
    os.replace(own, cached)
    assert load(Data(source=str(root))).content_hash == new.content_hash
    assert pa.ipc.open_file(cached).schema.metadata[b"hpcl.format"] == store.FORMAT.encode()


@pytest.mark.parametrize("gray", [{0, 1, 2, 3, 4}, {5}, {0, 11}])
def test_gray_among_colour_is_expanded_wherever_it_stands(
    gray: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    pixels = [random_pixels(i, channels=1 if i in gray else 3) for i in range(12)]
    path = table(tmp_path / "set.parquet", {"image": [png(each) for each in pixels]})
    images = load(Data(source=str(path))).images
    assert images.shape == (12, 3, 12, 12)
    for found, each in zip(images, pixels, strict=True):
        assert (found == (each[None] if each.ndim == 2 else each.transpose(2, 0, 1))).all()


def test_blocks_are_in_order_and_as_a_plain_loop_decodes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "set", each=13)
    (root / "class1" / "006a.png").write_text("broken")
    wanted = [decode(file, 8) for file in sorted(root.rglob("*.png")) if file.name != "006a.png"]
    for items in (1, 5, 256):
        monkeypatch.setattr(blocks, "_ITEMS", items)
        images = load(Data(source=str(root), size=8), tmp_path / f"cache{items}").images
        assert (images == np.stack(wanted).transpose(0, 3, 1, 2)).all()


def test_several_sizes_are_told_without_looking_at_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = small_blocks(monkeypatch)
    monkeypatch.setattr(convert, "_LOOKED_AT", 20)
    root = class_folders(tmp_path / "set", each=40)
    save(root / "class0" / "000a.png", random_pixels(0, height=13))
    said = problem_of(Data(source=str(root)))
    assert "the first 21 images have 2 sizes: 12x12 (20, e.g. class0/000.png), 12x13 (1, e.g. class0/000a.png)" in said
    assert len(seen) < 60


def photograph(height: int, width: int) -> Image.Image:
    """A smooth picture, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / width * a) * np.cos(y / height * b) for a, b in ((9, 4), (5, 11), (14, 2))]
    return Image.fromarray(np.dstack(waves).astype(np.uint8))


@pytest.mark.parametrize(("height", "width", "halved"), [(480, 640, True), (640, 480, True), (150, 200, False)])
def test_large_photographs_are_halved_by_their_decoder(height: int, width: int, halved: bool, tmp_path: Path) -> None:
    file = save(tmp_path / "a.jpg", photograph(height, width), quality=90)
    with Image.open(file) as opened:
        whole = np.asarray(ImageOps.fit(opened, (64, 64), method=Image.Resampling.BICUBIC)).astype(int)
    off = np.abs(decode(file, 64) - whole)
    assert (0 < off.mean() < 1 and off.max() < 12) if halved else off.max() == 0
    assert (decode(file, 64) == decode(file.read_bytes(), 64)).all()
    assert decode(file, None).shape == (height, width, 3)


# --- cut off -----------------------------------------------------------------------


CUT_OFF = """
import os, signal, sys
from hpcl.sections import Data
from hpcl.data import blocks, load
blocks._ITEMS, left, decode = 4, [int(sys.argv[2])], blocks.attempt
def counted(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments)
blocks.attempt = counted
load(Data(source=sys.argv[1]))
"""


@contextmanager
def cut_off(source: Path, after: int) -> Iterator[Path]:
    """The scratch folder of a conversion in blocks of 4 images that was killed in its so many-th image."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(source), str(after)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = Path(os.environ["HPCL_CACHE"]).glob(".*.partial")
    yield folder
    assert not folder.exists()


def test_a_killed_conversion_goes_on_with_its_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "set", each=20)
    (root / "class0" / "000a.png").write_text("broken")
    whole = load(Data(source=str(root)), tmp_path / "other")
    seen = small_blocks(monkeypatch)
    with cut_off(root, 40) as folder:
        lines = (folder / "journal.jsonl").read_text().splitlines()
        kept = sum(json.loads(line)["items"] for line in lines[1:])
        assert 4 < kept < 40
        found = load(Data(source=str(root)))
    assert [item.name for item in seen] == [item.name for item in sources.items(sources.find(str(root)))][kept:]
    assert (found.images == whole.images).all() and found.content_hash == whole.content_hash
    assert found.skipped == whole.skipped != ()


DAMAGE = {
    "a torn line": lambda text, pixels: (text[:-9], pixels),
    "a line that is none": lambda text, pixels: (text + b'{"items": 4}\nnonsense\n', pixels),
    "more pixels than the journal knows": lambda text, pixels: (text, pixels + b"x" * 999),
    "fewer pixels than the journal knows": lambda text, pixels: (text, pixels[:-99]),
    "other pixels": lambda text, pixels: (text, bytes(len(pixels))),
    "another source": lambda text, pixels: (text.replace(b"fingerprint", b"other"), pixels),
    "nothing": lambda text, pixels: (b"", b""),
}


def test_what_a_crash_damaged_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "set", each=8)
    whole = load(Data(source=str(root)), tmp_path / "other")
    key = {"a": 1}
    made = tmp_path / "made"
    made.mkdir()
    first = scratch.Scratch(made, key)
    pixels = [decode(file, None) for file in sorted(root.rglob("*.png"))]
    for start in (0, 4, 8):
        first.add(4, pixels[start : start + 4], [])
    first.close()
    text, content = (made / "journal.jsonl").read_bytes(), (made / "pixels").read_bytes()
    kept = {"a torn line": 2, "a line that is none": 3, "more pixels than the journal knows": 3}
    kept |= {"fewer pixels than the journal knows": 2, "other pixels": 0, "another source": 0, "nothing": 0}
    for name, change in DAMAGE.items():
        lines, bits = change(text.replace(b'"a"', b'"fingerprint"'), content)
        (made / "journal.jsonl").write_bytes(lines)
        (made / "pixels").write_bytes(bits)
        again = scratch.Scratch(made, {"fingerprint": 1})
        assert len(again.done) == kept[name], name
        for start in range(4 * len(again.done), 24, 4):
            again.add(4, pixels[start : start + 4], [])
        assert (again.whole() == whole.images).all(), name
        again.close()


def test_a_full_disk_keeps_what_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = class_folders(tmp_path / "set", each=20, height=64, width=64), tmp_path / "out.arrow"
    seen = small_blocks(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (300_000, 738_500):  # in the middle of the pixels; of the Arrow file
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            with pytest.raises(DataError, match=r"cannot be written .*what was decoded is kept.*name a file elsewhere"):
                convert_file(str(root), out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not out.exists()
        seen.clear()
    assert len(convert_file(str(root), out)[0].images) == 60 and seen == []
    assert list(tmp_path.glob(".*")) == []


# --- several processes -------------------------------------------------------------


def test_another_process_waits_and_then_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = class_folders(tmp_path / "set")
    seen = small_blocks(monkeypatch)
    code = CUT_OFF.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True), sys.stdin.readline()")
    command = [sys.executable, "-c", code, str(root), "20"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "here\n"
        monkeypatch.setattr(progress, "QUIET", 0.05)
        found: list[int] = []
        waiting = threading.Thread(target=lambda: found.append(len(load(Data(source=str(root))).images)))
        waiting.start()
        said = ""
        while "waiting for it" not in said:
            said += capsys.readouterr().out
            time.sleep(0.02)
        assert found == [] and "another process converts" in said
        other.stdin.write("\n")
        other.stdin.flush()
        waiting.join(60)
        assert other.wait(60) == 0
    assert found == [30] and seen == []


def test_without_locks_each_converts_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "set")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    folders: list[str] = []
    add = scratch.Scratch.add

    def spied(self: scratch.Scratch, *arguments: object) -> object:
        folders.append(self.folder.name)
        return add(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scratch.Scratch, "add", spied)
    assert len(load(Data(source=str(root))).images) == 30
    assert all(".partial-" in name for name in folders) and folders
    assert [file.suffix for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".partial")] == [".arrow"]


def test_a_scratch_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    root, elsewhere = class_folders(tmp_path / "set"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".out.arrow.partial").symlink_to(elsewhere)
    assert len(convert_file(str(root), tmp_path / "out.arrow")[0].images) == 30
    assert list(elsewhere.iterdir()) == []


SHARING = """
import re, sys
from hpcl.sections import Data
from hpcl.data import load
images = load(Data(source=sys.argv[1])).images
images.sum(), print("touched", flush=True), sys.stdin.readline()
address, entry = images.ctypes.data, ""
for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())[1:]:
    low, high = (int(part, 16) for part in block.split()[0].split("-"))
    entry = block if low <= address < high else entry
print(entry.split()[5], *(re.search(name + r":\\s+(\\d+)", entry)[1] for name in ("Rss", "Pss", "Anonymous")))
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_three_processes_share_one_mapped_copy(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", each=40, height=64, width=64)
    size = load(Data(source=str(root))).images.nbytes
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    start = [sys.executable, "-c", SHARING, str(root)]
    three = [subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        said = []
        for each in three:
            assert each.stdout is not None and each.stdout.readline() == "touched\n"
        for each in three:
            assert each.stdin is not None and each.stdout is not None
            each.stdin.write("\n")
            each.stdin.flush()
            said.append(each.stdout.readline().split())
    finally:
        for each in three:
            each.communicate("\n")
    for path, *numbers in said:
        resident, shared, own = (1024 * int(number) for number in numbers)
        assert Path(path) == cached and resident >= size and own == 0
        assert resident / 4 < shared < resident / 2  # a third each


def test_a_source_that_changes_while_it_is_read_gives_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else half of it would lie there under the name of what it was before."""
    root = class_folders(tmp_path / "set", classes=2, each=3)
    write = convert.write

    def late(*arguments: object) -> None:
        save(root / "class0" / "000.png", random_pixels(99, 20, 20))
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "write", late)
    with pytest.raises(DataError, match=r"set changed while it was being read; run again"):
        convert_file(str(root), tmp_path / "out.arrow", 8)
    assert not (tmp_path / "out.arrow").exists() and not (tmp_path / ".out.arrow.partial").exists()
