"""Rehearse clusters/local.yaml on one Linux computer: a rack of three hosts, a search, a power cut.

    sudo "$(which python)" clusters/rehearse.py      # the python that has hpcl; 4 minutes on 2 cores

Each host is a set of namespaces: a network of its own behind a switch, processes, mounts and a name of its own, an own
home, an own sshd on port 22. `ray up` starts Ray on them as it would on machines, the search runs with `--address
auto`, one worker loses network and power while it trains, the search goes on at the others, `ray down` ends it. Then
the tables are checked: no trial lost, none twice, at most the running epoch repeated. Exit code 0 says all checks held.

Everything happens in namespaces of this script: the computer's disks are read-only there, what is written lies in
memory, the network leads nowhere. When the script ends, or is killed, the kernel takes all of it away.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

PROJECT = Path(__file__).resolve().parents[1]
RACK = Path("/run/rack")  # in a tmpfs of our own; every path below is the same on all hosts
HOME = RACK / "home"
RESULTS = RACK / "shared"  # the hosts' common folder, as NFS would be
KEY = RACK / "key"
DESK = "10.77.0.1"  # where `ray up` is called
HOSTS = {"rack0": "10.77.0.10", "rack1": "10.77.0.11", "rack2": "10.77.0.12"}  # the head is the first
LOST = "rack2"
NAMESPACES = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child=KILL"]
PLAIN = "--log-style pretty --log-color false"
MIDDLE = range(4, 12)  # the cut comes after one of these epochs
T = TypeVar("T")


class Failed(Exception):
    """A step or a check did not give what it must."""


# ---------------------------------------------------------------- outside: needs, namespaces, the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16, help="trials of the search (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the results there; it must not exist yet")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    if problems := missing(options.keep):
        print("\n".join(problems), file=sys.stderr)
        return 2
    if options.keep:
        options.keep.mkdir(parents=True)
    # In a session of its own, so that Ctrl-C reaches us alone; our end, whatever it is, is the end of everything.
    bound = ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, "--net"]
    command = [*bound, sys.executable, __file__, "--inside", *sys.argv[1:]]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()


def missing(keep: Path | None) -> list[str]:
    """What stands in the way on this computer, a sentence each."""
    problems = []
    if platform.system() != "Linux" or os.geteuid() != 0:
        problems.append('it makes namespaces, which needs root on Linux: sudo "$(which python)" clusters/rehearse.py')
    packages = {"ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "sshd": "openssh-server"}
    packages |= {"ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if absent := sorted({package for tool, package in packages.items() if not shutil.which(tool, path=path)}):
        problems.append(f"not installed: {', '.join(absent)}; apt-get install -y {' '.join(absent)}")
    try:
        metadata.version("ray"), metadata.version("hpcl")
    except metadata.PackageNotFoundError as error:
        problems.append(
            f"{sys.executable} has no package {error.name}; give the python of the environment with the project"
        )
    if keep and keep.exists():
        problems.append(f"--keep {keep}: is there already; give a folder that is not")
    if not problems and subprocess.run([*NAMESPACES, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        problems.append("namespaces cannot be made here, as in a container without --privileged; use a whole machine")
    hidden = [p for p in (PROJECT, sys.prefix, sys.base_prefix) if str(p).startswith(("/tmp/", "/run/", "/dev/shm/"))]
    problems += [f"{path} lies in a folder that each host has for itself; put it elsewhere" for path in hidden]
    return problems


# ---------------------------------------------------------------- inside: the rack


def inside(options: argparse.Namespace) -> int:
    """The rehearsal, as process 1 of its own namespaces."""
    started = time.monotonic()
    try:
        furnish(options.keep)
        rehearse(options)
    except Failed as error:
        print(f"\nFAILED after {time.monotonic() - started:.0f} s: {error}", flush=True)
        return 1
    print(f"\nall checks held, {time.monotonic() - started:.0f} s", flush=True)
    return 0


def furnish(keep: Path | None) -> None:
    """Folders in memory over the computer's own, which are read-only from here on; the desk, the switch, the keys."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if device.startswith("/dev/") or kind in ("overlay", "nfs", "nfs4", "zfs"):
            do("mount", "-o", "remount,bind,ro", point.encode().decode("unicode_escape"))
    for point in ("/run", "/tmp", "/dev/shm", "/var/log", "/var/tmp"):
        do("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", point)
    for path in (*(RACK / f"home-{name}" for name in ("desk", *HOSTS)), HOME, RESULTS, Path("/run/sshd")):
        path.mkdir(parents=True, mode=0o755)
    if keep:
        do("mount", "--bind", str(keep.resolve()), str(RESULTS))
        do("mount", "-o", "remount,bind,rw", str(RESULTS))
    # The same account with another home; no password, so that a key is the only way in.
    write("passwd", f"root:x:0:0:root:{HOME}:/bin/bash\nsshd:x:109:65534::/run/sshd:/usr/sbin/nologin\n")
    write("shadow", "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n")
    write("hosts", "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in HOSTS.items()))
    for name in ("passwd", "shadow", "hosts"):
        do("mount", "--bind", str(RACK / name), f"/etc/{name}")
    do("mount", "--bind", str(RACK / "home-desk"), str(HOME))
    for command in (
        "hostname desk",
        "ip link set lo up",
        "ip link add switch type bridge",
        f"ip address add {DESK}/24 dev switch",
        "ip link set switch up",
    ):
        do(*command.split())
    for path in (KEY, RACK / "host_key"):
        do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
    keys = [f"HostKey {RACK}/host_key", f"AuthorizedKeysFile {KEY}.pub", "PasswordAuthentication no"]
    write("sshd_config", "\n".join([*keys, "StrictModes no", "UsePAM no", "PidFile none\n"]))
    (HOME / ".ssh").mkdir(mode=0o700)
    mine = ["User root", f"IdentityFile {KEY}", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null"]
    (HOME / ".ssh" / "config").write_text("\n".join([*mine, "LogLevel ERROR", "ConnectTimeout 5\n"]))
    os.environ |= {"HOME": str(HOME), "RAY_AUTH_MODE": "token"}
    # A plain line now and then instead of a live table; output in the order in which it came to be.
    os.environ |= {"TERM": "dumb", "PYTHONUNBUFFERED": "1"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in [name for name in os.environ if name.startswith(("RAY_ADDRESS", "SUDO_", "PYTHONPATH", "SSH_"))]:
        del os.environ[name]
    os.chdir(PROJECT)


def power_on(name: str) -> subprocess.Popen[bytes]:
    """A host: cable, processes, mounts and name of its own; bash is its process 1, sshd what it runs."""
    ip = HOSTS[name]
    for command in (
        f"ip netns add {name}",
        f"ip link add {name} type veth peer name eth0 netns {name}",
        f"ip link set {name} master switch up",
        f"ip -n {name} link set lo up",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} address add {ip}/24 dev eth0",
        f"ip -n {name} route add default via {DESK}",  # which forwards nothing
    ):
        do(*command.split())
    # What a machine of its own would have by itself: the environment on its disk, and one core, as the computer
    # that plays it has few.
    home = RACK / f"home-{name}"
    (home / "hpcl-env").symlink_to(sys.prefix)
    (home / ".bashrc").write_text('export RAY_OVERRIDE_RESOURCES=\'{"CPU": 1, "object_store_memory": 200000000}\'\n')
    boot = f"""
        hostname {name}
        mount --bind {home} {HOME}
        for path in /tmp /dev/shm /var/log; do mount -t tmpfs -o mode=1777 tmpfs $path; done
        touch /var/log/lastlog /var/log/wtmp
        {shutil.which("sshd")} -D -e -f {RACK}/sshd_config -o ListenAddress={ip} 2>/tmp/sshd.log &
        while true; do sleep 1; done  # process 1 takes in orphans and buries the dead
    """
    return subprocess.Popen(["ip", "netns", "exec", name, *NAMESPACES, "bash", "-c", boot])


def power_off(name: str, host: subprocess.Popen[bytes]) -> None:
    """First the cable, so that no farewell gets out, then every process of the host."""
    do("ip", "link", "set", name, "down")
    host.kill()  # of `unshare`: the kernel kills its process 1, and with that all others
    host.wait()


# ---------------------------------------------------------------- the rehearsal


def rehearse(options: argparse.Namespace) -> None:
    """Every step in the order in which a user takes it; raises Failed at the first that does not hold."""
    introduce()
    title("three hosts and a switch")
    hosts = {name: power_on(name) for name in HOSTS}
    for name, ip in HOSTS.items():
        until(lambda ip=ip: answers(ip), 30, f"{name}: sshd does not answer on {ip}:22")  # type: ignore[misc]
        print(f"{name}  {ip}  sshd answers")
    rack = fill_in(PROJECT / "clusters" / "local.yaml")

    title("ray up")
    shell("ray get-auth-token --generate > /dev/null")
    shell(f"ray up -y {PLAIN} {rack}", limit=300)
    with timed("both workers have joined"):
        until(lambda: alive(rack) == len(HOSTS), 240, "not all workers joined")
    shell(f"ray exec {PLAIN} {rack} 'hpcl doctor --address auto --results {RESULTS}'", limit=240, fails=True)

    title("the search, and a power cut")
    longer = "--epochs 16 --set data.subset=0.5"  # trials of half a minute on one core
    flags = f"--trials {options.trials} {longer} --address auto --results {RESULTS}"
    command = f"cd ~/hpcl && python run_search.py --space search_spaces/smoke.yaml {flags}"
    folder = RESULTS / "smoke"
    search = spawn(f"ray exec {PLAIN} {rack} '{command}'")
    with timed("the search"):
        trial = until(lambda: in_the_middle(search, folder, HOSTS[LOST]), 400, f"no trial trains on {LOST}")
        power_off(LOST, hosts[LOST])
        cut_at = time.time()
        print(f">>> {LOST} loses network and power while it trains trial {trial}", flush=True)
        until(lambda: search.poll() is not None, 600, "the search has not ended 600 s after the cut")
    if search.returncode:
        raise Failed(f"the search ended with exit code {search.returncode}")
    with timed("Ray has noticed"):
        until(lambda: alive(rack) == len(HOSTS) - 1, 120, f"Ray still counts {LOST}")
    shell(f"ray exec {PLAIN} {rack} 'ray list nodes'")

    title("ray down")
    shell(f"ray down -y {PLAIN} {rack}", limit=200)
    shell(f"for ip in {' '.join(list(HOSTS.values())[1:])}; do ssh $ip hpcl-env/bin/ray stop; done", fails=True)
    with timed("no process of Ray is left on any host"):
        until(lambda: not ray_processes(), 60, "Ray still runs after ray down and ray stop")

    title("no trial lost, none twice")
    check(folder, options.trials, trial, cut_at)


def introduce() -> None:
    """When, on what and with which versions."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.split(",")[0]
    versions = [f"{name} {metadata.version(name)}" for name in ("ray", "torch", "optuna")]
    print(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), end=", ")
    print(f"{os.cpu_count()} cores ({model.partition(': ')[2]}), {memory:.0f} GB, load {os.getloadavg()[0]:.0f}")
    print(f"Linux {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}, {ssh}")


def fill_in(shipped: Path) -> Path:
    """clusters/local.yaml with the rack's addresses, user and key: the four marked lines, and nothing else."""
    import yaml

    head, *workers = HOSTS.values()
    ours = {"head_ip": head, "worker_ips": f"[{', '.join(workers)}]", "ssh_user": "root", "ssh_private_key": str(KEY)}
    lines = shipped.read_text().splitlines()
    for number, line in enumerate(lines):
        if "# <-" in line:
            name = line.partition(":")[0]
            lines[number] = f"{name}: {ours.pop(name.strip())}"
    path = RACK / "local.yaml"
    path.write_text("\n".join(lines) + "\n")
    before, after = yaml.safe_load(shipped.read_text()), yaml.safe_load(path.read_text())
    for section in ("provider", "auth"):
        if before[section].keys() != after[section].keys():
            raise Failed(f"{shipped}: to fill it in changes the fields of {section}")
        before[section] = after[section]
    if ours or before != after:
        raise Failed(f"{shipped}: the marked lines are not those of a rack: {sorted(ours)}")
    print(f"$ diff {shipped.relative_to(PROJECT)} {path}", flush=True)
    subprocess.run(["diff", str(shipped), str(path)], check=False)
    return path


def alive(rack: Path) -> int:
    """How many machines Ray's head holds for alive."""
    command = ["ray", "exec", str(rack), "ray list nodes"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.count(" ALIVE ")


def in_the_middle(search: subprocess.Popen[str], folder: Path, ip: str) -> str | None:
    """A trial that this host trains, neither at its beginning nor near its end, as soon as others have ended."""
    if search.poll() is not None:
        raise Failed(f"the search ended before the cut, with exit code {search.returncode}")
    if sum(event["event"] == "end" for event in events(folder)) < 3:
        return None
    for path in folder.glob("tune*/*/result.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if rows and rows[-1].get("node_ip") == ip and rows[-1].get("state") == "running":
            trial, epoch = rows[-1]["config"]["trial"], rows[-1]["epoch"]
            ended = any(event["event"] == "end" and event["trial"] == trial for event in events(folder))
            if not ended and epoch in MIDDLE:
                return str(trial)
    return None


def events(folder: Path) -> list[dict[str, Any]]:
    """The search's log, up to its last whole line."""
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def ray_processes() -> list[str]:
    """Ray's own processes on all hosts; our process numbers hold those of the hosts, and no others."""
    names = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if re.search(r"raylet|gcs_server|ray::|ray/autoscaler|ray/dashboard|ray/_private", command):
                names.append(command[:80])
    return names


def check(folder: Path, trials: int, lost: str, cut_at: float) -> None:
    """The tables and the log of the search, read as a user would read them."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "trials.parquet").to_pylist()
    rows = pq.read_table(folder / "epochs.parquet", columns=["trial_id", "epoch"]).to_pylist()
    log = events(folder)
    names = [row["trial_id"] for row in table]
    epochs = {name: sorted(row["epoch"] for row in rows if row["trial_id"] == name) for name in names}
    states = Counter(row["state"] for row in table)
    ends = Counter(event["trial"] for event in log if event["event"] == "end")
    retries = [event for event in log if event["event"] == "retry"]
    told = [
        (event["time"], event["row"]["epoch"]) for event in log if event["event"] == "row" and event["trial"] == lost
    ]
    before = max((epoch for at, epoch in told if at <= cut_at), default=0)
    after = [(at - cut_at, epoch) for at, epoch in told if at > cut_at]
    print(f"{len(table)} trials: " + ", ".join(f"{number} {state}" for state, number in sorted(states.items())))
    for event in retries:
        print(f"trial {event['trial']} was tried again {event['time'] - cut_at:.0f} s after the cut: {event['reason']}")
    if after:
        print(f"trial {lost}: epoch {before} before the cut, epoch {after[0][1]} came {after[0][0]:.0f} s after it")
    checks = {
        f"{trials} trials were asked for, {trials} are in trials.parquet, each once": len(set(names))
        == len(table)
        == trials,
        "each ended, and ended once": all(ends[name] == 1 for name in names),
        "each finished, or was stopped by ASHA": set(states) <= {"finished", "stopped"},
        "each has its epochs 1, 2, ... in epochs.parquet, each once": all(
            epochs[row["trial_id"]] == list(range(1, row["epochs"] + 1)) for row in table
        ),
        f"trial {lost} was tried again": any(event["trial"] == lost for event in retries),
        "and went on at the epoch that was cut": bool(after) and after[0][1] == before + 1,
        "best.yaml is there": (folder / "best.yaml").is_file(),
    }
    for text, holds in checks.items():
        print(f"{'ok     ' if holds else 'FAILED '} {text}")
    if not all(checks.values()):
        raise Failed("the checks above say what")


# ---------------------------------------------------------------- commands


def do(*command: str) -> None:
    """A command that says nothing and must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stdout.strip()}")


def spawn(command: str) -> subprocess.Popen[str]:
    """Start a command at the desk, as a user would type it."""
    print(f"\n$ {command}", flush=True)
    return subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True)


def shell(command: str, *, limit: float = 120, fails: bool = False) -> None:
    """Run a command at the desk to its end, with its output and its seconds; `fails`: it may."""
    process = spawn(command)
    with timed(""):
        until(lambda: process.poll() is not None, limit, f"not done after {limit:.0f} s: {command}")
    if process.returncode and not fails:
        raise Failed(f"exit code {process.returncode}: {command}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took."""
    start = time.monotonic()
    yield
    print(f"[{what}{': ' if what else ''}{time.monotonic() - start:.0f} s]", flush=True)


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def until(condition: Callable[[], T | None], seconds: float, otherwise: str) -> T:
    """Ask twice a second until the answer is true, and give it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.5)
    raise Failed(otherwise)


def answers(ip: str) -> bool:
    """Whether an ssh server greets at this address."""
    try:
        with socket.create_connection((ip, 22), timeout=2) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def write(name: str, text: str) -> None:
    (RACK / name).write_text(text)
    (RACK / name).chmod(0o644)


if __name__ == "__main__":
    sys.exit(main())
