"""Where results are: a path, or a URI such as ``s3://bucket/results`` and its place on this machine.

With a path, local or shared by all nodes, every process works in that folder. With a URI the
store has the truth, and each process works in a scratch folder of its own below the cache
folder, in which everything of the store has its place. The scratch folder goes with its
process; what a killed process left is removed by the next one.

Only names are turned into one another here; :mod:`hpcl.search.storage` moves the files.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from hpcl.errors import StorageError, UserError
from hpcl.files import cache_folder, writing

_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BROKEN_URI = re.compile(r"(s3|gs|gcs|abfss?|az|hdfs|file):/(?!/)", re.IGNORECASE)
_own: Path | None = None
"""This process's scratch folder, as soon as it has one."""


def is_uri(where: str | os.PathLike[str]) -> bool:
    """Whether this is the URI of a store; ``file://`` is a path.

    Raises:
        UserError: it was a URI before it became a ``Path``.
    """
    text = os.fspath(where)
    if _BROKEN_URI.match(text):
        raise UserError(f"{text}: a URI has two slashes after its scheme; in Python give it as text, not as a Path")
    return bool(_URI.match(text)) and not text.lower().startswith("file://")


def place(where: str | os.PathLike[str]) -> Path:
    """Where the files of a path or URI are for this process; nothing is fetched.

    Raises:
        UserError: the URI cannot be used.

    Example:
        >>> place("results/mine"), place("file:///mnt/results")
        (PosixPath('results/mine'), PosixPath('/mnt/results'))
    """
    text = os.fspath(where)
    if not is_uri(text):
        return Path(unquote(urlsplit(text).path) if _URI.match(text) else text).expanduser()
    parts = urlsplit(text)
    names = [name for name in parts.path.split("/") if name]
    if parts.password:
        raise UserError(
            f"{parts.scheme}://...@{parts.hostname}: holds a password, which would stand in logs and tables; give "
            "credentials by the environment or by a file, as the store's own tools do"
        )
    if not parts.netloc or ".." in names or "." in names:
        raise UserError(f"{text}: is no URI that can hold results; give one such as s3://bucket/results")
    store = f"{parts.scheme.lower()}://{parts.netloc}" + (f"?{parts.query}" if parts.query else "")
    return _scratch().joinpath(quote(store, safe=""), *names)


def location(path: Path) -> str:
    """The URI of a path in this process's scratch folder, by which another finds it; any other path as it is."""
    if (found := inside(path)) is None:
        return str(path)
    store, names = found
    address, mark, query = store.partition("?")
    return "/".join((address, *names)) + mark + query


def shown(path: Path) -> str:
    """The URI, or the path as short as the current folder allows."""
    if is_remote(path):
        return location(path)
    relative = Path(os.path.relpath(path))
    return str(path if relative.parts[:1] == ("..",) else relative)


def told(what: str | UserError) -> str:
    """A text with URIs in place of the paths in the scratch folder, which its reader does not know.

    Where this machine's disk is full, its path is what matters.
    """
    if _own is None or isinstance(what, StorageError):
        return str(what)
    return re.sub(re.escape(str(_own)) + r"/[^\s:;,()\"']+", lambda found: location(Path(found[0])), str(what))


def is_remote(path: Path) -> bool:
    """Whether the files of a path are copies of those in a store."""
    return inside(path) is not None


def inside(path: Path) -> tuple[str, tuple[str, ...]] | None:
    """(the store, names within it) of a path in the scratch folder; None for any other path."""
    if _own is None or not path.is_relative_to(_own):
        return None
    store, *names = path.relative_to(_own).parts
    return unquote(store), tuple(names)


def _scratch() -> Path:
    """This process's own folder, which is locked as long as the process lives."""
    global _own
    if _own is not None:
        return _own
    root = cache_folder().absolute() / "remote"
    with writing(root):
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.mkdir(exist_ok=True)
        root = root.resolve()
        with open(root / "lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            for left in root.glob("*.lock"):
                _remove_if_left(left)
            handle, name = tempfile.mkstemp(dir=root, prefix=f"{os.getpid()}-", suffix=".lock")
            fcntl.flock(handle, fcntl.LOCK_EX)  # and open until this process ends
            own = Path(name).with_suffix("")
            own.mkdir()
    pid = os.getpid()

    def leave() -> None:
        if os.getpid() == pid:
            shutil.rmtree(own, ignore_errors=True)
            Path(name).unlink(missing_ok=True)

    atexit.register(leave)
    _own = own
    return own


def _remove_if_left(lock: Path) -> None:
    """Remove the scratch folder of a process that is gone."""
    with suppress(OSError), open(lock, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()
