"""Files that people keep: written whole or not at all, by one process, through no link; read without waiting.

Nothing here needs torch, ray or optuna.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpcl.errors import StorageError, TakenOver, UserError

_MOST_JSON = 64 * 2**20
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ENODEV)


def read_some(path: Path, most: int) -> bytes:
    """A file's content, up to so many bytes and one: the caller refuses what has more.

    Raises:
        OSError: there is no such file, or it is one that would be waited for (a pipe).
    """
    # Without waiting: who opens a pipe that nobody writes to never comes back.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Is a pipe", str(path))
        return file.read(most + 1)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError, ValueError: there is none.
    """
    try:
        content = json.loads(read_some(path, _MOST_JSON))
    except RecursionError:
        raise ValueError("nests too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, but must be an object")
    return content


def hash_of(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_in_words(count: int) -> str:
    """A number of bytes with two or three digits.

    >>> bytes_in_words(3_920_000), bytes_in_words(380_000_000), bytes_in_words(12_340_000_000)
    ('3.9 MB', '380 MB', '12 GB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.{3 if count >= 100 * unit else 2}g} {name}"
    return f"{count} bytes"


def cache_folder() -> Path:
    """Where decoded images and copies of remote results lie: ``$HPCL_CACHE``, else ``~/.cache/hpcl``."""
    return Path(os.environ.get("HPCL_CACHE") or Path.home() / ".cache" / "hpcl").expanduser()


def refuse_links(folder: Path, *, itself: bool = False) -> None:
    """See that nothing below a folder is a link: what is written there would go elsewhere.

    A folder that somebody else made may hold some; the folder itself may be one, unless `itself`. (What a
    dashboard of Optuna's leaves when it is killed, ``optuna.journal.lock``, is never written to.)

    Raises:
        UserError: something is; names the first and where it leads.
    """
    if itself and folder.is_symlink():
        raise _link(folder)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not entry.name.endswith(".lock"):
                    raise _link(Path(entry.path))
                if entry.is_dir(follow_symlinks=False):
                    refuse_links(Path(entry.path))
    except OSError:  # nothing there yet, or nothing that can be read: the first write will tell
        return


def _link(path: Path) -> UserError:
    return UserError(
        f"{path}: is a link to {path.readlink()}, but results are written through no link; put a copy of what it leads "
        "to in its place, or remove it"
    )


def may_write(out: Path, begins: str | bytes, command: str, instead: str, force: bool = False) -> None:
    """See that a file can be written: there is none, or one whose first 200 bytes hold these words.

    Args:
        out: the file.
        begins: what stands at the beginning of each file that the command writes.
        command: that writes it.
        instead: what the user can do where something else is there.
        force: overwrite whatever file is there.

    Raises:
        UserError: it was not written by the command, is a folder, or its folder is not there.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name another file")
    if out.is_dir():
        raise UserError(f"{out}: is a folder, but must be a file to write")
    if force or not out.exists():
        return
    try:
        ours = (begins.encode() if isinstance(begins, str) else begins) in read_some(out, 200)
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror}); name another file") from error
    if not ours:
        raise UserError(f"{out}: is there already, and not written by `{command}`; {instead}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the user where the disk is full or the folder cannot be written, instead of an OSError.

    Raises:
        StorageError: it is so.
    """
    try:
        yield
    except OSError as error:
        # Folders are made before they are written into: one that is missing was taken away meanwhile.
        advice = "free space there"
        if error.errno in _GONE:
            advice = "was its disk unmounted? Bring it back"
        elif error.errno in _CLOSED:
            advice = "see that you may write there"
        raise StorageError(f"{path}: cannot be written ({error}); {advice}, or give another folder") from error


def claim(folder: Path) -> Path:
    """Take a folder over from whichever process trained in it; gives a folder within, for :func:`atomic_path`.

    A process that was cut off or slept may wake when another one trains in its place. What it
    writes passes through its own folder within, which is moved away here: its next file does not come to stand.
    To be called before anything is read there.

    Raises:
        StorageError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".attempt-*"):
            gone = folder / f".gone-{os.urandom(4).hex()}"
            with suppress(FileNotFoundError):  # its process has just ended
                left.rename(gone)
        for left in folder.glob(".gone-*"):
            shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=folder, prefix=".attempt-"))


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """As :func:`claim`, for the length of the block; a folder that was made here and holds nothing goes again."""
    new = not folder.exists()
    through = claim(folder)
    try:
        yield through
    finally:
        shutil.rmtree(through, ignore_errors=True)
        if new:
            with suppress(OSError):  # there are files in it
                folder.rmdir()


@contextmanager
def atomic_path(path: Path, through: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, if the block succeeds.

    A reader sees the old file or the new one, never a part; a failing block leaves
    the old file as it was.

    Args:
        path: the file.
        through: a folder of :func:`claim` in which the temporary path lies instead.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
        TakenOver: another process has claimed the folder since.
    """
    with writing(path), _unless_taken_over(through):
        if through is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=through or path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _unless_taken_over(through: Path | None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if through is None or through.exists() or not through.parent.exists():
            raise
        raise TakenOver(
            f"{through.parent}: another process trains there since, and has gone on from the last checkpoint; this one "
            "ends. Give each its own folder, if both are meant"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
