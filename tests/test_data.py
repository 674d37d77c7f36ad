"""The parts of a source, the cache, and batches on the device."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import class_folders, problem_of, random_pixels, save

from hpcl.data import DeviceImages, ImageSet, blocks, cache_folder, load
from hpcl.data.parts import draw, parts_of
from hpcl.sections import Data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))


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
    parts = parts_of(labels, split, whole)
    train, held, tested = parts.train, parts.val, parts.test
    assert np.array_equal(np.sort(np.concatenate([train, held, tested])), np.arange(len(labels)))
    assert (_of_class(train, labels) >= 1).all()
    assert (np.abs(_of_class(tested, labels) - test * np.array(sizes)) < 1.000001).all()
    assert all((np.diff(ids) > 0).all() for ids in (train, held, tested))
    again = parts_of(labels, split, whole.model_copy(update={"subset": subset}))
    fewer, held_again, tested_again = again.train, again.val, again.test
    assert np.array_equal(held, held_again) and np.array_equal(tested, tested_again)
    assert set(fewer) <= set(train) and (_of_class(fewer, labels) >= 1).all()
    assert (np.abs(_of_class(fewer, labels) - subset * _of_class(train, labels)) < 1.000001).all()


def test_a_fraction_is_met_in_total_although_classes_are_small() -> None:
    labels = np.repeat(np.arange(20), 4)  # 0.1 of 4 rounds to 0 in each class
    drawn = draw(np.arange(80), labels, 0.1, 0, "val", least=0)
    assert len(drawn) == 8 and len(np.unique(labels[drawn])) == 8


def test_split_seed_changes_the_parts_and_nothing_else_does(tmp_path: Path) -> None:
    root = str(class_folders(tmp_path / "set", each=30))
    first, again, other = (load(Data(source=root, split_seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.val, again.val) and not np.array_equal(first.val, other.val)
    assert first.content_hash == other.content_hash


def test_mean_and_std_are_those_of_the_training_part(tmp_path: Path) -> None:
    found = load(Data(source=str(class_folders(tmp_path / "set")), subset=0.5))
    pixels = found.images[found.train] / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-5)
    assert found.mean.dtype == found.std.dtype == np.float32


def test_a_flat_set_has_a_std_above_zero(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "set" / f"{i}.png", np.full((8, 8, 3), 9, np.uint8))
    np.testing.assert_allclose(load(Data(source=str(tmp_path / "set"))).std, 1 / 255, rtol=1e-6)


# --- the cache ---------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_second_load_decodes_nothing_and_maps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(class_folders(tmp_path / "set", each=20, height=64, width=64))
    first = load(Data(source=root))

    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(blocks, "attempt", decode)
    before = pa.total_allocated_bytes()
    second = load(Data(source=root))
    assert pa.total_allocated_bytes() - before < second.images.nbytes / 10  # zero copy
    assert not second.images.flags.writeable and not second.images.flags.owndata
    assert (second.images == first.images).all() and second.content_hash == first.content_hash
    (cached,) = _files(cache_folder())
    assert cached.suffix == ".arrow" and cached.name.startswith("set-")


def test_a_changed_source_is_decoded_again_into_the_same_file(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    first = load(Data(source=str(root)))
    save(root / "class0" / "new.png", random_pixels(12345))
    second = load(Data(source=str(root)))
    assert len(first.images) == 30 and len(second.images) == 31 and first.content_hash != second.content_hash
    changed = root / "class0" / "001.png"
    before = changed.stat()
    save(changed, np.zeros((12, 12, 3), np.uint8))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    third = load(Data(source=str(root)))
    assert (third.images[1] == 0).all() and len(_files(cache_folder())) == 1
    assert (first.images[1].transpose(1, 2, 0) == random_pixels(1)).all()  # still mapped, still the old one


def test_sizes_are_cached_apart_and_an_explicit_folder_is_used(tmp_path: Path) -> None:
    root = str(class_folders(tmp_path / "set"))
    for size in (None, 8, 10):
        load(Data(source=root, size=size), cache_dir=tmp_path / "mine")
    assert len(_files(tmp_path / "mine")) == 3 and not cache_folder().exists()


def test_a_damaged_cache_file_is_written_again(tmp_path: Path) -> None:
    root = str(class_folders(tmp_path / "set"))
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
    root = str(class_folders(tmp_path / "set"))
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
    assert "cannot be written" in (problem := problem_of(Data(source=str(class_folders(tmp_path / "set")))))
    assert "set HPCL_CACHE to another folder" in problem


def test_the_arrow_file_is_plain_and_is_a_source_itself(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
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
    assert "an Arrow file that this project did not write" in problem_of(Data(source=str(path)))


# --- batches -----------------------------------------------------------------------


def test_batches_on_the_cpu_follow_the_ids(tmp_path: Path) -> None:
    found = load(Data(source=str(class_folders(tmp_path / "set"))))
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
    found = load(Data(source=str(class_folders(tmp_path / "set"))))
    images = DeviceImages(found, "cuda", share=share)
    assert images.resident == (share > 0) and images.prefetches == (share == 0)
    assert images.describe().startswith("images on the GPU" if share else "images streamed from the mapped file")
    for ids in (torch.tensor([7, 0, 7, 29]), torch.tensor([7, 0, 7, 29]).cuda()):
        images.prefetch(ids)
        batch = images.batch(ids)
        assert batch.is_cuda and (batch.cpu().numpy() == found.images[ids.cpu().numpy()]).all()
