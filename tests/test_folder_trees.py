"""Trees of folders as well-known sets are unpacked: a split, a mask or an unlabelled folder never becomes a class."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import png, random_pixels

from hpcl import sources

PIXELS = png(random_pixels(0, 4, 4))


def seen(root: Path, *folders: str) -> dict[str, tuple[object, int] | None]:
    """Label and split of the image in each folder; None where it is skipped."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "1.png").write_bytes(PIXELS)
    found = sources.items(sources.find(str(root)))
    return {item.name.rpartition("/")[0]: None if item.problem else (item.label, item.split) for item in found}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set/training_set", "test_set/test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train2017", "val2017"),
        ("x/train", "x/test1"),
        ("train_images", "test_images"),
    ],
)
def test_splits_by_names_that_hold_more_than_the_split(train: str, test: str, tmp_path: Path) -> None:
    folders = [f"{part}/{name}" for part in (train, test) for name in ("cat", "dog")]
    code = 1 if "val" in test else 2
    wanted = {folder: (folder[-3:], 0 if folder.startswith(train) else code) for folder in folders}
    assert seen(tmp_path, *folders) == wanted


def test_splits_without_classes_are_no_classes(tmp_path: Path) -> None:
    assert seen(tmp_path, "train", "test1") == {"train": (None, 0), "test1": (None, 2)}


@pytest.mark.parametrize("beside", ["unlabeled", "chest_xray/train/cat", "sample", "seg_pred"])
def test_what_lies_beside_train_and_test_is_no_class(beside: str, tmp_path: Path) -> None:
    known = {f"{part}/{name}": (name, code) for part, code in (("train", 0), ("test", 2)) for name in ("cat", "dog")}
    assert seen(tmp_path, *known, beside) == known | {beside: None}


@pytest.mark.parametrize("folder", ["test/unknown", "test/test", "test"])
def test_images_to_be_predicted_have_no_class(folder: str, tmp_path: Path) -> None:
    known = {f"{part}/{name}": (name, code) for part, code in (("train", 0), ("val", 1)) for name in ("cat", "dog")}
    assert seen(tmp_path, *known, folder) == known | {folder: None}


def test_classes_with_such_names_stay_classes(tmp_path: Path) -> None:
    names = ("bullet_train", "crash_test", "bus")
    assert seen(tmp_path / "a", *names) == {name: (name, 0) for name in names}
    names = ("cat", "dog", "test")
    assert seen(tmp_path / "b", *names) == {name: (name, 0) for name in names}
    vehicles = {
        f"{part}/{name}": (name, code) for part, code in (("train", 0), ("test", 2)) for name in ("car", "train")
    }
    assert seen(tmp_path / "c", *vehicles) == vehicles


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    wanted = {"images/cat": ("cat", 0), "images/dog": ("dog", 0), "masks/cat": None, "masks/dog": None}
    assert seen(tmp_path / "a", *wanted) == wanted
    assert seen(tmp_path / "b", "images", "annotations/trimaps") == {"images": (None, 0), "annotations/trimaps": None}
