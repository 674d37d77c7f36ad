"""CSV files that name image files, their classes and splits.

Ravi & Larochelle's mini-ImageNet has train.csv, val.csv and test.csv (`filename,label`) and its images in
`images/` beside them; others keep one labels.csv or metadata.csv. Columns, whatever their order and case:
`filename`, `file_name`, `file`, `path` or `image`; perhaps `label`, `labels`, `class`, `class_id`, `classid`
or `category`, `split`, `coarse_label`.
Without a column `split` the CSV's name says the split, or its folder's, or the first folder of each path.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hpcl.decode import Item
from hpcl.files import read_some
from hpcl.sources.source import SPLIT_CODES, SPLITS, DataError, Source, split_of
from hpcl.sources.walk import IMAGE_ENDINGS, Tree, walk

_FILE = ("filename", "file_name", "file", "path", "image")
_LABEL = ("label", "labels", "class", "class_id", "classid", "category")
_KNOWN = {"labels", "label", "metadata", "annotations", "index", "images", "classes"}
"""Names of CSV files that describe the whole set; any other is one only where there is none of these."""
_OF_LISTS = {"splits", "split", "lists", "csv", "labels", "annotations", "meta", "metadata"}
_MOST = 2**30
_MOST_HEAD = 2**16


@dataclass(frozen=True)
class Row:
    """One image that a row names."""

    path: Path
    label: Any
    coarse: Any
    split: int
    name: str
    """Its path below the source's folder."""
    where: str
    """The CSV file and line, for messages."""


@dataclass
class _Rows:
    """What all CSV files of a source say."""

    taken: dict[Path, Row] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind: its CSV files name at least one image below it.

    Files named for splits, labels.csv and the like go before CSV files of other names.
    """
    if not tree.images:
        return None
    tables = [path for path in tree.ending(".csv") if _dialect(path) is not None]
    known = [path for path in tables if split_of(path.name) is not None or path.stem.lower() in _KNOWN]
    return _source(tree, tree.root, known or tables)


def note(tree: Tree) -> tuple[str, ...]:
    """What to say of a folder with lists that name none of its images, or have no column that could."""
    lists = [tree.name(path) for path in tree.ending(".csv") if _dialect(path) is not None]
    said = ", ".join(lists[:4]) + (f" and {len(lists) - 4} more" if lists[4:] else "")
    notes = [f"taken as folders of images: no row of {said} names one of them"] if lists else []
    for path in tree.ending(".csv"):
        if _dialect(path) is None and (path.stem.lower() in _KNOWN or split_of(path.name) is not None):
            notes.append(f"{tree.name(path)} is not read: its first line has no column filename, file, path or image")
    return tuple(notes)


def look_at_file(path: Path) -> Source | None:
    """One CSV file as a source, with the images below its folder; None if it has no column of file names.

    Where that folder is called `splits` or the like, the images may lie beside it.

    Raises:
        DataError: it has one, but none of the files is there.
    """
    if _dialect(path) is None:
        return None
    source = _source(walk(path.parent), path, [path])
    if source is None and path.parent.name.lower() in _OF_LISTS:
        source = _source(walk(path.parent.parent), path, [path])
    if source is None:
        raise DataError(
            f"data.source: {path} names no image that lies in {path.parent} or below; "
            "put it beside the images, or give their folder"
        )
    return source


def items(source: Source) -> Iterator[Item]:
    """One item per row whose image is there, in the rows' order."""
    assert source.path is not None
    for row in source.detail:
        yield Item(row.name, row.path, row.label, row.split, coarse=row.coarse)


def _source(tree: Tree, path: Path, tables: list[Path]) -> Source | None:
    rows = _Rows()
    files = _Files(tree)
    for table in tables:
        _take(tree, files, table, rows)
    if not rows.taken:
        return None
    unnamed = [image for image in tree.images if image not in rows.taken]
    skipped = [
        *rows.skipped,
        *((tree.name(image), "no row of a CSV file names it") for image in unnamed),
    ]
    others = tuple(tree.name(other) for other in tree.others if other not in tables)
    said = ", ".join(tree.name(table) for table in tables[:4]) + (f" and {len(tables) - 4} more" if tables[4:] else "")
    notes = [f"taken as the rows of {said}; names of folders say nothing then"] if path == tree.root else []
    if unnamed:
        notes.append(f"{len(unnamed):,} of {len(tree.images):,} image files are left out, as no row names them")
    used = [*tables, *sorted(rows.taken)]
    detail = tuple(_numbered(list(rows.taken.values())))
    return tree.source("csv", used, others, skipped=skipped, path=path, notes=tuple(notes), detail=detail)


class _Files:
    """The image files of a folder, by what a row may call them."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in tree.images:
            self._by_name.setdefault(path.name, []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)

    def find(self, name: str, table: Path, label: str) -> Path | str:
        """The file, or why there is none.

        The path counts from the CSV's folder, from `images` beside it or from the source's; else it may be the end
        of exactly one file's path below the source, at best within a folder named as the label. The ending may be
        left out.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        if wanted.is_absolute() or ".." in wanted.parts or name[1:2] == ":":
            return "leads out of the folder; paths must be relative and without .."
        if not wanted.name:
            return "names no file"
        endless = wanted.suffix.lower() not in IMAGE_ENDINGS
        same = self._by_name.get(wanted.name) or (self._by_stem.get(wanted.name) if endless else None)
        if not same:
            return "there is no such file"
        depth = len(wanted.parts) - 1
        folder = wanted.parts[:-1]
        found = [path for path in same if not depth or path.parent.parts[-depth:] == folder]
        for start in (table.parent, table.parent / "images", self.tree.root, self.tree.root / "images"):
            exact = [path for path in found if path.parent == start.joinpath(*folder)]
            if len(exact) == 1:
                return exact[0]
        if len(found) > 1:
            found = [path for path in found if label in path.parts] or found
        if len(found) > 1:
            return f"may be any of {len(found):,} files, such as {self.tree.name(found[0])}; give more of its path"
        return found[0] if found else "there is no such file"


def _dialect(path: Path) -> str | None:
    """The delimiter of a CSV file whose head has a column of file names, else None."""
    try:
        head = read_some(path, _MOST_HEAD)[:_MOST_HEAD]
    except OSError:
        return None
    line = re.split(r"[\r\n]", _text(head), maxsplit=1)[0]  # an old Mac's lines end with \r alone
    for delimiter in ",;\t":
        names = _names(next(csv.reader([line], delimiter=delimiter), []))
        if any(name in names for name in _FILE):
            return delimiter
    return None


def _text(content: bytes) -> str:
    """The text; bytes that are no UTF-8 become lone surrogates."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _names(head: Iterable[str]) -> list[str]:
    return [name.strip().lower() for name in head]


def _take(tree: Tree, files: _Files, table: Path, rows: _Rows) -> None:
    """Adds the rows of one CSV file.

    Raises:
        DataError: it cannot be read to its end.
    """
    try:
        content = read_some(table, _MOST)
    except OSError as error:
        raise DataError(f"data.source: {table} cannot be read ({error.strerror}); see to it") from error
    if len(content) > _MOST:
        raise DataError(f"data.source: {table} has more than {_MOST >> 30} GB, which no list of images has")
    reader = csv.reader(io.StringIO(_text(content), newline=""), delimiter=_dialect(table) or ",")
    columns = _names(next(reader, []))
    called = tree.name(table)
    of_table = split_of(called)
    by_path = of_table is None and "split" not in columns
    found: list[Row] = []
    try:
        for values in reader:
            where = f"{called} line {reader.line_num}"
            row = _row(files, table, where, dict(zip(columns, values, strict=False)), of_table) if values else None
            if isinstance(row, tuple):
                rows.skipped.append((f"{where} ({row[0][:200]})" if row[0] else where, row[1]))
            elif row is not None:
                found.append(row)
    except csv.Error as error:
        raise DataError(
            f"data.source: {table} line {reader.line_num} is no CSV ({error}); an open quotation mark?"
        ) from error
    if by_path:
        found = _split_by_path(found)
    for row in found:
        before = rows.taken.setdefault(row.path, row)
        if before is not row:
            same = (before.label, before.split, before.coarse) == (row.label, row.split, row.coarse)
            says = "" if same else f", with label {before.label}, split {SPLITS[before.split]}"
            rows.skipped.append((f"{row.where} ({tree.name(row.path)})", f"is named by {before.where} already{says}"))


def _row(files: _Files, table: Path, where: str, values: dict[str, str], split: int | None) -> Row | tuple[str, str]:
    """What a row says, or the file it names and why it is left out."""
    if any(not value.isascii() and re.search("[\udc80-\udcff]", value) for value in values.values()):
        return "", "is not UTF-8; save the file as UTF-8"
    name = next((values[key].strip() for key in _FILE if values.get(key, "").strip()), "")
    if not name:
        return "", "names no file"
    label = next((values[key].strip() for key in _LABEL if key in values), "")
    path = files.find(name, table, label)
    if isinstance(path, str):
        return name, path
    said = values.get("split", "").strip()
    if said and said.lower() not in SPLIT_CODES:
        return name, f"has split {said[:50]!r}, but must have one of train, val, test"
    code = SPLIT_CODES[said.lower()] if said else split
    coarse = values.get("coarse_label", "").strip()
    return Row(path, label or None, coarse or None, code or 0, files.tree.name(path), where)


def _split_by_path(rows: list[Row]) -> list[Row]:
    """The rows with the split that a folder of each path is named for, if all have one."""
    codes = []
    for row in rows:
        folders = PurePosixPath(row.name).parts[:-1]
        codes.append(next((SPLIT_CODES[folder.lower()] for folder in folders if folder.lower() in SPLIT_CODES), None))
    if None in codes:
        return rows
    return [replace(row, split=code or 0) for row, code in zip(rows, codes, strict=True)]


def _numbered(rows: list[Row]) -> list[Row]:
    """The rows with labels as numbers where all of them are whole numbers, so that 10 comes after 2."""

    def are_numbers(labels: list[Any]) -> bool:
        said = [label for label in labels if label is not None]
        return bool(said) and all(len(x) < 10 and x.isascii() and x.isdigit() and str(int(x)) == x for x in said)

    if are_numbers([row.label for row in rows]):
        rows = [replace(row, label=None if row.label is None else int(row.label)) for row in rows]
    if are_numbers([row.coarse for row in rows]):
        rows = [replace(row, coarse=None if row.coarse is None else int(row.coarse)) for row in rows]
    return rows
