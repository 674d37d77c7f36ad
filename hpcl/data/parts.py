"""Which images are for training, validation and test, and which belong to classes that training never sees.

Legend: N images, n images of a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hpcl import sections
from hpcl.data.labels import Ids, no_ids
from hpcl.rng import seed_of
from hpcl.sources import SPLITS, DataError


@dataclass(frozen=True, eq=False)
class Parts:
    """Sorted places of images; no image is in two parts."""

    train: Ids
    val: Ids
    test: Ids
    novel_val: Ids = field(default_factory=no_ids)
    """Of classes that training never sees, to choose by; see :func:`parts_of`."""
    novel_test: Ids = field(default_factory=no_ids)
    """Of such classes, to report."""


def parts_of(labels: Ids | None, split: npt.NDArray[np.int8], data: sections.Data) -> Parts:
    """The parts of a source.

    The source's own splits count. A val (test) split that shares no class with the train split becomes
    `novel_val` (`novel_test`), for few-shot episodes: classes that a probe or a kNN vote never saw cannot be
    told. `novel_classes` more are drawn from those of the train split and go to `novel_test` with all their
    images. Then, where there are labels and no such split, `test_fraction` of the training images and
    `val_fraction` of the rest are drawn, by class. `subset` takes of what is left for training, by class, at
    least one image each.

    Args:
        labels: (N,) class ids, or None.
        split: (N,) places in :data:`hpcl.sources.SPLITS`.
        data: fractions, numbers and the seed.

    Raises:
        DataError: there is no training image, or `novel_classes` does not fit.
    """
    train, val, test = (np.flatnonzero(split == code) for code in range(len(SPLITS)))
    if not len(train):
        counts = ", ".join(f"{int((split == code).sum())} {name}" for code, name in enumerate(SPLITS))
        raise DataError(
            f"data.source {data.source} has no training image ({counts}); give one with a train split, or with none"
        )
    parts = Parts(train, val, test)
    if labels is None:
        if data.novel_classes:
            raise DataError(
                f"data.novel_classes is {data.novel_classes}, but {data.source} has no labels; leave it out, or give "
                "a labelled source"
            )
    else:
        parts = _hold_out(_draw_novel(_set_novel_apart(parts, labels), labels, data), labels, data)
    if data.subset < 1:
        of_image = labels if labels is not None else np.zeros(len(split), dtype=np.int64)
        parts = replace(parts, train=draw(parts.train, of_image, data.subset, data.split_seed, "subset", least=1))
    return parts


def _set_novel_apart(parts: Parts, labels: Ids) -> Parts:
    """A source's own val and test splits whose classes are all strange to its train split are novel."""
    known = np.unique(labels[parts.train])
    if len(parts.val) and not np.isin(labels[parts.val], known).any():
        parts = replace(parts, val=no_ids(), novel_val=parts.val)
    if len(parts.test) and not np.isin(labels[parts.test], known).any():
        parts = replace(parts, test=no_ids(), novel_test=parts.test)
    return parts


def _draw_novel(parts: Parts, labels: Ids, data: sections.Data) -> Parts:
    """Keep `novel_classes` classes of the train split out of all other parts."""
    if not data.novel_classes:
        return parts
    known = np.unique(labels[parts.train])
    left = len(known) - data.novel_classes
    if left < 2:
        raise DataError(
            f"data.novel_classes is {data.novel_classes}, but at least 2 of the {len(known)} classes that "
            f"{data.source} has for training must be left; give at most {max(0, len(known) - 2)}"
        )
    random = np.random.default_rng(seed_of(data.split_seed, "data-novel"))
    chosen = random.permutation(known)[: data.novel_classes]
    old = [parts.train, parts.val, parts.test]
    train, val, test = (ids[~np.isin(labels[ids], chosen)] for ids in old)
    drawn = [ids[np.isin(labels[ids], chosen)] for ids in old]
    return replace(
        parts, train=train, val=val, test=test, novel_test=np.sort(np.concatenate([parts.novel_test, *drawn]))
    )


def _hold_out(parts: Parts, labels: Ids, data: sections.Data) -> Parts:
    """Draw the test and val parts that the source does not have."""
    train, val, test = parts.train, parts.val, parts.test
    if not len(test):
        test = draw(train, labels, data.test_fraction, data.split_seed, "test", least=0)
        train = np.setdiff1d(train, test)
    if not len(val):
        val = draw(train, labels, data.val_fraction, data.split_seed, "val", least=0)
        train = np.setdiff1d(train, val)
    return replace(parts, train=train, val=val, test=test)


def draw(ids: Ids, labels: Ids, fraction: float, seed: int, purpose: str, *, least: int) -> Ids:
    """A fraction of some images, the same of each class (largest remainder), sorted.

    Args:
        ids: (n,) images to choose from.
        labels: (N,) class of every image.
        fraction: of `ids`.
        seed: of the choice.
        purpose: names the draw.
        least: images at least per class; 0 leaves one of each class instead.
    """
    classes = np.unique(labels[ids])
    members = [ids[labels[ids] == label] for label in classes]
    sizes = np.array([len(of_class) for of_class in members], dtype=np.int64)
    quota = fraction * sizes
    counts = np.floor(quota + 1e-9).astype(np.int64)
    missing = round(fraction * len(ids)) - int(counts.sum())
    by_remainder = np.argsort(-np.round(quota - counts, 9), kind="stable")
    counts[by_remainder[: max(0, missing)]] += 1
    counts = np.maximum(counts, least) if least else np.minimum(counts, sizes - 1)
    chosen = [
        np.random.default_rng(seed_of(seed, f"data-{purpose}", label)).permutation(of_class)[:count]
        for label, of_class, count in zip(classes, members, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else ids
