"""What a search will do: concurrency without deadlock, rungs, epochs and hours to expect, the text."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import class_folders

from hpcl.data import load
from hpcl.errors import ConfigError
from hpcl.search import space as spaces
from hpcl.search.check import backbone_problems
from hpcl.search.expected import Measured, expected_work, survivors, trial_lengths
from hpcl.search.images import foresee
from hpcl.search.machine import local_node
from hpcl.search.params import Resources
from hpcl.search.plan import DRIVER_CPUS, Node, Plan, concurrency, describe_nodes, duration, make_plan, startup_trials
from hpcl.search.plan_text import render
from hpcl.sections import Data
from hpcl.yamlio import Tree, read_tree

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


def plan_of(space: spaces.Space, *nodes: Node, measured: Measured | None = None) -> Plan:
    return make_plan(space, nodes or [Node(2)], cluster="here", folder=Path("r"), measured=measured)


def space_of(base: str, fields: str, search: str = "{}") -> spaces.Space:
    return spaces.from_tree(read_tree(f"base: {base}\nspace: {fields}\nsearch: {search}\n", "s.yaml"))


def asha_by_hand(order: np.ndarray, rungs: list[float], total: float, factor: int, start: float, peers: int) -> float:
    """Epochs trained when trials arrive one after another; `order` (trials, rungs) holds their values."""
    recorded: list[list[float]] = [[] for _ in rungs]
    trained = 0.0
    for values in order:
        reached = total
        for i, rung in enumerate(rungs):
            few = len(recorded[i]) < peers
            cutoff = -math.inf if few else np.percentile(recorded[i], (1 - 1 / factor) * 100)
            recorded[i].append(values[i])
            if values[i] < cutoff:
                reached = rung
                break
        trained += reached - start
    return trained


@pytest.mark.parametrize(
    ("trials", "factor", "rungs", "start", "peers"),
    [(16, 2, [8.0, 16.0], 0.0, 1), (9, 3, [5.0], 2.0, 1), (30, 4, [2.0, 8.0], 0.0, 1), (16, 2, [8.0, 13.0], 3.0, 4)],
)
def test_expected_epochs_against_a_simulation(
    trials: int, factor: int, rungs: list[float], start: float, peers: int
) -> None:
    rng = np.random.default_rng(0)
    runs = [asha_by_hand(rng.random((trials, len(rungs))), rungs, 20, factor, start, peers) for _ in range(400)]
    expected = expected_work(trials, 20, rungs, factor, start=start, min_peers=peers)
    error = np.std(runs) / math.sqrt(len(runs))
    # Fractional arrivals at the second rung are interpolated: allow a percent for that.
    assert abs(np.mean(runs) - expected) < 4 * error + 0.01 * expected


def test_survivors() -> None:
    assert survivors(0, 2) == 0
    assert survivors(1, 3) == 1  # the first always goes on
    assert survivors(2, 2) == pytest.approx(1.5)  # the second if it is better than the first
    assert survivors(2.5, 2) == pytest.approx((survivors(2, 2) + survivors(3, 2)) / 2)
    assert survivors(4, 3, min_peers=4) == 4
    assert survivors(10_000, 4) == pytest.approx(2500, rel=0.01)
    counts = [survivors(n / 10, 3) for n in range(200)]
    assert all(a < b for a, b in itertools.pairwise(counts))


def test_brackets_leave_out_rungs_and_so_cost_more() -> None:
    rungs, e = [2.0, 4.0, 8.0], math.e
    assert expected_work(16, 20, [], 2) == 16 * 20
    one, two = (expected_work(100, 20, rungs, 2, brackets=n) for n in (1, 2))
    first, second = 100 * e / (e + 1), 100 / (e + 1)  # e^3 and e^2, as Ray deals them
    assert two == pytest.approx(expected_work(first, 20, rungs, 2) + expected_work(second, 20, rungs[1:], 2))
    assert one < two


def test_startup() -> None:
    assert [startup_trials(16, c) for c in (1, 2, 8)] == [6, 6, 8]
    assert startup_trials(200, 2) == 10
    assert startup_trials(1, 1) == 1


def test_the_plan_of_a_shipped_space() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    plan = make_plan(space, [Node(2)], cluster="this machine", folder=Path("results/clusters"))
    assert (plan.concurrency.trials, plan.fork, plan.rungs) == (2, 3, (8, 13))
    assert plan.epochs_at_most == 320 - 15 * 3  # stage 1 once
    assert 3 + 16 * 5 < plan.epochs_expected < plan.epochs_at_most
    assert plan.notes == ()
    text = render(plan)
    for part in (
        "clusters.multiplier      1.2 .. 3 ",
        "stage 1 (3 epochs) is trained once, not 16 times: saves 45 of 320 epochs (14 % of the CPU-hours) and 13 %",
        "epoch 8, 13 of 20; about 1 in 2",
        "2 trials of 1 worker of 1 CPU (for this machine: 2 CPUs, 0 GPUs)",
        "at most 275, expected about ",
        "results/clusters",
        "mnist5k",
        "acc_proto_ref (higher is better)",
        f"budget     16 trials, after about {plan.epochs_expected:.0f} epochs",
    ):
        assert part in text
    assert "images     mnist5k, one mapped copy per machine, shared by all trials\n" in text
    assert plan_of(space, Node(64, 8)).concurrency.trials == 8
    one = plan_of(spaces.apply_overrides(space, ["search.max_concurrent=1", "search.startup=3"]), Node(64))
    assert (one.concurrency.trials, one.startup) == (1, 3)
    free = plan_of(spaces.apply_overrides(space, ["search.grace=null"]))
    assert (free.rungs, free.epochs_expected) == ((), free.epochs_at_most)
    assert "none: every trial trains all 20 epochs" in render(free)


def test_the_rungs_in_the_space_files_are_those_of_the_plan() -> None:
    for name, rungs in {
        "clusters": (8, 13), "stages": (8, 16), "losses": (8, 16), "full": (8, 16), "smoke": (3, 5),
    }.items():  # fmt: skip
        assert plan_of(spaces.load(SPACES / f"{name}.yaml")).rungs == rungs
        comment = (SPACES / f"{name}.yaml").read_text().partition("factor:")[2].partition("\n")[0]
        assert all(str(rung) in comment for rung in rungs)


def test_without_sharing_rungs_and_epochs_count_from_the_start() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    plan = plan_of(spaces.apply_overrides(space, ["search.share_prefix=false"]))
    assert (plan.prefixes, plan.rungs, plan.epochs_at_most) == (None, (5, 10), 320)
    assert plan.epochs_expected == pytest.approx(expected_work(16, 20, [5, 10], 2))
    assert "nothing (search.share_prefix is false)" in render(plan)
    assert "nothing: moco.temperature acts from stage 1 on" in render(plan_of(spaces.load(SPACES / "losses.yaml")))


def test_gpu_hours_and_wall_time_are_told_apart() -> None:
    space = spaces.apply_overrides(spaces.load(SPACES / "clusters.yaml"), ["search.grace=null"])
    measured = Measured((10.0, 20.0, 20.0, 20.0, 20.0), "cuda")
    plan = plan_of(space, Node(8, 4), measured=measured)
    assert plan.seconds is not None
    # 3 epochs of stage 1 once, then 17 in each of 16 trials; three of four GPUs wait 30 s for the prefix.
    assert plan.seconds.work == pytest.approx(30 + 16 * 17 * 20)
    assert plan.seconds.wall == pytest.approx(30 + 16 * 17 * 20 / 4)
    assert plan.seconds.work_saved == pytest.approx(15 * 30)
    assert plan.seconds.wall_saved == pytest.approx(16 * (30 + 17 * 20) / 4 - plan.seconds.wall)
    text = render(plan)
    assert "saves 45 of 320 epochs, 0.12 GPU-hours and 1 min 30 s of wall time" in text
    assert "expected about 1.5 GPU-hours and 23 min 10 s of wall time: an epoch took 10 s in stage 1 and 20 s" in text
    halves = plan_of(spaces.with_overrides(space, gpus_per_worker=0.5), Node(8, 4), measured=measured)
    assert "0.062 GPU-hours" in render(halves)  # the same epochs on half a GPU each
    assert "CPU-hours" in render(plan_of(space, Node(8), measured=measured))


def test_trials_that_differ_in_length() -> None:
    fields = "{stages.stage3.epochs: {int: [10, 90]}, stages.stage5.epochs: {choice: [20, 50]}}"
    space = space_of("{preset: mini_imagenet}", fields, "{grace: 20}")
    lengths = trial_lengths(space)
    assert (lengths.least, lengths.typical, lengths.most) == (60, (20, 5, 50, 5, 35), 170)
    plan = plan_of(space)
    assert (plan.fork, plan.rungs) == (25, (45, 65, 105))  # growth thresholds run over all epochs: from stage 3 on
    assert plan.epochs_at_most == 16 * 170 - 15 * 25
    text = render(plan)
    assert "60 to 170 epochs, on average 115; the base has 150 epochs" in text
    assert "epoch 45, 65, 105 of 150 in the base's schedule" in text
    free = plan_of(spaces.apply_overrides(space, ["search.grace=null"]))
    assert free.epochs_expected == pytest.approx(25 + 16 * 90)
    fixed = spaces.apply_overrides(space, ["stages.total=100"])
    assert (trial_lengths(fixed).least, trial_lengths(fixed).most) == (100, 100)


def test_the_budget_that_will_bind_is_named() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    short = spaces.apply_overrides(space, ["search.max_epochs=50", "search.max_hours=9"])
    text = render(plan_of(short))
    assert "budget     50 epochs, before the about" in text and "9 hours" in text
    hours = spaces.apply_overrides(space, ["search.max_hours=0.01"])
    measured = Measured((9.0, 9.0, 9.0, 9.0, 9.0), "cpu")
    assert "budget     0.01 hours, after about 8 of" in render(plan_of(hours, measured=measured))
    never = spaces.apply_overrides(space, ["search.max_gpu_hours=2"])
    assert "never 2 GPU-hours: the trials use no GPU" in render(plan_of(never))


def test_the_plan_says_what_a_reader_should_know() -> None:
    space = spaces.load(SPACES / "clusters.yaml")
    alone = spaces.apply_overrides(space, ["search.share_prefix=false", "search.grace=2"])
    notes = plan_of(alone).notes
    assert len(notes) == 1
    assert "the rung at epoch 2 lies before stage 2, the first in which a searched field acts" in notes[0]
    assert "above 3" in notes[0]
    raw = spaces.apply_overrides(alone, ["search.metric=acc_proto"])
    assert "acc_proto has no value in stage 1: no trial is stopped at the rung of epoch 2" in plan_of(raw).notes[0]
    assert plan_of(spaces.apply_overrides(space, ["search.grace=1", "search.metric=acc_proto"])).notes == ()
    losses = spaces.load(SPACES / "losses.yaml")
    assert plan_of(spaces.apply_overrides(losses, ["topk.max_clusters=64", "search.grace=2"])).notes == ()
    assert "int, if topk.mode is replace or add" in render(plan_of(losses))
    text = render(plan_of(space_of("{preset: embedded}", "{topk.k: {int: [4, 6]}}")))
    assert "topk.k is 3 in the base, which the space does not contain: trial 0 takes 4" in text
    random = spaces.apply_overrides(space, ["search.sampler=random", "search.min_peers=3", "search.brackets=2"])
    text = render(plan_of(random))
    assert "trial 0 is the base, then random; seed 0" in text
    assert "all while fewer than 3 others have come there; 2 brackets leave out 0 to 1 rungs" in text
    goes_on = make_plan(space, [Node(2)], cluster="here", folder=Path("results/a"), resumes=True)
    assert "results/a (the unfinished search there goes on)" in render(goes_on)


def test_a_gpu_that_is_wanted_must_be_there() -> None:
    space = space_of("{preset: embedded, runtime: {device: cuda}}", "{topk.k: {int: [1, 3]}}")
    with pytest.raises(
        ConfigError, match=r"s\.yaml:1:44: runtime\.device is cuda, but a worker gets no GPU \(resourc.*2 C"
    ):
        plan_of(space)
    assert plan_of(space, Node(2, 1)).concurrency.gpus_per_worker == 1
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 0"):
        plan_of(spaces.with_overrides(space, gpus_per_worker=0), Node(2, 1))
    choice = space_of("{preset: embedded}", "{runtime.device: {choice: [cpu, cuda]}}")
    with pytest.raises(ConfigError, match=r"s\.yaml:2:40: runtime\.device is cuda"):
        plan_of(choice)


def test_backbones_that_no_trial_could_build_are_named() -> None:
    fields = "{model.backbone: {choice: [convnet, resnet19]}}"
    (problem,) = backbone_problems(space_of("{preset: embedded, model: {backbone: mine}}", fields))
    assert problem.startswith("s.yaml:2:44: model.backbone is resnet19, but must be one of convnet, ")
    assert problem.endswith("; did you mean resnet18?")
    (problem,) = backbone_problems(space_of("{preset: embedded, model: {backbone: mine}}", "{topk.k: {int: [1, 3]}}"))
    assert problem.startswith("s.yaml:1:44: model.backbone is mine")
    assert backbone_problems(spaces.load(SPACES / "clusters.yaml")) == []
    assert backbone_problems(space_of("{preset: embedded}", "{model.backbone: {choice: [vgg11_bn, convnet]}}")) == []
    pytest.importorskip("timm")
    (problem,) = backbone_problems(
        space_of("{preset: embedded}", "{model.backbone: {choice: [convnet, 'timm:resnet18z']}}")
    )
    assert problem.startswith("s.yaml:2:44: model.backbone is timm:resnet18z, but timm ")


def test_an_epoch_is_measured_by_training_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    import torch

    from hpcl.search.measure import measure, two_epochs

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    space = spaces.from_tree(Tree({"base": TINY, "space": {"topk.k": {"int": [1, 3]}}, "search": {"grace": 2}}))
    threads = torch.get_num_threads()
    measured = measure(space)
    assert measured.device == "cpu" and min(measured.seconds) > 0
    assert measured.seconds[1:] == (measured.seconds[4],) * 4 != (measured.seconds[0],) * 4
    assert torch.get_num_threads() == threads and not list(tmp_path.iterdir())
    auto = space.base.with_values({"runtime.device": "auto", "stages.total": 40})
    assert two_epochs(auto, gpus=0).runtime.device == "cpu" and two_epochs(auto, gpus=1).runtime.device == "auto"
    assert two_epochs(auto, gpus=1).stages.total is None


def test_durations() -> None:
    assert [duration(s) for s in (75.2, 5, 7300)] == ["1 min 15 s", "5 s", "2 h 1 min"]


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


def test_the_plan_says_how_large_the_images_are_and_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCL_CACHE", str(tmp_path / "cache"))
    root = class_folders(tmp_path / "set")
    (root / "class0" / "000.png").write_text("broken")
    space = spaces.load(SPACES / "clusters.yaml")

    def line(data: Data, node: Node) -> str:
        mine = replace(space, base=space.base.with_values({"data": data.model_dump()}))
        plan = make_plan(mine, [node], cluster="here", folder=Path("r"), images=foresee(data))
        return next(each for each in render(plan).splitlines() if each.startswith("images"))

    copies = ", one mapped copy per machine, shared by all trials"
    assert line(Data(), Node(2)) == f"images     mnist5k: 5,000 x 1x28x28 = 3.9 MB{copies}"
    gpu = line(Data(size=32), Node(8, 1))
    assert gpu.startswith("images     mnist5k: 5,000 x 1x32x32 = 5.1 MB")
    assert gpu.endswith("; copied to the GPU if it fits half of its free memory, else streamed with prefetch")
    data = Data(source=str(root), size=8)
    assert line(data, Node(2)) == f"images     {root}: 30 x 3x8x8 = about 5.8 kB{copies}"
    assert not (tmp_path / "cache").exists()  # nothing was converted
    load(data)
    assert line(data, Node(2)) == f"images     {root}: 29 x 3x8x8 = 5.6 kB{copies}"
    assert foresee(Data(source="/no/such/place")) is None
    assert line(Data(source="/no/such/place"), Node(2)) == f"images     /no/such/place{copies}"
