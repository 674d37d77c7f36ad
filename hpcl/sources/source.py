"""What a source of images is once it was found, and the words that name its parts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from hpcl.errors import UserError

SPLITS = ("train", "val", "test")
"""Names of the parts; a part's code is its place here."""

SPLIT_CODES = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
KINDS = (
    "mnist5k, a folder of images (with or without CSV files that name them, or in VOC's layout), "
    "a CSV, Parquet, npz or pickle file or a folder of them, CIFAR's python batches, or an Arrow file this "
    "project wrote"
)
"""For messages."""


_FORMS = b"3\0"
"""Changes when the same files are understood otherwise than before."""


class DataError(UserError):
    """The images cannot be used; each problem says where, what it is, what is needed and what to do."""


@dataclass(frozen=True)
class Source:
    """A source that exists, not yet decoded."""

    kind: str
    """mnist5k, folder, csv, voc, parquet, npz, pickle or arrow."""
    path: Path | None
    files: tuple[Path, ...]
    """Every file that is read: images, tables and lists, sorted within each kind."""
    fingerprint: str
    """Changes when a file's name, size or time of change does."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Entries that give no image, with the reason."""
    others: tuple[str, ...] = field(default=(), repr=False)
    """Names of files that are no images."""
    litter: tuple[tuple[str, str], ...] = ()
    """Hidden files and what other systems leave behind, with what each is; left out everywhere."""
    empty: tuple[str, ...] = ()
    """Folders without any image, where folders are classes."""
    notes: tuple[str, ...] = ()
    """Sentences on how the source was understood where it might be understood otherwise."""
    detail: Any = field(default=None, compare=False, repr=False)
    """What the reader of this kind found, so that it need not look again."""

    @property
    def other_files(self) -> int:
        """Number of files that are no images."""
        return len(self.others)


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names, sizes and times of change of files below `root` (or of `root` itself)."""
    digest = hashlib.sha256(_FORMS + str(root).encode("utf-8", "surrogateescape"))
    for file in files:
        found = file.stat()
        name = str(file.relative_to(root)).encode("utf-8", "surrogateescape")
        digest.update(name + f"\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def same_names(
    before: tuple[tuple[str, ...], Path] | None, names: tuple[str, ...], file: Path
) -> tuple[tuple[str, ...], Path]:
    """Class names and the file that said them first.

    Raises:
        DataError: another file says others, so that its numbers mean other classes.
    """
    if before is not None and before[0] != names:
        at = next((i for i, pair in enumerate(zip(*(before[0], names), strict=False)) if pair[0] != pair[1]), None)
        where = f"class {at} is {before[0][at]} and {names[at]}" if at is not None else f"{len(names)} classes"
        raise DataError(
            f"data.source: {before[1]} and {file} name different classes ({where}), so the same number would mean two; "
            "write both with the same list"
        )
    return before or (names, file)


def split_of(name: str | PurePath, *, folders: bool = True) -> int | None:
    """Code of the split that a file's name says: the last such word of it, else its nearest folder's whole name.

    >>> [split_of(name) for name in ("mini-imagenet-cache-val.pkl", "data/test-00000.parquet", "train/a.csv", "a.csv")]
    [1, 2, 0, None]
    """
    path = PurePath(name)
    words = re.findall(r"[a-z]+", path.stem.lower())
    names = [*reversed(words), *(part.lower() for part in reversed(path.parts[:-1]) if folders)]
    return next((SPLIT_CODES[name] for name in names if name in SPLIT_CODES), None)
