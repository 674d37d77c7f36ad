"""Average precision of a ranking, in the two forms that Pascal VOC uses. Pure numpy.

Legend: n ranked items, P positives among them, T ranks at which the score changes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Form = Literal["11-point", "all-point"]
FORMS: tuple[Form, ...] = ("11-point", "all-point")
"""`11-point` (VOC 2007: Everingham et al. 2010, eq. 1 and 2): mean over r in {0, .1, ..., 1} of the highest precision
among all cuts whose recall is at least r; 0 where there is none.

`all-point` (VOC from 2010 on): area under the precision that is made to fall with recall,
``sum_i (R_i - R_{i-1}) max_{j >= i} P_j``. scikit-learn's ``average_precision_score`` takes P_i itself in place of the
maximum, so it is at most this; COCO samples the same falling precision at 101 places."""


def average_precision(scores: npt.ArrayLike, positive: npt.ArrayLike, form: Form) -> float | None:
    """Average precision 0..1 of items ranked by score, highest first; None where no item is positive.

    A cut goes between two scores, never within equal ones: the order of the items has no say (so does scikit-learn;
    VOC's own code keeps whatever order its sort gives).

    Args:
        scores: (n,) finite.
        positive: (n,) bool, or 0 and 1.
        form: one of :data:`FORMS`.

    Raises:
        ValueError: a score is not finite, or the lengths differ.

    >>> average_precision([0.9, 0.8, 0.7], [True, False, True], "all-point")  # 1/2 * 1 + 1/2 * 2/3
    0.8333333333333333
    """
    score, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if score.ndim != 1 or score.shape != truth.shape:
        raise ValueError(f"scores of shape {score.shape} for items of shape {truth.shape}")
    if not np.isfinite(score).all():
        raise ValueError("a score is not finite")
    found, positives = _found(score, truth), int(truth.sum())
    if not positives:
        return None
    hits, ranks = found
    falling = np.maximum.accumulate((hits / ranks)[::-1])[::-1]
    if form == "all-point":
        return float((np.diff(hits, prepend=0) * falling).sum() / positives)
    # In whole numbers, hits / P >= i / 10 has no rounding: 3 of 10 are recall 0.3.
    first = np.searchsorted(10 * hits, positives * np.arange(11), side="left")
    return float(np.append(falling, 0.0)[first].mean())


def _found(scores: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], ...]:
    """(T,) positives found and (T,) items taken, at each cut."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    return np.cumsum(truth[order], dtype=np.int64)[last], (last + 1).astype(np.int64)
