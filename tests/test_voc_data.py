"""Folders in VOC form: what is read, what is refused, and annotations that somebody else made to do harm."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_folders import Box, digit_folder, write_voc, xml

from hpcl.downstream.voc.data import VOC_CLASSES, read_voc
from hpcl.downstream.voc.xml import MOST_BYTES, AnnotationError, parse_annotation
from hpcl.errors import UserError
from hpcl.sources import DataError

GRAY = np.full((40, 60), 90, dtype=np.uint8)
CAT: Box = ("cat", (11, 6, 30, 25), {"difficult": 0, "truncated": 1})


def shared(name: str) -> Path:
    """A real set, where HPCL_TEST_DATA names a folder that holds it."""
    folder = Path(os.environ.get("HPCL_TEST_DATA", ""), "detection", name)
    if not os.environ.get("HPCL_TEST_DATA") or not folder.is_dir():
        pytest.skip(f"HPCL_TEST_DATA names no folder with detection/{name}")
    return folder


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read_voc(path)
    return caught.value.problems


# ---------------------------------------------------------------- what is read


def test_boxes_classes_flags_and_parts(tmp_path: Path) -> None:
    dog: Box = ("dog", (1, 1, 60, 40), {"difficult": 1})
    folder = write_voc(tmp_path, {"a": (GRAY, [CAT, dog]), "b": (GRAY, [])}, {"train": ["a"], "val": [], "test": ["b"]})
    data = read_voc(tmp_path)  # the folder around it
    assert data.root == folder == read_voc(folder).root
    assert data.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    first, second = data.images
    # 1-based and inclusive: columns 11 to 30 are 20 pixels, from 10 up to, without, 30
    assert first.boxes.tolist() == [[10, 5, 30, 25], [0, 0, 60, 40]] and first.size == (40, 60)
    assert [data.classes[i] for i in first.labels] == ["cat", "dog"]
    assert first.difficult.tolist() == [False, True] and first.truncated.tolist() == [True, False]
    assert second.boxes.shape == (0, 4) and second.labels.dtype == np.int64
    assert {part: ids.tolist() for part, ids in data.parts.items()} == {
        "train": [0], "val": [], "trainval": [0], "test": [1],
    }  # fmt: skip
    cat, dog_id = VOC_CLASSES.index("cat"), VOC_CLASSES.index("dog")
    assert data.presence[0, [cat, dog_id]].tolist() == [1, 0] and (data.presence[1] == -1).all()
    assert data.describe().endswith("2 images, 20 classes, 2 objects (1 difficult); train 1, val 0, trainval 1, test 1")


def test_other_names_are_the_classes_in_order(tmp_path: Path) -> None:
    data = read_voc(digit_folder(tmp_path, {"train": 3, "test": 3}, classes=(4, 0)))
    assert data.classes == ("digit0", "digit4")
    white = data.pixels(0, 1)[0][
        tuple(slice(*edge) for edge in data.images[0].boxes[0].reshape(2, 2).T.astype(int))[::-1]
    ]
    assert white.max() > 200  # the box is where the digit was drawn


def test_boxes_without_area_outside_and_over_the_edge_are_counted(tmp_path: Path) -> None:
    boxes: list[Box] = [
        CAT,
        ("cat", (20, 5, 20, 9), {}),  # no area
        ("cat", (70, 5, 90, 9), {}),  # to the right of the image
        ("cat", (50, 30, 75, 44), {}),  # over two edges
        ("cat", (0, 0, 10, 10), {}),  # counted from 0
    ]
    data = read_voc(write_voc(tmp_path, {"a": (GRAY, boxes)}, {"test": ["a"]}))
    assert data.images[0].boxes.tolist() == [[10, 5, 30, 25], [49, 29, 60, 40], [0, 0, 10, 10]]
    assert data.notes == (
        "1 boxes without area left out (a)",
        "1 boxes outside the image left out (a)",
        "2 boxes clipped to the image (a)",
    )


def test_class_lists_count_where_there_are_any(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": (GRAY, [CAT]), "b": (GRAY, [CAT])}, {"test": ["a", "b"]})
    (folder / "ImageSets" / "Main" / "cat_test.txt").write_text("a  1\nb  0\n")
    data = read_voc(folder)
    assert data.presence[:, VOC_CLASSES.index("cat")].tolist() == [1, 0]
    assert data.notes == ("1 entries of class lists differ from the objects (first: b cat)",)
    (folder / "ImageSets" / "Main" / "cat_test.txt").write_text("c 1\na 2\n")
    assert len(problems_of(folder)) == 2


def test_pixels_become_gray_or_colour_and_square(tmp_path: Path) -> None:
    red = np.zeros((40, 60, 3), dtype=np.uint8)
    red[..., 0] = 200
    data = read_voc(write_voc(tmp_path, {"gray": (GRAY, []), "red": (red, [])}, {"test": ["gray", "red"]}))
    assert data.pixels(0, 3).shape == (3, 40, 60) and (data.pixels(0, 3) == 90).all()
    assert data.pixels(1, 1).shape == (1, 40, 60)
    np.testing.assert_allclose(data.pixels(1, 1), 0.299 * 200, atol=2)
    assert data.pixels(1, 3, size=16).shape == (3, 16, 16)


def test_an_image_on_its_side_is_turned_only_if_the_boxes_are(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": (GRAY, [CAT])}, {"test": ["a"]})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY).save(folder / "JPEGImages" / "a.jpg", exif=exif)
    (problem,) = problems_of(folder)
    assert "an image of 60x40 pixels, but a.jpg has 40x60 turned upright (EXIF orientation 6)" in problem
    (folder / "Annotations" / "a.xml").write_text(xml(40, 60, [CAT]))
    data = read_voc(folder)
    assert data.images[0].size == (60, 40) and data.pixels(0, 1).shape == (1, 60, 40)


# ---------------------------------------------------------------- what is refused


def test_everything_missing_or_wrong_is_told_at_once(tmp_path: Path) -> None:
    names = ["good", "no_image", "no_annotation", "broken", "other_size"]
    folder = write_voc(tmp_path, {name: (GRAY, [CAT]) for name in names}, {"trainval": names[:2], "test": names[2:]})
    (folder / "JPEGImages" / "no_image.jpg").unlink()
    (folder / "Annotations" / "no_annotation.xml").unlink()
    (folder / "JPEGImages" / "broken.jpg").write_bytes(b"no image")
    (folder / "Annotations" / "other_size.xml").write_text(xml(640, 480, [CAT]))
    problems = problems_of(folder)
    assert len(problems) == 4
    for problem, text in zip(
        problems,
        (
            "no_image.jpg: is missing",
            "no_annotation.xml: is missing",
            "is no image that is read",
            "640x480 pixels, but",
        ),
        strict=True,
    ):
        assert text in problem


def test_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": (GRAY, []), "b": (GRAY, [])}, {"trainval": ["a", "b"], "test": ["b"]})
    (problem,) = problems_of(folder)
    assert "1 images stand in trainval.txt and in test.txt (first: b)" in problem


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "is no folder" in problems_of(tmp_path / "nowhere")[0]
    (tmp_path / "VOC2007" / "Annotations").mkdir(parents=True)
    assert "VOC2007: has no folder ImageSets/Main, JPEGImages" in problems_of(tmp_path)[0]
    assert "none of train.txt, val.txt" in problems_of(write_voc(tmp_path / "x", {}, {"test": []}))[0]


def test_a_broken_image_is_told_when_it_is_decoded(tmp_path: Path) -> None:
    folder = write_voc(
        tmp_path, {"a": (np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8), [])}, {"test": ["a"]}
    )
    file = folder / "JPEGImages" / "a.jpg"
    file.write_bytes(file.read_bytes()[:700])
    data = read_voc(folder)
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded \(.*truncated"):
        data.pixels(0, 3)


# ---------------------------------------------------------------- files by somebody else

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>'.encode(), "document type"),
        (b'<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>', "document type"),
        ('<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a><annotation/>'.encode("utf-16"), "document type"),
        (b"<annotation>" + b"<a>" * 100_000, "deep"),
        (b" " * (MOST_BYTES + 1), "bytes"),
        (b"", "is no XML"),
        (b"<annotation>", "is no XML"),
        (b"\xff\xfe\x00", "is no XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "is no XML"),
        (b"<html/>", "begins with <html>"),
        (b"<annotation><object/></annotation>", "object 1 has no <name>"),
        (b"<annotation><object><name>cat</name></object></annotation>", r"object 1 \(cat\) has no <bndbox>"),
        (xml(9, 9, [("cat", (1, 1, float("nan"), 5), {})]).encode(), "<xmax> 'nan'"),
        (xml(9, 9, [("cat", (1, 1, float("inf"), 5), {})]).encode(), "<xmax> 'inf'"),
        (b"<annotation><object><name>c</name><bndbox><xmin>one</xmin></bndbox></object></annotation>", "'one'"),
    ],
)
def test_hostile_annotations_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(AnnotationError, match=problem):
        parse_annotation(content)


def test_parts_of_objects_are_no_objects() -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    text = xml(9, 9, [("person", (1, 1, 5.5, 5), {})]).replace("</object>", f"{part}</object>").replace("<size>", "<s>")
    found = parse_annotation(text.replace("</size>", "</s>").encode())
    assert found.size is None and [(o.name, o.box) for o in found.objects] == [("person", (0, 0, 5.5, 5))]


def test_lists_lead_out_of_no_folder(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": (GRAY, [])}, {"test": ["a", "../../secret", "x\\y", ".."]})
    problems = problems_of(folder)
    assert len(problems) == 3 and all("is no name of an image" in problem for problem in problems)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"a": (GRAY, [])}, {"test": ["a"]})
    (folder / "Annotations" / "a.xml").unlink()
    os.mkfifo(folder / "Annotations" / "a.xml")
    assert "Is a pipe" in problems_of(folder)[0]


# ---------------------------------------------------------------- real sets


def test_genuine_voc2007_images() -> None:
    data = read_voc(shared("voc2007_genuine4"))
    assert data.classes == VOC_CLASSES and len(data.images) == 4 and "11 objects (2 difficult)" in data.describe()
    chairs = data.images[[image.name for image in data.images].index("000005")]
    assert chairs.size == (375, 500) and chairs.boxes[0].tolist() == [262, 210, 324, 339]
    assert data.pixels(0, 3).shape == (3, *data.images[0].size)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("indoor", "73 images, 20 classes, 241 objects (0 difficult); trainval 43, test 30"),
        (
            "bccd",
            "364 images, 3 classes, 4,886 objects (0 difficult); train 205, val 87, trainval 292, test 72; 2 boxes",
        ),
    ],
)
def test_real_sets(name: str, said: str) -> None:
    assert said in read_voc(shared(name)).describe()
