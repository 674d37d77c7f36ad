"""Trials at a time on a cluster whose machines come and go; plain numbers, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcl.search import elastic
from hpcl.search.elastic import Room, machines
from hpcl.search.params import Resources
from hpcl.search.plan import Node, NoRoom, concurrency, make_plan
from hpcl.search.plan_text import render
from hpcl.search.space import apply_overrides, from_tree
from hpcl.yamlio import read_tree


@pytest.fixture(autouse=True)
def every_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "LOOK_EVERY", 0.0)


def test_room_follows_the_machines_and_says_so() -> None:
    there, said = [Node(4)], []
    room = Room(
        concurrency(Resources(), there), 1, most=9, ahead=1, look=lambda: there, changed=lambda *what: said.append(what)
    )
    assert (room.trials, room()) == (4, 5) and not said
    there.append(Node(8))
    assert (room.trials, room()) == (9, 9)  # 12 fit, 9 are allowed
    there.pop()
    assert (room.trials, room()) == (4, 5)
    there.clear()
    assert (room.trials, room()) == (0, 1)  # one waits, which is what brings a machine back
    assert said == [("4 CPUs, 0 GPUs + 8 CPUs, 0 GPUs", 9), ("4 CPUs, 0 GPUs", 4), ("no machine", 0)]


def test_a_workers_share_stays_as_it_was_at_the_start() -> None:
    there = [Node(8, 1)]
    room = Room(concurrency(Resources(), there), 1, most=99, look=lambda: there)
    there.append(Node(16, 2))  # `auto` would now give other CPUs to a worker
    assert room() == 3
    there[0] = Node(4, 1)  # too few CPUs for a worker of this search
    assert room() == 2


def test_on_one_machine_nothing_is_looked_at() -> None:
    assert Room(concurrency(Resources(), [Node(3)]), 1, most=3)() == 3


def test_machines_as_ray_lists_them() -> None:
    nodes = [
        {"Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0, "memory": 1.0}},
        {"Resources": {"CPU": 2.0}},
        {"Resources": {}},
    ]
    assert machines(nodes) == [Node(8, 2, "A100"), Node(2, 0, ""), Node(0, 0, "")]


def test_only_machines_with_the_asked_kind_of_gpu_count() -> None:
    nodes = [Node(16, 2, "A100"), Node(16, 4, "L4"), Node(64, 0, "")]
    wanted = Resources(accelerator_type="A100")
    room = concurrency(wanted, nodes)
    assert (room.trials, room.cpus_per_worker, room.gpus_per_worker) == (2, 8.0, 1.0)
    assert room.worker == {"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 0.001}
    assert room.each(1) == "1 x 8 CPUs + 1 GPUs (A100)"
    assert concurrency(Resources(), nodes).worker == {"CPU": 4.0, "GPU": 1.0}
    assert concurrency(wanted, [Node(8, 3)]).trials == 3  # not known which, as for --assume-gpus
    with pytest.raises(
        NoRoom, match=r"is H100, but the cluster has .*4 GPUs of kind L4.*; name one .*\(A100, L4\), or"
    ):
        concurrency(Resources(accelerator_type="H100"), nodes)
    with pytest.raises(NoRoom, match=r"accelerator_type is T4, but the cluster has 2 CPUs.*; leave it out"):
        concurrency(Resources(accelerator_type="T4"), [Node(2)])
    with pytest.raises(NoRoom, match=r"of kind L4 = 8.*has room for 4 such workers"):
        concurrency(Resources(accelerator_type="L4", workers=8), nodes)


@pytest.mark.parametrize(
    ("gpus", "share", "cpus", "said"),
    [
        (1, 0.25, "auto", "4 trials of 1 worker of 4 CPUs and 0.25 GPUs; up to 4 share a GPU"),
        (2, 0.5, "auto", "4 trials of 1 worker of 4 CPUs and 0.5 GPUs; up to 2 share a GPU"),
        (1, 0.1, 8, "2 trials of 1 worker of 8 CPUs and 0.1 GPUs; up to 2 share a GPU"),
        (2, 1, "auto", "2 trials of 1 worker of 8 CPUs and 1 GPU (for"),
    ],
)
def test_the_plan_says_how_many_trials_share_a_gpu(gpus: int, share: float, cpus: Any, said: str) -> None:
    space = from_tree(read_tree("space: {clusters.first: {int: [2, 32]}}\n"))
    wanted = apply_overrides(space, [f"resources.gpus_per_worker={share}", f"resources.cpus_per_worker={cpus}"])
    plan = make_plan(wanted, [Node(16, gpus)], cluster="one machine", folder=Path("results/x"))
    assert said in render(plan)


def test_a_kind_of_gpu_without_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="accelerator_type is A100, but gpus_per_worker is 0"):
        Resources(accelerator_type="A100", gpus_per_worker=0)
