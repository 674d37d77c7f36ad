"""Folders in VOC2007's layout as unlabelled images, for pre-training.

``ImageSets/Main/{train,val,trainval,test}.txt`` name the images of ``JPEGImages/`` of each split. Images that
only trainval names count as val where a train list is there, else as train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpcl.decode import Item
from hpcl.files import read_some
from hpcl.sources.source import SPLIT_CODES, DataError, Source
from hpcl.sources.walk import Tree

_LISTS = ("train", "val", "trainval", "test")
_MOST_LIST = 64 * 2**20


@dataclass
class _Found:
    """The images of all VOC folders below the source."""

    images: list[tuple[Path, int]] = field(default_factory=list)
    """With the code of the split."""
    lists: list[Path] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind: it is, or holds, folders with JPEGImages and Annotations or ImageSets."""
    names = {"", *tree.folders}
    roots = [
        name
        for name in sorted(names)
        if _below(name, "JPEGImages") in names
        and (_below(name, "ImageSets/Main") in names or _below(name, "Annotations") in names)
    ]
    if not roots:
        return None
    found = _Found()
    for root in roots:
        _take(tree, root, found)
    if not found.images:
        return None
    used = {path for path, _ in found.images} | set(found.lists)
    known = tuple(_below(root, folder) + "/" for root in roots for folder in ("JPEGImages", "Annotations", "ImageSets"))
    others = [
        name
        for name, path in ((tree.name(path), path) for path in [*tree.others, *tree.images])
        if path not in used and not name.startswith(known)
    ]
    notes = (
        f"taken as VOC layout ({', '.join(root or '.' for root in roots)}): images without labels, splits by lists",
    )
    files = (*(path for path, _ in found.images), *found.lists)
    return tree.source("voc", files, others, skipped=found.skipped, notes=notes, detail=tuple(found.images))


def items(source: Source) -> Iterator[Item]:
    """One item per image, without label, by folder and name."""
    assert source.path is not None
    for path, split in source.detail:
        yield Item(path.relative_to(source.path).as_posix(), path, None, split)


def _below(root: str, name: str) -> str:
    return f"{root}/{name}" if root else name


def _take(tree: Tree, root: str, found: _Found) -> None:
    """Adds one VOC folder's images."""
    folder = tree.root / root / "JPEGImages"
    there = {path.stem: path for path in tree.images if path.parent == folder}
    lists = {name: tree.root / root / "ImageSets" / "Main" / f"{name}.txt" for name in _LISTS}
    lists = {name: path for name, path in lists.items() if path in set(tree.others)}
    found.lists += lists.values()
    if not lists:
        found.images += [(path, 0) for _, path in sorted(there.items())]
        return
    split_by_id: dict[str, tuple[int, str]] = {}
    missing: set[str] = set()
    for name in (name for name in ("train", "val", "test", "trainval") if name in lists):
        both = 1 if "train" in lists else 0
        code = both if name == "trainval" else SPLIT_CODES[name]
        for number, image in _ids(lists[name]):
            where = f"{tree.name(lists[name])} line {number} ({image})"
            before = split_by_id.get(image)
            if before is None and image not in there:
                if image not in missing:
                    found.skipped.append((where, "JPEGImages has no such file"))
                missing.add(image)
            elif before is None:
                split_by_id[image] = (code, name)
            elif name != "trainval" or before[1] == "test":
                found.skipped.append((where, f"is in {before[1]}.txt already, and counts as of that"))
    for image, path in sorted(there.items()):
        if image in split_by_id:
            found.images.append((path, split_by_id[image][0]))
        else:
            found.skipped.append((tree.name(path), f"no list of ImageSets/Main names it ({', '.join(lists)})"))


def _ids(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and first words of a list."""
    try:
        content = read_some(path, _MOST_LIST)
    except OSError as error:
        raise DataError(f"data.source: {path} cannot be read ({error.strerror}); see to it") from error
    for number, line in enumerate(content[:_MOST_LIST].decode("utf-8", "replace").splitlines(), 1):
        if words := line.split():
            yield number, words[0]
