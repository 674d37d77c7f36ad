"""AP50 of found boxes, scored by faster-coco-eval as VOC means it.

Legend: n boxes of one image; Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcl.data import Ids
from hpcl.errors import UserError

IOU = 0.5
"""Overlap (intersection over union) from which on a box is found: VOC's."""
MEASURES = ("AP50 (101-point)", "AP50 (11-point)")
"""The falling precision at recall 0, .01, ..., 1, as COCO samples it, and at 0, .1, ..., 1, as VOC 2007 does (and
Detectron2, whose "AP50" of VOC07 in the papers of MoCo and PCL is the second)."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one image: found ones with scores, or true ones."""

    boxes: npt.NDArray[np.float32]
    """(n, 4) left, top, right, bottom, in pixels."""
    labels: Ids
    """(n,) 0..Y-1."""
    scores: npt.NDArray[np.float32] | None = None
    """(n,) of found boxes."""
    difficult: npt.NDArray[np.bool_] | None = None
    """(n,) of true boxes."""


def missing_library() -> str | None:
    """What to install, if the library is not there."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        return "detection is scored by faster-coco-eval, which is not installed: pip install 'hpcl[voc]'"
    return None


def average_precisions(truth: Sequence[Boxes], found: Sequence[Boxes], num_classes: int) -> npt.NDArray[np.float64]:
    """(Y, 2) AP50, 0..1, in the forms of MEASURES; NaN for a class without an object that counts.

    As in VOC, a difficult object is neither found nor missed: a box that overlaps one most, by at least IOU, is left
    out with it, however many such boxes there are. (COCO's crowds would forgive boxes that lie within one, too.) Two
    rules are COCO's: a box may take the best object that is still free (VOC's only the best of all), and boxes with
    equal scores stay in the order of the images.

    Args:
        truth: of each image.
        found: of each image, the same order.
        num_classes: Y.

    Raises:
        UserError: the library is not installed.
    """
    problem = missing_library()
    if problem is not None:
        raise UserError(problem)
    from faster_coco_eval import COCO, COCOeval_faster

    left = [_without_difficult(*pair) for pair in zip(truth, found, strict=True)]
    objects = [row for i, (true, _) in enumerate(left) for row in _rows(i, true)]
    results = [row for i, (_, guess) in enumerate(left) for row in _rows(i, guess)]
    content = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
        "annotations": [row | {"id": i + 1, "iscrowd": 0} for i, row in enumerate(objects)],
    }
    scored = COCO(content)
    evaluation = COCOeval_faster(scored, scored.loadRes(results), "bbox")
    parameters = evaluation.params
    parameters.iouThrs = np.array([IOU])
    # i / 100 as a quotient: a recall of 3 in 10 must not lie below the place 0.3
    parameters.recThrs = np.arange(101) / 100
    parameters.areaRng, parameters.areaRngLbl = [[0, 1e10]], ["all"]
    parameters.maxDets = [max(1, len(results))]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"], dtype=np.float64).reshape(101, num_classes)
    precision = np.where(precision < 0, np.nan, precision)
    return np.stack([precision.mean(0), precision[::10].mean(0)], axis=1)


def overlaps(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(n, m) intersection over union of boxes (n, 4) and (m, 4)."""
    a, b = one.astype(np.float64)[:, None], other.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    both = sides.prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (a, b)]
    shared: npt.NDArray[np.float64] = both / np.maximum(areas[0] + areas[1] - both, 1e-12)
    return shared


def _without_difficult(truth: Boxes, found: Boxes) -> tuple[Boxes, Boxes]:
    assert truth.difficult is not None
    assert found.scores is not None
    counts = np.ones(len(found.labels), dtype=bool)
    if truth.difficult.any() and len(found.labels):
        own = found.labels[:, None] == truth.labels[None]
        shared = np.where(own, overlaps(found.boxes, truth.boxes), -1.0)
        best = shared.argmax(1)
        counts = ~((shared.max(1) >= IOU) & truth.difficult[best])
    sure = ~truth.difficult
    return (
        Boxes(truth.boxes[sure], truth.labels[sure], difficult=truth.difficult[sure]),
        Boxes(found.boxes[counts], found.labels[counts], found.scores[counts]),
    )


def _rows(image_id: int, boxes: Boxes) -> list[dict[str, Any]]:
    """COCO's form: left, top, width, height."""
    rows: list[dict[str, Any]] = []
    for i, (label, box) in enumerate(zip(boxes.labels.tolist(), boxes.boxes.tolist(), strict=True)):
        left, top, right, bottom = box
        row = {"image_id": image_id, "category_id": label, "bbox": [left, top, right - left, bottom - top]}
        row["area"] = (right - left) * (bottom - top)
        rows.append(row if boxes.scores is None else row | {"score": float(boxes.scores[i])})
    return rows
