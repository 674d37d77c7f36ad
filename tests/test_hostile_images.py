"""Data sets from somebody else: images and tables that would fill the memory, start programs or lie.

Each is left out or refused in a sentence, and nothing of it runs.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import Evil, sentinel
from pictures import class_folders, png, problem_of, random_pixels, table

import hpcl.results
from hpcl.data import load
from hpcl.sections import Data

__all__ = ["sentinel"]


def huge_png(side: int) -> bytes:
    """A black image of side x side pixels in one bit each, in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, rows = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), zlib.compressobj(9)
    line = bytes(1 + (side + 7) // 8)
    content = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def test_images_that_would_fill_the_memory_are_skipped_with_a_reason(tmp_path: Path) -> None:
    small, large = huge_png(9_100), huge_png(20_000)
    root = class_folders(tmp_path / "set")
    (root / "class0" / "bomb.png").write_bytes(large)
    (root / "class1" / "large.png").write_bytes(small)
    found = load(Data(source=str(root)), tmp_path / "cache")
    assert len(found.images) == 30 and dict(found.skipped).keys() == {"class0/bomb.png", "class1/large.png"}
    assert dict(found.skipped)["class1/large.png"].startswith("has 9100x9100 pixels, but at most 80 million are")
    assert dict(found.skipped)["class0/bomb.png"].startswith("has more than 80 million pixels")
    file = table(tmp_path / "set.parquet", {"image": [png(random_pixels(i)) for i in range(9)] + [large]})
    (where, reason), *_ = load(Data(source=str(file)), tmp_path / "cache").skipped
    assert where == "set.parquet row 9" and reason.startswith("has more than 80 million pixels")


def test_more_pixels_than_the_disk_holds_are_refused_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = class_folders(tmp_path / "set")  # 30 images of 432 bytes, which lie there twice in the end
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=25_000))
    said = problem_of(Data(source=str(root)), tmp_path / "cache")
    assert "cache: 2.59e-05 GB more are needed there, but 2.5e-05 GB are free; free space, or set HPCL_CACHE" in said
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=26_000))
    assert len(load(Data(source=str(root)), tmp_path / "cache").images) == 30


@pytest.mark.skipif(sys.platform != "linux", reason="the bound is Linux's RLIMIT_DATA")
def test_the_memory_is_bounded_while_images_are_decoded(tmp_path: Path) -> None:
    """160 images of 1 MB each that take 1 kB as files, where 130 MB are allowed: they go to the disk on the way."""
    (tmp_path / "set").mkdir()
    for number in range(160):
        (tmp_path / "set" / f"{number}.png").write_bytes(huge_png(1000))
    code = (
        "import os, re, resource, sys; from hpcl.config import Data; from hpcl.data import load, blocks\n"
        "import pyarrow; blocks.cores = lambda: 2\n"
        "kept = pyarrow.array([0])\n"  # what Arrow sets aside for itself comes before the limit
        "now = int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (now + 130_000_000, -1))\n"
        "found = load(Data(source=sys.argv[1]), sys.argv[2])\n"
        "try: bytearray(found.images.nbytes)\n"
        "except MemoryError: print(found.images.shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert done.stdout == "(160, 1, 1000, 1000)\n", done.stderr[-2000:]


def test_a_dictionary_that_multiplies_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """10 MB that stand once in a file of a few kilobytes, and in each of its 200 rows."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([bytes(10_000_000)]))
    path = tmp_path / "set.parquet"
    pq.write_table(
        pa.table({"image": once}), path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    assert path.stat().st_size < 10_000
    code = (
        "import resource, sys; from hpcl import sources; from hpcl.config import Data\n"
        "from hpcl.data import blocks, load; from hpcl.errors import UserError\n"
        "sources.parquet._BYTES = blocks._ENCODED = 50_000_000\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most()\n"
        "try: load(Data(source=sys.argv[1]), sys.argv[2])\n"
        "except UserError as error: print(error)\n"
        "print(most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    said, most = done.stdout.splitlines()
    assert "has no usable image (200 skipped; the first: set.parquet row 0" in said and int(most) < 500_000  # kB


def test_an_image_that_is_postscript_starts_no_ghostscript(
    tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {sentinel}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    root = class_folders(tmp_path / "set")
    (root / "class0" / "evil.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    found = load(Data(source=str(root)), tmp_path / "cache")
    assert dict(found.skipped)["class0/evil.png"].startswith("is no image that is read (PNG, JPEG, ")


def test_a_files_name_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    (root / "class0" / "\x1b[31m.png").write_text("no image")
    found = load(Data(source=str(root)), tmp_path / "cache")
    assert found.skipped[0][0] == r"class0/\x1b[31m.png" and r"\x1b[31m" in found.describe()


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None], **columns: Any) -> None:
    """An Arrow file of ours with other facts, and other columns in the place of its own."""
    batch = pa.ipc.open_file(source).get_batch(0)
    facts = json.loads(batch.schema.metadata[b"hpcl"])
    change(facts)
    whole = {name: columns.get(name, batch.column(name)) for name in batch.schema.names}
    metadata = {"hpcl.format": batch.schema.metadata[b"hpcl.format"], "hpcl": json.dumps(facts)}
    new = pa.record_batch(whole).replace_schema_metadata(metadata)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, new.schema) as writer:
        writer.write_batch(new)


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "more images than there are": lambda facts: facts.update(shape=[10**9, 3, 12, 12]),
    "larger images": lambda facts: facts.update(shape=[30, 3, 10**6, 10**6]),
    "no shape": lambda facts: facts.update(shape="30"),
    "a negative shape": lambda facts: facts.update(shape=[30, 3, -12, -12]),
    "fewer classes than labels": lambda facts: facts.update(classes=["one"]),
    "classes that are no names": lambda facts: facts.update(classes=[1, 2, 3]),
    "a hash that is none": lambda facts: facts.update(content_hash=None),
    "reasons that are none": lambda facts: facts.update(skipped=[1]),
    "other files that are no number": lambda facts: facts.update(other_files="many"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_cached_file_that_lies_is_not_believed(lie: str, tmp_path: Path) -> None:
    root, cache = class_folders(tmp_path / "set"), tmp_path / "cache"
    true = load(Data(source=str(root)), cache)
    (file,) = cache.glob("*.arrow")
    rewritten(file, tmp_path / "given.arrow", LIES[lie])
    said = problem_of(Data(source=str(tmp_path / "given.arrow")))
    assert "an Arrow file that this project did not write or that is incomplete" in said
    os.replace(tmp_path / "given.arrow", file)
    again = load(Data(source=str(root)), cache)  # decoded anew
    assert again.content_hash == true.content_hash and (again.images == true.images).all()


def test_labels_and_parts_out_of_range_are_not_believed(tmp_path: Path) -> None:
    load(Data(source=str(class_folders(tmp_path / "set"))), tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.arrow")
    split = pa.DictionaryArray.from_arrays(pa.array([99] * 30, pa.int8()), ["a", "b", "c"], safe=False)
    for columns in ({"label": pa.array([-1] * 30)}, {"label": pa.array([2**40] * 30)}, {"split": split}):
        rewritten(file, tmp_path / "given.arrow", lambda facts: None, **columns)
        assert "that this project did not write" in problem_of(Data(source=str(tmp_path / "given.arrow")))


def test_pickles_in_the_metadata_of_tables_are_not_read(tmp_path: Path, sentinel: Path) -> None:
    """Arrow once unpickled what an extension type says of itself."""
    hostile = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(sentinel)),
    }
    pictures = pa.array([png(random_pixels(i)) for i in range(9)])
    schema = pa.schema([pa.field("image", pa.binary(), metadata=hostile)], metadata={"pandas": "{"})
    pq.write_table(pa.table([pictures], schema=schema), tmp_path / "set.parquet")
    assert len(load(Data(source=str(tmp_path / "set.parquet")), tmp_path / "cache").images) == 9
    pq.write_table(
        pa.table([pa.array([1])], pa.schema([pa.field("x", pa.int64(), metadata=hostile)])), tmp_path / "t.parquet"
    )
    assert hpcl.results.read_rows(tmp_path / "t.parquet") == [{"x": 1}]


def test_the_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    load(Data(source=str(class_folders(tmp_path / "set"))), tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
