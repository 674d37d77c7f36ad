"""Files between the scratch folder of a process and the store that has the truth (:mod:`hpcl.search.places`).

Where results lie in a folder that every node sees, nothing here does anything. With a URI
:func:`fetch` brings what the store has, and :func:`push` sends what is new or has changed.

An object is replaced as a whole, so a reader finds the old one or the new one. What is
appended to (:data:`APPENDED`) lies in parts of a mebibyte, ``journal.jsonl``,
``journal.jsonl.1`` and so on, of which only the last is ever sent again.

pyarrow opens ``s3``, ``gs``, ``abfs`` and ``hdfs``, fsspec any other scheme whose package is
installed. Credentials are found as those libraries find them, on every node.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import posixpath
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from hpcl.errors import StorageError, UserError
from hpcl.files import writing
from hpcl.search.places import inside, is_remote, is_uri, place

T = TypeVar("T")

APPENDED = ("journal.jsonl", "optuna.journal", "ray.log")
"""Files that only grow."""
PART = 1 << 20
"""Bytes of a part of such a file."""

_CHUNK = 1 << 24
"""Bytes that are moved at a time."""
_OPTIONS = {
    "s3": {"allow_delayed_open": "true"},  # one request for a small file instead of three
    "gs": {"retry_limit_seconds": "30"},  # not pyarrow's 15 minutes
    "gcs": {"retry_limit_seconds": "30"},
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LAST = ("checkpoint", "search.json")
_ADVICE = "see that it is there and that this machine has the credentials and the network to use it"
_got: dict[Path, tuple[int, int | None]] = {}
"""Size and time of the object that was brought to a place."""
_sent: dict[Path, tuple[int, int, int]] = {}
"""What a file was when it was brought or sent."""


def check(where: str | os.PathLike[str]) -> None:
    """See that a store can be written; for a path nothing.

    Raises:
        UserError: its scheme is not known, a package or credentials are missing, or there is no such bucket.
    """
    if not is_uri(where):
        return
    if (scheme := urlsplit(os.fspath(where)).scheme.lower()) == "memory":
        raise UserError(f"{os.fspath(where)}: {scheme} lies in one process, and trials run in others; give a store")
    probe = place(where) / f".hpcl-{os.urandom(4).hex()}"
    files, at = opened(probe)

    def write() -> None:
        with files.open_output_stream(at) as stream:
            stream.write(b"hpcl")
        files.delete_file(at)

    try:
        _try(probe.parent, write, patience=0.0)
    except StorageError as error:  # nothing has begun that could go on later
        raise UserError(*error.problems) from error


def opened(path: Path) -> tuple[Any, str]:
    """pyarrow's file system of a place in the scratch folder, and where it lies there.

    Raises:
        UserError: the scheme is not known, or its package is missing.
    """
    found = inside(path)
    assert found is not None, path
    store, names = found
    files, root = _open(store)
    return files, "/".join((root, *names))


def storage_trouble(error: BaseException) -> str | None:
    """What keeps results from being written, where that is behind an error; None where it is not.

    Ray wraps an error of ours in one of its own, or in its text.
    """
    causes: list[BaseException] = [error]
    for cause in causes:
        if isinstance(cause, StorageError):
            return str(cause)
        inner = (getattr(cause, "cause", None), cause.__cause__, cause.__context__)
        causes += [each for each in inner if isinstance(each, BaseException) and each not in causes]
    return full_disk("\n".join(map(str, causes)))


def full_disk(text: str) -> str | None:
    """The last line of an error's text that tells of a full disk, with what to do; None where none does."""
    full = [os.strerror(number) for number in _FULL]
    for line in reversed(text.splitlines()):
        if any(reason in line for reason in full):
            return f"{line.strip()}; free space there, or give the folder back"
    return None


# ---------------------------------------------------------------- bring and send


def fetch(folder: Path, names: Collection[str] | None = None, *, deep: bool = False) -> None:
    """Bring a folder's files, those that have changed since this process had them.

    Args:
        folder: in the scratch folder; for any other nothing happens.
        names: of the files; None: all.
        deep: those of the folders in it too.

    Raises:
        StorageError: the store does not answer.
    """
    if not is_remote(folder):
        return
    parts: dict[str, dict[int, Any]] = {}
    for name, info in sorted(_listed(folder, deep=deep).items()):
        stem, number = name, 0
        head, _, tail = name.rpartition(".")
        if head in APPENDED and tail.isdecimal():
            stem, number = head, int(tail)
        if names is not None and stem not in names:
            continue
        if stem in APPENDED:
            parts.setdefault(stem, {})[number] = info
        elif _got.get(folder / name) != (info.size, info.mtime_ns) or not (folder / name).exists():
            if not _download(info, folder / name):
                continue
            _got[folder / name], _sent[folder / name] = (info.size, info.mtime_ns), _identity(folder / name)
    for stem, infos in parts.items():
        _join(folder / stem, infos)


def push(folder: Path, names: Collection[str] | None = None, *, deep: bool = False) -> None:
    """Send a folder's files, those that are new or have changed since this process brought or sent them.

    Hidden files, locks and :data:`APPENDED` are left out. A file that took another name is copied within the
    store. Checkpoints and ``search.json`` go last: whoever finds one finds tables that go as far.
    Arguments as in :func:`fetch`; with `deep`, what was removed here is removed there too.

    Raises:
        StorageError: the store does not answer.
    """
    if not is_remote(folder):
        return
    found = {
        path: _identity(path)
        for path in (folder.rglob("*") if deep else folder.iterdir())
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix != ".lock"
        and path.name not in APPENDED
        and (names is None or path.name in names)
    }
    new = {path: identity for path, identity in found.items() if _sent.get(path) != identity}
    known = {identity: path for path, identity in _sent.items() if path.is_relative_to(folder)}
    moved = {path: known[identity] for path, identity in new.items() if identity in known}
    for path in moved.keys() - moved.values():
        copy(moved[path], path)
        _sent[path] = new.pop(path)
    for path in sorted(new, key=lambda path: (path.name.startswith(_LAST), path)):
        _upload(path, path)
        _sent[path] = new[path]
    if deep and names is None:
        for path in [path for path in _sent if path.is_relative_to(folder) and not path.exists()]:
            remove(path)


def push_part(path: Path, number: int, size: int) -> None:
    """Send one part of a file that is appended to, as far as it goes among the first `size` bytes."""
    with open(path, "rb") as file:
        file.seek(number * PART)
        content = file.read(min(PART, size - number * PART))
    part = path.with_name(f".{path.name}.part")
    with writing(part):
        part.write_bytes(content)
    _upload(part, _part(path, number))


def remove_parts(path: Path, above: int) -> None:
    """Remove the parts of such a file above a number."""
    there = _listed(path.parent)
    for number in range(above + 1, above + 1 + len(there)):
        if _part(path, number).name in there:
            remove(_part(path, number))


# ---------------------------------------------------------------- look, copy, remove


def exists(path: Path) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        try:
            return path.is_file()
        except OSError:  # a mount that has gone
            return False
    from pyarrow.fs import FileType

    files, at = opened(path)
    return bool(_try(path, lambda: files.get_file_info(at)).type == FileType.File)


def changed(path: Path) -> float | None:
    """When a store got this object, in seconds since 1970 by the store's clock; None where it does not say."""
    files, at = opened(path)
    info = _try(path, lambda: files.get_file_info(at))
    return None if info.mtime_ns is None else info.mtime_ns / 1e9


def copy(source: Path, target: Path) -> None:
    """Copy one object within a store."""
    (files, at), (_, to) = opened(source), opened(target)
    _try(target, lambda: files.copy_file(at, to))


def remove(path: Path) -> None:
    """Remove a file or a folder, here and in the store; nothing where there is none."""
    if is_remote(path):
        from pyarrow.fs import FileType

        files, at = opened(path)

        def delete() -> None:
            kind = files.get_file_info(at).type
            with suppress(FileNotFoundError):  # another process was first
                if kind == FileType.File:
                    files.delete_file(at)
                elif kind == FileType.Directory:
                    files.delete_dir(at)

        _try(path, delete)
    _remove_here(path)


def drop(path: Path) -> None:
    """Remove this process's copy of a file or folder in a store; any other stays."""
    if is_remote(path):
        _remove_here(path)


def _remove_here(path: Path) -> None:
    for known in (_got, _sent):
        for each in [each for each in known if each.is_relative_to(path)]:
            del known[each]
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- the store


@functools.cache
def _open(store: str) -> tuple[Any, str]:
    """pyarrow's file system of a store, and its root there."""
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    parts = urlsplit(store)
    query = urlencode({**_OPTIONS.get(parts.scheme, {}), **dict(parse_qsl(parts.query))}, safe=":/")
    uri = f"{parts.scheme}://{parts.netloc}/"
    try:
        files, root = FileSystem.from_uri(f"{uri}?{query}" if query else uri)
    except ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise UserError(f"{store}: cannot be used ({_reason(error)}); mend the URI") from None
        try:
            import fsspec

            there, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except (ImportError, ValueError) as missing:
            known = "give a path, or a URI of s3, gs, abfs or hdfs, or of a scheme whose fsspec package is installed"
            raise UserError(f"{store}: cannot be used ({_reason(missing)}); {known}") from None
        files = PyFileSystem(FSSpecHandler(there))
    except OSError as error:
        raise StorageError(f"{store}: cannot be used from {platform.node()} ({_reason(error)}); {_ADVICE}") from error
    return files, root.rstrip("/")


def _patience() -> float:
    """Seconds for which a store that does not answer is waited for: ``$HPCL_STORAGE_PATIENCE``, else 60."""
    return float(os.environ.get("HPCL_STORAGE_PATIENCE") or 60)


def _try(path: Path, action: Callable[[], T], patience: float | None = None) -> T:
    """What an action on the store gives; one that fails is tried again for some time.

    Raises:
        StorageError: it still failed.
    """
    until, pause = time.monotonic() + (_patience() if patience is None else patience), 0.25
    while True:
        try:
            return action()
        except Exception as error:  # packages of fsspec raise errors of their own
            if getattr(error, "errno", None) in _FULL:
                raise StorageError(
                    f"{path.parent}: cannot be written ({error}); free space there, or set HPCL_CACHE to another folder"
                ) from error
            if time.monotonic() + pause > until:
                store, _ = inside(path) or (str(path), ())
                raise StorageError(
                    f"{store}: cannot be used from {platform.node()} ({_reason(error)}); {_ADVICE}"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _listed(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Path below a folder -> pyarrow's description, of the files there."""
    from pyarrow.fs import FileSelector, FileType

    files, at = opened(folder)
    selector = FileSelector(at, allow_not_found=True, recursive=deep)
    return {
        posixpath.relpath(info.path.strip("/"), at.strip("/")): info
        for info in _try(folder, lambda: files.get_file_info(selector))
        if info.type == FileType.File
    }


def _download(info: Any, local: Path) -> bool:
    """Bring one object; False where it is gone meanwhile."""
    from pyarrow.fs import LocalFileSystem, copy_files

    files, _ = opened(local)
    temporary = local.with_name(f".{local.name}.tmp")
    with writing(local):
        local.parent.mkdir(parents=True, exist_ok=True)
    here: Any = {"source_filesystem": files, "destination_filesystem": LocalFileSystem(), "chunk_size": _CHUNK}

    def bring() -> bool:
        with suppress(FileNotFoundError):
            copy_files(info.path, str(temporary), **here)
            return True
        return False

    if not _try(local, bring):
        return False
    if info.mtime_ns is not None:
        os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
    os.replace(temporary, local)
    return True


def _upload(local: Path, target: Path) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    files, at = opened(target)
    # One call of C++, which no signal cuts short: a store takes a stream that is closed too early for the whole.
    there: Any = {"source_filesystem": LocalFileSystem(), "destination_filesystem": files, "chunk_size": _CHUNK}
    _try(target, lambda: copy_files(str(local), at, **there))


def _join(path: Path, parts: dict[int, Any]) -> None:
    """Put the parts of a file that is appended to together; whole ones that are here stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "ab+") as file:
        first = min(file.tell() // PART, max(parts))
        file.truncate(first * PART)
        temporary = path.with_name(f".{path.name}.part")
        for number in range(first, len(parts)):
            if number not in parts or not _download(parts[number], temporary):
                break
            file.write(temporary.read_bytes())
            temporary.unlink()
    if newest := max(info.mtime_ns or 0 for info in parts.values()):
        os.utime(path, ns=(newest, newest))


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _identity(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
