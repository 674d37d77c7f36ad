"""Images in numpy's .npz files, read row by row; no pickle in them is touched.

| form | names of the arrays |
|---|---|
| one set | `images`, `x` or `data`; perhaps `labels` or `y`, `split`, `coarse_labels`, `classes` |
| Keras | `x_train`, `y_train`, `x_test`, `y_test`; perhaps `x_val`, `y_val` |
| MedMNIST | `train_images`, `train_labels`, and the same for `val` and `test` |

Images are uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W), labels of shape (N,) or (N, 1).
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hpcl.decode import MOST_PIXELS, Item
from hpcl.sources.source import SPLIT_CODES, SPLITS, DataError, Source, fingerprint, same_names, split_of
from hpcl.sources.stored import Unreadable, as_image, image_layout
from hpcl.sources.walk import Tree

MOST_GROWTH = 200
"""Times a compressed array may be larger than what stands in the file, if it is larger than `_SMALL`; photos
compress 1.5 times, MNIST 5 times."""
_SMALL = 2**26
_IMAGES, _LABELS, _COARSE = ("images", "x", "data"), ("labels", "y"), ("coarse_labels", "coarse_label")
_PARTS = {
    f"{front}{name}{back}": (kind, code)
    for name, code in (("train", 0), ("val", 1), ("test", 2))
    for front, back, kind in (
        ("x_", "", "images"), ("y_", "", "labels"), ("", "_images", "images"), ("", "_labels", "labels"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class _Header:
    """What an array in the file says of itself, checked against its length."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


@dataclass(frozen=True)
class _Set:
    """Arrays that belong together."""

    path: Path
    images: _Header
    labels: list[Any] | None
    coarse: list[Any] | None
    split: int | list[int]
    classes: tuple[str, ...] | None


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind: all its npz files that hold images.

    Raises:
        DataError: it holds npz files and no image file, and none of them can be used; says why.
    """
    candidates = tree.ending(".npz")
    sets: list[_Set] = []
    failed = []
    for path in candidates:
        try:
            sets += _sets(path, split_of(tree.name(path)))
        except (Unreadable, OSError) as error:
            failed.append((path, _reason(error)))
    if not sets:
        if failed and not tree.images and all(path in candidates for path in tree.others):
            raise DataError(*(f"data.source: {path} {reason}" for path, reason in failed))
        return None
    used = sorted({each.path for each in sets})
    others = [tree.name(path) for path in [*tree.others, *tree.images] if path not in set(candidates)]
    skipped = ((tree.name(path), reason) for path, reason in failed)
    notes = (f"taken as npz files; its {len(tree.images):,} image files are not read",) if tree.images else ()
    return tree.source("npz", used, others, skipped=skipped, notes=notes, detail=tuple(sets))


def look_at_file(path: Path) -> Source:
    """One file as a source.

    Raises:
        DataError: it is no npz file of images; says why.
    """
    try:
        sets = _sets(path, None)
    except (Unreadable, OSError) as error:
        raise DataError(f"data.source: {path} {_reason(error)}") from error
    return Source("npz", path, (path,), fingerprint(path, [path]), detail=tuple(sets))


def items(source: Source) -> Iterator[Item]:
    """One item per image, in the order of files, splits and rows.

    Raises:
        DataError: a file is damaged.
    """
    assert source.path is not None
    root = source.path if source.path.is_dir() else source.path.parent
    for each in source.detail:
        name = f"{each.path.relative_to(root).as_posix()} {each.images.member.removesuffix('.npy')}"
        layout = image_layout(each.images.shape)
        assert layout is not None
        try:
            for number, row in enumerate(_rows(each.path, each.images)):
                yield Item(
                    f"{name} {number}",
                    as_image(row, layout),
                    each.labels[number] if each.labels else None,
                    each.split if isinstance(each.split, int) else each.split[number],
                    coarse=each.coarse[number] if each.coarse else None,
                )
        except (Unreadable, OSError) as error:
            raise DataError(f"data.source: {each.path} {_reason(error)}") from error


def class_names(source: Source) -> tuple[str, ...] | None:
    """Names of labels that are numbers, which files that have them agree on.

    Raises:
        DataError: they differ between files.
    """
    said: tuple[tuple[str, ...], Path] | None = None
    for each in source.detail:
        if each.classes:
            said = same_names(said, each.classes, each.path)
    return said[0] if said else None


def _reason(error: Exception) -> str:
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)


def _sets(path: Path, of_file: int | None) -> list[_Set]:
    """The sets of images of one file; `of_file` is the split that its name says."""
    with _opened(path) as archive:
        headers = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name.lower() in {*_IMAGES, *_LABELS, *_COARSE, *_PARTS, "split", "classes"}:
                headers[name.lower()] = _header(archive, info)
    parts = [code for code in range(len(SPLITS)) for name in headers if _PARTS.get(name) == ("images", code)]
    if parts:
        names = {key: name for name, key in _PARTS.items() if name in headers}
        of_parts = [
            _Set(
                path,
                _images(headers[names["images", code]]),
                _labels(path, headers.get(names.get(("labels", code), "")), headers[names["images", code]]),
                None,
                code,
                _names(path, headers.get("classes")),
            )
            for code in parts
        ]
        if len({each.labels is None for each in of_parts}) > 1:
            raise Unreadable("has labels for some of its splits only")
        return of_parts
    first = next((headers[name] for name in _IMAGES if name in headers), None)
    if first is None:
        with _opened(path) as archive:
            found = ", ".join(info.filename.removesuffix(".npy") for info in archive.infolist()[:8])
        raise Unreadable(f"has no array `images`, `x`, `data`, `x_train` or `train_images` (only {found or 'nothing'})")
    images = _images(first)
    label = next((headers[name] for name in _LABELS if name in headers), None)
    coarse = next((headers[name] for name in _COARSE if name in headers), None)
    split = _labels(path, headers.get("split"), images)
    codes: int | list[int] = of_file or 0 if split is None else [_code(value) for value in split]
    classes = _names(path, headers.get("classes"))
    return [_Set(path, images, _labels(path, label, images), _labels(path, coarse, images), codes, classes)]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with it as `Unreadable`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,  # zipfile's, of an archive that needs a later version of it
        RuntimeError,
        EOFError,
        ValueError,
        MemoryError,
    ) as error:
        raise Unreadable(f"is no whole npz file ({' '.join(str(error).split())[:150]})") from error


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    """An array's shape and type, if its length is as they say."""
    name = info.filename.removesuffix(".npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise Unreadable(f"has `{name}` encrypted or compressed in a way that numpy does not write")
    if info.file_size > _SMALL and info.file_size > MOST_GROWTH * info.compress_size:
        raise Unreadable(
            f"has `{name}` of {info.compress_size:,} bytes that would become {info.file_size:,}: more than "
            f"{MOST_GROWTH} times as much, which images never do; write it with np.savez if it is meant"
        )
    with archive.open(info) as file:
        shape, fortran, dtype = _read_header(file, name)
        start = file.tell()
    if dtype.hasobject:
        raise Unreadable(
            f"has `{name}` as Python objects, which may run code; write it as plain numbers or texts (dtype=str)"
        )
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != info.file_size - start:
        raise Unreadable(
            f"has `{name}` of shape {shape} and dtype {dtype}, but {info.file_size - start:,} bytes of data for it"
        )
    return _Header(info.filename, tuple(int(side) for side in shape), dtype, fortran)


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # a later one may announce gigabytes of header
        raise Unreadable(f"has `{name}` in version {version} of numpy's format, but plain arrays have (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, fortran, dtype


def _images(header: _Header) -> _Header:
    """See that an array holds images."""
    name = header.member.removesuffix(".npy")
    if header.dtype != np.uint8:
        raise Unreadable(
            f"has `{name}` of dtype {header.dtype}, but images must be uint8, 0 to 255; scale and round them"
        )
    if image_layout(header.shape) is None:
        raise Unreadable(
            f"has `{name}` of shape {header.shape}, but must be (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3"
        )
    if not 0 < math.prod(header.shape[1:]) <= 3 * MOST_PIXELS:
        raise Unreadable(f"has `{name}` of shape {header.shape}: an image may have 1 to {MOST_PIXELS:,} pixels")
    return header


def _labels(path: Path, header: _Header | None, images: _Header) -> list[Any] | None:
    """Numbers or texts, one for each image."""
    if header is None:
        return None
    name = header.member.removesuffix(".npy")
    count = images.shape[0]
    if header.shape not in ((count,), (count, 1)):
        raise Unreadable(f"has `{name}` of shape {header.shape}, but must have one label for each of {count:,} images")
    if header.dtype.kind not in "biuSU":
        raise Unreadable(f"has `{name}` of dtype {header.dtype}, but labels must be whole numbers or texts")
    if header.dtype.itemsize > 1024:
        raise Unreadable(f"has `{name}` of texts of {header.dtype.itemsize} bytes each, which are no labels")
    found = np.concatenate([row.reshape(-1) for row in _rows(path, header)]).tolist() if count else []
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in found]


def _names(path: Path, header: _Header | None) -> tuple[str, ...] | None:
    """Class names."""
    if header is None:
        return None
    size = (header.dtype.itemsize + 1) * math.prod(header.shape)
    if len(header.shape) != 1 or header.dtype.kind not in "SU" or size > _SMALL:
        raise Unreadable(f"has `classes` of shape {header.shape} and dtype {header.dtype}, but must have texts (N,)")
    found = [row.item() for row in _rows(path, header)]
    return tuple(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in found)


def _code(value: Any) -> int:
    code = SPLIT_CODES.get(str(value).lower(), value if type(value) is int and value in range(len(SPLITS)) else None)
    if code is None:
        raise Unreadable(f"has {value!r} in `split`, but must have train, val, test or 0, 1, 2")
    return int(code)


def _rows(path: Path, header: _Header) -> Iterator[np.ndarray[Any, Any]]:
    """Each row of an array in turn."""
    shape, length = header.shape[1:], math.prod(header.shape[1:]) * header.dtype.itemsize
    with _opened(path) as archive, archive.open(header.member) as file:
        _read_header(file, header.member)
        if header.fortran and len(header.shape) > 1:  # rare, and its rows do not lie together
            whole = np.frombuffer(file.read(length * header.shape[0]), header.dtype)
            yield from whole.reshape(header.shape, order="F")
            return
        for _ in range(header.shape[0]):
            row = file.read(length)
            if len(row) != length:
                raise Unreadable(f"has `{header.member.removesuffix('.npy')}` cut off")
            yield np.frombuffer(row, header.dtype).reshape(shape)
