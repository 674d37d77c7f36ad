"""Tables of rows, as Parquet: written whole or not at all, and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcl.files import atomic_path
from hpcl.results.columns import clean

if TYPE_CHECKING:
    import pyarrow as pa


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, through: Path | None = None) -> None:
    """Write rows as Parquet, atomically (see :func:`atomic_path`).

    Keys outside the schema are left out, missing ones are null.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{name: clean(row.get(name)) for name in schema.names} for row in rows], schema)
    with atomic_path(path, through) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rows(path: Path, schema: pa.Schema | None = None) -> list[dict[str, Any]]:
    """The rows of a Parquet table as dictionaries.

    Raises:
        OSError, ValueError: there is none, or its columns are not those of `schema`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:  # not all of them are one of the two
        raise ValueError(str(error)) from error
    if schema is not None and not table.schema.equals(schema):
        raise ValueError(f"{path}: has other columns than this version's")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
