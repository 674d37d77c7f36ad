"""Labels of tables: what several files must agree on, columns by other names, and labels that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import png, random_pixels

from hpcl import sources
from hpcl.data import DataError, load
from hpcl.sections import Data
from hpcl.sources.check import check

PNG = png(random_pixels(0, 4, 4))


@pytest.mark.parametrize("form", ["npz", "parquet"])
@pytest.mark.parametrize(("other", "words"), [("dog cat", "class 0 is dog and cat"), ("cat dog emu", "2 classes")])
def test_files_that_name_other_classes_are_refused(form: str, other: str, words: str, tmp_path: Path) -> None:
    """Number 0 would be a cat in one and a dog in the other."""
    for part, names in (("test", other.split()), ("train", ["cat", "dog"])):
        if form == "npz":
            np.savez(tmp_path / part, images=np.zeros((2, 4, 4), np.uint8), labels=[0, 1], classes=np.array(names))
        else:
            table = pa.table({"image": [PNG, PNG], "label": [0, 1]})
            pq.write_table(table.replace_schema_metadata({"classes": json.dumps(names)}), tmp_path / f"{part}.parquet")
    with pytest.raises(DataError, match=rf"test.{form} and .*train.{form} name different classes \({words}\)"):
        load(Data(source=str(tmp_path)), tmp_path / "cache")


def test_a_hubs_column_may_be_called_labels(tmp_path: Path) -> None:
    """As in cats_vs_dogs and beans, which were taken for unlabelled."""
    info = {"info": {"features": {"labels": {"names": ["cat", "dog"]}}}}
    table = pa.table({"image": [PNG, PNG], "labels": [1, 0]}).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "set.parquet")
    found = sources.find(str(tmp_path / "set.parquet"))
    assert [item.label for item in sources.items(found)] == [1, 0] and sources.class_names(found) == ("cat", "dog")


@pytest.mark.parametrize("label", [[0], {"a": 0}, b"cat"])
def test_checking_tells_of_labels_that_are_none(label: object, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PNG], "label": [label]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [PNG], "label": [3]}), tmp_path / "b.parquet")
    (problem,) = check(str(tmp_path)).unusable
    assert f"1 {type(label).__name__}" in problem and "1 int" in problem


def test_a_list_of_an_old_mac_has_lines_that_end_with_a_carriage_return(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "labels.csv").write_bytes(b"filename,label\r1.png,cat\r2.png,dog\r")
    assert [item.label for item in sources.items(sources.find(str(tmp_path)))] == ["cat", "dog"]
    (tmp_path / "labels.csv").write_bytes(b"\r\x00\r,\r\n")  # no list at all, and no reason to stop
    assert [item.label for item in sources.items(sources.find(str(tmp_path)))] == [None, None]


def test_traffic_signs_of_gtsrb_keep_their_classes(tmp_path: Path) -> None:
    """Its lists have the columns Path and ClassId; without the second one the set was unlabelled, folders or not."""
    for part, label in (("Train", "7"), ("Train", "12"), ("Test", "7")):
        (tmp_path / part / label).mkdir(parents=True)
        (tmp_path / part / label / "1.png").write_bytes(PNG)
    (tmp_path / "Train.csv").write_text("Width,ClassId,Path\n4,7,Train/7/1.png\n4,12,Train/12/1.png\n")
    (tmp_path / "Test.csv").write_text("Width,ClassId,Path\n4,7,Test/7/1.png\n")
    found = sources.items(sources.find(str(tmp_path)))
    assert {(item.name, item.label, item.split) for item in found} == {
        ("Train/7/1.png", 7, 0), ("Train/12/1.png", 12, 0), ("Test/7/1.png", 7, 2)
    }  # fmt: skip
