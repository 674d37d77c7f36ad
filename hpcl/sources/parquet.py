"""Parquet files of encoded images, as dataset hubs keep them.

Columns: `image` or `img` (bytes, or a struct with `bytes`), `label`, `labels` or `fine_label`, `coarse_label`,
`split`; all but the first may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpcl.decode import Item
from hpcl.sources.source import SPLIT_CODES, DataError, Source, fingerprint, same_names, split_of
from hpcl.sources.walk import Tree

_ROWS = 1024
"""Parquet rows held in memory in encoded form at a time, at most."""
_BYTES = 2**29
"""What those rows may take, should each be as large as all values of its part of the file: a dictionary in
the file has a value once that may stand in every row."""


@dataclass(frozen=True)
class _Columns:
    """Names of a file's columns, by what they hold."""

    image: str
    label: str | None
    coarse: str | None
    split: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.label, self.coarse, self.split) if name is not None]


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind: all its Parquet files, unless none of them has images where others are."""
    tables = tree.ending(".parquet")
    if not tables or (tree.images and not any(_has_images(file) for file in tables)):
        return None
    others = [tree.name(path) for path in [*tree.others, *tree.images] if path not in set(tables)]
    notes = (f"taken as Parquet files; its {len(tree.images):,} image files are not read",) if tree.images else ()
    return tree.source("parquet", tables, others, notes=notes)


def look_at_file(path: Path) -> Source:
    """One file as a source."""
    return Source("parquet", path, (path,), fingerprint(path, [path]))


def items(source: Source) -> Iterator[Item]:
    """One item per row. Without a column `split` the name of one of several files, or its folder, may say it.

    Raises:
        DataError: a file is not whole, or its columns do not fit.
    """
    assert source.path is not None
    root = source.path if source.path.is_dir() else source.path.parent
    for file in source.files:
        name = file.relative_to(root)
        code = (split_of(name) if len(source.files) > 1 or len(name.parts) > 1 else None) or 0
        try:
            with pq.ParquetFile(file) as table:
                columns = _checked_columns(table.schema_arrow, file)
                batches = table.iter_batches(batch_size=_rows_at_a_time(table.metadata), columns=columns.names)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    yield _item(row, columns, f"{name.as_posix()} row {number}", file, number, code)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def check_tables(source: Source) -> None:
    """See that every file is whole and has the columns that are needed.

    Raises:
        DataError: one is not.
    """
    for file in source.files:
        try:
            _checked_columns(pq.read_schema(file), file)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def class_names(source: Source) -> tuple[str, ...] | None:
    """Names of the labels, which files that have them agree on: key `classes` (a JSON list), or HF's ClassLabel.

    Raises:
        DataError: they are there but no JSON, or differ between files.
    """
    return _names(source, "classes", ("label", "labels", "fine_label"))


def coarse_names(source: Source) -> tuple[str, ...] | None:
    """Names of the coarse labels, likewise (key `coarse_classes`)."""
    return _names(source, "coarse_classes", ("coarse_label",))


def _names(source: Source, key: str, features: tuple[str, ...]) -> tuple[str, ...] | None:
    said: tuple[tuple[str, ...], Path] | None = None
    for file in source.files:
        try:
            metadata = pq.read_schema(file).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
        try:
            names = json.loads(metadata.get(key.encode(), b"null"))
            if names is None:
                known = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
                names = next((known[name]["names"] for name in features if "names" in known.get(name, {})), None)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"data.source: {file} has class names in its metadata that are not JSON ({error})"
            ) from error
        if isinstance(names, list) and names:
            said = same_names(said, tuple(str(name) for name in names), file)
    return said[0] if said else None


def _item(row: dict[str, Any], columns: _Columns, name: str, file: Path, number: int, code: int) -> Item:
    content, split = row[columns.image], row.get(columns.split or "")
    if isinstance(content, dict):
        content = content["bytes"]
    if split is not None:
        found = SPLIT_CODES.get(str(split).lower())
        if found is None:
            raise DataError(
                f"data.source: {file} row {number} has split {split!r}, but must have one of train, val, test"
            )
        code = found
    return Item(name, content, row.get(columns.label or ""), code, coarse=row.get(columns.coarse or ""))


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"data.source: {file} cannot be read as Parquet ({error}); write it again")


def _rows_at_a_time(facts: Any) -> int:
    """Rows to hold at a time, by the metadata of a Parquet file."""
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    parts: list[int] = [group.column(j).total_uncompressed_size for group in groups for j in range(group.num_columns)]
    return max(1, min(_ROWS, _BYTES // max([1, *parts])))


def _has_images(file: Path) -> bool:
    try:
        _checked_columns(pq.read_schema(file), file)
    except (pa.ArrowException, OSError, DataError):
        return False
    return True


def _checked_columns(schema: pa.Schema, file: Path) -> _Columns:
    """The columns to read."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in schema.names), None)

    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    name = first("image", "img")
    if name is None:
        raise DataError(
            f"data.source: {file} has no column `image` (or `img`) with encoded images (PNG, JPEG, ...), "
            f"only {found or 'no column at all'}; rename the column that holds them"
        )
    for used in (name, *("label", "labels", "fine_label", "coarse_label", "split")):
        if schema.names.count(used) > 1:
            raise DataError(f"data.source: {file} has several columns `{used}`; keep one")
    kind = schema.field(name).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    if not any(test(content) for test in is_bytes):
        raise DataError(f"data.source: {file} has column `{name}` of type {kind}, but it must hold encoded image bytes")
    return _Columns(name, first("label", "labels", "fine_label"), first("coarse_label"), first("split"))


def count_rows(source: Source) -> int | None:
    """Rows of all tables; None where one cannot be read."""
    with suppress(pa.ArrowException, OSError):
        return sum(int(pq.read_metadata(file).num_rows) for file in source.files)
    return None
