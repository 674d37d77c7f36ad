"""Folders of image files whose folders' names are their splits and classes.

The folders above a file are levels, the first below the source being level 0. A level whose names are
all names of splits says the split, wherever it stands. A level with one name for all images says
nothing. Of the levels that are left the first is the class::

    train/cat/1.png      cat/train/1.png      download/train/cat/images/1.png      1.png, a/1.png: no labels
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpcl.decode import Item
from hpcl.files import read_some
from hpcl.sources.source import SPLIT_CODES, Source, fingerprint
from hpcl.sources.walk import Tree

_CONTAINERS = {"images", "image", "imgs", "img"}
"""Folders that are no class where they hold all images of a split and none of another."""
_ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's classes of validation images: lines of file name, class and box, with tabs."""
_MOST_ANNOTATIONS = 64 * 2**20


def look(tree: Tree) -> Source | None:
    """The folder as a source of this kind, or None if it holds no image file."""
    if not tree.images:
        return None
    holding = {
        folder.as_posix()
        for parent in {image.parent for image in tree.images}
        for folder in (parent.relative_to(tree.root), *parent.relative_to(tree.root).parents)
    }
    lists = [path for path in tree.others if path.name == _ANNOTATIONS]
    others = [tree.name(path) for path in tree.others if path not in lists]
    empty = [name for name in tree.folders if name not in holding]
    outermost = tuple(name for name in empty if name.rpartition("/")[0] not in empty)
    return Source(
        "folder",
        tree.root,
        tuple(tree.images),
        fingerprint(tree.root, [*tree.images, *lists]),
        tuple(tree.skipped),
        len(others),
        tuple(others),
        tuple(tree.litter),
        outermost,
        detail=tuple(lists),
    )


def items(source: Source) -> Iterator[Item]:
    """One item per file; see the top of this file.

    With fewer than two classes the set counts as unlabelled. In a set with splits or classes a file
    that lies beside their folders is skipped.
    """
    assert source.path is not None
    names = [file.relative_to(source.path).parts for file in source.files]
    above = [name[:-1] for name in names]
    level = _split_level(above)
    splits: list[str | None] = [None if level is None or len(name) <= level else name[level].lower() for name in above]
    rest = above if level is None else [(*name[:level], *name[level + 1 :]) for name in above]
    classes = _classes(rest)
    labelled = any(label is not None for label in classes)
    bare = _bare_splits(splits, classes)
    listed = _annotations(source.detail or (), source.path) if bare else {}
    for file, name, split, found in zip(source.files, names, splits, classes, strict=True):
        label, problem = found, None
        if level is not None and split is None:
            problem = "lies beside the folders of splits or classes"
        elif split in bare:
            label = listed.get(file)
            problem = None if label else "has no class folder, as images of other splits have"
        elif labelled and label is None:
            problem = "lies beside the folders of splits or classes"
        code = SPLIT_CODES[split] if split is not None else 0
        yield Item("/".join(name), file, None if problem else label, code, problem)


def _split_level(above: list[tuple[str, ...]]) -> int | None:
    """The first level all of whose names are names of splits.

    Below the first level at least half of the images must have it: a few in cat/test/ make no split of the others.
    """
    for level in range(max((len(name) for name in above), default=0)):
        names = [name[level].lower() for name in above if len(name) > level]
        if set(names) <= set(SPLIT_CODES) and (level == 0 or 2 * len(names) >= len(above)):
            return level
    return None


def _classes(above: list[tuple[str, ...]]) -> list[str | None]:
    """The name of each image at the first level that has several, else None."""
    for level in range(max((len(name) for name in above), default=0)):
        if len({name[level] for name in above if len(name) > level}) > 1:
            return [name[level] if len(name) > level else None for name in above]
    return [None] * len(above)


def _bare_splits(splits: list[str | None], classes: list[str | None]) -> set[str | None]:
    """Splits whose images lie in one folder such as `images` that no other split has, so it is no class."""
    of_split: dict[str | None, set[str | None]] = {}
    for split, label in zip(splits, classes, strict=True):
        if split is not None:
            of_split.setdefault(split, set()).add(label)
    bare: set[str | None] = set()
    for split, found in of_split.items():
        if len(found) == 1 and (next(iter(found)) or "").lower() in _CONTAINERS:
            bare.add(split)
    return bare if len(bare) < len(of_split) else set()


def _annotations(lists: tuple[Path, ...], root: Path) -> dict[Path, str]:
    """Classes of images by Tiny ImageNet's list beside (or beside the folder of) the images."""
    found: dict[Path, str] = {}
    for path in lists:
        text = read_some(path, _MOST_ANNOTATIONS)[:_MOST_ANNOTATIONS].decode("utf-8", "replace")
        for line in text.splitlines():
            name, *label = line.split("\t")
            if label and "/" not in name and label[0]:
                found[path.parent / name] = found[path.parent / "images" / name] = label[0]
    return found
