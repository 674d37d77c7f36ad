"""Several raylets on one machine, a search on them, and the count of what it did: what faults.py and soak.py share.

The cluster is Ray's own `ray.cluster_utils.Cluster`: one head without CPUs and some raylets,
each a node of its own as far as Ray knows. The search is a process of its own (driver.py).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver import NOTES

DRIVER = Path(__file__).resolve().with_name("driver.py")
MARK = "HPCL_RAYLETS"
"""Environment variable by which all processes of one cluster and its searches are known."""
SERVICES = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of a raylet's own that are called like workers."""
STORE = 80_000_000
"""Bytes of a node's object store; rows are small."""

Row = dict[str, Any]


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A process of the cluster or of its searches."""

    pid: int
    parent: int
    name: str
    """Its command line; what a worker of Ray's runs is `ray::...`."""

    @property
    def kind(self) -> str:
        """`rank` of a worker group, `trial` (its process in Tune), `idle` worker, or `service`."""
        if self.name.startswith("ray::RayTrainWorker"):
            return "rank"
        if not self.name.startswith("ray::") or self.name.startswith(SERVICES):
            return "service"
        return "idle" if self.name.startswith("ray::IDLE") else "trial"


def processes(mark: str) -> dict[int, Process]:
    """All living processes with this mark in their environment, by pid."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError, IndexError):
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    found[int(folder.name)] = Process(int(folder.name), parent, name)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs or could run (a dead one that nobody waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until something is true, and give it; TimeoutError where it never is."""
    until = time.monotonic() + seconds
    while not (answer := true()):
        if time.monotonic() > until:
            raise TimeoutError(f"after {seconds:g} s: not {what}")
        time.sleep(0.05)
    return answer


# ---------------------------------------------------------------- the cluster


class Raylets:
    """A head without CPUs and some raylets, each with a few."""

    def __init__(self, number: int, cpus: float = 1.0) -> None:
        self.mark = secrets.token_hex(8)
        own = {MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._before = {name: os.environ.get(name) for name in own}
        os.environ |= own
        from ray.cluster_utils import Cluster

        from hpcl.search.cluster import _apart

        logging.getLogger("ray").setLevel(logging.ERROR)
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "dashboard_port": _free_port()}
        self._cpus = cpus
        self.nodes: list[Any] = []
        self._ever: list[Any] = []
        """The head, and all raylets that there ever were."""
        with _apart():  # on loopback, behind a token of its own
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            self._ever.append(self._cluster.head_node)
            for _ in range(number):
                self.add(wait=False)
        self._cluster.wait_for_nodes(120)

    @property
    def address(self) -> str:
        """Where a search connects to."""
        return str(self._cluster.address)

    def add(self, *, wait: bool = True, gpus: int = 0) -> Any:
        """One more raylet; GPUs that it only claims to have will do for a trainer that uses none."""
        node = self._cluster.add_node(wait=wait, num_cpus=self._cpus, num_gpus=gpus, object_store_memory=STORE)
        self.nodes.append(node)
        self._ever.append(node)
        return node

    def kill(self, *nodes: Any) -> None:
        """kill -9 of raylets."""
        raylets = [_raylet(node) for node in nodes]
        for raylet in raylets:
            raylet.send_signal(signal.SIGKILL)
        for raylet in raylets:
            raylet.wait()  # Ray's workers take a zombie for a living raylet
        for node in nodes:
            self.nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)

    def node_of(self, pid: int) -> Any:
        """The node on which a process runs."""
        known = self.processes()
        while pid in known:
            for node in self.nodes:
                if _raylet(node).pid == pid:
                    return node
            pid = known[pid].parent
        raise LookupError(f"process {pid} belongs to no raylet")

    def of_node(self, node: Any) -> list[int]:
        """A raylet and all its processes."""
        known, found = self.processes(), [_raylet(node).pid]
        for pid in found:
            found += [process.pid for process in known.values() if process.parent == pid]
        return found

    def processes(self) -> dict[int, Process]:
        """Living processes of the cluster and of its searches."""
        for node in self.nodes:
            _raylet(node).poll()  # one that ended by itself: Ray's workers take a zombie for a living raylet
        return {pid: process for pid, process in processes(self.mark).items() if alive(pid)}

    def of_kind(self, kind: str) -> list[Process]:
        """Those of a kind."""
        return [process for process in self.processes().values() if process.kind == kind]

    def orphans(self) -> list[Process]:
        """Processes that no search needs any more: trials, ranks, and whatever has lost its raylet."""
        known = self.processes()
        left = []
        for process in known.values():
            top = process
            while top.parent in known:
                top = known[top.parent]
            if process.kind in ("trial", "rank") or top.parent != os.getpid():
                left.append(process)
        return left

    def groups(self) -> list[dict[str, Any]]:
        """Placement groups that are not removed."""
        table = self._cluster.global_state.placement_group_table()
        return [group for group in table.values() if group["state"] != "REMOVED"]

    def held(self) -> float:
        """CPUs that are held now."""
        state = self._cluster.global_state
        free, total = state.available_resources(), state.cluster_resources()
        return round(total.get("CPU", 0.0) - free.get("CPU", 0.0), 4)

    def close(self) -> None:
        """End all its processes."""
        from ray.experimental.internal_kv import _internal_kv_reset

        from hpcl.search.cluster import _token_anew

        for node in list(self.nodes):
            self._cluster.remove_node(node)
        self._cluster.remove_node(self._cluster.head_node)
        # What is connected to a head that has gone waits for it for a minute, and then ends this process, within Ray.
        _internal_kv_reset()
        self._cluster.global_state.disconnect()
        for node in self._ever:
            node._gcs_client = None
        self._ever.clear()
        gc.collect()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        _token_anew()
        until = time.monotonic() + 20
        while left := [pid for pid in processes(self.mark) if alive(pid)]:
            if time.monotonic() > until:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)


@contextmanager
def raylets(number: int, cpus: float = 1.0) -> Iterator[Raylets]:
    """A cluster for the length of the block."""
    cluster = Raylets(number, cpus)
    try:
        yield cluster
    finally:
        cluster.close()


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- the search


class Search:
    """The driver's process, and what it leaves in its folder.

    Args:
        space: the space file.
        results: folder of all results.
        address: the cluster.
        options: of driver.py.
        log: where its output goes; None: beside the results.
    """

    def __init__(self, space: Path, results: Path, address: str, *options: str, log: Path | None = None) -> None:
        self.folder = results / space.stem
        self._command = [sys.executable, str(DRIVER), *options]
        self._command += ["--space", str(space), "--results", str(results), "--address", address]
        self._log = log or results / f"{space.stem}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or go on with it: the same command."""
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(seconds)

    def until(self, true: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
        """Wait until something is true, and give it; RuntimeError where the search ends before."""

        def seen() -> Any:
            ended = self.ended
            if not (answer := true()) and ended:
                raise RuntimeError(f"the search has ended, and never: {what}\n{self.said[-3000:]}")
            return answer

        return wait_for(seen, seconds, what)

    @property
    def ended(self) -> bool:
        """Whether its process has ended."""
        return self.process is not None and self.process.poll() is not None

    @property
    def said(self) -> str:
        """All that it printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        """The events of its journal so far."""
        from hpcl.search.journal import read_events

        path = self.folder / "journal.jsonl"
        return read_events(path) if path.is_file() else []

    def notes(self) -> dict[str, list[Row]]:
        """What each trial's processes wrote down, in order."""
        found = {}
        for path in sorted(self.folder.glob(f"trials/*/{NOTES}")):
            lines = path.read_text().splitlines()
            found[path.parent.name] = [json.loads(line) for line in lines if line.endswith("}")]
        return found

    def running(self, epoch: int = 1) -> dict[str, Row]:
        """Trials in the middle of an epoch, this one or a later one: what rank 0 wrote last."""
        ended = {event["trial"] for event in self.events() if event["event"] == "end"}
        newest = {trial: [n for n in notes if n["rank"] == 0][-1:] for trial, notes in self.notes().items()}
        return {
            trial: last[0]
            for trial, last in newest.items()
            if last and trial not in ended and last[0]["what"] == "begin" and last[0]["epoch"] >= epoch
        }


@dataclass
class Count:
    """What became of a search's trials."""

    asked: int
    states: Counter[str]
    state_of: dict[str, str] = field(default_factory=dict)
    """Trial -> how it ended."""
    lost: list[str] = field(default_factory=list)
    """Trials that were drawn and have not ended, or failed (the trainer itself never does), or were never drawn."""
    doubled: list[str] = field(default_factory=list)
    """Trials that were counted twice, in the journal or in Optuna's study."""
    overlapping: list[str] = field(default_factory=list)
    """Trials that two processes trained at a time."""
    again: dict[str, int] = field(default_factory=dict)
    """Trial -> epochs that were begun more often than once, each as often as it was too often."""
    reasons: list[str] = field(default_factory=list)
    """Why trials were tried again."""


def count(search: Search, asked: int) -> Count:
    """Count a search's trials from its journal, its study and what its trials wrote down."""
    events = search.events()
    ends = Counter(event["trial"] for event in events if event["event"] == "end" and event["trial"].isdecimal())
    states = {e["trial"]: e["state"] for e in events if e["event"] == "end" and e["trial"].isdecimal()}
    drawn = Counter(e["trial"] for e in events if e["event"] == "trial" and e["trial"].isdecimal())
    rows = Counter((e["trial"], e["row"]["epoch"]) for e in events if e["event"] == "row")
    counted = Count(asked, Counter(states.values()), states)
    counted.lost = [trial for trial in drawn if states.get(trial, "failed") == "failed"]
    counted.lost += ["never drawn"] * (asked - len(drawn))
    twice = {trial for trial, number in (ends + Counter()).items() if number > 1}
    twice |= {trial for trial, number in drawn.items() if number > 1}
    twice |= {trial for (trial, _), number in rows.items() if number > 1}
    told = _told(search.folder)
    twice |= {trial for trial, number in told.items() if number != 1} | (set(drawn) - set(told))
    for trial, notes in search.notes().items():
        begun = Counter(note["epoch"] for note in notes if note["what"] == "begin" and note["rank"] == 0)
        counted.again[trial] = sum(number - 1 for number in begun.values())
        pids = [note["pid"] for note in notes if note["rank"] == 0]
        turns = [pid for number, pid in enumerate(pids) if number == 0 or pids[number - 1] != pid]
        if len(turns) != len(set(turns)):
            counted.overlapping.append(trial)
    counted.doubled = sorted(twice)
    counted.reasons = [event["reason"] for event in events if event["event"] == "retry"]
    return counted


def _told(folder: Path) -> Counter[str]:
    """Trial -> as how many ended trials it stands in Optuna's study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    study = optuna.load_study(study_name=folder.name, storage=optuna.storages.JournalStorage(backend))
    known = (trial for trial in study.trials if trial.user_attrs.get("state") != "lost")
    return Counter(trial.user_attrs["trial"] for trial in known if trial.state.is_finished())
