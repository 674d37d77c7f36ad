"""Lists of labelled images: balanced, nested, the same by seed, and files that say when they do not fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpcl.data import ImageSet
from hpcl.downstream.labels import draw_labels, label_list, label_order, list_path, list_text, percent
from hpcl.errors import UserError


def images_of(labels: list[int], train: list[int] | None = None) -> ImageSet:
    count = len(labels)
    return ImageSet(
        images=np.zeros((count, 1, 8, 8), dtype=np.uint8),
        labels=np.array(labels),
        train=np.arange(count) if train is None else np.array(train),
        val=np.empty(0, dtype=np.int64),
        test=np.empty(0, dtype=np.int64),
        classes=tuple("abcdefgh"[: max(labels) + 1]),
        source="made",
        content_hash="c0ffee",
        mean=np.zeros(1, dtype=np.float32),
        std=np.ones(1, dtype=np.float32),
    )


UNEQUAL = images_of([0] * 50 + [1] * 30 + [2] * 3 + [3] * 17)


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [
        (0.001, [1, 1, 1, 1]),
        (0.04, [1, 1, 1, 1]),
        (0.08, [2, 2, 2, 2]),
        (0.33, [10, 10, 3, 10]),
        (1.0, [50, 30, 3, 17]),
    ],
)
def test_classes_are_balanced_as_far_as_they_go(fraction: float, counts: list[int]) -> None:
    ids = draw_labels(UNEQUAL, fraction, 0)
    assert UNEQUAL.labels is not None
    assert np.bincount(UNEQUAL.labels[ids], minlength=4).tolist() == counts
    assert (np.diff(ids) > 0).all()


def test_lists_are_nested_the_same_by_seed_and_of_training_images_alone() -> None:
    some = replace(UNEQUAL, train=np.arange(0, 100, 2))
    lists = [set(draw_labels(some, fraction, 3).tolist()) for fraction in (0.01, 0.1, 0.3, 0.7, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(lists))
    assert lists[-1] == set(some.train.tolist())
    assert (label_order(some, 3) == label_order(some, 3)).all()
    assert (label_order(some, 3) != label_order(some, 4)).any()
    sizes = [np.bincount(some.labels[draw_labels(some, 0.11, s)], minlength=4) for s in range(20)]  # type: ignore[index]
    assert all(sorted(size) == [1, 1, 2, 2] for size in sizes)  # 6 images, of 4 classes with 2 at least
    assert len({tuple(size) for size in sizes}) > 1  # which classes have one more is drawn


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        draw_labels(UNEQUAL, fraction, 0)


def test_a_list_is_kept_and_read_back(tmp_path: Path) -> None:
    ids = label_list(UNEQUAL, 0.1, 7, tmp_path / "labels")
    path = list_path(tmp_path / "labels", 0.1, 7)
    assert path.name == "10percent-seed7.csv"
    assert (list_path(tmp_path, 0.005, 0).name, percent(0.01)) == ("0.5percent-seed0.csv", "1 %")
    lines = path.read_text().splitlines()
    assert lines[:3] == ["# fraction: 0.1", "# seed: 7", "# images: c0ffee"]
    assert lines[4] == "row,label"
    assert [line.split(",")[0] for line in lines[5:]] == [str(i) for i in ids]
    written = path.stat().st_mtime_ns
    assert (label_list(UNEQUAL, 0.1, 7, tmp_path / "labels") == ids).all()
    assert path.stat().st_mtime_ns == written
    # somebody's own choice of images, in the same form, is used as it is
    assert UNEQUAL.labels is not None
    own = [0, 1, 50, 80, 99]
    path.write_text("\n".join([*lines[:5], *(f"{i},{UNEQUAL.labels[i]}" for i in own)]))
    assert label_list(UNEQUAL, 0.1, 7, tmp_path / "labels").tolist() == own


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("c0ffee", "beef", ["its images is beef, but must be c0ffee"]),
        ("# seed: 0", "# seed: 1", ["its seed is 1, but must be 0"]),
        ("# fraction: 0.1", "", ["its fraction is not given, but must be 0.1"]),
        ("row,label", "path,label", [":5: is path,label, but must be row,label"]),
        ("row,label\n", "row,label\n999,0\n-1,0\n1,one\n", [":6: row 999 is no", ":7: is -1,0", ":8: is 1,one"]),
        (",0\n", ",4\n", ["has label 4, but must have 0"]),
        (",3\n", ",3\n{again},3\n", ["stands there twice"]),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    ids = label_list(UNEQUAL, 0.1, 0, tmp_path)
    path = list_path(tmp_path, 0.1, 0)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new.format(again=ids[-1])))
    with pytest.raises(UserError) as error:
        label_list(UNEQUAL, 0.1, 0, tmp_path)
    assert all(word in str(error.value) for word in words)
    assert str(path) in str(error.value)
    assert "remove it and run again" in str(error.value)


def test_other_training_images_and_missing_classes_and_bytes(tmp_path: Path) -> None:
    label_list(UNEQUAL, 0.1, 0, tmp_path)
    path = list_path(tmp_path, 0.1, 0)
    text = path.read_text()
    with pytest.raises(UserError, match=r"its training part is 100 images, .*, but must be 50 images"):
        label_list(replace(UNEQUAL, train=np.arange(50)), 0.1, 0, tmp_path)
    path.write_text("\n".join(line for line in text.splitlines() if not line.endswith(",2")))
    with pytest.raises(UserError, match=r"has no image of 1 classes \(first: 2\)"):
        label_list(UNEQUAL, 0.1, 0, tmp_path)
    for content in (b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as a list|not given"):
            label_list(UNEQUAL, 0.1, 0, tmp_path)


def test_a_list_has_about_as_many_images_as_its_fraction_says(tmp_path: Path) -> None:
    """10 of 100 images and 4 classes: 14 may be rounding, 15 are more labels than the table will say."""
    path = list_path(tmp_path, 0.1, 0)
    path.write_text(list_text(UNEQUAL, np.arange(36, 87, 4)[:13], 0.1, 0) + "99,3\n")
    assert len(label_list(UNEQUAL, 0.1, 0, tmp_path)) == 14
    path.write_text(path.read_text() + "98,3\n")
    with pytest.raises(UserError, match=r"has 15 images, but 10 % of 100 are 10, and one more for each of the 4"):
        label_list(UNEQUAL, 0.1, 0, tmp_path)
