"""Folders of image files whose folders' names are their splits and classes.

The folders above a file are levels, the first below the source being level 0. A level whose names are
all names of splits says the split, wherever it stands; so does one with names such as seg_train and seg_test,
or train and test1, and folders beside these (seg_pred) are left out. A level with one name for all images says
nothing. Of the levels that are left the first is the class::

    train/cat/1.png      cat/train/1.png      download/train/cat/images/1.png      1.png, a/1.png: no labels
    training_set/training_set/cat/1.png       images/cat/1.png beside masks/cat/1.png, which is left out
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hpcl.decode import Item
from hpcl.files import read_some
from hpcl.sources.source import SPLIT_CODES, Source
from hpcl.sources.walk import Tree

_CONTAINERS = {"images", "image", "imgs", "img"}
"""Folders that are no class where they hold all images of a split and none of another."""
_UNKNOWN = {"unknown", "unlabeled", "unlabelled", "all", "none"}
"""The same of a split for validation or test whose classes are not given."""
_NO_IMAGES = {
    "masks", "mask", "annotations", "annotation", "labels", "label", "segmentations", "segmentation", "trimaps",
    "ground_truth", "groundtruth", "gt",
}  # fmt: skip
"""Folders beside one of `_CONTAINERS` that hold what was drawn on its images."""
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
    return tree.source("folder", tree.images, others, lists=lists, empty=outermost, detail=tuple(lists))


def items(source: Source) -> Iterator[Item]:
    """One item per file; see the top of this file.

    With fewer than two classes the set counts as unlabelled. In a set with splits or classes a file
    that lies beside their folders is skipped.
    """
    assert source.path is not None
    names = [file.relative_to(source.path).parts for file in source.files]
    drawn = _drawn_on([name[:-1] for name in names])
    above = [() if aside else name[:-1] for name, aside in zip(names, drawn, strict=True)]
    level, codes = _split_level(above)
    splits = [_split_at(name, level, codes) for name in above]
    classes = _classes(_without_splits(above, splits, level))
    labelled = any(label is not None for label in classes)
    bare = _bare_splits(splits, classes, codes)
    listed = _annotations(source.detail or (), source.path) if bare else {}
    for file, name, aside, split, found in zip(source.files, names, drawn, splits, classes, strict=True):
        label, problem = found, None
        if aside:
            problem = "lies in a folder of masks or annotations beside that of the images"
        elif level is not None and split is None:
            problem = "lies beside the folders of splits or classes"
        elif split in bare:
            label = listed.get(file)
            problem = None if label else "has no class folder, as images of other splits have"
        elif labelled and label is None:
            problem = "lies beside the folders of splits or classes"
        code = codes[split] if split is not None else 0
        yield Item("/".join(name), file, None if problem else label, code, problem)


def _drawn_on(above: list[tuple[str, ...]]) -> list[bool]:
    """Whether each image lies in a folder such as `masks` at a level that has `images` and nothing else beside it."""
    for level in range(max((len(name) for name in above), default=0)):
        names = {name[level].lower() for name in above if len(name) > level}
        if len(names & _CONTAINERS) == 1 and names - _CONTAINERS and names - _CONTAINERS <= _NO_IMAGES:
            return [len(name) > level and name[level].lower() in _NO_IMAGES for name in above]
    return [False] * len(above)


def _split_level(above: list[tuple[str, ...]]) -> tuple[int | None, dict[str, int]]:
    """The first level that says the split, and the code of each of its names that does (in small letters).

    Below the first level at least half of the images must have it: a few in cat/test/ make no split of the others.
    """
    for level in range(max((len(name) for name in above), default=0)):
        names = [name[level].lower() for name in above if len(name) > level]
        codes = _split_codes(set(names))
        if codes and (level == 0 or 2 * len(names) >= len(above)):
            return level, codes
    return None, {}


def _split_codes(names: set[str]) -> dict[str, int]:
    """The code of each name that says a split; none where the names are no splits.

    All are names of splits; or some are alike but for the split's name and for digits, one of them for training:
    `training_set` and `test_set`, `train2017` and `val2017`, but not `bullet_train` and `crash_test`.
    """
    if names <= set(SPLIT_CODES):
        return {name: SPLIT_CODES[name] for name in names}
    by_rest: dict[tuple[str, ...], dict[str, int]] = {}
    for name in names:
        words = re.findall(r"[^\W\d_]+", name)
        said = [word for word in words if word in SPLIT_CODES]
        if len(said) == 1:
            rest = tuple(word for word in words if word not in SPLIT_CODES)
            by_rest.setdefault(rest, {})[name] = SPLIT_CODES[said[0]]
    pairs = [codes for codes in by_rest.values() if 0 in codes.values() and len(set(codes.values())) > 1]
    return pairs[0] if len(pairs) == 1 else by_rest.get((), {}) if by_rest.get(()) in pairs else {}


def _split_at(name: tuple[str, ...], level: int | None, codes: dict[str, int]) -> str | None:
    """The folder that says the split of an image, in small letters; None where there is none."""
    said = None if level is None or len(name) <= level else name[level].lower()
    return said if said in codes else None


def _without_splits(above: list[tuple[str, ...]], splits: list[str | None], level: int | None) -> list[tuple[str, ...]]:
    """The folders that may say the class: of images with a split where there are any; none of the others.

    A folder of the same name within that of a split, which holds all of its images, is left out too.
    """
    if level is None:
        return above
    rest = [
        () if split is None else (*name[:level], *name[level + 1 :]) for name, split in zip(above, splits, strict=True)
    ]
    once = {
        split
        for split, name in zip(splits, rest, strict=True)
        if split is not None and (len(name) <= level or name[level].lower() != split)
    }
    return [
        name if split is None or split in once else (*name[:level], *name[level + 1 :])
        for name, split in zip(rest, splits, strict=True)
    ]


def _classes(above: list[tuple[str, ...]]) -> list[str | None]:
    """The name of each image at the first level that has several, else None."""
    for level in range(max((len(name) for name in above), default=0)):
        if len({name[level] for name in above if len(name) > level}) > 1:
            return [name[level] if len(name) > level else None for name in above]
    return [None] * len(above)


def _bare_splits(splits: list[str | None], classes: list[str | None], codes: dict[str, int]) -> set[str | None]:
    """Splits whose images lie in one folder that is no class.

    It is `images` or the like, and no other split's; or `unknown` or the like, of another split than training, and no
    class of training (Keras' test/unknown).
    """
    of_split: dict[str | None, set[str | None]] = {}
    for split, label in zip(splits, classes, strict=True):
        if split is not None:
            of_split.setdefault(split, set()).add(label)
    known = {label for split, found in of_split.items() if codes[split or ""] == 0 for label in found}
    bare: set[str | None] = set()
    for split, found in of_split.items():
        label = next(iter(found))
        unknown = (label or "").lower() in _UNKNOWN and codes[split or ""] > 0 and label not in known
        if len(found) == 1 and ((label or "").lower() in _CONTAINERS or unknown):
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
