"""Several processes train one run (gloo): R ranks equal one process with ``bn_splits = R``, over all five stages.

METHOD 1: plain BatchNorm normalises each rank's part of the batch by itself, which
``model.bn_splits`` does in one process. In float64 the two differ by the order of sums alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from runs import FORKS, NUM_IMAGES, timeless

from hpcl.checkpoint import load_checkpoint, save_checkpoint
from hpcl.config import Config
from hpcl.data import DeviceImages, load
from hpcl.dist import World
from hpcl.errors import UserError
from hpcl.features import FeaturePass
from hpcl.methods import METHODS
from hpcl.model import build_network
from hpcl.trainer import fit

pytestmark = pytest.mark.timeout(600)

Rows = list[dict[str, Any]]
Task = dict[str, Any]
"""``config, folder, stop, fork, until``: what one rank trains; `stop` is the epoch to interrupt it after."""


def train(task: Task) -> Rows:
    """Train as a task says, on the ranks there are; gives the rows."""
    rows: Rows = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["epoch"] == task.get("stop"):
            raise KeyboardInterrupt

    try:
        run = fit(task["config"], task["folder"], report=report, fork=task.get("fork"), until_stage=task.get("until"))
    except KeyboardInterrupt:
        return rows
    return run.rows


def _rank(rank: int, size: int, store: str, pipe: Connection) -> None:
    """One of `size` processes: train what comes through the pipe until None does."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        try:
            pipe.send(train(task))
        except UserError as error:
            pipe.send(error)
        except Exception:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


class Ranks:
    """Processes that train together, one run after the other."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        load(Config.model_validate(TINY).data)  # decoded once, here, and not by every rank
        ends = [FORKS.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in ends]
        self._processes = [
            FORKS.Process(target=_rank, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self._processes:
            process.start()

    def train(self, config: Config, folder: Path, **options: Any) -> Rows:
        """Rows of a run; raises what rank 0 raised."""
        result = self.each([{"config": config, "folder": folder, **options}] * self.size)[0]
        if isinstance(result, UserError):
            raise result
        assert not isinstance(result, str), result
        return result

    def each(self, tasks: list[Task]) -> list[Any]:
        """What each rank's task gives: its rows, its UserError, or the text of another error."""
        for pipe, task in zip(self._pipes, tasks, strict=True):
            pipe.send(task)
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        results: list[Any] = [None] * self.size
        while waiting:
            ready = wait([*waiting], timeout=300)
            assert ready, f"ranks {[*waiting.values()]} of {self.size} hang"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                results[waiting.pop(pipe)] = pipe.recv()
        return results

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(60)
            if process.exitcode is None:
                process.kill()
            assert process.exitcode == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.end()


def assert_equal(ours: Rows, theirs: Rows, size: int, tolerance: float = 1e-9) -> None:
    """Rows of `size` ranks against those of one process: numbers within the tolerance, counts and words exactly."""
    assert [row["world_size"] for row in ours] == [size] * len(theirs)
    for mine, other in zip(timeless(ours), timeless(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"world_size"}:
            expected = other[name]
            if isinstance(expected, float):
                # Singular values come as roots: of one that is 0, half the digits are left.
                close = tolerance**0.5 if name == "effective_rank" else tolerance
                expected = pytest.approx(expected, rel=close, abs=close)
            elif tolerance > 1e-9 and name == "growth_reason":
                continue  # words around rounded numbers
            assert mine[name] == expected, (mine["epoch"], name)


CASES: dict[str, dict[str, Any]] = {
    "as it comes": {"clusters.levels": 3},
    "InfoNCE alone": {"prototypes.weight": 0.0, "clusters.levels": 1, "moco.shuffle_keys": False},
    "pcl": {
        "prototypes.targets": "pcl",
        "topk.mode": "none",
        "clusters.levels": 1,
        "moco.shuffle_keys": False,
        "head.kind": "v1",
    },
    "adjusted, top-K added": {
        "prototypes.targets": "adjusted",
        "topk.mode": "add",
        "topk.far": "sum",
        "moco.symmetric": True,
        "moco.shuffle_keys": False,
        "head.kind": "simclr2",  # BatchNorm in the head, too
        "growth.max_hold": 1,  # this one does not grow by itself
    },
    "unique, drawn negatives": {
        "prototypes.max_in_loss": 2,
        "prototypes.negatives": 3,
        "topk.mode": "none",
        "moco.shuffle_keys": False,
        "head.attach": "replace",
        "augment.flip": 0.5,
    },
    "top-K in its place": {
        "topk.mode": "replace",
        "topk.k": 2,
        "topk.weights": "softmax",
        "moco.shuffle_keys": False,
        "clusters.space": "embedding",
        "clusters.size_tolerance": None,
    },
    "SimCLR": {"method": "simclr", "moco.shuffle_keys": False},
    "HCSC, several heads, a bank, LARS": {
        "method": "hcsc",
        "head.kind": "multi",
        "clusters.counts": (3, 8),
        "clusters.features": "bank",
        "optimizer.kind": "lars",
        "density.parent": 0.5,
        "moco.shuffle_keys": False,
    },
}
"""All of hpcl grow. The first shuffles keys over the ranks; METHOD does not ask for equality there, but it holds."""

DOUBLE = {"runtime.precision": "fp64", "stages.total": 6}
SLOW = {(case, 4 if number % 2 else 2) for number, case in enumerate(CASES)}
"""By default every case runs with one number of ranks; the others are in the slow tier."""


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(case, size, marks=pytest.mark.slow if (case, size) in SLOW else ())
        for case in CASES
        for size in (2, 4)
    ],
)
def test_ranks_equal_one_process_with_as_many_batchnorm_splits(
    tiny: Config, tmp_path: Path, request: pytest.FixtureRequest, case: str, size: int
) -> None:
    assert NUM_IMAGES % size and tiny.meters.views % size == 0  # parts of unequal and of equal length
    ranks: Ranks = request.getfixturevalue({2: "two", 4: "four"}[size])
    config = tiny.with_values({**DOUBLE, **CASES[case]})
    ours = ranks.train(config, tmp_path / "ranks")
    theirs = fit(config.with_values({"model.bn_splits": size}), tmp_path / "one").rows
    assert [row["stage"] for row in theirs] == [1, 2, 3, 3, 4, 5]
    assert any(row.get("grew") for row in theirs) == METHODS[config.method].grows
    assert_equal(ours, theirs, size)


def test_ranks_equal_one_process_in_float32(tiny: Config, tmp_path: Path, two: Ranks) -> None:
    lrs = {f"stages.stage{stage}.lr": 0.003 for stage in range(1, 6)}  # rounding grows with every step
    config = tiny.with_values({"runtime.precision": "fp32", "moco.shuffle_keys": False, "stages.total": 6, **lrs})
    ours = two.train(config, tmp_path / "ranks")
    theirs = fit(config.with_values({"model.bn_splits": 2}), tmp_path / "one").rows
    assert any(row.get("grew") for row in theirs)
    assert_equal(ours, theirs, 2, tolerance=1e-4)


@pytest.fixture(scope="module")
def whole(two: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows of an unbroken run of two ranks."""
    config = Config.model_validate(TINY).with_values({"stages.total": 6})
    return two.train(config, tmp_path_factory.mktemp("whole") / "run")


def test_ranks_that_are_interrupted_go_on_as_if_they_had_not_been(
    tiny: Config, tmp_path: Path, two: Ranks, whole: Rows
) -> None:
    config = tiny.with_values({"stages.total": 6})
    for epoch in (1, 3, 5):  # at the ends of stages and in the middle of one
        rows = two.train(config, tmp_path, stop=epoch)
        assert rows[-1]["epoch"] == epoch
    assert timeless(two.train(config, tmp_path)) == timeless(whole)


def test_another_number_of_ranks_may_go_on(tiny: Config, tmp_path: Path, two: Ranks, four: Ranks) -> None:
    """Its BatchNorm is that of the new number; one process with other splits from there on does the same."""
    config = tiny.with_values(DOUBLE)
    ours, theirs = tmp_path / "ranks", tmp_path / "one"
    two.train(config, ours, stop=2)
    four.train(config, ours, stop=4)
    rows = fit(config, ours).rows
    assert [row["world_size"] for row in rows] == [2, 2, 4, 4, 1, 1]
    log = (ours / "log.txt").read_text()
    assert "processes: 2 up to epoch 2, 4 from here on" in log and "processes: 4 up to epoch 4, 1 from here on" in log

    train({"config": config.with_values({"model.bn_splits": 2}), "folder": theirs, "stop": 2})
    for splits, stop in ((4, 4), (1, None)):
        state = load_checkpoint(theirs / "checkpoint.pt")
        state["config"]["model"]["bn_splits"] = splits
        save_checkpoint(theirs / "checkpoint.pt", state)
        one = train({"config": config.with_values({"model.bn_splits": splits}), "folder": theirs, "stop": stop})
    for mine, other in zip(rows, one, strict=True):
        assert_equal([mine], [other], mine["world_size"])


def test_ranks_that_fork_equal_ranks_that_trained_it_all(tiny: Config, tmp_path: Path, two: Ranks, whole: Rows) -> None:
    config = tiny.with_values({"stages.total": 6})
    prefix = config.with_values({"stages.stage5.lr": 0.5})  # acts later
    assert len(two.train(prefix, tmp_path / "prefix", until=2)) == 2
    rows = two.train(config, tmp_path / "fork", fork=tmp_path / "prefix" / "checkpoint.pt")
    assert [row.pop("shared") for row in rows] == [True, True, False, False, False, False]
    assert timeless(rows) == timeless([{k: v for k, v in row.items() if k != "shared"} for row in whole])


def test_ranks_that_do_not_see_the_same_folder_are_told(tiny: Config, tmp_path: Path, two: Ranks) -> None:
    config = tiny.with_values({"stages.total": 5})
    two.train(config, tmp_path / "a", stop=1)
    errors = two.each([{"config": config, "folder": tmp_path / name} for name in ("a", "b")])
    for error in errors:
        assert isinstance(error, UserError) and r"different epochs in it (1, 0, in order of rank)" in str(error)
    assert not (tmp_path / "b").exists()


def test_settings_that_do_not_divide_are_refused_on_every_rank(tiny: Config, tmp_path: Path, four: Ranks) -> None:
    config = tiny.with_values({"optimizer.batch": 50, "moco.queue": 100})
    errors = four.each([{"config": config, "folder": tmp_path / "run"}] * 4)
    assert {str(error).split(": ", 1)[1] for error in errors} == {
        "optimizer.batch is 50, but must be a multiple of the number of workers (4)"
    }


def test_a_rank_without_a_row_of_its_own_takes_part(tiny: Config) -> None:
    class Second(World):  # of two ranks; only one row to share
        def gather_shards(self, x: torch.Tensor, count: int) -> torch.Tensor:
            return x

    data, world = load(tiny.data), Second(1, 2, torch.device("cpu"))
    passes = FeaturePass(DeviceImages(data, "cpu"), world, torch.float32)
    network = build_network(tiny.model, tiny.head, 1, 0)
    assert [len(part) for part in passes.of_images(network, data.val[:1], use_head=True)] == [0, 0, 0]
