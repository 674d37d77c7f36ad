"""What a source of images holds, looked at image by image, and everything about it that is not as it should be.

Every image is decoded once, at its own size; none is kept but a few small ones for the contact sheet.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcl.decode import Item, Pixels, attempt_told, blocks, resize_one
from hpcl.errors import harmless
from hpcl.sources import SPLITS, DataError, Source, check_tables, class_names, coarse_names, find, items

THUMB = 72
"""Side of a picture on the contact sheet, in pixels."""
EACH = 5
"""Pictures of a class."""
_ALL = 60
"""Pictures of a set without classes, at least, where it has as many."""
_MOST_CLASSES = 2000
"""Classes of which pictures are kept."""

Finding = tuple[str, str]
"""Where, and what is the matter."""


@dataclass
class Checked:
    """What :func:`check` found."""

    source: Source
    size: int | None
    """`data.size` that is meant."""
    images: int = 0
    """Usable ones."""
    of_split: Counter[int] = field(default_factory=Counter)
    """Usable images by the code of their split."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Usable images by width and height."""
    gray: int = 0
    classes: dict[str, list[int]] = field(default_factory=dict)
    """Images of each split by class, in the classes' order; empty for unlabelled sources."""
    coarse: dict[str, int] = field(default_factory=dict)
    """Images by coarse class."""
    unusable: list[str] = field(default_factory=list)
    """Why loading the source will refuse it, if it will."""
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    """Everything that was left out or changed, or is odd, by kind."""
    pictures: dict[str, list[Pixels]] = field(default_factory=dict)
    """A few images of each class (of "" where there are none), (THUMB, THUMB) or (THUMB, THUMB, 3)."""

    @property
    def found(self) -> int:
        """Number of findings of all kinds."""
        return sum(len(entries) for entries in self.findings.values())


@dataclass
class _Seen:
    """What is kept of an image."""

    size: tuple[int, int]
    is_gray: bool
    digest: bytes
    told: tuple[str, ...]
    picture: Pixels | None


def check(source: str, size: int | None = None, progress: Callable[[int], None] | None = None) -> Checked:
    """Looks at every image of a source.

    Args:
        source: as `data.source`.
        size: as `data.size`: the contact sheet shows the images cut as they will be, and smaller ones are told.
        progress: called with the number of images that have been looked at, again and again.

    Raises:
        DataError: the source does not exist, or cannot be read.
    """
    try:
        found = find(source)
        if found.kind == "arrow":
            raise DataError(f"data.source is {source}, which is decoded already; check the source it was made from")
        check_tables(found)
        return _Check(found, size).run(progress)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a disk that went away
        raise DataError(f"data.source is {source[:80]}, which cannot be read ({error}); give another") from error


class _Check:
    def __init__(self, source: Source, size: int | None) -> None:
        self._out = Checked(source, size)
        self._names, self._coarse_names = class_names(source), coarse_names(source)
        self._tried: Counter[str] = Counter()
        self._usable: Counter[str] = Counter()
        self._classes: dict[Any, list[int]] = {}
        self._coarse: Counter[Any] = Counter()
        self._first: dict[bytes, tuple[str, Any, int]] = {}
        self._label_types: Counter[str] = Counter()
        self._spread = _Spread()

    def run(self, progress: Callable[[int], None] | None) -> Checked:
        done = 0
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")  # of Pillow, about tags it does not know and large images
            for block in blocks(items(self._out.source)):
                parts = [
                    [(item, self._wants(item, done + i + j)) for j, item in enumerate(block[i : i + 32])]
                    for i in range(0, len(block), 32)
                ]
                for part, results in zip(parts, pool.map(self._look, parts), strict=True):
                    for (item, _), seen in zip(part, results, strict=True):
                        self._take(item, seen, done)
                        done += 1
                    if progress:
                        progress(done)
        return self._end()

    def _wants(self, item: Item, number: int) -> bool:
        """Whether a picture is to be made; of twice as many as are shown, as some may be broken."""
        if item.label is None:
            return self._spread.wants(number)
        name = self._name(item.label, self._names)
        self._tried[name] += 1
        return self._tried[name] <= 2 * EACH and len(self._tried) <= _MOST_CLASSES

    def _look(self, part: Sequence[tuple[Item, bool]]) -> list[_Seen | str]:
        """In a thread: decodes some images."""
        return [self._seen(item, wants) for item, wants in part]

    def _seen(self, item: Item, wants: bool) -> _Seen | str:
        found = attempt_told(item, None)
        item.content = None
        if isinstance(found, str):
            return found
        pixels, told = found
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16, key=repr(pixels.shape).encode())
        picture = None
        if wants:
            cut = resize_one(pixels, self._out.size) if self._out.size else pixels
            picture = resize_one(cut, THUMB)
        return _Seen((pixels.shape[1], pixels.shape[0]), pixels.ndim == 2, digest.digest(), told, picture)

    def _take(self, item: Item, seen: _Seen | str, number: int) -> None:
        """Counts one image, in the order of the source."""
        out = self._out
        if isinstance(seen, str):
            self._find("left out", item.name, seen)
            return
        out.images += 1
        out.of_split[item.split] += 1
        out.sizes[seen.size] += 1
        out.gray += seen.is_gray
        for text in seen.told:
            self._find("changed on the way", item.name, text)
        if out.size is not None and min(seen.size) < out.size:
            self._find("smaller than --size", item.name, f"enlarged to {out.size}x{out.size}")
        self._label_types["none" if item.label is None else type(item.label).__name__] += 1
        item.label, item.coarse = _key(item.label), _key(item.coarse)
        if item.label is not None:
            self._usable[self._name(item.label, self._names)] += 1
            self._classes.setdefault(item.label, [0] * len(SPLITS))[item.split] += 1
        if item.coarse is not None:
            self._coarse[item.coarse] += 1
        self._compare(item, seen.digest)
        if seen.picture is not None and item.label is None:
            self._spread.add(number, seen.picture)
        elif seen.picture is not None:
            pictures = out.pictures.setdefault(self._name(item.label, self._names), [])
            pictures += [seen.picture][: EACH - len(pictures)]

    def _compare(self, item: Item, digest: bytes) -> None:
        name, label, split = self._first.setdefault(digest, (item.name, item.label, item.split))
        if name == item.name:
            return
        differs = []
        if label != item.label:
            said = (self._name(each, self._names) if each is not None else "none" for each in (label, item.label))
            differs.append(f"another class ({' and '.join(said)})")
        if split != item.split:
            differs.append(f"another split ({SPLITS[split]} and {SPLITS[item.split]})")
        kind = f"same pixels in {' and '.join(d.partition(' (')[0] for d in differs)}" if differs else "same pixels"
        self._find(kind, item.name, f"as {name}" + (f", of {', of '.join(differs)}" if differs else ""))

    def _find(self, kind: str, where: str, what: str) -> None:
        self._out.findings.setdefault(kind, []).append((_in_a_line(where), _in_a_line(what)))

    @staticmethod
    def _name(label: Any, names: tuple[str, ...] | None) -> str:
        """A label as text."""
        is_place = names is not None and type(label) is int and 0 <= label < len(names)
        return _in_a_line(names[label] if names is not None and is_place else str(label))

    def _end(self) -> Checked:
        """What only the whole shows."""
        out, source = self._out, self._out.source
        for where, what in source.skipped:
            self._find("left out", where, what)
        for where, what in source.litter:
            self._find("hidden, left out", where, what)
        for where in source.others:
            self._find("no image", where, "other file, not read")
        for where in source.empty:
            self._find("folder without an image", where, "holds no image file")
        for name, tried in self._tried.items():
            if not self._usable[name]:
                self._find("class without a usable image", name, f"none of its {tried:,} images can be used")
        order = sorted(self._classes, key=lambda label: (isinstance(label, str), label))
        out.classes = {self._name(label, self._names): self._classes[label] for label in order}
        coarse = sorted(self._coarse, key=lambda label: (isinstance(label, str), label))
        out.coarse = {self._name(label, self._coarse_names): self._coarse[label] for label in coarse}
        out.unusable = list(self._refusals())
        if not out.classes and self._spread.kept:
            out.pictures = {"": self._spread.pictures()}
        out.pictures = {name: out.pictures[name] for name in [*out.classes, ""] if name in out.pictures}
        return out

    def _refusals(self) -> Iterator[str]:
        source, types = self._out.source, self._label_types
        if not self._out.images:
            yield f"data.source {source.path} has no usable image"
        elif not self._out.of_split[0]:
            counts = ", ".join(f"{self._out.of_split[code]:,} {name}" for code, name in enumerate(SPLITS))
            yield (
                f"there is no training image ({counts}): a name of a file or folder, a list or a column `split` says "
                "so; give a source with a train split, or name it otherwise"
            )
        if len(types) > 1 or set(types) - {"none", "int", "str", "bool"}:
            said = ", ".join(f"{count:,} {name}" for name, count in types.most_common())
            yield f"labels are {said}, but all or none must be there, and all whole numbers or all texts"
        numbers = [label for label in self._classes if type(label) is int]
        wrong = [x for x in numbers if x < 0 or (self._names is not None and x >= len(self._names))]
        if wrong:
            known = f"; {len(self._names)} classes are named" if self._names is not None else ""
            yield f"label {wrong[0]} is no class{known}"


def _key(label: Any) -> Any:
    """A label that can be counted and put in order: one of another kind than those that are taken is its text."""
    return label if label is None or type(label) in (int, str, bool) else str(label)


def _in_a_line(text: str) -> str:
    """The text without control characters: a name that holds a line's end must not forge a line."""
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


class _Spread:
    """Pictures evenly from a set whose length is not known before its end."""

    def __init__(self) -> None:
        self._stride = 1
        self.kept: dict[int, Pixels] = {}

    def wants(self, number: int) -> bool:
        return number % self._stride == 0

    def add(self, number: int, picture: Pixels) -> None:
        if not self.wants(number):
            return
        self.kept[number] = picture
        if len(self.kept) >= 2 * _ALL:
            self._stride *= 2
            self.kept = {place: kept for place, kept in self.kept.items() if self.wants(place)}

    def pictures(self) -> list[Pixels]:
        kept = list(self.kept.values())
        return [kept[i * len(kept) // _ALL] for i in range(_ALL)] if len(kept) > _ALL else kept
