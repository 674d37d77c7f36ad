"""Which images are labelled: class-balanced lists drawn by seed, and the files that hold them.

One order of all training images per seed deals the classes round by round; a list is its
beginning. So lists of one seed are nested (1 % lies within 10 %), each class has as many images as
any other as long as it has any left, and none has less than one.
Legend: N training images; n labelled images; Y classes that have a training image.
"""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import numpy as np

from hpcl.data import Ids, ImageSet
from hpcl.errors import UserError
from hpcl.files import read_some, write_text
from hpcl.rng import seed_of

FRACTIONS = (0.01, 0.1)
"""Labelled parts of the training images that the tasks use; the usual two (Chen et al. 2020)."""

_MOST_BYTES = 1 << 28
_COLUMNS = ["row", "label"]
_ADVICE = "remove it and run again to draw it anew, or give another folder"


def label_order(images: ImageSet, seed: int) -> Ids:
    """(N,) all training images, round by round one of each class; the classes' order is drawn too.

    Args:
        images: labelled.
        seed: of the lists; a function of it, of the labels and of the training part alone.
    """
    assert images.labels is not None
    of_image = images.labels[images.train]
    classes = np.unique(of_image)
    turn_of_class = np.random.default_rng(seed_of(seed, "label-classes")).permutation(len(classes))
    round_of_image = np.empty(len(of_image), dtype=np.int64)
    turn_of_image = np.empty(len(of_image), dtype=np.int64)
    for turn, label in zip(turn_of_class, classes, strict=True):
        members = np.flatnonzero(of_image == label)
        round_of_image[members] = np.random.default_rng(seed_of(seed, "labels", int(label))).permutation(len(members))
        turn_of_image[members] = turn
    order: Ids = images.train[np.lexsort((turn_of_image, round_of_image))]
    return order


def draw_labels(images: ImageSet, fraction: float, seed: int) -> Ids:
    """(n,) sorted places of the labelled images; n is the fraction of N, rounded, and at least Y.

    Args:
        images: labelled.
        fraction: of the training images, in (0, 1].
        seed: of the list.

    Raises:
        ValueError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must be in (0, 1]")
    return np.sort(label_order(images, seed)[: label_count(images, fraction)])


def label_count(images: ImageSet, fraction: float) -> int:
    """n, the fraction of the training images, rounded, and at least one of each class."""
    assert images.labels is not None
    return max(round(fraction * len(images.train)), len(np.unique(images.labels[images.train])))


def percent(fraction: float) -> str:
    """A fraction in words: ``0.01`` is `1 %`."""
    return f"{100 * fraction:.6g} %"


def list_path(folder: Path, fraction: float, seed: int) -> Path:
    """Where a list lies, such as ``labels/1percent-seed0.csv``."""
    return folder / f"{100 * fraction:.6g}percent-seed{seed}.csv"


def label_list(images: ImageSet, fraction: float, seed: int, folder: Path | None = None) -> Ids:
    """As :func:`draw_labels`; with a folder the list is kept there, and one that is there is used as it is.

    A list of somebody else's is welcome if it has the form of :func:`list_text`.

    Raises:
        UserError: the file in the folder is not a list for these images, fraction and seed; all problems at once.
        StorageError: it cannot be written.
    """
    if folder is None:
        return draw_labels(images, fraction, seed)
    path = list_path(folder, fraction, seed)
    if not path.exists():
        write_text(path, list_text(images, draw_labels(images, fraction, seed), fraction, seed))
    return read_list(path, images, fraction, seed)


def list_text(images: ImageSet, ids: Ids, fraction: float, seed: int) -> str:
    """A list as CSV: facts in lines that begin with ``#``, then the columns `row` and `label`.

    `row` is the image's place among all images of the source, from 0, in the order in which they are read
    (parts and classes sorted by name); `label` the class's place among the sorted class names.
    """
    assert images.labels is not None
    facts = _facts(images, fraction, seed)
    lines = [f"# {name}: {value}\n" for name, value in facts.items()]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(zip(ids.tolist(), images.labels[ids].tolist(), strict=True))
    return "".join(lines) + out.getvalue()


def read_list(path: Path, images: ImageSet, fraction: float, seed: int) -> Ids:
    """(n,) sorted places of the labelled images in a file that :func:`list_text` wrote.

    Raises:
        UserError: it cannot be read, or does not fit the images, the fraction or the seed; all problems at once.
    """
    assert images.labels is not None
    try:
        content = read_some(path, _MOST_BYTES)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of labels ({error}); {_ADVICE}") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: has more than {_MOST_BYTES >> 20} MiB, which no list of labels has; {_ADVICE}")
    found: dict[str, str] = {}
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            name, _, value = line[1:].partition(":")
            found[name.strip()] = value.strip()
        elif line.strip():
            rows.append((number, line.strip()))
    problems = [
        f"{path}: its {name} is {found.get(name, 'not given')[:80]}, but must be {value}; it was drawn for other "
        f"images, or changed: {_ADVICE}"
        for name, value in _facts(images, fraction, seed).items()
        if found.get(name) != value
    ]
    if problems:
        raise UserError(*problems)
    ids = _checked(path, images, rows)
    wanted = label_count(images, fraction)
    classes = len(np.unique(images.labels[images.train]))
    if len(ids) - wanted > classes:  # a list that rounds by class is welcome, more labels than it says are not
        raise UserError(
            f"{path}: has {len(ids):,} images, but {percent(fraction)} of {len(images.train):,} are {wanted:,}, and "
            f"one more for each of the {classes} classes at most; {_ADVICE}"
        )
    return ids


def _facts(images: ImageSet, fraction: float, seed: int) -> dict[str, str]:
    """What a list depends on, beside the code; a change of any makes another list."""
    train = hashlib.sha256(np.ascontiguousarray(images.train, dtype="<i8").data).hexdigest()
    return {
        "fraction": f"{fraction:.6g}",
        "seed": str(seed),
        "images": images.content_hash,
        "training part": f"{len(images.train)} images, {train}",
    }


def _checked(path: Path, images: ImageSet, rows: list[tuple[int, str]]) -> Ids:
    """The places in the lines of a list, once each is a training image with its own label."""
    assert images.labels is not None
    if not rows or rows[0][1].split(",") != _COLUMNS:
        at = f"{path}:{rows[0][0]}: is {rows[0][1][:80]}" if rows else f"{path}: has no line of columns"
        raise UserError(f"{at}, but must be {','.join(_COLUMNS)}; {_ADVICE}")
    train = set(images.train.tolist())
    problems, ids = [], list[int]()
    seen: set[int] = set()
    for number, line in rows[1:]:
        row, _, label = line.partition(",")
        if not (row.isascii() and row.isdigit() and label.isascii() and label.isdigit()):
            problems.append(f"{path}:{number}: is {line[:80]}, but must be two whole numbers, row and label; {_ADVICE}")
            continue
        place = int(row[:18])
        if place not in train:
            problems.append(f"{path}:{number}: row {row[:20]} is no training image; {_ADVICE}")
        elif place in seen:
            problems.append(f"{path}:{number}: row {row} stands there twice; {_ADVICE}")
        elif str(images.labels[place]) != label:
            own = images.labels[place]
            problems.append(f"{path}:{number}: row {row} has label {label[:20]}, but must have {own}; {_ADVICE}")
        seen.add(place)
        ids.append(place)
    if problems:
        raise UserError(*problems)
    chosen: Ids = np.sort(np.array(ids, dtype=np.int64))
    absent = np.setdiff1d(images.labels[images.train], images.labels[chosen])
    if len(absent):
        raise UserError(f"{path}: has no image of {len(absent)} classes (first: {absent[0]}); {_ADVICE}")
    return chosen
