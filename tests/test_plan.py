"""What a search will do: concurrency without deadlock, rungs, epochs to expect, the text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcl.errors import ConfigError
from hpcl.search import space as spaces
from hpcl.search.machine import local_node
from hpcl.search.params import Resources
from hpcl.search.plan import (
    DRIVER_CPUS,
    Node,
    concurrency,
    describe_nodes,
    expected_epochs,
    make_plan,
    render,
    rungs,
    startup_trials,
    survivors,
)

SPACES = Path(__file__).parents[1] / "search_spaces"


def pack(nodes: list[Node], cpus: float, gpus: float, workers: int, trials: int) -> bool:
    """Whether Ray could place these trials, bundle by bundle, each GPU by itself, in ten-thousandths."""
    rooms = [[round(n.cpus * 10_000), [10_000] * int(n.gpus)] for n in nodes]

    def place(cpu: int, gpu: int) -> bool:
        for room in rooms:
            free = room[1]
            whole = [i for i, left in enumerate(free) if left == 10_000]
            if room[0] < cpu or (gpu >= 10_000 and len(whole) < gpu // 10_000):
                continue
            if 0 < gpu < 10_000:
                fitting = [i for i, left in enumerate(free) if left >= gpu]
                if not fitting:
                    continue
                free[fitting[0]] -= gpu
            for i in whole[: gpu // 10_000]:
                free[i] = 0
            room[0] -= cpu
            return True
        return False

    drivers = trials if workers > 1 else 0
    bundles = [place(round(cpus * 10_000), round(gpus * 10_000)) for _ in range(trials * workers)]
    return all(bundles) and all(place(round(DRIVER_CPUS * 10_000), 0) for _ in range(drivers))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.builds(Node, st.integers(1, 12).map(float), st.integers(0, 4).map(float)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from(["auto", 0.1, 0.3, 0.5, 0.9, 1.0, 3.0]),
    st.sampled_from(["auto", 0.0, 0.1, 0.3, 0.4, 0.5, 1.0, 2.0]),
)
def test_as_many_trials_as_fit_and_never_more(
    nodes: list[Node], workers: int, cpus: float | str, gpus: float | str
) -> None:
    if workers > 1 and gpus not in ("auto", 0.0, 1.0, 2.0):
        gpus = 1.0
    resources = Resources(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)  # type: ignore[arg-type]
    try:
        room = concurrency(resources, nodes)
    except ConfigError:
        if cpus != "auto" and gpus != "auto":
            assert not pack(nodes, float(cpus) + (2 * DRIVER_CPUS if workers > 1 else 0), float(gpus), workers, 1)
        return
    assert pack(nodes, room.cpus_per_worker, room.gpus_per_worker, workers, room.trials)
    if workers == 1:
        assert not pack(nodes, room.cpus_per_worker, room.gpus_per_worker, 1, room.trials + 1)


@pytest.mark.parametrize(
    ("resources", "nodes", "trials", "cpus", "gpus"),
    [
        (Resources(), [Node(2)], 2, 1.0, 0.0),
        (Resources(workers=2), [Node(2)], 1, 0.999, 0.0),  # two workers and their driver on two CPUs
        (Resources(workers=2), [Node(64)], 32, 0.999, 0.0),
        (Resources(cpus_per_worker=0.1), [Node(1)], 10, 0.1, 0.0),  # 1 // 0.1 is 9 in floating point
        (Resources(gpus_per_worker=0.1), [Node(16, 1)], 10, 1.6, 0.1),
        (Resources(gpus_per_worker=0.4), [Node(16, 2)], 4, 4.0, 0.4),  # not 5: no worker has parts of two GPUs
        (Resources(), [Node(32, 8)], 8, 4.0, 1.0),
        (Resources(), [Node(16, 1)], 1, 8.0, 1.0),
        (Resources(), [Node(2, 4)], 4, 0.5, 1.0),
        (Resources(), [Node(8), Node(8, 2)], 2, 4.0, 1.0),  # auto uses the GPUs where there are some
        (Resources(gpus_per_worker=0.0), [Node(8, 2)], 8, 1.0, 0.0),
        (Resources(workers=3), [Node(4), Node(4)], 2, 0.999, 0.0),  # a trial may lie on two machines
    ],
)
def test_concurrency(resources: Resources, nodes: list[Node], trials: int, cpus: float, gpus: float) -> None:
    room = concurrency(resources, nodes)
    assert (room.trials, room.cpus_per_worker, room.gpus_per_worker) == (trials, cpus, gpus)
    assert concurrency(resources, nodes, limit=1).trials == 1


@pytest.mark.parametrize(
    ("resources", "nodes", "texts"),
    [
        (Resources(workers=2, cpus_per_worker=1.0), [Node(2)], ["2 x 1 + 0.001 (driver) CPUs = 2.001", "has 2 CPUs"]),
        (Resources(workers=4, gpus_per_worker=1.0), [Node(16, 2)], ["4 x 1 GPUs = 4", "16 CPUs, 2 GPUs", "room for 2"]),
        (Resources(gpus_per_worker=0.5), [Node(16)], ["1 x 0.5 GPUs = 0.5", "0 GPUs", "room for 0"]),
        (Resources(cpus_per_worker=3.0), [Node(2), Node(2)], ["1 x 3 CPUs = 3", "2 x (2 CPUs, 0 GPUs)"]),
        (Resources(), [], ["has no machine"]),
    ],
)
def test_asking_for_too_much_is_refused_with_the_sum(resources: Resources, nodes: list[Node], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        concurrency(resources, nodes)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "expected"),
    [
        (8, 2, 20, (8, 16)),
        (8, 2, 16, (8,)),
        (8, 3, 20, (8,)),
        (1, 3, 100, (1, 3, 9, 27, 81)),
        (20, 2, 20, ()),
        (None, 2, 20, ()),
    ],
)
def test_rungs_lie_below_the_total(grace: int | None, factor: int, epochs: int, expected: tuple[int, ...]) -> None:
    assert rungs(grace, factor, epochs) == expected


def asha_by_hand(order: np.ndarray, rung_epochs: list[int], epochs: int, factor: int) -> int:
    """Epochs trained when trials arrive one after another; `order` (trials, rungs) holds their values."""
    recorded: list[list[float]] = [[] for _ in rung_epochs]
    total = 0
    for values in order:
        reached = epochs
        for i, rung in enumerate(rung_epochs):
            cutoff = np.percentile(recorded[i], (1 - 1 / factor) * 100) if recorded[i] else -math.inf
            recorded[i].append(values[i])
            if values[i] < cutoff:
                reached = rung
                break
        total += reached
    return total


@pytest.mark.parametrize(("trials", "factor", "rung_epochs"), [(16, 2, [8, 16]), (9, 3, [5]), (30, 4, [2, 8])])
def test_expected_epochs_against_a_simulation(trials: int, factor: int, rung_epochs: list[int]) -> None:
    rng = np.random.default_rng(0)
    runs = [asha_by_hand(rng.random((trials, len(rung_epochs))), rung_epochs, 20, factor) for _ in range(400)]
    expected = expected_epochs(trials, 20, rung_epochs, factor)
    error = np.std(runs) / math.sqrt(len(runs))
    # Fractional arrivals at the second rung are interpolated: allow a percent for that.
    assert abs(np.mean(runs) - expected) < 4 * error + 0.01 * expected


def test_survivors() -> None:
    assert survivors(0, 2) == 0
    assert survivors(1, 3) == 1  # the first always goes on
    assert survivors(2, 2) == pytest.approx(1.5)  # the second if it is better than the first
    assert survivors(2.5, 2) == pytest.approx((survivors(2, 2) + survivors(3, 2)) / 2)
    assert survivors(10_000, 4) == pytest.approx(2500, rel=0.01)
    counts = [survivors(n / 10, 3) for n in range(200)]
    assert all(a < b for a, b in itertools.pairwise(counts))
    assert expected_epochs(16, 20, [], 2) == 16 * 20


def test_startup() -> None:
    assert [startup_trials(16, c) for c in (1, 2, 8)] == [6, 6, 8]
    assert startup_trials(200, 2) == 10
    assert startup_trials(1, 1) == 1


def test_the_plan_of_a_shipped_space() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    plan = make_plan(space, [Node(2)], cluster="this machine", folder=Path("results/clusters"))
    assert (plan.concurrency.trials, plan.rungs, plan.epochs_at_most) == (2, (8, 16), 320)
    assert 16 * 8 < plan.epochs_expected < 320
    assert plan.notes == ()
    text = render(plan)
    for part in (
        "clusters.multiplier      1.2 .. 3 ",
        "epoch 8, 16 of 20",
        "2 trials of 1 worker of 1 CPU (for this machine: 2 CPUs, 0 GPUs)",
        "at most 320, expected about ",
        "results/clusters",
        "mnist5k",
        "acc_proto_ref (higher is better)",
    ):
        assert part in text
    many = make_plan(space, [Node(64, 8)], cluster="8 GPUs assumed", folder=Path("r"))
    assert many.concurrency.trials == 8
    one = make_plan(
        spaces.apply_overrides(space, ["search.max_concurrent=1", "search.startup=3"]),
        [Node(64)],
        cluster="x",
        folder=Path("r"),
    )
    assert (one.concurrency.trials, one.startup) == (1, 3)
    free = make_plan(spaces.apply_overrides(space, ["search.grace=null"]), [Node(2)], cluster="x", folder=Path("r"))
    assert (free.rungs, free.epochs_expected) == ((), 320)
    assert "none: every trial trains all 20 epochs" in render(free)


def test_the_plan_says_what_a_reader_should_know() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    early = spaces.apply_overrides(space, ["search.grace=2"])
    notes = make_plan(early, [Node(2)], cluster="x", folder=Path("r")).notes
    assert len(notes) == 1
    assert "lies in stage 1, where no searched field acts" in notes[0]
    raw = spaces.apply_overrides(space, ["search.grace=2", "search.metric=acc_proto"])
    assert "no value in stage 1" in make_plan(raw, [Node(2)], cluster="x", folder=Path("r")).notes[0]
    losses = spaces.load(SPACES / "losses.yaml")
    moved = spaces.apply_overrides(losses, ["topk.max_clusters=64"])
    assert make_plan(moved, [Node(2)], cluster="x", folder=Path("r")).notes == ()
    conditional = render(make_plan(losses, [Node(2)], cluster="x", folder=Path("r")))
    assert "int, if topk.mode is replace or add" in conditional
    clipped = spaces.from_tree(spaces.Tree({"base": {"preset": "embedded"}, "space": {"topk.k": {"int": [4, 6]}}}))
    text = render(make_plan(clipped, [Node(2)], cluster="x", folder=Path("r")))
    assert "topk.k is 3 in the base, which the space does not contain: trial 0 takes 4" in text


def test_nodes_in_words() -> None:
    assert describe_nodes([Node(16, 2), Node(16, 2), Node(1)]) == "2 x (16 CPUs, 2 GPUs) + 1 CPU, 0 GPUs"


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert local_node(root=tmp_path) == Node(8, 0)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    for text, cpus in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("broken", 8)):
        (cgroup / "cpu.max").write_text(text)
        assert local_node(root=tmp_path) == Node(cpus, 2)
    for visible, gpus in (("1", 1), ("", 0), ("-1", 0), ("0,1", 2), ("0,1,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local_node(root=tmp_path).gpus == gpus
    assert local_node(assume_gpus=4, root=tmp_path).gpus == 4
