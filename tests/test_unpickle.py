"""The unpickler that runs nothing: plain data come out as Python's own gives them, all else is refused by name."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Evil, sentinel
from pictures import random_pixels

from hpcl.sources.stored import Array, Unreadable
from hpcl.sources.unpickle import load

__all__ = ["sentinel"]

PLAIN: dict[str, Any] = {
    "nothing": None,
    "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**40, -(2**70), 1.5, True, False],
    "texts": {"a": "b", "ü": "\u732b", "long": "x" * 300, "empty": ""},
    "nested": {"x": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()], 7: {}, b"bytes": b"\x00\xff", b"": b""},
    "shared": [[1, 2]] * 3,
    "many": list(range(3000)),
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def plain(value: Any) -> Any:
    """The value with arrays read."""
    if isinstance(value, Array):
        return value.load().tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if type(value) is list else value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_as_pickle_itself_gives_them(name: str, protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps(PLAIN[name], protocol=protocol)
    if name == "nested" and protocol < 3:  # bytes are a call of _codecs.encode there
        assert b"_codecs" in content
    assert load(written(tmp_path / "x.pkl", content)) == pickle.loads(content) == PLAIN[name]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("side", [3, 200])  # 200: long enough to stay in the file
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_arrays_as_pickle_itself_gives_them(protocol: int, side: int, order: str, module: str, tmp_path: Path) -> None:
    images = np.asarray(np.stack([random_pixels(i, side, side) for i in range(3)]), order=order)  # type: ignore[call-overload]
    labels = np.arange(3, dtype=">i4")
    content = pickle.dumps({"data": images, "labels": labels, "one": np.int64(7), "f": np.float32(0.5)}, protocol)
    if protocol < 4:
        content = content.replace(b"cnumpy._core", f"c{module}".encode())
    found = load(written(tmp_path / "x.pkl", content))
    assert found["data"].shape == images.shape and found["data"].dtype == np.uint8
    assert (found["data"].load() == images).all()
    assert all((row == image).all() for row, image in zip(found["data"].rows(), images, strict=True))
    assert found["labels"].load().tolist() == [0, 1, 2] and found["one"] == 7 and found["f"] == 0.5


def python2(images: np.ndarray[Any, Any]) -> bytes:
    """A dictionary as cPickle of Python 2 wrote it with protocol 2: byte strings everywhere."""
    count, *rest = images.shape
    shape = b"".join(b"M" + struct.pack("<H", side) for side in (count, *rest))
    data = images.tobytes()
    kind = b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R(K\x01(" + shape
    array += b"t" + kind + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    return b"\x80\x02}q\x01(U\x04data" + array + b"U\x06labels]q\x06(K\x00K\x01K\x02eU\x04name" + b"U\x03M\xfcuu."


@pytest.mark.parametrize("side", [3, 200])
def test_a_pickle_of_python_2_is_read_as_latin_1(side: int, tmp_path: Path) -> None:
    images = np.stack([random_pixels(i, side, side) for i in range(3)])
    content = python2(images)
    found, wanted = load(written(tmp_path / "x.pkl", content)), pickle.loads(content, encoding="latin1")
    assert (found["data"].load() == wanted["data"]).all() and (found["data"].load() == images).all()
    assert found["labels"] == [0, 1, 2] and found["name"] == wanted["name"] == "Müu"


class Sub(np.ndarray):  # type: ignore[type-arg]
    """A class of its own."""


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
BYTE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87R"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (b'cos\nsystem\n(S"touch x"\ntR.', r"asks for os\.system, .* may run code"),
    "eval": (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031+1\x85R.", r"asks for builtins\.eval"),
    "getattr": (b"c__builtin__\ngetattr\n(}S'x'\ntR.", r"asks for __builtin__\.getattr"),
    "INST": (b"(S'x'\nios\nsystem\n.", r"asks for os\.system"),
    "OBJ": (b"(cnumpy\ndtype\nS'u1'\no.", "uses OBJ"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.", "uses NEWOBJ"),
    "PERSID": (b"Pabc\n.", "uses PERSID"),
    "BINPERSID": (b"\x80\x02K\x01Q.", "uses BINPERSID"),
    "EXT1": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "uses NEXT_BUFFER"),
    "numpy.load": (b"cnumpy\nload\n(S'x'\ntR.", r"asks for numpy\.load"),
    "numpy.memmap": (b"cnumpy\nmemmap\n(S'made'\nS'u1'\nS'w+'\ntR.", r"asks for numpy\.memmap"),
    "a submodule": (b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.", r"asks for numpy\.core\.multiarray\.fromfile"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", r"asks for numpy\.ndarray\.dump"),
    "bytes by number": (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "no whole pickle"),
    "a subclass": (pickle.dumps(np.zeros(3).view(Sub)), r"asks for test_unpickle\.Sub"),
    "objects": (pickle.dumps({"data": np.array([os.getpid, 1], dtype=object)}), "dtype 'O8': arrays of Python objects"),
    "objects with a call": (pickle.dumps(np.array([Evil(Path("x"))], dtype=object), 2), r"asks for posix|dtype 'O8'"),
    "a list as data": (b"\x80\x02" + RECONSTRUCT + b"(K\x01K\x01\x85" + BYTE + b"\x89]tb.", "array of Python objects"),
    "a compound dtype": (pickle.dumps(np.zeros(3, dtype=[("a", "u1")])), "dtype 'V1'"),
    "times": (pickle.dumps(np.zeros(3, dtype="M8[s]")), "dtype 'M8'"),
    "a call of an array": (b"\x80\x02" + RECONSTRUCT + b")R.", "calls a Array"),
    "a state of a list": (b"\x80\x02]}b.", "sets the state of a list"),
    "another encoding": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86R.", "encode to 'bz2'"),
    "a tuple as key": (b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "has a tuple as a key"),
    "a large shape": (
        b"\x80\x02" + RECONSTRUCT + b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86" + BYTE + b"\x89C\x04abcdtb.",
        r"shape \(2147483647, 2147483647\), .* but 4 bytes of data",
    ),
    "a negative shape": (
        b"\x80\x02" + RECONSTRUCT + b"(K\x01J\xff\xff\xff\xff\x85" + BYTE + b"\x89C\x04abcdtb.",
        "without shape",
    ),
    "bytes announced": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "cut off: 4,611,686,018,427,387,904"),
    "a bytearray announced": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "is cut off"),
    "a text announced": (b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.", "is cut off"),
    "a negative string": (b"\x80\x02T" + struct.pack("<i", -5) + b"x.", "negative length"),
    "a number of many digits": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "too many digits"),
    "a line of many digits": (b"I" + b"9" * 5000 + b"\n.", "line that is too long"),
    "a memo that is not there": (b"\x80\x02h\x07.", "no whole pickle"),
    "a stack that is empty": (b"\x80\x02\x87.", "a value is missing"),
    "a mark that is missing": (b"\x80\x02t.", "a mark is missing"),
    "nothing": (b"", "is cut off"),
    "no pickle": (b"\xfe\xfd", "is no pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_all_else_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, text = HOSTILE[name]
    with pytest.raises(Unreadable, match=text):
        load(written(tmp_path / "x.pkl", content))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


def test_an_object_that_runs_something_runs_nothing(tmp_path: Path, sentinel: Path) -> None:
    for protocol in range(6):
        with pytest.raises(Unreadable, match=r"asks for (posix|os)\.system"):
            load(written(tmp_path / "x.pkl", pickle.dumps({"data": Evil(sentinel)}, protocol)))


def test_every_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"data": np.arange(12, dtype="u1").reshape(3, 2, 2), "labels": [1, 2, 3]}, 4)
    for length in range(len(content)):
        with pytest.raises(Unreadable):
            load(written(tmp_path / "x.pkl", content[:length]))


def test_damaged_bytes_give_data_or_a_refusal_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 5):
        content = pickle.dumps({"data": np.arange(12, dtype="u1").reshape(3, 2, 2), "labels": [1, 2, 3]}, protocol)
        random = np.random.default_rng(protocol)
        for _ in range(80):
            broken = bytearray(content)
            for place in random.integers(0, len(content), 3):
                broken[place] = random.integers(0, 256)
            try:
                plain(load(written(tmp_path / "x.pkl", bytes(broken))))
            except Unreadable:
                continue
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


BOMBS: dict[str, bytes] = {
    "a place in the memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "an array by reconstruct": b"\x80\x02" + RECONSTRUCT.replace(b"K\x00\x85", b"J\xff\xff\xff\x7f\x85") + b".",
    "pairs of pairs": b"\x80\x02]" + b"q\x00h\x00\x86" * 300 + b".",
    "a text encoded again and again": b"\x80\x02X" + struct.pack("<I", 60000) + b"a" * 60000 + b"q\x00("
    + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 20000 + b"l.",
    "an array of a text again and again": b"\x80\x02X" + struct.pack("<I", 60000) + b"a" * 60000 + b"q\x00"
    + BYTE + b"q\x01(" + (RECONSTRUCT + b"(K\x01M\x60\xea\x85h\x01\x89h\x00tb") * 20000 + b"l.",
    "empty lists": b"\x80\x02(" + b"]" * 4_000_000 + b"l.",
}  # fmt: skip


def test_a_pickle_takes_no_more_memory_than_its_file(tmp_path: Path) -> None:
    """Each bomb in a process that may have 400 MB more than it has at the start, where Python's own takes gigabytes."""
    for number, content in enumerate(BOMBS.values()):
        written(tmp_path / f"{number}.pkl", content)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from hpcl.sources import unpickle; from hpcl.sources.stored import Unreadable\n"
        "unpickle.MOST_OPERATIONS = 300_000\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + 4 * 10**8,) * 2)\n"
        "for file in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: unpickle.load(file)\n"
        "    except Unreadable as error: assert 'MemoryError' not in str(error), (file, error)\n"
        "try: bytearray(5 * 10**8)\n"
        "except MemoryError: print('the limit holds')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the limit holds\n"


def test_long_arrays_are_not_read_before_they_are_asked_for(tmp_path: Path) -> None:
    images = np.zeros((40, 1000, 1000), np.uint8)
    path = written(tmp_path / "x.pkl", pickle.dumps({"data": images}, 4))
    found = load(path)["data"]
    assert found.shape == images.shape
    os.truncate(path, path.stat().st_size - 10**7)
    rows = found.rows()
    assert (next(rows) == 0).all()
    with pytest.raises(Unreadable, match="became shorter while it was read"):
        list(rows)
