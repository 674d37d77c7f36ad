"""Labels as sources give them, to class ids.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcl.sources import DataError

Ids = npt.NDArray[np.int64]


def no_ids() -> Ids:
    """An empty part."""
    return np.zeros(0, dtype=np.int64)


def class_ids(
    raw: Sequence[Any], names: tuple[str, ...] | None, where: str, what: str = "label"
) -> tuple[Ids | None, tuple[str, ...]]:
    """(N,) class ids and class names; without `names` the distinct labels in order are the classes.

    Args:
        raw: what the source says of each image: whole numbers, names, or None.
        names: class names that numbers are places in.
        where: the source, for messages.
        what: "label" or "coarse label", for messages.

    Returns:
        None and no names where no image has a label.

    Raises:
        DataError: some have a label and some have none, they are of several kinds, or a number is out of range.
    """
    missing = sum(label is None for label in raw)
    if missing == len(raw):
        return None, ()
    if missing:
        raise DataError(
            f"data.source {where}: {missing} of {len(raw)} images have no {what}, but all or none must have one; "
            "drop the column or the rows"
        )
    labels = [label.item() if isinstance(label, np.generic) else label for label in raw]
    kinds = {type(label) for label in labels}
    if kinds not in ({int}, {str}, {bool}):
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"data.source {where}: {what}s are {got}, but must be all whole numbers or all strings")
    if names is not None and kinds == {int}:
        wrong = sorted({label for label in labels if not 0 <= label < len(names)})
        if wrong:
            raise DataError(
                f"data.source {where}: {what} {wrong[0]} is not one of the {len(names)} classes named in the file "
                f"(0 to {len(names) - 1})"
            )
        return np.array(labels, dtype=np.int64), names
    if kinds == {int} and min(labels) < 0:
        raise DataError(
            f"data.source {where}: {what} {min(labels)} is negative; leave out the column for images without"
        )
    distinct = sorted(set(labels))
    place = {label: i for i, label in enumerate(distinct)}
    return np.array([place[label] for label in labels], dtype=np.int64), tuple(str(label) for label in distinct)
