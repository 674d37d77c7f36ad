"""What a search keeps when processes and nodes are killed: real raylets here, the driver in a process of its own.

The faults are those of benchmarks/faults.py, whose table is in docs/reliability.md.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
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
search: {{trials: {trials}, grace: 2, factor: 2, max_concurrent: 2, seed: 3}}
resources: {{workers: {workers}, cpus_per_worker: {cpus}, gpus_per_worker: 0}}
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


def search(cluster: Any, folder: Path, *, trials: int, epochs: int, workers: int = 1) -> Any:
    """A search that was started as a user starts it; an epoch takes 0.3 s, more in worse trials."""
    cpus = {1: 0.8, 2: 0.4}[workers]
    (folder / "s.yaml").write_text(SPACE.format(trials=trials, epochs=epochs, workers=workers, cpus=cpus))
    started = raylets.Search(folder / "s.yaml", folder, cluster.address, "--pause", "0.3", "--lag", "4")
    started.start()
    return started


def free(cluster: Any) -> bool:
    """No trial, no rank, no placement group, no CPU held, and no process that has lost its raylet."""
    return not (cluster.orphans() or cluster.groups() or cluster.held())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_frees_the_place_and_the_processes_of_a_trial_that_has_no_successor(
    cluster: Any, tmp_path: Path, workers: int
) -> None:
    running = search(cluster, tmp_path, trials=2, epochs=100, workers=workers)

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


def test_a_trial_of_a_killed_raylet_goes_on_at_the_other(cluster: Any, tmp_path: Path) -> None:
    running = search(cluster, tmp_path, trials=3, epochs=16)
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
