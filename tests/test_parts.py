"""Classes that training never sees: a source's own, and those drawn for few-shot episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import class_folders, problem_of, random_pixels, save

from hpcl.data import load
from hpcl.data.parts import Parts, parts_of
from hpcl.sections import Data


def all_of(parts: Parts) -> list[np.ndarray]:
    return [parts.train, parts.val, parts.test, parts.novel_val, parts.novel_test]


def of_splits(*classes: tuple[range, int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and split codes of images, 10 a class: the classes of each split."""
    labels = np.concatenate([np.repeat(np.array(part), 10) for part, _ in classes])
    split = np.concatenate([np.full(10 * len(part), code, dtype=np.int8) for part, code in classes])
    return labels, split


def test_splits_by_class_become_novel_and_the_others_are_drawn_from_train() -> None:
    labels, split = of_splits((range(64), 0), (range(64, 80), 1), (range(80, 100), 2))  # mini-imagenet's 64/16/20
    found = parts_of(labels, split, Data(val_fraction=0.2, test_fraction=0.1))
    assert np.array_equal(found.novel_val, np.flatnonzero(split == 1))
    assert np.array_equal(found.novel_test, np.flatnonzero(split == 2))
    assert [len(part) for part in all_of(found)] == [461, 115, 64, 160, 200]  # 64 of 640, then 0.2 of 576
    assert set(labels[found.val]) <= set(range(64)) and set(labels[found.test]) <= set(range(64))
    without = parts_of(labels[:640], split[:640], Data(val_fraction=0.2, test_fraction=0.1))
    assert np.array_equal(found.train, without.train) and np.array_equal(found.val, without.val)


@pytest.mark.parametrize(("val", "novel"), [(range(8, 12), False), (range(9, 12), False), (range(10, 12), True)])
def test_a_split_that_shares_a_class_stays_what_it_is(val: range, novel: bool) -> None:
    labels, split = of_splits((range(10), 0), (val, 1), (range(10), 2))
    found = parts_of(labels, split, Data())
    own = np.flatnonzero(split == 1)
    assert np.array_equal(found.novel_val if novel else found.val, own)
    assert len(found.novel_test) == 0 and np.array_equal(found.test, np.flatnonzero(split == 2))
    assert (len(found.val) == 10) if novel else (len(found.novel_val) == 0)


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(3, 12), novel=st.integers(0, 10), seed=st.integers(0, 50), subset=st.sampled_from([0.5, 1.0])
)
def test_drawn_classes_are_nowhere_else(classes: int, novel: int, seed: int, subset: float) -> None:
    if classes - novel < 2:
        return
    labels = np.random.default_rng(seed).permutation(np.arange(10 * classes) % classes)
    split = np.zeros(len(labels), dtype=np.int8)
    found = parts_of(labels, split, Data(novel_classes=novel, split_seed=seed, subset=subset))
    everywhere = np.concatenate(all_of(found))
    assert len(np.unique(everywhere)) == len(everywhere) and all((np.diff(part) > 0).all() for part in all_of(found))
    drawn = set(labels[found.novel_test])
    assert len(drawn) == novel and len(found.novel_test) == 10 * novel and len(found.novel_val) == 0
    assert not drawn & set(labels[np.concatenate([found.train, found.val, found.test])])
    again = parts_of(labels, split, Data(novel_classes=novel, split_seed=seed, subset=subset))
    assert all(np.array_equal(one, other) for one, other in zip(all_of(found), all_of(again), strict=True))


def test_the_draw_depends_on_the_seed_and_takes_images_out_of_the_sources_own_splits() -> None:
    labels, split = of_splits((range(20), 0), (range(20), 1), (range(20, 25), 2))
    draws = set()
    for seed in range(5):
        found = parts_of(labels, split, Data(novel_classes=3, split_seed=seed))
        drawn = sorted(set(labels[found.novel_test]) - set(range(20, 25)))
        draws.add(tuple(drawn))
        assert len(drawn) == 3 and len(found.novel_test) == 3 * 20 + 50  # train's and val's, and the source's own
        assert not np.isin(labels[np.concatenate([found.train, found.val, found.test])], drawn).any()
    assert len(draws) > 1


def test_too_many_novel_classes_and_none_to_draw_from(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    said = problem_of(Data(source=str(root), novel_classes=2), tmp_path / "cache")
    assert "data.novel_classes is 2, but at least 2 of the 3 classes" in said and "give at most 1" in said
    for i in range(4):
        save(tmp_path / "flat" / f"{i}.png", random_pixels(i))
    said = problem_of(Data(source=str(tmp_path / "flat"), novel_classes=1), tmp_path / "cache")
    assert "data.novel_classes is 1, but" in said and "has no labels" in said


def test_novel_classes_are_described_and_classes_keep_their_numbers(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=4)
    plain = load(Data(source=str(root)), tmp_path / "cache")
    found = load(Data(source=str(root), novel_classes=1), tmp_path / "cache")
    assert found.describe() == f"{root}: 40 images 3x12x12, 4 classes; train 24, val 3, test 3, novel test 10 (1 class)"
    assert found.classes == plain.classes and found.content_hash == plain.content_hash
    assert found.labels is not None and np.array_equal(found.labels, plain.labels)
    assert "novel test" not in plain.describe() and len(plain.novel_test) == len(plain.novel_val) == 0
    pixels = found.images[found.train] / 255  # mean and deviation are of the training part alone
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-6)


def test_a_source_split_by_class_is_described(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "de"), ("test", "f")):
        for name in names:
            for i in range(5):
                save(tmp_path / "set" / split / name / f"{i}.png", random_pixels(i))
    said = load(Data(source=str(tmp_path / "set")), tmp_path / "cache").describe()
    assert said.endswith("6 classes; train 12, val 1, test 2, novel val 10 (2 classes), novel test 5 (1 class)")
