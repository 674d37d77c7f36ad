"""Ray on this machine: who can reach it, whose signals reach it, and what it leaves behind.

One search with two workers, resumed in a folder full of pickles, is looked at while it runs and
then gets SIGTERM together with its whole process group.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest
from hostile import Evil

from hpcl.errors import UserError
from hpcl.search.journal import read_events

linux = pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="reads /proc")

SPACE = """
base: {preset: embedded, stages: {total: 60}}
space:
  clusters.first: {int: [2, 32]}
search: {trials: 2, max_concurrent: 1, grace: 20}
resources: {workers: 2, gpus_per_worker: 0}
"""

DRIVER = """
import os, sys, time
sys.path[:0] = [{tests!r}]
from hpcl.search import cli, runner
from hpcl.search.progress import say

def train(config, folder, report, **options):
    import torch
    from hpcl.results import EPOCH_COLUMNS
    for epoch in range(1, 61):
        ranks = torch.ones(1)
        torch.distributed.all_reduce(ranks)
        time.sleep(0.2)
        row = {{c.name: None for c in EPOCH_COLUMNS if c.name not in ("trial_id", "arrival", "clock")}}
        row |= {{"epoch": epoch, "stage": 1, "state": "running", "seconds": 0.2, "world_size": int(ranks.item())}}
        report(row)

def tell(text):
    say(text)
    if text.startswith("search "):
        say("dashboard " + os.environ["RAY_API_SERVER_ADDRESS"])

run = runner.run
runner.run = lambda *given, **options: run(*given, **options, train=train, say=tell)
sys.argv = ["run_search.py", *{arguments!r}]
raise SystemExit(cli.main())
"""


def tree(root: int) -> set[int]:
    """A process and all that come from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found, more = {root}, {root}
    while more:
        more = {process for process, parent in parents.items() if parent in found} - found
        found |= more
    return found & parents.keys()


def listening(processes: set[int]) -> set[tuple[str, int]]:
    """(address, port) of each TCP socket on which one of the processes listens."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                host, port = fields[1].split(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                address = ipaddress.ip_address(b"".join(words))
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                sockets[f"socket:[{fields[9]}]"] = str(mapped or address), int(port, 16)
    found = set()
    for process in processes:
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
        except OSError:  # it has ended
            continue
        found |= {sockets[link] for link in links if link in sockets}
    return found


def name_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def wait_for(true: Callable[[], Any], seconds: float = 120) -> Any:
    until = time.monotonic() + seconds
    while not (answer := true()) and time.monotonic() < until:
        time.sleep(0.1)
    return answer


@pytest.fixture
def results() -> Iterator[Path]:
    """A folder with a short name: those of Ray's sockets, which lie below it, have 107 letters at most."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def planted(results: Path) -> Path:
    """The folder of a search that was cut short, and a sentinel that is made where a pickle in it is read."""
    from hpcl.search.space import load
    from hpcl.yamlio import write

    folder, sentinel = results / "hostile", results / "sentinel"
    for place in ("tune", "tune-2", "trials/0000", "tune-2/0000"):
        (folder / place).mkdir(parents=True)
        for name in ("tuner.pkl", "trainable.pkl", "trainer.pkl", "searcher-state-1.pkl", "params.pkl", "error.pkl"):
            (folder / place / name).write_bytes(pickle.dumps(Evil(sentinel)))
    (results / "hostile.yaml").write_text(SPACE)
    write(folder / "space.yaml", load(results / "hostile.yaml").to_tree())
    values = {"clusters.first": 2}
    events: list[dict[str, Any]] = [
        {"event": "session", "command": "", "gpus": 0, "cpus": 1},
        {"event": "trial", "trial": "0000", "number": 0, "values": values, "optuna": None},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))
    return sentinel


@contextmanager
def searching(results: Path) -> Iterator[subprocess.Popen[str]]:
    """The search in a process group of its own."""
    tests = str(Path(__file__).parent)
    arguments = ["--space", str(results / "hostile.yaml"), "--results", str(results)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    (results / "home").mkdir()
    (results / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=tests, arguments=arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "HOME": str(results / "home"), "RAY_TMPDIR": str(results / "tmp")},
        process_group=0,
    )
    try:
        yield process
    finally:
        left = tree(process.pid)
        for each in left:
            os.kill(each, signal.SIGKILL)
        process.wait()


CLIENT = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"", timeout=20)))
"""


def gcs_says(port: int, **environment: str) -> str:
    """What Ray's head answers a process of this machine."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}"]
    return subprocess.run(command, env={**known, **environment}, capture_output=True, text=True, timeout=100).stderr


@linux
@pytest.mark.timeout(600)
def test_a_private_ray_is_for_this_user_and_this_search_alone(results: Path) -> None:
    sentinel = planted(results)
    with searching(results) as process:
        assert process.stdout is not None
        said = ""
        while "dashboard http" not in said:
            line = process.stdout.readline()
            said += line
            assert line, said
        journal = results / "hostile" / "journal.jsonl"
        assert wait_for(lambda: any(e["event"] == "row" for e in read_events(journal)), 300), said

        # Two ranks train: Ray, the trial, its ranks and their process group listen, all of them on loopback.
        processes = tree(process.pid)
        names = [name_of(each) for each in processes]
        assert sum("RayTrainWorker" in name for name in names) == 2 and any("dashboard.py" in name for name in names)
        sockets = listening(processes)
        assert len(sockets) > 12 and {address for address, _ in sockets} == {"127.0.0.1"}, sorted(sockets)

        # Other users of this machine reach loopback: they are asked for a token, which no file of Ray's holds.
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{said.split('dashboard ')[1].strip()}/api/v0/nodes", timeout=60)
        (head,) = [each for each in processes if "gcs_server" in name_of(each).split(" ")[0]]
        (port,) = {port for _, port in listening({head})}
        assert "InvalidAuthToken" in gcs_says(port)
        environment = Path(f"/proc/{process.pid}/environ")
        assert b"RAY_AUTH_TOKEN" not in environment.read_bytes()  # given to Ray's processes only
        (token,) = {
            entry
            for entry in Path(f"/proc/{head}/environ").read_bytes().split(b"\0")
            if entry.startswith(b"RAY_AUTH_TOKEN=")
        }
        key = token.partition(b"=")[2]
        assert len(key) == 64 and gcs_says(port, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=key.decode()) == ""
        assert not any(key in path.read_bytes() for path in results.rglob("*") if path.is_file())
        assert not (results / "home" / ".ray").exists()
        (session,) = (results / "tmp").iterdir()
        assert session.stat().st_mode & 0o777 == 0o700

        # A signal to the group, as of Ctrl-C in a terminal: the epoch is finished, the summary printed, Ray is gone.
        os.killpg(process.pid, signal.SIGTERM)
        said += process.communicate(timeout=200)[0]
        assert process.returncode == 130 and "Traceback" not in said, said
        assert "interrupted: the running epochs are finished and saved" in said and "resume   python run_search" in said
        assert wait_for(lambda: not any(name_of(each) for each in processes), 60)
    rows = [event["row"]["world_size"] for event in read_events(journal) if event["event"] == "row"]
    assert set(rows) == {2} and not sentinel.exists()


@linux
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_takes_its_ray_with_it(results: Path) -> None:
    planted(results)
    with searching(results) as process:
        journal = results / "hostile" / "journal.jsonl"
        assert wait_for(lambda: any(e["event"] == "row" for e in read_events(journal)), 300)
        processes = tree(process.pid)
        process.kill()
        process.wait()
        work = {each for each in processes if "Agent" not in name_of(each)}
        assert wait_for(lambda: not any(name_of(each) for each in work), 30)
        # Ray's agents try for a minute to tell the head, which is gone, that their node is.
        assert wait_for(lambda: not any(name_of(each) for each in processes), 150)


# --- the listener of a worker group, without Ray -------------------------------------


def test_who_does_not_know_the_key_is_not_listened_to(tmp_path: Path) -> None:
    lean = pytest.importorskip("hpcl.search.lean")
    group = lean.Group.__new__(lean.Group)
    group.shape, group._over, group._of_rank = lean.Shape(1, {"CPU": 1.0}), False, {}
    group._heard = lean.queue.Queue()
    group._listener = Listener(("127.0.0.1", 0))
    group._address = group._listener.address
    thread = threading.Thread(target=group._listen, args=(b"key",), daemon=True)
    thread.start()
    silent = socket.create_connection(group._address)  # connects, says nothing, and holds up nobody
    evil = pickle.dumps(Evil(tmp_path / "sentinel"))
    with socket.create_connection(group._address) as stranger:
        stranger.sendall(len(evil).to_bytes(4, "big") + evil)
    with pytest.raises(Exception, match=r"digest sent was rejected|Connection reset|closed"):
        Client(group._address, authkey=b"another key").send(Evil(tmp_path / "sentinel"))
    with Client(group._address, authkey=b"key") as rank:
        rank.send(0)
        rank.send({"epoch": 1})
        assert group._heard.get(timeout=60) == {"epoch": 1}
        thread.join(60)
        assert not thread.is_alive() and list(group._of_rank) == [0]
    silent.close()
    assert not (tmp_path / "sentinel").exists()


# --- where it may be -----------------------------------------------------------------


def test_a_folder_that_others_can_enter_is_not_used_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcl.search.cluster import _ours, ray_folder

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = ray_folder().parent
    assert folder.parent == tmp_path and str(os.getuid()) in folder.name
    _ours(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    _ours(folder)
    folder.chmod(0o770)
    with pytest.raises(
        UserError, match=rf"{folder}: .* it is not yours alone .* set RAY_TMPDIR to a folder of your own"
    ):
        _ours(folder)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not yours alone"):
        _ours(folder)


def test_an_address_of_ray_client_is_refused() -> None:
    from hpcl.search.cluster import connected

    with pytest.raises(UserError, match="--address ray://head:10001: is no address of a cluster's head"):  # noqa: SIM117
        with connected("ray://head:10001"):
            pass
