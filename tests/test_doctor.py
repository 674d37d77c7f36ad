"""`hpcl doctor`: what facts mean, what a node says, and one whole run on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcl.search import agreement, diagnosis, doctor, nodes
from hpcl.search.diagnosis import Finding
from hpcl.search.facts import DataFacts, Disk, Driver, Faiss, Gpu, Machine, NodeFacts, RayFacts, Torch
from hpcl.search.plan import Node
from hpcl.search.space import load

ROOT = Path(__file__).parents[1]
GB = 10**9
A100 = Gpu(name="A100", capability=(8, 0), free=39 * GB, total=40 * GB)
CUDA = Torch(version="2.15.0+cu132", cuda="13.2", threads=8, kinds=("sm_80", "sm_90", "compute_90"))
TWO_A100 = {
    "driver": Driver(version="580.65.06", gpus=("A100", "A100")),
    "torch": CUDA.model_copy(update={"gpus": (A100, A100)}),
}
HEALTHY = Machine(
    host="a",
    python="3.11.7",
    executable="/venv/bin/python",
    hpcl="0.1.0",
    code="c0de",
    cpus=8,
    memory_free=30 * GB,
    memory_total=32 * GB,
    shm_free=16 * GB,
    visible=None,
    driver=Driver(),
    torch=CUDA,
    faiss=Faiss(version="1.15.1", for_gpus=True),
    ray=RayFacts(version="2.60.0", lean=True),
    disks=(Disk(holds="results", path="/x", free=100 * GB, total=200 * GB, device=1, writable=True),),
)
VERSIONS = {"python": "3.11.7", "hpcl": "0.1.0", "code": "c0de", "ray": "2.60.0", "torch": "2.15.0"}


def machine(**changes: Any) -> Machine:
    return HEALTHY.model_copy(update=changes)


def node(name: str, **changes: Any) -> NodeFacts:
    facts = NodeFacts(name=name, node_id=name, here=name == "a", cpus=8, gpus=0, versions=VERSIONS, token=True)
    return facts.model_copy(update={"folder": "same", **changes})


def told(findings: Sequence[Finding], level: str) -> list[str]:
    """What is said and advised in all findings of a level."""
    for each in findings:
        assert each.says and (each.do or each.level != "fault"), "a fault comes with what to do"
    return [f"{each.about}: {each.says} -> {each.do}" for each in findings if each.level == level]


def of_nodes(*facts: NodeFacts, data: str | None = None) -> list[Finding]:
    return agreement.of_nodes(facts, HEALTHY, folder="/x", data=data, cluster=True)


# ---------------------------------------------------------------- a machine


def test_a_healthy_machine_has_neither_fault_nor_note() -> None:
    for healthy in (HEALTHY, machine(**TWO_A100)):
        found = diagnosis.of_machine(healthy)
        assert {each.level for each in found} == {"ok"}
        names = [each.about for each in found]
        assert names == ["Python", "torch", "GPUs", "faiss", "Ray", "memory", "/dev/shm", "disk"]
    assert "2 x A100, 40 GB, compute capability 8.0, driver 580.65.06" in found[2].says


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        (
            {"driver": Driver(version="470.57.02", gpus=("Tesla T4",)), "torch": CUDA},
            "fault",
            "driver 470.57.02, which is too old for torch's CUDA 13.2: .* -> update the driver to 580 or newer$",
        ),
        (
            {"driver": Driver(version="550.90", gpus=("Tesla T4",)), "torch": CUDA},
            "fault",
            "1 x Tesla T4, driver 550.90, .* -> update the driver to 580 or newer, or install a torch for CUDA 12",
        ),
        (
            {
                "driver": Driver(version="580.65", gpus=("A100",)),
                "torch": CUDA.model_copy(update={"cuda": None, "version": "2.15.0+cpu"}),
            },
            "fault",
            r"torch 2.15.0\+cpu is built for CPUs only.* -> install a torch for CUDA: pip install --force-reinstall",
        ),
        (
            {"driver": Driver(version="580.65", gpus=("A100",) * 2), "visible": ""},
            "note",
            "2 x A100, driver 580.65; CUDA_VISIBLE_DEVICES= hides them.* -> to use them: unset it",
        ),
        (
            {"driver": Driver(version="580.65", gpus=("A100",)), "visible": "7"},
            "fault",
            r"with CUDA_VISIBLE_DEVICES=7 torch finds none.* -> name GPUs that are there \(nvidia-smi -L\)",
        ),
        (
            {**TWO_A100, "visible": "0", "torch": CUDA.model_copy(update={"gpus": (A100,)})},
            "note",
            "1 of 2 are used: CUDA_VISIBLE_DEVICES=0 -> to use all: unset it",
        ),
        (
            {
                "driver": Driver(version="580.65", gpus=("Tesla K80",)),
                "torch": CUDA.model_copy(
                    update={"gpus": (Gpu(name="Tesla K80", capability=(3, 7), free=11 * GB, total=11 * GB),)}
                ),
            },
            "fault",
            "no kernels for GPU 0, Tesla K80: it has compute capability 3.7 -> install a torch that has",
        ),
        (
            {**TWO_A100, "torch": CUDA.model_copy(update={"gpus": (A100.model_copy(update={"free": GB}), A100)})},
            "note",
            "GPU 0, A100, has 1 of 40 GB free: another process holds it -> nvidia-smi shows which",
        ),
        (
            {**TWO_A100, "torch": CUDA.model_copy(update={"gpus": (A100, A100.model_copy(update={"error": "ECC"}))})},
            "fault",
            r"GPU 1, A100, does not compute \(ECC\) -> see nvidia-smi",
        ),
        (
            {"driver": Driver(version="580.65", gpus=("A100",), exclusive=True), "torch": TWO_A100["torch"]},
            "note",
            "one process only .*gpus_per_worker below 1 will not work -> .*nvidia-smi -c DEFAULT",
        ),
        (
            {"driver": Driver(error="nvidia-smi: Driver/library version mismatch")},
            "fault",
            r"does not answer \(nvidia-smi: Driver/library version mismatch\).* -> .*restart the machine",
        ),
        ({"driver": Driver(on_bus=1)}, "note", "1 NVIDIA GPU on the bus, but no driver.* -> .*--gpus all"),
        ({"torch": Torch(error="No module named 'torch'")}, "fault", "^torch: torch cannot be used .* -> install both"),
        (
            {"torch": CUDA.model_copy(update={"torchvision": "operator torchvision::nms does not exist"})},
            "fault",
            r"torchvision does not fit torch 2.15.0\+cu132 .* -> install both from one place",
        ),
        (
            {"faiss": Faiss(version="1.15.1", error="the process was ended by SIGILL: it uses an instruction")},
            "fault",
            "faiss 1.15.1 cannot be used .*SIGILL.* -> .*pip install faiss-cpu; or set clusters.backend to torch",
        ),
        ({"faiss": Faiss(missing=True)}, "note", "is not installed.* -> pip install faiss-cpu"),
        ({"ray": RayFacts(version="2.59.1")}, "fault", r"is 2.59.1, but this project needs 2.60 -> .*==2.60.\*"),
        (
            {"ray": RayFacts(version="2.60.0", without_default="No module named 'aiohttp'")},
            "fault",
            r"lacks what ray\[default\] brings .*aiohttp.* -> pip install \"ray\[default,tune,train\]",
        ),
        ({"ray": RayFacts(version="2.60.4")}, "note", "2.60.4 is not as expected inside"),
        ({"packages": ("optuna 4.6 is installed, <6,>=5.0 is needed",)}, "fault", "optuna 4.6 .* -> .*pip install -e"),
        ({"memory_free": GB}, "fault", "1.0 of 32.0 GB free: not enough for one trial .* -> end what else runs"),
        ({"memory_free": 2 * GB}, "note", "2.0 of 32.0 GB free: Ray ends trials when it is 95 % full"),
        ({"shm_free": 64 * 10**6}, "note", "0.1 GB free.* -> .*--shm-size"),
    ],
)
def test_what_is_amiss_is_said_with_what_to_do(changes: dict[str, Any], level: str, words: str) -> None:
    found = diagnosis.of_machine(machine(**changes))
    [text] = told(found, level)
    assert re.search(words, text), text
    assert not told(found, "note" if level == "fault" else "fault")


@pytest.mark.parametrize(
    ("disk", "level", "words"),
    [
        ({"free": 5 * 10**8}, "fault", r"0.5 of 200 GB free for results \(/x\) -> free space there, or name"),
        ({"files_left": False}, "fault", "no file can be made any more"),
        ({"total": 0}, "fault", "/x\\): no files can be kept there -> name another place: --results, HPCL_CACHE"),
        ({"free": 4 * GB}, "note", "4.0 of 200 GB free"),
        ({"free": 8 * GB, "holds": "Ray's own files"}, "note", "over 95 % full"),
        ({"writable": False, "holds": "decoded images"}, "fault", "/x cannot be written .* -> .*HPCL_CACHE"),
        ({"error": "no answer within 30 s"}, "fault", r"/x cannot be looked at \(no answer.* -> .*--results"),
    ],
)
def test_full_and_foreign_disks(disk: dict[str, Any], level: str, words: str) -> None:
    [text] = told(diagnosis.disks(machine(disks=(HEALTHY.disks[0].model_copy(update=disk),))), level)
    assert re.search(words, text), text


def test_folders_on_one_disk_are_told_in_one_line() -> None:
    one, other = HEALTHY.disks[0], HEALTHY.disks[0].model_copy(update={"holds": "decoded images", "path": "/y"})
    assert len(diagnosis.disks(machine(disks=(one, other)))) == 1
    assert len(diagnosis.disks(machine(disks=(one, other.model_copy(update={"device": 2}))))) == 2


def test_which_kernels_run_on_a_gpu() -> None:
    def runs(capability: tuple[int, int], *kinds: str) -> bool:
        return diagnosis.runs_on(A100.model_copy(update={"capability": capability}), kinds)

    assert runs((8, 6), "sm_80") and not runs((8, 0), "sm_86") and not runs((9, 0), "sm_80")
    assert runs((12, 0), "compute_90") and not runs((8, 0), "compute_90")
    assert runs((9, 0), "sm_90a") and not runs((9, 1), "sm_90a") and runs((12, 1), "sm_120")


# ---------------------------------------------------------------- a cluster


def test_a_healthy_cluster_has_neither_fault_nor_note() -> None:
    found = of_nodes(*(node(name, data=DataFacts(files=9, digest="d")) for name in "abc"), data="/d")
    assert {each.level for each in found} == {"ok"}
    texts = {each.about: each.says for each in found}
    assert texts["nodes"].startswith("3 of 3 nodes answer: a (here), b, c")
    assert texts["results"] == "/x can be written and read from every node"
    assert texts["images"] == "/d (9 files) can be read from every node"
    assert not nodes.storage_problems([node("a"), node("b")], "/x")


@pytest.mark.parametrize(
    ("b", "level", "words"),
    [
        (
            {"versions": {**VERSIONS, "code": "0ther"}},
            "fault",
            r"hpcl 0.1.0 \(0ther\), but 0.1.0 \(c0de\) here",
        ),
        ({"versions": {**VERSIONS, "torch": "2.14.0"}}, "fault", "node b: torch 2.14.0, but 2.15.0 here -> install"),
        ({"versions": {**VERSIONS, "python": "3.11.9"}}, "note", "node b: Python 3.11.9, but 3.11.7 here"),
        ({"ahead": -42.0}, "note", "clock of node b is 42 s behind the one here.* -> .*time synchronisation"),
        ({"token": False}, "note", "node b of the cluster: Ray there asks for no token: .* -> .*RAY_AUTH_MODE=token"),
        ({"silent": "no answer within 120 s"}, "fault", r"node b: no answer within 120 s -> .*ray status"),
        ({"silent": "hpcl cannot be imported there"}, "fault", "node b: hpcl cannot .* -> install this project there"),
        ({"folder": "missing"}, "fault", r"node b does not see the results folder /x \(it is .* this machine only\)"),
        ({"folder": "other"}, "fault", "node b has another folder at /x than this machine -> use a folder that all"),
        ({"folder": "unseen"}, "fault", "what node b writes into /x does not come to this machine -> use a folder"),
        ({"folder": "silent"}, "fault", "the results folder /x does not answer on node b -> see that its server"),
        ({"folder": "refused", "folder_error": "Read-only"}, "fault", r"node b cannot write .*\(Read-only\) -> give"),
        ({"machine": machine(memory_free=GB)}, "fault", "memory: node b: 1.0 of 32.0 GB free"),
        ({"gpus": 2, "machine": HEALTHY}, "fault", "Ray counts 2 GPUs on node b, torch can use 0.* -> .*--num-gpus=0"),
        ({"machine": machine(**TWO_A100)}, "note", "Ray counts 0 GPUs on node b, torch can use 2: some stay idle"),
    ],
)
def test_a_node_that_differs_is_named(b: dict[str, Any], level: str, words: str) -> None:
    found = of_nodes(node("a"), node("b", **b))
    [text] = told(found, level)
    assert re.search(words, text), text
    assert not told(found, "note" if level == "fault" else "fault")


def test_equal_faults_of_many_nodes_are_one() -> None:
    many = [node("a"), *(node(f"10.0.0.{i}", folder="missing", machine=machine(memory_free=GB)) for i in range(9))]
    found = told(of_nodes(*many), "fault")
    assert len(found) == 2 and all("nodes 10.0.0.0, 10.0.0.1, 10.0.0.2 and 6 more" in text for text in found)
    [problem] = nodes.storage_problems(many[:3], "/x")
    assert problem == (
        "nodes 10.0.0.0 and 10.0.0.1 do not see the results folder /x (it is a folder of this machine only): "
        "use a folder that all nodes share, or a URI such as s3://bucket/results"
    )
    [problem] = nodes.storage_problems([node("b", folder="refused", folder_error="AWS Error")], "s3://x")
    assert problem.startswith("node b cannot write into the results folder s3://x (AWS Error): give these nodes cred")


def test_images_that_are_missing_or_differ_on_a_node() -> None:
    good, other, none = DataFacts(files=9, digest="d"), DataFacts(files=8, digest="e"), DataFacts(error="no /d")
    [text] = told(of_nodes(node("a", data=good), node("b", data=other), data="/d"), "fault")
    assert "/d is not the same everywhere: 9 files on node a; 8 files on node b -> copy" in text
    [text] = told(of_nodes(node("a", data=good), node("b", data=none), data="/d"), "fault")
    assert text.startswith("images: node b: no /d -> copy the images to the same path")
    [text] = told(of_nodes(node("a", data=none), node("b", data=none), data="/d"), "fault")
    assert text == "images: no /d -> give images that are there: --data"
    [text] = told(of_nodes(node("a", data=good), node("b", data=DataFacts(slow=True)), data="/d"), "note")
    assert "node b: /d is there, but its files could not be looked through" in text


@pytest.mark.parametrize(
    ("error", "address", "words"),
    [
        (
            "Ray did not start here (boom); x; give the command again",
            None,
            r"start here \(boom\) -> with memory and disk",
        ),
        ("Ray did not start (AF_UNIX path length", None, r"-> name a folder with a short path.* RAY_TMPDIR"),
        ("no answer within 180 s", None, "Ray did not start on this machine: no answer within 180 s"),
        ("--address x: no (Version mismatch: The", "x", "-> install here the Ray and the Python that the cluster has"),
        ("--address x: no (InvalidAuthToken)", "x", "-> copy the cluster's ~/.ray/auth_token to the same place"),
        ("no answer within 180 s", "x", "Ray: --address x: no answer within 180 s -> see `ray status`"),
    ],
)
def test_a_ray_that_does_not_answer(error: str, address: str | None, words: str) -> None:
    assert re.search(words, told([agreement.no_ray(error, address)], "fault")[0])


def test_the_logs_of_a_ray_that_did_not_start_are_named() -> None:
    logs = Path("/tmp/ray/session_1/logs")
    error = "Ray did not start on this machine (boom); nothing was changed, give the command again"
    assert agreement.no_ray(error, None, logs).do.startswith(f"see its logs in {logs}; ")
    refused = "/tmp/hpcl-0: it is not yours alone; remove it, or set RAY_TMPDIR"
    assert agreement.no_ray(refused, None, None).do == "remove it, or set RAY_TMPDIR"


def test_results_that_refuse_this_machine() -> None:
    [text] = told(
        [agreement.refused("/x: cannot be written (No such device; really); give another --results")], "fault"
    )
    assert text == "results: /x: cannot be written (No such device; really) -> give another --results"
    assert told([agreement.refused("s3://x is nothing")], "fault")


def test_the_plan_in_a_line() -> None:
    space = load(ROOT / "search_spaces" / "smoke.yaml")
    [found] = doctor.plan(space, [Node(cpus=2.0)], "this machine", HEALTHY)
    assert found.level == "ok" and found.says.startswith("smoke: 2 trials at a time, each 1 x 1 CPUs")
    little = machine(memory_free=2 * GB)
    _, note = doctor.plan(space, [Node(cpus=2.0)], "this machine", little)
    assert note.level == "note" and "too little for 2 trials" in note.says and "max_concurrent=1" in note.do
    [fault] = doctor.plan(space, [], "this machine", HEALTHY)
    assert fault.level == "fault" and "a trial needs 1 x 1 CPUs" in fault.says


# ---------------------------------------------------------------- whole runs


def ran(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hpcl.cli import main; main()", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **environment})


@pytest.mark.slow  # 15 s
def test_a_run_on_this_machine(tmp_path: Path) -> None:
    """Everything is looked at, Ray too; what was made is gone."""
    results, space = tmp_path / "deep" / "results", str(ROOT / "search_spaces" / "smoke.yaml")
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as short:  # Ray's sockets have long names
        done = ran("--results", str(results), "--space", space, RAY_TMPDIR=short)
        sessions = list(Path(short).rglob("session_2*"))
    assert "Traceback" not in done.stdout + done.stderr and done.stderr == ""
    levels = {tuple(line.split()[:2]) for line in done.stdout.splitlines()[1:] if line and not line.startswith(" ")}
    assert {("ok", "Python"), ("ok", "results"), ("ok", "images"), ("ok", "plan")} <= levels
    assert re.search(r"ok +Ray +starts here \(\d+ s\)", done.stdout)
    assert f"{results} can be written and read" in done.stdout and "smoke: " in done.stdout
    faults = done.stdout.count("\nfault")
    assert done.returncode == (1 if faults else 0), done.stdout
    assert not (tmp_path / "deep").exists()
    assert not sessions


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    modules = ", ".join(f"hpcl.search.{name}" for name in ("doctor", "diagnosis", "agreement", "nodes", "probe"))
    code = f"import sys, {modules}; print([n for n in ('torch', 'ray', 'optuna', 'faiss') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_users_mistake_ends_with_2() -> None:
    done = ran("--space", "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr
    assert ran("--resluts", "x").returncode == 2


CLUSTER = """
import os, signal, sys
from ray.cluster_utils import Cluster
from hpcl.search import doctor
from hpcl.search.cluster import connected
from hpcl.search.nodes import look_at_nodes, storage_problems

results, there = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    other = cluster.add_node(num_cpus=1, env_vars={"HOME": there})
    print(doctor.main(address=cluster.address, results=results, data="mnist5k"), flush=True)
    with connected(cluster.address):
        for problem in storage_problems(look_at_nodes("~/results"), "~/results"):
            print("problem:", problem, flush=True)
        raylet = other.all_processes["raylet"][0].process.pid
        os.kill(raylet, signal.SIGSTOP)
        try:
            print("silent:", [node.silent for node in look_at_nodes(results, seconds=10)], flush=True)
        finally:
            os.kill(raylet, signal.SIGCONT)
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
def test_two_nodes_one_of_which_sees_another_folder_and_then_hangs(tmp_path: Path) -> None:
    for name in ("here/results", "there"):
        (tmp_path / name).mkdir(parents=True)
    environment = {**os.environ, "HOME": str(tmp_path / "here"), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", CLUSTER, str(tmp_path / "shared"), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert re.search(r"ok +nodes +2 of 2 nodes answer: .* \(here\), ", done.stdout), done.stdout + done.stderr
    assert re.search(r"ok +results .*shared can be written and read from every node", done.stdout)
    assert re.search(r"ok +versions +the same on every node and here: Python", done.stdout)
    assert re.search(r"note +token +the cluster asks for no token", done.stdout)
    assert "does not see the results folder ~/results (it is a folder of this machine only)" in done.stdout
    assert "silent: ['', 'no answer within 10 s']" in done.stdout
    assert not (tmp_path / "shared").exists() and not list((tmp_path / "here/results").iterdir())
    assert not (tmp_path / "there/results").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as short:
        command = [sys.executable, "-c", "from hpcl.cli import main; main()", "doctor", "--results", "r"]
        environment = {**os.environ, "RAY_TMPDIR": short}
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            until = time.monotonic() + 200
            while not list(Path(short).rglob("session_2*")) and time.monotonic() < until:
                time.sleep(0.1)
            process.send_signal(number)
            out, _ = process.communicate(timeout=100)
        assert process.returncode == 130 and out.endswith("interrupted; nothing was left behind\n")
        assert not list(Path(short).rglob("session_2*"))
        running = subprocess.run(["pgrep", "-f", short], capture_output=True, text=True).stdout.split()
        assert not running
    assert list(tmp_path.iterdir()) == []
