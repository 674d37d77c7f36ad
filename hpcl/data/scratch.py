"""The folder in which a conversion collects its pixels, so that the next process goes on where this one was killed.

It lies beside the file that is made:

    .OUT.arrow.partial/
        lock            held (flock) by the process that converts; others wait for it
        journal.jsonl   one line of JSON: what is converted; then one for each block that is whole
        pixels          the blocks' pixels, one after another
        expanded        all of them with the same channels, where some blocks are gray and some have colour
        store           the Arrow file, until it takes its place

Legend: n images of a block, N of all, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_Pixels = npt.NDArray[np.uint8]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says that has no flock."""
_CHUNK = 16 << 20
"""Bytes of pixels that are looked at, or expanded, at a time."""


@dataclass(frozen=True)
class Done:
    """A block whose pixels are in the scratch file."""

    items: int
    """Images of the source that went into it, also those left out."""
    shape: tuple[int, int, int, int]
    """(n, C, H, W) of its pixels."""
    skipped: list[tuple[int, str]]
    """Place in the block and reason of those left out."""
    crc: int
    """CRC-32 of its pixels."""

    @property
    def bytes(self) -> int:
        """Bytes of its pixels."""
        count, channels, height, width = self.shape
        return count * channels * height * width


class Scratch:
    """Pixels that were decoded, and the journal of finished blocks.

    A line of the journal counts if it is whole and the pixels it speaks of are there (their CRC-32); what comes
    after the first that does not is cut off and decoded again.

    Args:
        folder: of :func:`claimed`.
        key: what is converted; blocks of anything else are thrown away.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        self.done: list[Done] = []
        """Finished blocks, in the order of the source."""
        first = json.dumps(key, sort_keys=True) + "\n"
        kept = self._read(first)
        self._journal = open(folder / "journal.jsonl", "r+b" if kept else "w+b")  # noqa: SIM115 - closed in close()
        self._pixels = open(folder / "pixels", "r+b" if kept else "w+b")  # noqa: SIM115 - the same
        for file, end in ((self._journal, kept), (self._pixels, sum(done.bytes for done in self.done))):
            file.truncate(end)
            file.seek(end)
        if not kept:
            self._write(self._journal, first.encode())

    def _read(self, first: str) -> int:
        """Take the blocks that count into :attr:`done`; the bytes of the journal that speak of them."""
        try:
            lines = (self.folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
            if not lines or lines[0] != first.encode().rstrip():
                return 0
            kept = len(lines[0]) + 1
            with open(self.folder / "pixels", "rb") as pixels:
                for line in lines[1:]:
                    done = _done(line)
                    if done is None or _crc(pixels, done.bytes) != done.crc:
                        break
                    self.done.append(done)
                    kept += len(line) + 1
        except OSError:
            return 0
        return kept

    def add(self, items: int, pixels: list[_Pixels], skipped: list[tuple[int, str]]) -> Done:
        """Take a block in: its pixels, (H, W) or (H, W, 3) all of one size, and then its line.

        Raises:
            OSError: the disk is full; the blocks before are kept.
        """
        count = len(pixels)
        channels = 3 if any(each.ndim == 3 for each in pixels) or self._has_colour else 1
        height, width = pixels[0].shape[:2] if pixels else (0, 0)
        block = np.empty((count, channels, height, width), dtype=np.uint8)
        for place, each in zip(block, pixels, strict=True):
            place[:] = each.transpose(2, 0, 1) if each.ndim == 3 else each
        done = Done(items, (count, channels, height, width), skipped, zlib.crc32(block.data))
        self._write(self._pixels, block.data)
        line = {"items": items, "shape": done.shape, "skipped": skipped, "crc": done.crc}
        self._write(self._journal, json.dumps(line).encode() + b"\n")
        self.done.append(done)
        return done

    @property
    def _has_colour(self) -> bool:
        return bool(self.done) and self.done[-1].shape[1] == 3

    @staticmethod
    def _write(file: Any, content: bytes | memoryview) -> None:
        file.write(content)
        file.flush()

    def whole(self) -> _Pixels:
        """(N, C, H, W) of all blocks, mapped; gray ones are expanded where others have colour.

        Raises:
            OSError: the disk is full.
        """
        blocks = [done for done in self.done if done.shape[0]]
        count, channels = sum(done.shape[0] for done in blocks), max(done.shape[1] for done in blocks)
        shape = (count, channels, *blocks[0].shape[2:])
        if all(done.shape[1] == channels for done in blocks):
            return np.memmap(self.folder / "pixels", dtype=np.uint8, mode="r", shape=shape)
        with open(self.folder / "pixels", "rb") as source, open(self.folder / "expanded", "wb") as target:
            for done in blocks:
                part = np.frombuffer(source.read(done.bytes), dtype=np.uint8).reshape(done.shape)
                target.write(np.ascontiguousarray(np.broadcast_to(part, (done.shape[0], *shape[1:]))).data)
        return np.memmap(self.folder / "expanded", dtype=np.uint8, mode="r", shape=shape)

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for file in (self._journal, self._pixels):
            with suppress(OSError):  # a full disk was told of already
                file.close()


def _done(line: bytes) -> Done | None:
    """A block as its line says; None where that is not such a line."""
    try:
        said = json.loads(line)
        count, channels, height, width = (int(number) for number in said["shape"])
        skipped = [(int(place), str(reason)) for place, reason in said["skipped"]]
        done = Done(int(said["items"]), (count, channels, height, width), skipped, int(said["crc"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    sizes = (count, height, width)
    fits = channels in (1, 3) and min(sizes) >= 0 and count + len(skipped) == done.items
    return done if fits else None


def _crc(file: Any, length: int) -> int | None:
    """CRC-32 of the next bytes of a file; None where there are fewer."""
    crc = 0
    for start in range(0, length, _CHUNK):
        part = file.read(min(_CHUNK, length - start))
        crc = zlib.crc32(part, crc)
        if len(part) < min(_CHUNK, length - start):
            return None
    return crc


# ---------------------------------------------------------------- one process at a time


@contextmanager
def claimed(target: Path, waits: Callable[[float], None]) -> Iterator[Path]:
    """The scratch folder of a file, for this process alone; waits while another one has it.

    Where the file system has no locks, or somebody else made the folder, a private one is used, from which no
    other process goes on.

    Args:
        target: the file that is made; its folder must be there.
        waits: called with the seconds waited so far, about ten times a second.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = target.with_name(f".{target.name}.partial")
    handle = _lock(folder, waits)
    if handle is None:
        private = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        try:
            yield private
        finally:
            shutil.rmtree(private, ignore_errors=True)
        return
    try:
        yield folder
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Remove a scratch folder that is claimed; the lock last: who waits for it may make a new folder at once."""
    with suppress(OSError):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "lock"):
            entry.unlink(missing_ok=True)
        folder.rmdir()


def _lock(folder: Path, waits: Callable[[float], None]) -> int | None:
    """A handle that holds the folder's lock; None where there can be none."""
    started = time.monotonic()
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                return None
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # it was removed just now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), (folder / "lock").stat()):
                return handle
            os.close(handle)
        except FileNotFoundError:  # the file we hold is no longer there
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            waits(time.monotonic() - started)
            time.sleep(0.1)
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
