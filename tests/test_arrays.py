"""Sources that hold pixels: pickles of mini-ImageNet, CIFAR's python batches, npz files; and those that lie."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Evil, sentinel
from pictures import class_folders, random_pixels

from hpcl import sources
from hpcl.data import load
from hpcl.decode import Item
from hpcl.sections import Data
from hpcl.sources import DataError

__all__ = ["sentinel"]

IMAGES = np.stack([random_pixels(i, 8, 8) for i in range(6)])


def dumped(path: Path, content: Any, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def items(source: Path) -> list[Item]:
    return list(sources.items(sources.find(str(source))))


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(sources.items(sources.find(str(source))))
    return str(caught.value)


def pixels(found: list[Item]) -> np.ndarray[Any, Any]:
    return np.stack([item.content for item in found])  # type: ignore[arg-type]


# --- pickles -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_mini_imagenet_cache(protocol: int, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        classes = {f"n_{split}_1": [0, 2, 4], f"n_{split}_0": np.array([1, 3, 5])}
        dumped(tmp_path / f"mini-imagenet-cache-{split}.pkl", {"image_data": IMAGES, "class_dict": classes}, protocol)
    found = items(tmp_path)
    assert [item.split for item in found] == [2] * 6 + [0] * 6 + [1] * 6  # by the files' names
    assert (pixels(found[6:12]) == IMAGES).all() and found[6].name == "mini-imagenet-cache-train.pkl image 0"
    assert [item.label for item in found[6:12]] == ["n_train_1", "n_train_0"] * 3
    alone = items(tmp_path / "mini-imagenet-cache-val.pkl")
    assert [(item.label, item.split) for item in alone] == [(item.label, 1) for item in found[12:]]


def test_mini_imagenet_category_split(tmp_path: Path) -> None:
    for name, first in (("train_phase_train", 0), ("val", 64), ("test", 80), ("train_phase_val", 0)):
        content = {"data": IMAGES, "labels": [first, first + 1] * 3}
        dumped(tmp_path / f"miniImageNet_category_split_{name}.pickle", content)
    found = items(tmp_path)
    assert [(item.label, item.split) for item in found[::6]] == [(80, 2), (0, 0), (0, 1), (64, 1)]
    named = {"data": IMAGES, "labels": [1, 0] * 3, "catname2label": {"cat": 0, "dog": 1}}
    assert [item.label for item in items(dumped(tmp_path / "named.pickle", named))] == ["dog", "cat"] * 3


def batches(root: Path, *, fortran: bool = False) -> Path:
    flat = IMAGES.transpose(0, 3, 1, 2).reshape(6, -1)
    flat = np.asfortranarray(flat) if fortran else flat
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {b"batch_label": name, b"labels": [0, 1, 2, 0, 1, 2], b"data": flat, b"filenames": ["x.png"] * 6}
        dumped(root / "cifar-10-batches-py" / name, content)
    dumped(root / "cifar-10-batches-py" / "batches.meta", {"label_names": ["cat", "dog", "emu"], "num_vis": 192})
    (root / "cifar-10-batches-py" / "readme.html").write_text("x")
    return root


@pytest.mark.parametrize("fortran", [False, True])
def test_cifar_10_batches(fortran: bool, tmp_path: Path) -> None:
    root = batches(tmp_path, fortran=fortran)
    for place in (root, root / "cifar-10-batches-py"):
        found = items(place)
        assert len(found) == 36 and sum(item.split == 2 for item in found) == 6
        assert (pixels(found[:6]) == IMAGES).all()
        source = sources.find(str(place))
        assert sources.class_names(source) == ("cat", "dog", "emu") and len(source.files) == 7
    one = sources.find(str(root / "cifar-10-batches-py" / "data_batch_3"))
    assert sources.class_names(one) == ("cat", "dog", "emu") and len(list(sources.items(one))) == 6
    loaded = load(Data(source=str(root)), tmp_path / "cache")
    assert loaded.images.shape == (36, 3, 8, 8) and loaded.classes == ("cat", "dog", "emu") and len(loaded.test) == 6


def test_cifar_100_has_two_levels_of_classes(tmp_path: Path) -> None:
    flat = IMAGES.transpose(0, 3, 1, 2).reshape(6, -1)
    for name in ("train", "test"):
        content = {"fine_labels": [0, 1, 2, 0, 1, 2], "coarse_labels": [0, 0, 1] * 2, "data": flat}
        dumped(tmp_path / "cifar-100-python" / name, content)
    meta = {"fine_label_names": ["cat", "dog", "car"], "coarse_label_names": ["animal", "thing"]}
    dumped(tmp_path / "cifar-100-python" / "meta", meta)
    source = sources.find(str(tmp_path / "cifar-100-python"))
    found = list(sources.items(source))
    assert [(item.label, item.coarse) for item in found[:3]] == [(0, 0), (1, 0), (2, 1)]
    assert sources.class_names(source) == ("cat", "dog", "car") and sources.coarse_names(source) == ("animal", "thing")
    assert [item.split for item in found] == [2] * 6 + [0] * 6


WRONG = {
    "no dictionary": ([1, 2], "holds a list, but must hold a dictionary of images and labels"),
    "no images": ({"labels": [1], "x": 1}, "has no array `image_data` or `data` (its keys: labels, x)"),
    "floats": ({"data": IMAGES / 255, "labels": [0] * 6}, "dtype float64, but they must be uint8, 0 to 255"),
    "a strange shape": ({"data": IMAGES.reshape(6, 2, -1), "labels": [0] * 5}, "has 5 labels in `labels` for 6 images"),
    "flat, but no square": ({"data": np.zeros((6, 9), np.uint8), "labels": [0] * 6}, "has images of shape (6, 9), but"),
    "no sides": ({"data": np.zeros((0, 0, 0, 3), np.uint8)}, "has images of shape (0, 0, 0, 3)"),
    "too few labels": ({"data": IMAGES, "labels": [0]}, "has 1 labels in `labels` for 6 images"),
    "labels that are none": ({"data": IMAGES, "labels": [[0]] * 6}, "has no list of labels in `labels` for 6 images"),
    "a place outside": ({"image_data": IMAGES, "class_dict": {"a": [6]}}, "names image 6 of class 'a', but has 6"),
    "a place twice": ({"image_data": IMAGES, "class_dict": {"a": [1], "b": [1]}}, "names image 1 twice"),
    "no places": ({"image_data": IMAGES, "class_dict": {"a": 1}}, "has class 'a' in `class_dict` without a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_pickles_that_do_not_fit_say_why(name: str, tmp_path: Path) -> None:
    content, text = WRONG[name]
    assert text in refusal(dumped(tmp_path / "set" / "x.pkl", content))
    assert text in refusal(tmp_path / "set")


def test_an_image_of_no_class_is_skipped(tmp_path: Path) -> None:
    found = items(dumped(tmp_path / "x.pkl", {"image_data": IMAGES, "class_dict": {"a": [0, 1, 2], "b": [3, 4]}}))
    assert [item.problem for item in found] == [None] * 5 + ["no class of class_dict names it"]


def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path, sentinel: Path) -> None:
    hostile = dumped(tmp_path / "set" / "evil.pkl", {"data": Evil(sentinel), "labels": [0]})
    assert "asks for posix.system, but only plain data" in refusal(hostile)
    assert "evil.pkl asks for posix.system" in refusal(tmp_path / "set")
    dumped(tmp_path / "set" / "train.pkl", {"data": IMAGES, "labels": [0] * 6})
    (told,) = sources.find(str(tmp_path / "set")).skipped
    assert told[0] == "evil.pkl" and told[1].startswith("asks for posix.system") and len(items(tmp_path / "set")) == 6
    folders = class_folders(tmp_path / "folders", classes=2, each=1)
    hostile.rename(folders / "evil.pkl")
    found = sources.find(str(folders))
    assert found.kind == "folder" and found.others == ("evil.pkl",)


# --- npz ---------------------------------------------------------------------------


def saved(path: Path, *, packed: bool = False, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("x", "y"), ("data", "label_names")])
def test_one_set(images: str, labels: str, packed: bool, tmp_path: Path) -> None:
    columns = {images: IMAGES, labels: np.arange(6)[:, None] % 3}
    columns |= {"split": np.array(["train", "val", "test"] * 2), "coarse_labels": np.arange(6) % 2}
    source = sources.find(str(saved(tmp_path / "x.npz", packed=packed, classes=np.array(["a", "b", "c"]), **columns)))
    found = list(sources.items(source))
    assert (pixels(found) == IMAGES).all() and [item.split for item in found] == [0, 1, 2] * 2
    assert [item.label for item in found] == ([None] * 6 if labels == "label_names" else [0, 1, 2] * 2)
    assert [item.coarse for item in found] == [0, 1] * 3 and sources.class_names(source) == ("a", "b", "c")


def test_keras_and_medmnist(tmp_path: Path) -> None:
    gray = IMAGES[..., 0]
    keras = saved(tmp_path / "keras.npz", x_train=gray, y_train=np.arange(6), x_test=gray[:2], y_test=np.arange(2))
    found = items(keras)
    assert [(item.label, item.split) for item in found] == [*((i, 0) for i in range(6)), (0, 2), (1, 2)]
    assert (pixels(found[:6]) == gray).all() and found[6].name == "keras.npz x_test 0"
    parts = {
        f"{s}_{k}": v
        for s in ("train", "val", "test")
        for k, v in (("images", IMAGES), ("labels", np.ones((6, 1), int)))
    }
    found = items(saved(tmp_path / "med.npz", packed=True, **parts))
    assert [item.split for item in found] == [0] * 6 + [1] * 6 + [2] * 6 and {item.label for item in found} == {1}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "NHW1"])
def test_layouts(layout: str, order: str, tmp_path: Path) -> None:
    array = {"NHWC": IMAGES, "NCHW": IMAGES.transpose(0, 3, 1, 2), "NHW": IMAGES[..., 0], "NHW1": IMAGES[..., :1]}[
        layout
    ]
    found = items(saved(tmp_path / "x.npz", images=np.asarray(array, order=order)))  # type: ignore[call-overload]
    assert (pixels(found) == (IMAGES if layout in ("NHWC", "NCHW") else IMAGES[..., 0])).all()


def test_a_folder_of_npz_files_has_the_splits_of_their_names(tmp_path: Path) -> None:
    for name in ("train", "test"):
        saved(tmp_path / "set" / f"{name}.npz", images=IMAGES, labels=np.arange(6))
    saved(tmp_path / "set" / "features.npz", features=np.ones(3))
    assert [item.split for item in items(tmp_path / "set")] == [2] * 6 + [0] * 6
    (told,) = sources.find(str(tmp_path / "set")).skipped
    assert told[0] == "features.npz" and "has no array `images`, `x`, `data`" in told[1]


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"images": IMAGES / 255}, "has `images` of dtype float64, but images must be uint8, 0 to 255"),
    "a flat array": ({"images": IMAGES.reshape(6, -1)}, "has `images` of shape (6, 192), but must be (N, H, W)"),
    "four channels": ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "C 1 or 3"),
    "no sides": ({"images": np.zeros((2, 0, 8), np.uint8)}, "an image may have 1 to 80,000,000 pixels"),
    "several labels": ({"images": IMAGES, "labels": np.zeros((6, 14))}, "of shape (6, 14), but must have one label"),
    "labels of another number": ({"images": IMAGES, "labels": np.zeros(5, int)}, "one label for each of 6 images"),
    "labels that are fractions": ({"images": IMAGES, "y": np.zeros(6)}, "of dtype float64, but labels must be whole"),
    "objects": ({"images": IMAGES, "classes": np.array(["a", 1], dtype=object)}, "`classes` as Python objects, which"),
    "another split": ({"images": IMAGES, "split": np.array(["spare"] * 6)}, "has 'spare' in `split`, but must have"),
    "labels of one split": ({"x_train": IMAGES, "y_train": np.arange(6), "x_test": IMAGES}, "some of its splits only"),
    "other names": ({"a": IMAGES, "b": IMAGES}, "has no array `images`, `x`, `data`, `x_train` or `train_images` "),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_npz_files_that_do_not_fit_say_why(name: str, tmp_path: Path) -> None:
    arrays, text = UNFIT[name]
    assert text in refusal(saved(tmp_path / "x.npz", **arrays))


def header(shape: str, dtype: str = "|u1") -> bytes:
    """A numpy header of any content."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path: Path, content: bytes, name: str = "images.npy") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr(name, content)
    return path


def test_npz_files_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    assert "bytes of data for it" in refusal(archive(path, header("(1000000, 1000, 1000)") + b"x" * 100))
    assert "bytes of data for it" in refusal(archive(path, header("(-1, -1, 100)") + b"x" * 100))
    assert "Python objects" in refusal(archive(path, header("(1, 1, 1)", "|O") + pickle.dumps([1])))
    assert "version (2, 0)" in refusal(archive(path, b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x" * 100))
    assert "is no whole npz file" in refusal(archive(path, header("__import__('os').system('x')")))
    assert "is no whole npz file" in refusal(archive(path, b"nothing"))
    whole = saved(path, packed=True, images=IMAGES).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no whole npz file" in refusal(path)
    damaged = bytearray(whole)
    damaged[300:330] = bytes(30)
    path.write_bytes(bytes(damaged))
    assert "x.npz" in refusal(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """70 MB of zeros in 70 kB; and one that says it is small and goes on and on."""
    bomb = archive(tmp_path / "bomb.npz", header("(7000, 100, 100)") + bytes(7 * 10**7))
    assert bomb.stat().st_size < 200_000 and "more than 200 times as much, which images never do" in refusal(bomb)
    lie = bytearray(archive(tmp_path / "lie.npz", header("(10, 10, 10)") + bytes(6 * 10**7)).read_bytes())
    true_size = struct.pack("<I", len(header("(10, 10, 10)")) + 6 * 10**7)
    while true_size in lie:
        at = lie.index(true_size)
        lie[at : at + 4] = struct.pack("<I", len(header("(10, 10, 10)")) + 1000)
    (tmp_path / "lie.npz").write_bytes(lie)
    code = (
        "import resource, sys; from pathlib import Path; from hpcl import sources\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + 5 * 10**7,) * 2)\n"
        "try: print(len(list(sources.items(sources.find(sys.argv[1])))))\n"
        "except sources.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lie.npz")], capture_output=True, text=True)
    assert done.returncode == 0 and ("no whole npz file" in done.stdout or done.stdout == "10\n"), done


@pytest.mark.parametrize(
    ("version", "flags", "method", "words"),
    [
        (20, 0, 99, "encrypted or compressed in a way that numpy does not write"),
        (20, 1, 8, "encrypted or compressed in a way that numpy does not write"),
        (99, 0, 8, "is no whole npz file"),
    ],
    ids=["unknown packing", "encrypted", "of a later zip"],
)
def test_archives_that_zipfile_cannot_unpack_are_told(
    version: int, flags: int, method: int, words: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "set.npz", header("(10, 10, 10)") + bytes(1000))
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 4), (b"PK\x01\x02", 6)):  # the version comes first in both headers
        place = content.index(signature) + at
        content[place : place + 6] = struct.pack("<HHH", version, flags, method)
    path.write_bytes(content)
    assert words in refusal(path)


def test_bytes_after_the_images_are_not_read_as_images(tmp_path: Path) -> None:
    held = io.BytesIO()
    np.save(held, IMAGES)
    assert "bytes of data for it" in refusal(archive(tmp_path / "x.npz", held.getvalue() + b"more"))
