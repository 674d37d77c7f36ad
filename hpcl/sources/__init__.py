"""Finding and reading sources of images: folders, tables, archives and pickles as they are found in the world.

:func:`find` says what a source is, from its files' content and structure, and gives its fingerprint without
decoding anything; :func:`items` gives its images one by one, still encoded where they are files. One file of
this package per family of forms:

| kind | file |
|---|---|
| mnist5k | mnist.py |
| folder | folders.py |
| csv | csv_rows.py |
| voc | voc.py |
| parquet | parquet.py |
| npz | npz.py |
| pickle | batches.py, over unpickle.py, which runs nothing |
| arrow | the cache of ``hpcl.data``, which reads it itself |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hpcl.decode import Item
from hpcl.sources import batches, csv_rows, folders, mnist, npz, parquet, voc
from hpcl.sources.source import KINDS, SPLITS, DataError, Source, fingerprint
from hpcl.sources.walk import Tree, walk

__all__ = [
    "SPLITS", "DataError", "Source", "check_tables", "class_names", "coarse_names", "count", "find", "items",
]  # fmt: skip

_FORMS: tuple[Callable[[Tree], Source | None], ...] = (
    batches.look,
    npz.look,
    voc.look,
    parquet.look,
    csv_rows.look,
    folders.look,
)
"""What a folder may be, the more specific first."""
_ITEMS: dict[str, Callable[[Source], Iterator[Item]]] = {
    "mnist5k": mnist.items,
    "folder": folders.items,
    "csv": csv_rows.items,
    "voc": voc.items,
    "parquet": parquet.items,
    "npz": npz.items,
    "pickle": batches.items,
}
_CLASS_NAMES: dict[str, Callable[[Source], tuple[str, ...] | None]] = {
    "parquet": parquet.class_names,
    "npz": npz.class_names,
    "pickle": batches.class_names,
}
_COARSE_NAMES: dict[str, Callable[[Source], tuple[str, ...] | None]] = {
    "parquet": parquet.coarse_names,
    "pickle": batches.coarse_names,
}


def find(source: str) -> Source:
    """What `source` is.

    Raises:
        DataError: it does not exist, or is nothing that can be read.
    """
    if source == "mnist5k":
        return Source("mnist5k", None, (), "mnist5k")
    if not source.strip():
        raise DataError(f"data.source is empty; give {KINDS}")
    path = Path(source).expanduser()
    if not path.exists():
        near = " (did you mean mnist5k?)" if difflib.get_close_matches(source.lower(), ["mnist5k"], cutoff=0.7) else ""
        raise DataError(f"data.source is {source}, which does not exist{near}; give {KINDS}")
    path = path.resolve()
    if path.is_file():
        return _file(path, source)
    if not path.is_dir():
        raise DataError(f"data.source is {source}, which is neither a file nor a folder; give {KINDS}")
    tree = walk(path)
    for look in _FORMS:
        found = look(tree)
        if found is not None:
            return replace(found, notes=csv_rows.note(tree)) if found.kind == "folder" else found
    packed = [file.name for file in tree.others if file.suffix.lower() in (".zip", ".tar", ".gz", ".tgz")]
    advice = f"unpack {packed[0]} and give its folder" if packed else f"give {KINDS}"
    raise DataError(
        f"data.source is the folder {source}, which holds no images "
        f"({len(tree.others)} other files, {len(tree.skipped)} entries that cannot be read); {advice}"
    )


def items(source: Source) -> Iterator[Item]:
    """The images of a source in their order, which is the same each time; not of kind arrow.

    Raises:
        DataError: a file cannot be read, or does not hold what is needed.
    """
    read_one_by_one: Callable[[Source], Iterator[Item]] = _ITEMS[source.kind]
    return read_one_by_one(source)


def count(source: Source) -> int | None:
    """Images of a source, also those that cannot be decoded; None where only reading it tells."""
    if source.kind in ("csv", "voc"):
        return len(source.detail)
    if source.kind == "npz":
        return sum(int(each.images.shape[0]) for each in source.detail)
    if source.kind == "pickle":
        return sum(int(batch.images.shape[0]) for batch in source.detail.batches)
    if source.kind == "parquet":
        return parquet.count_rows(source)
    return {"folder": len(source.files), "mnist5k": mnist.COUNT}.get(source.kind)


def class_names(source: Source) -> tuple[str, ...] | None:
    """Names of the classes where labels are their numbers, or None where labels are names, or numbers without any.

    Raises:
        DataError: they are there but cannot be read.
    """
    if source.kind == "mnist5k":
        return mnist.CLASSES
    names_of = _CLASS_NAMES.get(source.kind)
    return names_of(source) if names_of else None


def coarse_names(source: Source) -> tuple[str, ...] | None:
    """As :func:`class_names`, of the coarse labels."""
    names_of = _COARSE_NAMES.get(source.kind)
    return names_of(source) if names_of else None


def check_tables(source: Source) -> None:
    """See that every Parquet file of a source is whole and has the columns that are needed.

    Raises:
        DataError: one is not.
    """
    if source.kind == "parquet":
        parquet.check_tables(source)


def _file(path: Path, source: str) -> Source:
    """What a file is, by its first bytes and its name."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic == b"ARROW1":
        return Source("arrow", path, (path,), fingerprint(path, [path]))
    if magic.startswith(b"PAR1"):
        return parquet.look_at_file(path)
    if magic.startswith(b"PK") and path.suffix.lower() == ".npz":
        return npz.look_at_file(path)
    if batches.starts_one(path, magic):
        return batches.look_at_file(path)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        found = csv_rows.look_at_file(path)
        if found is not None:
            return found
        raise DataError(
            f"data.source is the file {source}, which has no column filename, file_name, file, path or image "
            f"in its first line; name the column that holds the images' paths, or give {KINDS}"
        )
    packed = magic.startswith((b"PK", b"\x1f\x8b")) or path.suffix.lower() in (".zip", ".tar", ".tgz")
    advice = "unpack it and give its folder" if packed else f"give {KINDS}"
    raise DataError(f"data.source is the file {source}, which is of no kind that is read; {advice}")
