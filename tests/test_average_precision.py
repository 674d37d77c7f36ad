"""Average precision by hand, by a slow loop and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve

from hpcl.downstream.voc.average_precision import FORMS, Form, average_precision


def loop(scores: list[float], positive: list[bool], form: Form) -> float:
    """Everingham et al. 2010, one cut at a time; equal scores are taken together."""
    points = []
    for cut in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= cut]
        points.append((sum(taken) * 1.0 / sum(positive), sum(taken) / len(taken)))
    if form == "11-point":
        return sum(max((p for r, p in points if r >= i / 10 - 1e-12), default=0.0) for i in range(11)) / 11
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[i:])
        before = recall
    return area


@pytest.mark.parametrize(
    ("order", "eleven", "all_points"),
    [
        ("+", 1.0, 1.0),
        ("++--", 1.0, 1.0),
        ("-+", 1 / 2, 1 / 2),
        ("+-+", (6 * 1 + 5 * 2 / 3) / 11, 1 / 2 + 1 / 2 * 2 / 3),  # recall 0.5 is reached at once: six points of 1
        ("--++", 1 / 2, 1 / 2),  # precision 1/3 at the first, but 1/2 later on: it may only fall
        ("+---+", (6 * 1 + 5 * 2 / 5) / 11, 1 / 2 + 1 / 2 * 2 / 5),
        ("+-+-+", (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11, (1 + 2 / 3 + 3 / 5) / 3),
    ],
)
def test_by_hand(order: str, eleven: float, all_points: float) -> None:
    scores, positive = -np.arange(len(order)), np.array([c == "+" for c in order])
    assert average_precision(scores, positive, "11-point") == pytest.approx(eleven)
    assert average_precision(scores, positive, "all-point") == pytest.approx(all_points)


def test_recall_of_three_in_ten_counts_for_point_three() -> None:
    # 3/10 < 0.30000000000000004 = 3 * 0.1: in floating point the fourth point would be lost
    positive = np.array([True] * 3 + [False] * 30 + [True] * 7)
    low = 10 / 40
    assert average_precision(-np.arange(40), positive, "11-point") == pytest.approx((4 * 1 + 7 * low) / 11)


def test_equal_scores_are_one_cut_whatever_their_order() -> None:
    for positive in ([True, False, False, True], [False, True, True, False], [True, True, False, False]):
        assert average_precision([1, 1, 1, 1], positive, "all-point") == 0.5
        assert average_precision([1, 1, 1, 1], positive, "11-point") == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40))
def test_equals_the_slow_loop_and_bounds_scikit_learns(items: list[tuple[int, bool]]) -> None:
    scores, positive = [float(s) for s, _ in items], [p for _, p in items]
    if not any(positive):
        assert all(average_precision(scores, positive, form) is None for form in FORMS)
        return
    for form in FORMS:
        value = average_precision(scores, positive, form)
        assert value == pytest.approx(loop(scores, positive, form))
        assert average_precision(scores[::-1], positive[::-1], form) == pytest.approx(value)
    area = average_precision(scores, positive, "all-point")
    assert area is not None and area >= average_precision_score(positive, scores) - 1e-12
    precision, recall, _ = precision_recall_curve(positive, scores)  # recall falls from 1 to 0
    envelope = np.maximum.accumulate(precision[:-1])
    assert area == pytest.approx(float((-np.diff(recall) * envelope).sum()))


def test_the_forms_differ_from_scikit_learns_where_precision_rises() -> None:
    scores, positive = [4, 3, 2, 1], [False, True, True, True]
    assert average_precision_score(positive, scores) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(scores, positive, "all-point") == pytest.approx(3 / 4)


def test_what_cannot_be_ranked() -> None:
    assert average_precision([], [], "11-point") is None
    assert average_precision([0.1, 0.2], [0, 0], "all-point") is None
    with pytest.raises(ValueError, match="not finite"):
        average_precision([0.1, float("nan")], [0, 1], "all-point")
    with pytest.raises(ValueError, match="shape"):
        average_precision([0.1], [0, 1], "all-point")
