"""Why images do not suffice for a task that looks at labels, in sentences that say what to do."""

from __future__ import annotations

import numpy as np

from hpcl.downstream.bench import Bench


def without_labels(bench: Bench, task: str) -> str | None:
    """The sentence where training images have no labels, or all the same one; else None.

    Args:
        bench: the images.
        task: subject of the sentence, such as `kNN`.
    """
    images = bench.images
    if images.labels is None:
        return (
            f"{images.source}: has no labels, which {task} needs; give a source with one folder per class, or with a "
            "column `label`"
        )
    known = np.unique(images.labels[images.train])
    if len(known) < 2:
        return (
            f"{images.source}: {len(known)} class has training images, but {task} needs 2 or more; give a source with "
            "more classes"
        )
    return None


def without_known_classes(bench: Bench, task: str) -> str | None:
    """As :func:`without_labels`, and where no image of the scored split has a class of the training images."""
    if sentence := without_labels(bench, task):
        return sentence
    images, ids = bench.images, bench.ids(bench.split)
    assert images.labels is not None
    if not len(ids):
        return (
            f"{images.source}: has no {bench.split} images, which {task} is scored on; set data.{bench.split}_fraction "
            "above 0, or name another split"
        )
    if not np.isin(images.labels[ids], images.labels[images.train]).any():
        return (
            f"{images.source}: no class of its {bench.split} images has training images, so {task} cannot be right; "
            "measure fewshot instead, or give a source whose splits share their classes"
        )
    return None
