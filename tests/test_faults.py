"""What a search keeps when processes and nodes are killed: real raylets here, the driver in a process of its own.

The faults are those of benchmarks/faults.py, whose table is in docs/reliability.md.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIMIT = 240.0

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]

SPACE = """
base: {{preset: embedded, optimizer: {{weight_decay: 1.0e-4}}, stages: {{total: {epochs}}}}}
space:
  optimizer.weight_decay: {{float: [1.0e-4, 1.0], log: true}}
search: {{trials: {trials}, factor: 2, seed: 3, {more}}}
resources: {{{resources}}}
"""
"""Trial 0 is the best there can be: ASHA never stops it."""


def script(name: str) -> ModuleType:
    """A script of benchmarks/."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


raylets: Any = script("raylets")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two raylets of one CPU each, beside a head without any."""
    with raylets.raylets(2) as found:
        yield found


@pytest.fixture
def search(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a search as a user starts it, on two raylets; an epoch takes 0.3 s, more in worse trials."""
    while len(cluster.nodes) < 2:
        cluster.add()
    started = raylets.Search(tmp_path / "s.yaml", tmp_path, cluster.address, "--pause", "0.3", "--lag", "4")

    def start(
        *,
        trials: int,
        epochs: int,
        workers: int = 1,
        more: str = "grace: 2, max_concurrent: 2",
        resources: str = "",
    ) -> Any:
        cpus = {1: 0.8, 2: 0.4}[workers]
        resources = resources or f"workers: {workers}, cpus_per_worker: {cpus}, gpus_per_worker: 0"
        (tmp_path / "s.yaml").write_text(SPACE.format(trials=trials, epochs=epochs, more=more, resources=resources))
        started.start()
        return started

    yield start
    if started.process and not started.ended:
        started.kill()


def free(cluster: Any) -> bool:
    """No trial, no rank, no placement group, no CPU held, and no process that has lost its raylet."""
    return not (cluster.orphans() or cluster.groups() or cluster.held())


@pytest.mark.slow  # 14 s each
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_frees_the_place_and_the_processes_of_a_trial_that_has_no_successor(
    cluster: Any, search: Any, workers: int
) -> None:
    running = search(trials=2, epochs=100, workers=workers)

    running.until(lambda: any(event.get("state") == "stopped" for event in running.events()), "a trial is stopped")
    ranks = 0 if workers == 1 else workers
    running.until(lambda: len(cluster.groups()) == 1 and cluster.held() < 1, "one place is free")
    running.until(lambda: len(cluster.of_kind("rank")) == ranks, "its ranks are gone")
    running.until(
        lambda: len([p for p in cluster.of_kind("trial") if "ray::Impl" in p.name]) == 1, "its process is gone"
    )
    assert "0000" in running.running(), "the other trial has ended too: nothing was shown"
    os.kill(running.process.pid, signal.SIGINT)
    assert running.wait(LIMIT) == 130
    raylets.wait_for(lambda: free(cluster), LIMIT, "free")


@pytest.mark.slow  # 25 s
def test_a_trial_of_a_killed_raylet_goes_on_at_the_other(cluster: Any, search: Any) -> None:
    running = search(trials=3, epochs=16)
    running.until(lambda: running.running(3), "a trial at epoch 3")
    trial, note = max(running.running(3).items(), key=lambda item: item[1]["at"])
    cluster.kill(cluster.node_of(note["pid"]))
    assert running.wait(LIMIT) == 0, running.said
    raylets.wait_for(lambda: free(cluster), LIMIT, "free")
    counted = raylets.count(running, 3)
    assert (counted.lost, counted.doubled, counted.overlapping) == ([], [], []), running.said
    assert sum(counted.states.values()) == 3 and len(counted.reasons) == 1
    processes = {note["pid"] for note in running.notes()[trial]}
    assert len(processes) >= 2  # it went on in another one
    assert {t for t, again in counted.again.items() if again} <= {trial} and counted.again[trial] <= 1
    assert not raylets.alive(note["pid"])


@pytest.mark.slow
def test_trials_at_a_time_follow_the_machines(cluster: Any, search: Any) -> None:
    running = search(trials=6, epochs=200, more="max_concurrent: auto, grace: null")
    running.until(lambda: len(running.running()) == 2, "two trials, one a machine")
    joined = cluster.add()
    running.until(lambda: len(running.running()) == 3, "three trials")
    assert len({cluster.node_of(note["pid"]).unique_id for note in running.running().values()}) == 3
    cluster.kill(joined)
    running.until(lambda: "the cluster has 2 x (1 CPU, 0 GPUs) now: 2 trials at a time" in running.said, "two again")
    assert "the cluster has 3 x (1 CPU, 0 GPUs) now: 3 trials at a time" in running.said
    os.kill(running.process.pid, signal.SIGINT)
    assert running.wait(LIMIT) == 130
    raylets.wait_for(lambda: free(cluster), LIMIT, "free")


@pytest.mark.slow
def test_trials_share_a_gpu(cluster: Any, search: Any) -> None:
    with_gpu = cluster.add(gpus=1)
    shared = "workers: 1, cpus_per_worker: 0.4, gpus_per_worker: 0.5"
    running = search(trials=4, epochs=200, more="max_concurrent: auto, grace: null", resources=shared)
    running.until(lambda: len(running.running(2)) == 2, "two trials at their second epoch")
    assert {cluster.node_of(note["pid"]).unique_id for note in running.running().values()} == {with_gpu.unique_id}
    assert "2 at a time (1 x 0.4 CPUs + 0.5 GPUs each)" in running.said
    os.kill(running.process.pid, signal.SIGINT)
    assert running.wait(LIMIT) == 130
    assert len(running.notes()) == 2  # the other two machines, which have none, took no trial
    cluster.kill(with_gpu)
    raylets.wait_for(lambda: free(cluster), LIMIT, "free")


FAULTS: dict[str, Any] = script("faults").FAULTS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers"), [(name, mode) for name, fault in FAULTS.items() for mode in fault.modes])
def test_nothing_is_lost_doubled_or_left(name: str, workers: int, tmp_path: Path) -> None:
    fault = FAULTS[name]
    if fault.root and os.geteuid():
        pytest.skip("needs root to mount a small disk")
    line = script("faults").measure(fault, workers, tmp_path)
    assert line.code == 0
    assert (line.counted.lost, line.counted.doubled, line.left) == ([], [], [])
    assert name == "asleep" or line.counted.overlapping == []  # a machine that wakes ends the epoch it was in
    # A torn checkpoint takes the epoch that it held with it, besides the one that ran.
    assert max(line.counted.again.values()) <= (2 if name == "torn" else 1)
