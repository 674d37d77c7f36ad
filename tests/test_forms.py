"""Files as users have them: nested folders, CSV lists, VOC's layout, hubs' tables; what is found and what is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from pictures import class_folders, png, random_pixels, save, table

from hpcl import sources
from hpcl.decode import attempt
from hpcl.sources import DataError

SMALL = random_pixels(0, 4, 4)


def files(root: Path, *names: str) -> Path:
    """Images of these names, all alike."""
    for name in names:
        save(root / name, SMALL)
    return root


def seen(root: Path) -> dict[str, tuple[object, int]]:
    """Label and split of each usable image by its name."""
    return {item.name: (item.label, item.split) for item in sources.items(sources.find(str(root))) if not item.problem}


def problems(root: Path) -> dict[str, str]:
    """What is skipped, before anything is decoded."""
    found = sources.find(str(root))
    return {**dict(found.skipped), **{item.name: item.problem for item in sources.items(found) if item.problem}}


# --- folders -----------------------------------------------------------------------

TREES = {
    "train/{}/{}.png": "split, class",
    "{}/train/{}.png": "class, split",
    "download/v2/train/{}/{}.png": "wrappers above",
    "train/{}/images/{}.png": "a folder below the class, as in Tiny ImageNet",
    "train/data/{}/deep/er/{}.png": "a wrapper between, deeper files",
    "Training/{}/{}.png": "another name of the split",
}


@pytest.mark.parametrize("tree", TREES)
def test_splits_and_classes_wherever_they_stand(tree: str, tmp_path: Path) -> None:
    names = {tree.format(c, i): c for c in ("cat", "dog") for i in range(2)}
    tests = {name.replace("train", "test").replace("Training", "testing"): c for name, c in names.items()}
    files(tmp_path / "set", *names, *tests)
    wanted = {name: (c, 0) for name, c in names.items()} | {name: (c, 2) for name, c in tests.items()}
    assert seen(tmp_path / "set") == wanted


def test_nested_folders_without_classes_are_unlabelled(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "a/b/1.png", "a/b/c/2.png", "a/3.png")
    assert seen(root) == {name: (None, 0) for name in ("a/3.png", "a/b/1.png", "a/b/c/2.png")}


def test_a_few_images_in_a_folder_called_test_make_no_split(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "cat/1.png", "cat/2.png", "cat/test/3.png", "dog/1.png")
    assert Counter(seen(root).values()) == {("cat", 0): 3, ("dog", 0): 1}


def test_of_several_levels_the_first_is_the_class(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "cat/tabby/1.png", "cat/manx/2.png", "dog/husky/3.png")
    assert {label for label, _ in seen(root).values()} == {"cat", "dog"}


TINY = ("train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "val/images/v0.JPEG", "val/images/v1.JPEG")


def test_tiny_imagenet_without_its_list_has_no_class_called_images(tmp_path: Path) -> None:
    root = files(tmp_path / "set", *TINY)
    assert {label for label, _ in seen(root).values()} == {"n01", "n02"}
    assert problems(root) == {name: "has no class folder, as images of other splits have" for name in TINY[2:]}


def test_tiny_imagenet_takes_validation_classes_from_its_list(tmp_path: Path) -> None:
    root = files(tmp_path / "set", *TINY)
    before = sources.find(str(root)).fingerprint
    (root / "val" / "val_annotations.txt").write_text("v0.JPEG\tn02\t0\t0\t9\t9\nv1.JPEG\tn01\t0\t0\t9\t9\n")
    assert seen(root)["val/images/v0.JPEG"] == ("n02", 1) and seen(root)["val/images/v1.JPEG"] == ("n01", 1)
    found = sources.find(str(root))
    assert found.fingerprint != before and found.other_files == 0


def test_a_class_of_one_split_only_stays_a_class(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "train/cat/1.png", "train/dog/1.png", "test/emu/1.png")
    assert seen(root)["test/emu/1.png"] == ("emu", 2)


def test_hidden_files_are_named_and_folders_without_images_too(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "cat/1.png", "dog/1.png", "__MACOSX/cat/1.png", "__MACOSX/cat/2.png", ".git/x.png")
    (root / "cat" / "._1.png").write_bytes(b"")
    (root / "emu" / "deep").mkdir(parents=True)
    found = sources.find(str(root))
    assert dict(found.litter) == {
        "__MACOSX/": "what a Mac's archive leaves, no images (2 files)",
        ".git/": "hidden folder (1 file)",
        "cat/._1.png": "what a Mac keeps beside a file, no image (._ file)",
    }
    assert found.empty == ("emu",) and found.skipped == () and len(seen(root)) == 2


# --- CSV ---------------------------------------------------------------------------


def lists(root: Path, rows: dict[str, str], head: str = "filename,label") -> None:
    for name, lines in rows.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{head}\n{lines}\n")


@pytest.mark.parametrize("where", ["images/", "", "images/train/n01/", "elsewhere/deep/er/"])
@pytest.mark.parametrize("folder", ["", "splits/"])
def test_ravi_and_larochelles_mini_imagenet(where: str, folder: str, tmp_path: Path) -> None:
    root = files(tmp_path / "set", *(f"{where}n0{i}.jpg" for i in range(4)))
    lists(root, {f"{folder}train.csv": "n00.jpg,n01\nn01.jpg,n02\ngone.jpg,n02", f"{folder}test.csv": "n03.jpg,n09"})
    assert seen(root) == {
        f"{where}n00.jpg": ("n01", 0),
        f"{where}n01.jpg": ("n02", 0),
        f"{where}n03.jpg": ("n09", 2),
    }
    assert problems(root) == {
        f"{folder}train.csv line 4 (gone.jpg)": "there is no such file",
        f"{where}n02.jpg": "no row of a CSV file names it",
    }
    found = sources.find(str(root))
    assert found.kind == "csv" and found.other_files == 0
    assert found.notes[0].startswith(f"taken as the rows of {folder}test.csv, {folder}train.csv;")
    assert found.notes[1].startswith("1 of 4 image files are left out")
    assert sources.find(str(root / f"{folder}train.csv")).kind == "csv"
    (root / f"{folder}test.csv").write_text("filename,label\nn02.jpg,n09\n")
    assert sources.find(str(root)).fingerprint != found.fingerprint


@pytest.mark.parametrize("column", ["filename", "file_name", "File", "path", "IMAGE"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_one_list_with_all_columns(column: str, delimiter: str, tmp_path: Path) -> None:
    root = files(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png")
    rows = [["split", column, "class", "coarse_label"], ["train", "a/1.png", "10", "x"], ["Test", "a\\2.png", "2", "y"]]
    (root / "labels.csv").write_text("\n".join(delimiter.join(row) for row in [*rows, ["dev", "./b/1", "2", "x"]]))
    found = list(sources.items(sources.find(str(root))))
    assert [(i.name, i.label, i.split, i.coarse) for i in found] == [
        ("a/1.png", 10, 0, "x"),
        ("a/2.png", 2, 2, "y"),
        ("b/1.png", 2, 1, "x"),
    ]
    assert [i.name for i in sources.items(sources.find(str(root / "labels.csv")))] == [i.name for i in found]


def test_the_split_of_a_list_by_its_folder_or_its_paths(tmp_path: Path) -> None:
    root = files(tmp_path / "hub", "train/1.png", "test/2.png")
    lists(root, {"train/metadata.csv": "1.png,x", "test/metadata.csv": "2.png,y"}, "file_name,label")
    assert seen(root) == {"train/1.png": ("x", 0), "test/2.png": ("y", 2)}
    root = files(tmp_path / "paths", "x/train/1.png", "x/val/2.png")
    lists(root, {"labels.csv": "x/train/1.png,a\nx/val/2.png,b"})
    assert seen(root) == {"x/train/1.png": ("a", 0), "x/val/2.png": ("b", 1)}


def test_rows_that_are_refused(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "a/1.png", "b/1.png", "a/2.png", "c/3.png", "cat/4.png", "dog/4.png")
    save(tmp_path / "out.png", SMALL)
    rows = [
        "../out.png,x", f"{tmp_path}/out.png,x", "C:\\out.png,x", "1.png,x", "2.png,x", "a/2.png,x", "a/2.png,y",
        ",x", "4.png,cat", "b/../c/3.png,x",
    ]  # fmt: skip
    (root / "labels.csv").write_bytes(("filename,label\n" + "\n".join(rows)).encode() + b"\nc/3.png,caf\xe9\n")
    assert seen(root) == {"a/2.png": ("x", 0), "cat/4.png": ("cat", 0)}
    found = {name: reason for name, reason in problems(root).items() if name.startswith("labels.csv")}
    outside = "leads out of the folder; paths must be relative and without .."
    assert found == {
        "labels.csv line 2 (../out.png)": outside,
        f"labels.csv line 3 ({tmp_path}/out.png)": outside,
        "labels.csv line 4 (C:\\out.png)": outside,
        "labels.csv line 5 (1.png)": "may be any of 2 files, such as a/1.png; give more of its path",
        "labels.csv line 7 (a/2.png)": "is named by labels.csv line 6 already",
        "labels.csv line 8 (a/2.png)": "is named by labels.csv line 6 already, with label x, split train",
        "labels.csv line 9": "names no file",
        "labels.csv line 11 (b/../c/3.png)": outside,
        "labels.csv line 12": "is not UTF-8; save the file as UTF-8",
    }


def test_an_image_in_two_splits_counts_once_and_is_told(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "1.png", "2.png")
    lists(root, {"train.csv": "1.png,a\n2.png,a", "val.csv": "2.png,a"})
    assert seen(root) == {"1.png": ("a", 0), "2.png": ("a", 0)}
    assert problems(root) == {
        "val.csv line 2 (2.png)": "is named by train.csv line 3 already, with label a, split train"
    }


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_excel_saves(encoding: str, tmp_path: Path) -> None:
    root = files(tmp_path / "set", "1.png")
    (root / "labels.csv").write_bytes("filename;label\r\n1.png;käse\r\n".encode(encoding))
    assert seen(root) == {"1.png": ("käse", 0)}


def test_other_csv_files_are_other_files(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=2)
    (root / "numbers.csv").write_text("a,b\n1,2\n")
    (root / "results.csv").write_text("path,score\n/gone.png,1\n")
    (root / "binary.csv").write_bytes(bytes(range(256)))
    found = sources.find(str(root))
    assert found.kind == "folder" and found.others == ("binary.csv", "numbers.csv", "results.csv")
    assert found.notes == ("taken as folders of images: no row of results.csv names one of them",)
    (root / "labels.csv").write_text("path,label\nclass0/000.png,a\n")
    found = sources.find(str(root))  # a list by its name: the others are not asked
    assert found.kind == "csv" and found.others == ("binary.csv", "numbers.csv", "results.csv")
    with pytest.raises(DataError, match=r"numbers.csv, which has no column filename, file_name"):
        sources.find(str(root / "numbers.csv"))
    with pytest.raises(DataError, match=r"results.csv names no image that lies in .*; put it beside the images"):
        sources.find(str(root / "results.csv"))


def test_a_csv_that_does_not_end(tmp_path: Path) -> None:
    root = files(tmp_path / "set", "1.png")
    (root / "labels.csv").write_text("filename,label\n1.png,a\n" + '2.png,"' + "x" * 200_000)
    with pytest.raises(DataError, match=r"labels.csv line \d+ is no CSV .* an open quotation mark"):
        sources.find(str(root))


# --- VOC ---------------------------------------------------------------------------


def voc(root: Path, lists_of: dict[str, list[str]], images: int = 6) -> Path:
    files(root, *(f"JPEGImages/{i:06}.jpg" for i in range(images)), "SegmentationClass/000000.png")
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / "000000.xml").write_text("<annotation/>")
    for name, ids in lists_of.items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in ids))
    return root


def ids(*numbers: int) -> list[str]:
    return [f"{number:06}" for number in numbers]


VOC_LISTS = {
    "all": ({"train": ids(0, 1), "val": ids(2), "trainval": ids(0, 1, 2), "test": ids(3, 4, 5)}, [0, 0, 1, 2, 2, 2]),
    "trainval and test": ({"trainval": ids(0, 1, 2), "test": ids(3, 4, 5)}, [0, 0, 0, 2, 2, 2]),
    "train and trainval": ({"train": ids(0, 1), "trainval": ids(0, 1, 2, 3, 4, 5)}, [0, 0, 1, 1, 1, 1]),
    "none": ({}, [0] * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", VOC_LISTS)
@pytest.mark.parametrize("parent", [False, True])
def test_voc_is_unlabelled_with_its_splits(name: str, parent: bool, tmp_path: Path) -> None:
    lists_of, splits = VOC_LISTS[name]
    root = voc(tmp_path / "VOCdevkit" / "VOC2007", lists_of)
    source = sources.find(str(root.parent if parent else root))
    assert source.kind == "voc" and source.notes[0].startswith("taken as VOC layout")
    assert [(item.label, item.split) for item in sources.items(source)] == [(None, split) for split in splits]
    assert (
        source.skipped == () and len(source.others) == 1 and source.others[0].endswith("SegmentationClass/000000.png")
    )


def test_voc_lists_that_do_not_fit(tmp_path: Path) -> None:
    root = voc(tmp_path / "VOC2007", {"train": [*ids(0, 1, 77)], "test": ids(1, 2), "trainval": ids(0, 1, 77)})
    assert {name: split for name, (_, split) in seen(root).items()} == {
        "JPEGImages/000000.jpg": 0,
        "JPEGImages/000001.jpg": 0,
        "JPEGImages/000002.jpg": 2,
    }
    told = problems(root)
    assert told["ImageSets/Main/train.txt line 3 (000077)"] == "JPEGImages has no such file"
    assert told["ImageSets/Main/test.txt line 1 (000001)"] == "is in train.txt already, and counts as of that"
    assert (
        told["JPEGImages/000005.jpg"] == "no list of ImageSets/Main names it (train, trainval, test)" and len(told) == 5
    )


# --- Parquet -----------------------------------------------------------------------


def test_tables_of_a_hub_in_sub_folders(tmp_path: Path) -> None:
    features = {
        "fine_label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["animal", "thing"], "_type": "ClassLabel"},
        "img": {"_type": "Image"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 2)):
        content = [{"bytes": png(random_pixels(i)), "path": f"{i}.png"} for i in range(count)]
        columns = {"img": content, "fine_label": [i % 2 for i in range(count)], "coarse_label": [1] * count}
        table(tmp_path / "set" / "data" / f"{name}.parquet", columns, metadata)
    (tmp_path / "set" / "README.md").write_text("x")
    source = sources.find(str(tmp_path / "set"))
    found = list(sources.items(source))
    assert source.kind == "parquet" and Counter(item.split for item in found) == {0: 5, 2: 2}
    assert {item.coarse for item in found} == {1} and [item.label for item in found] == [0, 1, 0, 1, 0, 0, 1]
    assert sources.class_names(source) == ("cat", "dog") and sources.coarse_names(source) == ("animal", "thing")
    assert source.others == ("README.md",) and (attempt(found[2], None) == random_pixels(0)).all()


def test_images_beside_a_table_of_numbers_are_images(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", classes=2, each=1)
    table(root / "numbers.parquet", {"a": [1]})
    assert sources.find(str(root)).kind == "folder"
    table(root / "images.parquet", {"image": [png(SMALL)]})
    found = sources.find(str(root))
    assert found.kind == "parquet" and found.notes == ("taken as Parquet files; its 2 image files are not read",)


def test_the_same_twice(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    one, other = (sources.find(str(root)) for _ in range(2))
    assert one == other and list(map(str, sources.items(one))) == list(map(str, sources.items(other)))
