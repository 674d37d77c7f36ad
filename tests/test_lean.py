"""Worker groups inside Tune: the stop, the errors and the death of a trial, with two gloo ranks that train nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.train.torch import TorchTrainer

from hpcl.errors import UserError
from hpcl.search import lean
from hpcl.search.cluster import connected

CPUS = 0.9


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected(None):  # one worker per trial as far as it knows: without Ray's dashboard
        yield


def work(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """One rank: write down each epoch at its start, sum the ranks, report; then fail if asked to."""
    import torch

    rank = torch.distributed.get_rank()
    for epoch in range(1, payload["epochs"] + 1):
        with (Path(payload["folder"]) / f"rank{rank}.txt").open("a") as file:
            file.write(f"{epoch} {os.getpid()}\n")
        ranks = torch.ones(1)
        torch.distributed.all_reduce(ranks)
        report({"epoch": epoch, "ranks": int(ranks.item())})
    if rank == payload.get("fails"):
        raise UserError("data.source: no images", "data.channels: 4 is not 1 or 3")


def written(folder: Path) -> tuple[list[list[int]], set[int]]:
    """Epochs that each rank has begun, and the ranks' processes."""
    ranks = [[line.split() for line in (folder / f"rank{rank}.txt").read_text().splitlines()] for rank in (0, 1)]
    return [[int(epoch) for epoch, _ in lines] for lines in ranks], {int(pid) for lines in ranks for _, pid in lines}


def wait_for(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not (answer := true()) and time.monotonic() < until:
        time.sleep(0.1)
    return answer


def all_free() -> bool:
    return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def is_training(pid: int) -> bool:
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def one_trial(config: dict[str, Any]) -> None:
    """Trial 0 is stopped by Tune at epoch 2; the process of trial 1 dies there once."""
    folder = Path(config["folder"]) / str(config["trial"])
    folder.mkdir(exist_ok=True)

    def on_row(row: dict[str, Any]) -> None:
        if config["trial"] == 1 and row["epoch"] == 2 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)  # time in which a rank that does not wait would begin its next epoch
        tune.report({**row, "last": config["trial"] == 0 and row["epoch"] == 2})

    lean.run_group(
        work,
        {"folder": str(folder), "epochs": 4},
        workers=2,
        holds={"CPU": CPUS},
        name=folder.name,
        storage_path=str(folder.parent),
        on_row=on_row,
    )


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.slow
def test_a_stop_keeps_the_ranks_for_the_next_trial_and_a_death_frees_them(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    tuner = tune.Tuner(
        tune.with_resources(one_trial, lean.trial_resources(lean.Shape(2, {"CPU": CPUS}), 0.01)),
        param_space={"trial": tune.grid_search([0, 1]), "folder": str(folder)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tmp_path),
            verbose=0,
            stop={"last": True},
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    results = tuner.fit()
    assert wait_for(all_free)
    assert [(result.metrics or {})["ranks"] for result in results] == [2, 2]
    begun, ranks = written(folder / "0")
    assert begun == [[1, 2], [1, 2]]  # not one epoch beyond the stop
    begun, more = written(folder / "1")
    assert begun == [[1, 2, 1, 2, 3, 4]] * 2  # up to the death, and tried again
    assert len(ranks) == 2 and len(more) == 4 and ranks < more
    assert wait_for(lambda: not any(is_training(pid) for pid in more))


def test_outside_a_trial_rays_own_trainer_runs_and_an_error_of_a_rank_comes_out_as_it_is(tmp_path: Path) -> None:
    assert lean._trainer_class(lean.Shape(1, {"CPU": CPUS})) is TorchTrainer
    rows: list[dict[str, Any]] = []
    with pytest.raises(UserError) as caught:
        lean.run_group(
            work,
            {"folder": str(tmp_path), "epochs": 2, "fails": 0},
            workers=1,
            holds={"CPU": CPUS},
            name="stock",
            storage_path=str(tmp_path),
            on_row=rows.append,
        )
    assert caught.value.problems == ("data.source: no images", "data.channels: 4 is not 1 or 3")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert wait_for(all_free)


@pytest.mark.parametrize("name", ["run", "worker_group_cls", "get_result"])
def test_where_rays_inside_is_another_the_trial_holds_no_place_for_ranks(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from ray.train.v2._internal.execution.controller import TrainController

    shape = lean.Shape(2, {"CPU": 1.0, "GPU": 1.0})
    held = lean.trial_resources(shape, 0.01)
    assert isinstance(held, tune.PlacementGroupFactory)
    assert held.bundles == [{"CPU": 0.01}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert not lean.needs_dashboard()
    monkeypatch.delattr(TrainController, name)
    assert lean.trial_resources(shape, 0.01) == {"cpu": 0.01} and lean.needs_dashboard()


class GroupError(Exception):
    def __init__(self, **failures: Exception) -> None:
        self.worker_failures = {int(rank.removeprefix("rank")): failure for rank, failure in failures.items()}


class DeathSeen(Exception):
    health_check_failure = OSError("gone")


LOST = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (GroupError(rank0=LOST, rank1=ZeroDivisionError("its own")), "its own"),
        (GroupError(rank0=ZeroDivisionError("its own"), rank1=UserError("a mistake")), "a mistake"),
        (GroupError(rank0=LOST, rank1=DeathSeen()), "rank 1: its process was killed"),
        (GroupError(rank0=ConnectionResetError("reset"), rank1=EOFError("closed")), "reset"),
        (ValueError("the group could not start"), "the group could not start"),
    ],
)
def test_the_error_of_the_rank_that_failed_first_is_told(error: BaseException, text: str) -> None:
    assert str(lean._cause(error)).startswith(text)
