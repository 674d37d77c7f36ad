"""AP50 by the library: against VOC's own rules, one box at a time, and by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hpcl.downstream.voc.box_precision import Boxes, average_precisions, missing_library, overlaps
from hpcl.errors import UserError

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (pip install 'hpcl[voc]')")

OBJECT = (0.0, 0.0, 10.0, 10.0)


def true(*boxes: tuple[float, ...], difficult: tuple[bool, ...] = ()) -> Boxes:
    hard = np.array(difficult or [False] * len(boxes), dtype=bool)
    return Boxes(np.array(boxes, dtype=np.float32).reshape(-1, 4), np.zeros(len(boxes), dtype=np.int64), difficult=hard)


def found(*boxes: tuple[float, ...]) -> Boxes:
    """Corners and score."""
    rows = np.array(boxes, dtype=np.float32).reshape(-1, 5)
    return Boxes(rows[:, :4], np.zeros(len(rows), dtype=np.int64), rows[:, 4])


def devkit(truth: list[Boxes], guesses: list[Boxes], label: int) -> tuple[float, float]:
    """11-point and all-point AP of a class as VOC's evaluation finds it (Everingham et al. 2010)."""
    every = []
    for i, guess in enumerate(guesses):
        assert guess.scores is not None
        every += [(s, i, b) for s, b, own in zip(guess.scores, guess.boxes, guess.labels, strict=True) if own == label]
    taken, hits, count = set(), [], 0
    for image in truth:
        assert image.difficult is not None
        count += int(((image.labels == label) & ~image.difficult).sum())
    for _, i, box in sorted(every, key=lambda row: -row[0]):
        best, at = 0.0, -1
        for j in np.flatnonzero(truth[i].labels == label):
            other = truth[i].boxes[j]
            width = max(min(box[2], other[2]) - max(box[0], other[0]), 0.0)
            height = max(min(box[3], other[3]) - max(box[1], other[1]), 0.0)
            union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - width * height
            if width * height / union > best:
                best, at = float(width * height / union), int(j)
        difficult = truth[i].difficult
        assert difficult is not None
        if best >= 0.5 and difficult[at]:
            continue
        hits.append(best >= 0.5 and (i, at) not in taken)
        taken |= {(i, at)} if hits[-1] else set()
    found_so_far = np.cumsum(hits)
    precision = found_so_far / np.arange(1, len(hits) + 1)
    best_later = [max(precision[i:]) for i in range(len(hits))]
    area = sum(p for p, hit in zip(best_later, hits, strict=True) if hit) / count
    at_least = [[p for p, n in zip(precision, found_so_far, strict=True) if 10 * n >= i * count] for i in range(11)]
    return float(np.mean([max(reached, default=0.0) for reached in at_least])), float(area)


@pytest.mark.parametrize("seed", range(5))
def test_equals_vocs_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, guesses = [], []
    for _ in range(12):
        n = int(rng.integers(0, 5))
        # objects on a grid, so that no box overlaps two of them by half: there COCO's rule is another
        cells = rng.permutation(9)[:n]
        corners = np.stack([cells % 3, cells // 3], 1) * 100 + rng.integers(0, 10, (n, 2))
        boxes = np.concatenate([corners, corners + rng.integers(40, 90, (n, 2))], 1).astype(np.float32)
        labels = rng.integers(0, 3, n)
        truth.append(Boxes(boxes, labels, difficult=rng.random(n) < 0.3))
        twice = np.repeat(np.arange(n), 2)
        near = boxes[twice] + rng.normal(0, 8, (2 * n, 4)).astype(np.float32)
        named = np.where(rng.random(2 * n) < 0.8, labels[twice], rng.integers(0, 3, 2 * n))
        guesses.append(Boxes(near, named, rng.random(2 * n).astype(np.float32)))
    values = average_precisions(truth, guesses, 4)
    assert values.shape == (4, 2) and np.isnan(values[3]).all()  # no object of it
    for label in range(3):
        eleven, area = devkit(truth, guesses, label)
        assert 0.2 < area <= 1
        assert values[label, 1] == pytest.approx(eleven, abs=1e-9)
        assert values[label, 0] == pytest.approx(area, abs=0.01)  # 101 places of the same curve


def test_by_hand() -> None:
    other = (50.0, 50.0, 60.0, 60.0)
    miss, half = (70.0, 70.0, 80.0, 80.0), (0.0, 0.0, 10.0, 5.0)
    truth = [true(OBJECT), true(other)]

    def of(*guesses: Boxes) -> list[float]:
        value: list[float] = average_precisions(truth, list(guesses), 1)[0].tolist()
        return value

    assert of(found(), found()) == [0, 0]
    assert of(found((*OBJECT, 0.9)), found((*other, 0.8))) == pytest.approx([1, 1])
    assert of(found((*half, 0.9)), found((*other, 0.8))) == pytest.approx([1, 1])  # exactly half is enough
    assert of(found((*OBJECT, 0.9)), found((*miss, 0.8))) == pytest.approx([51 / 101, 6 / 11])
    assert of(found((*OBJECT, 0.8)), found((*miss, 0.9))) == pytest.approx([51 / 101 / 2, 6 / 11 / 2])
    # the second box on the same object is wrong
    assert of(found((*OBJECT, 0.9), (*OBJECT, 0.8)), found((*other, 0.7))) == pytest.approx(
        [(51 + 50 * 2 / 3) / 101, (6 + 5 * 2 / 3) / 11]
    )


def test_a_difficult_object_is_neither_found_nor_missed() -> None:
    hard = (50.0, 0.0, 90.0, 40.0)
    truth = [true(OBJECT, hard, difficult=(False, True))]
    right, on_it, again = (*OBJECT, 0.5), (*hard, 0.9), (51.0, 1.0, 90.0, 40.0, 0.8)
    within = (60.0, 10.0, 70.0, 20.0, 0.7)  # COCO would forgive it, were the object a crowd
    assert average_precisions(truth, [found(right)], 1)[0].tolist() == pytest.approx([1, 1])
    assert average_precisions(truth, [found(right, on_it, again)], 1)[0].tolist() == pytest.approx([1, 1])
    assert average_precisions(truth, [found(right, within)], 1)[0].tolist() == pytest.approx([1 / 2, 1 / 2])
    nothing = average_precisions([true(hard, difficult=(True,))], [found(on_it)], 1)
    assert np.isnan(nothing).all()


def test_three_of_ten_reach_the_place_point_three() -> None:
    truth = [true(*[(20.0 * i, 0.0, 20.0 * i + 10, 10.0) for i in range(10)])]
    guess = found(*[(20.0 * i, 0.0, 20.0 * i + 10, 10.0, 0.9 - i / 100) for i in range(3)])
    assert average_precisions(truth, [guess], 1)[0].tolist() == pytest.approx([31 / 101, 4 / 11])


def test_overlaps() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], dtype=np.float32)
    np.testing.assert_allclose(overlaps(boxes, boxes[:2]), [[1, 1 / 3], [1 / 3, 1], [0, 0]])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_library() is None
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'hpcl\[voc\]'"):
        average_precisions([], [], 1)
