"""Batches that are fetched ahead from the mapped file: the same bits as without, and no thread is left."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import class_folders

from hpcl import trainer
from hpcl.config import Config
from hpcl.data import DeviceImages, ImageSet, load
from hpcl.data.device import MOST_AHEAD
from hpcl.sections import Data
from hpcl.trainer import fit


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hpcl-prefetch")]


@pytest.fixture
def found(tmp_path: Path) -> ImageSet:
    return load(Data(source=str(class_folders(tmp_path / "set"))), tmp_path / "cache")


class Spied(DeviceImages):
    """Notes in which thread rows are gathered."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **(options | {"ahead": True}))  # type: ignore[arg-type]
        self.gathered: list[tuple[bool, list[int]]] = []

    def _gather(self, ids: np.ndarray) -> torch.Tensor:
        self.gathered.append((threading.current_thread() is threading.main_thread(), ids.tolist()))
        return super()._gather(ids)


def test_a_batch_asked_for_ahead_is_gathered_in_the_thread_and_equal(found: ImageSet) -> None:
    images, plain = Spied(found, "cpu"), DeviceImages(found, "cpu")
    order = np.random.default_rng(0).permutation(30)
    parts = [order[start : start + 6] for start in range(0, 30, 6)]
    images.prefetch(torch.from_numpy(parts[0]))
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if following is not None:
            images.prefetch(following)
            images.prefetch(following)  # once is enough
        assert torch.equal(images.batch(part), plain.batch(part))
    assert images.gathered == [(False, part.tolist()) for part in parts]
    other = images.batch(np.array([3, 3]))  # nobody said that this would come
    assert images.gathered[-1] == (True, [3, 3]) and (other.numpy() == found.images[[3, 3]]).all()
    images.close()
    assert threads() == []
    images.prefetch(parts[0])  # it begins anew
    assert torch.equal(images.batch(parts[0]), plain.batch(parts[0])) and len(threads()) == 1
    images.close()


def test_what_is_never_taken_is_bounded_and_an_error_reaches_who_takes_it(found: ImageSet) -> None:
    images = DeviceImages(found, "cpu", ahead=True)
    for i in range(20):
        images.prefetch(np.array([i]))
    assert len(images._ahead) == MOST_AHEAD
    assert (images.batch(np.array([19])).numpy() == found.images[[19]]).all()
    images.prefetch(np.array([10_000]))
    with pytest.raises(IndexError):
        images.batch(np.array([10_000]))
    images.close()


def test_the_thread_ends_with_its_images_where_nobody_closes_them(found: ImageSet) -> None:
    images = DeviceImages(found, "cpu", ahead=True)
    images.prefetch(np.array([1]))
    images.batch(np.array([1]))
    assert len(threads()) == 1
    del images
    for _ in range(500):
        if not threads():
            break
        time.sleep(0.01)
    assert threads() == []


def test_a_forked_process_has_a_thread_of_its_own(found: ImageSet) -> None:
    images = DeviceImages(found, "cpu", ahead=True)
    images.prefetch(np.array([1]))
    images.prefetch(np.array([2]))
    child = os.fork()
    if not child:  # in the child: the parent's thread is not there
        ok = (images.batch(np.array([2])).numpy() == found.images[[2]]).all()
        images.prefetch(np.array([3]))
        ok = ok and (images.batch(np.array([3])).numpy() == found.images[[3]]).all()
        images.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (images.batch(np.array([2])).numpy() == found.images[[2]]).all()
    images.close()


def test_it_is_said_where_batches_come_from(found: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DeviceImages(found, "cpu").describe() == "images read from the mapped file: 13 kB"
    ahead = DeviceImages(found, "cpu", ahead=True)
    assert ahead.describe() == "images streamed from the mapped file with prefetch: 13 kB"
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 20_000}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    large = DeviceImages(found, "cpu")  # too large to stay in memory
    said = "images streamed from the mapped file with prefetch: 13 kB > half of this machine's 20 kB"
    assert large.prefetches and large.describe() == said


VARIANTS = {
    "plain": {},
    "symmetric, split": {"model.bn_splits": 2, "moco.symmetric": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_with_prefetch_is_the_run_without(
    variant: str, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"stages.stage2.epochs": 0, "stages.stage3.epochs": 1, "stages.stage4.epochs": 0, "stages.stage5.epochs": 0}
    config = tiny.with_values({**short, "meters.knn_every": 0, **VARIANTS[variant]})
    plain = fit(config, tmp_path / "plain", objective=None)
    made: list[Spied] = []

    def spied(*arguments: object) -> Spied:
        made.append(Spied(*arguments))
        return made[-1]

    monkeypatch.setattr(trainer, "DeviceImages", spied)
    streamed = fit(config, tmp_path / "streamed", objective=None)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, streamed.network.state_dict()[name]), name
    curves = ("loss", "acc_inst", "acc_proto_ref")
    assert [[row[name] for name in curves] for row in plain.rows] == [
        [row[name] for name in curves] for row in streamed.rows
    ]
    in_thread = [ids for main, ids in made[0].gathered if not main]
    assert len(in_thread) >= 2 * (405 // 64 - 1)  # all steps but the first of each epoch, which nobody knows before
    assert threads() == []
    log = (tmp_path / "streamed" / "log.txt").read_text()
    assert "images streamed from the mapped file with prefetch: 3.9 MB" in log
    assert "images read from the mapped file: 3.9 MB" in (tmp_path / "plain" / "log.txt").read_text()


def test_no_thread_is_left_when_a_run_fails(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "DeviceImages", Spied)

    class Ended(Exception):
        pass

    def report(row: object) -> None:
        assert threads()
        raise Ended

    with pytest.raises(Ended):
        fit(tiny, tmp_path / "run", report=report)
    assert threads() == []
