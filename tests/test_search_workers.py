"""The real trainer with two workers per trial: Ray Train's worker groups inside Tune."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import TINY
from runs import hparams

import hpcl.search
from hpcl.config import Config
from hpcl.results import read_rows
from hpcl.search.cluster import connected
from hpcl.search.found import Found
from hpcl.search.space import Space, from_tree
from hpcl.yamlio import dump, read_tree

SPACE = """
space:
  moco.temperature: {float: [0.1, 10.0]}
search: {trials: 2, metric: loss_inst, grace: 2, factor: 2, max_concurrent: 1, seed: 0}
resources: {workers: 2, gpus_per_worker: 0}
"""
"""Trial 0 has T = 0.1. Trial 1 draws a T far above it, at which InfoNCE stays near log(K + 1): ASHA stops it."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    base = Config.model_validate({**TINY, "runtime": {"device": "auto"}})
    text = "base:\n" + "".join(f"  {line}\n" for line in dump(base).splitlines()) + SPACE
    space: Space = from_tree(read_tree(text), name="two workers")
    with connected(None, workers=2):
        yield hpcl.search.run(space, name="two", results=tmp_path_factory.mktemp("results"))


def is_training(pid: int) -> bool:
    """Whether a process lives and is a worker of Ray Train (a dead one that nobody waited for is not)."""
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_stop_frees_all_cpus_and_ends_all_workers(found: Found) -> None:
    from ray.util.state import list_actors

    workers = list_actors(filters=[("class_name", "=", "RayTrainWorker")], detail=True, limit=100)
    assert len(workers) == 2  # the second trial ran on the first one's
    until = time.monotonic() + 60
    while time.monotonic() < until:
        free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
        if free and not any(is_training(worker.pid) for worker in workers):
            break
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    assert [worker.pid for worker in workers if is_training(worker.pid)] == []


def test_one_trial_ran_all_five_stages_and_one_was_stopped(found: Found) -> None:
    finished, stopped = sorted(found.trials, key=lambda trial: trial["state"])
    assert (finished["state"], stopped["state"]) == ("finished", "stopped")
    assert stopped["stop_reason"].startswith("epoch 2: loss_inst ")
    rows = read_rows(found.folder / "epochs.parquet")
    stages = [row["stage"] for row in rows if row["trial_id"] == finished["trial_id"]]
    assert stages == [1, 2, 3, 3, 3, 4, 5, 5]
    # The stopped trial trained no epoch beyond the one it was stopped at.
    assert [row["epoch"] for row in rows if row["trial_id"] == stopped["trial_id"]] == [1, 2]
    own = read_rows(found.folder / "trials" / stopped["trial_id"] / "epochs.parquet")
    assert [row["epoch"] for row in own] == [1, 2]


def test_two_ranks_trained_every_epoch(found: Found) -> None:
    assert {row["world_size"] for row in found.epochs} == {2}


def test_the_best_is_a_run_that_can_be_used(found: Found) -> None:
    assert found.best_trial is not None and found.best is not None
    assert found.best.moco.temperature == 0.1
    assert 0.1 < found.best_trial["objective"] <= 1.0
    folder = found.folder / "trials" / found.best_trial["trial_id"]
    assert {"config.yaml", "log.txt", "checkpoint.pt"} <= {file.name for file in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents.*.1"))
    assert hparams(folder) == {"moco.temperature": 0.1}
