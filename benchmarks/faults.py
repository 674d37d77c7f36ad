"""What a search loses when something breaks: kill -9, lost nodes, hung trials, a full disk, a torn checkpoint.

    python benchmarks/faults.py                            # all of them, about half an hour on 2 cores
    python benchmarks/faults.py --only raylet driver --workers 1

Each line is a search of its own on three raylets of one CPU each (`ray.cluster_utils.Cluster`, real
processes), two trials at a time, started by a process of its own as `run_search.py --address`. Something is
broken in the middle of an epoch; then the search goes on to its end. Printed as Markdown:

    epochs again    epochs that a trial had begun already and began once more: the most of any trial
    lost            trials that never ended, or failed
    doubled         trials that ended twice, have an epoch twice, or stand twice in Optuna's study
    left over       trials, ranks and placement groups still there a minute after the search ended, and processes
                    that have lost their raylet
    went on after   seconds until the trial that was hit trained again (first and last, where several were)

An epoch is a sleep, a sum over the ranks and a checkpoint; in the lines `real` it is the real trainer on MNIST-5k.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from driver import BUSY
from raylets import Count, Raylets, Search, count, raylets, wait_for

TRIALS, EPOCHS, NODES = 5, 12, 3
LIMIT = 300.0
"""Seconds after which a search that does not go on is given up."""

SPACE = """
base: {{preset: embedded, optimizer: {{weight_decay: 1.0e-4}}, stages: {{total: {epochs}}}, {base}}}
space:
  optimizer.weight_decay: {{float: [1.0e-8, 1.0], log: true}}
search: {{trials: {trials}, grace: 6, factor: 2, startup: 3, max_concurrent: 2, seed: 3{more}}}
resources: {{workers: {workers}, cpus_per_worker: {cpus}, gpus_per_worker: 0}}
"""
CPUS = {1: 0.8, 2: 0.4}
"""CPUs of a worker, by workers per trial: one trial fits on a raylet."""

Victims = list[str]


@dataclass(frozen=True)
class Fault:
    """Something that breaks."""

    title: str
    act: Callable[[Raylets, Search], Victims]
    """Breaks it, and gives the trials that were hit."""
    modes: tuple[int, ...] = (1, 2)
    """Workers per trial for which it makes sense."""
    options: tuple[str, ...] = ()
    """Of raylets.py."""
    root: bool = False
    after: Callable[[Raylets], None] | None = None
    """What happens when the trials that were hit train again."""
    more: str = ""
    """Further settings of the search."""
    base: str = "seed: 0"
    """Further settings of the base."""
    trials: int = TRIALS


# ---------------------------------------------------------------- what breaks


def hit(cluster: Raylets, search: Search, node: Any) -> Victims:
    """Trials in the middle of an epoch on a node."""
    return [trial for trial, note in search.running().items() if cluster.node_of(note["pid"]) is node]


def newest(search: Search) -> tuple[str, dict[str, Any]]:
    """The trial that has just begun an epoch."""
    return max(search.running(3).items(), key=lambda item: item[1]["at"])


def process_of(cluster: Raylets, search: Search, trial: str) -> int:
    """The trial's process in Tune: with one worker the one that trains, else the one beside its ranks."""
    trains = int(search.running()[trial]["pid"])
    known = cluster.processes()
    if known[trains].kind == "trial":
        return trains
    return next(p.pid for p in known.values() if p.name.startswith("ray::Impl") and p.parent == known[trains].parent)


def to_trial(number: int) -> Callable[[Raylets, Search], Victims]:
    def act(cluster: Raylets, search: Search) -> Victims:
        trial, _ = newest(search)
        os.kill(process_of(cluster, search, trial), number)
        return [trial]

    return act


def to_rank(number: int) -> Callable[[Raylets, Search], Victims]:
    def act(cluster: Raylets, search: Search) -> Victims:
        trial, _ = newest(search)
        os.kill(next(note["pid"] for note in reversed(search.notes()[trial]) if note["rank"] == 1), number)
        return [trial]

    return act


def kill_raylets(number: int) -> Callable[[Raylets, Search], Victims]:
    def act(cluster: Raylets, search: Search) -> Victims:
        nodes = [cluster.node_of(note["pid"]) for note in search.running(3).values()][:number]
        victims = [trial for node in nodes for trial in hit(cluster, search, node)]
        cluster.kill(*nodes)
        return victims

    return act


def freeze_node(cluster: Raylets, search: Search) -> Victims:
    """A machine that is cut off, or sleeps."""
    _, note = newest(search)
    node = cluster.node_of(note["pid"])
    victims = hit(cluster, search, node)
    for pid in cluster.of_node(node):
        os.kill(pid, signal.SIGSTOP)
    return victims


def wake(cluster: Raylets) -> None:
    """All that sleeps goes on."""
    for pid in cluster.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill_driver(cluster: Raylets, search: Search) -> Victims:
    victims = list(search.running())
    search.kill()
    search.start()
    return victims


def busy_loop(cluster: Raylets, search: Search) -> Victims:
    trial, _ = newest(search)
    (search.folder / "trials" / trial / BUSY).touch()
    return [trial]


def torn_checkpoint(cluster: Raylets, search: Search) -> Victims:
    trial, note = newest(search)
    file = search.folder / "trials" / trial / "checkpoint.pt"
    os.truncate(file, file.stat().st_size // 2)
    os.kill(note["pid"], signal.SIGKILL)
    return [trial]


def disk_full(cluster: Raylets, search: Search) -> Victims:
    """Fill the disk until the search has ended with an error; then make room and give the command again."""
    victims = list(search.running())
    filler = search.folder.parent / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(b"0")
    code = search.wait(LIMIT)
    print(f"  (full disk: exit code {code}, {last_line(search.said)!r})", file=sys.stderr)
    filler.unlink()
    search.start()
    return victims


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


SMALL = "data: {subset: 0.2}, moco: {queue: 256}, model: {width: 8}, meters: {views: 64}, runtime: {device: cpu}"
HUNG = {"options": ("--least", "10"), "more": ", hung_after: 10"}
FAULTS: dict[str, Fault] = {
    "rank": Fault("kill -9 of a rank", to_rank(signal.SIGKILL), modes=(2,)),
    "trial": Fault("kill -9 of a trial's process", to_trial(signal.SIGKILL)),
    "raylet": Fault("kill -9 of a raylet", kill_raylets(1)),
    "two": Fault("kill -9 of two raylets at once", kill_raylets(2)),
    "asleep": Fault("a node sleeps, and wakes when its trial has gone on", freeze_node, after=wake),
    "driver": Fault("kill -9 of the driver, the same command again", kill_driver),
    "frozen": Fault("a trial's process stops (SIGSTOP)", to_trial(signal.SIGSTOP), **HUNG),
    "frozen-rank": Fault("a rank stops (SIGSTOP)", to_rank(signal.SIGSTOP), modes=(2,), **HUNG),
    "busy": Fault("a loop that never ends", busy_loop, **HUNG),
    "torn": Fault("a torn checkpoint, then kill -9", torn_checkpoint),
    "full": Fault("the disk is full, the same command again", disk_full, root=True),
    "real": Fault("kill -9 of a raylet, real trainer", kill_raylets(1), options=("--real",), base=SMALL, trials=3),
}


# ---------------------------------------------------------------- one line


@dataclass
class Line:
    """One line of the table."""

    counted: Count
    seconds: list[float]
    """Until each trial that was hit trained again."""
    code: int
    left: list[str]
    """Processes and placement groups that stayed."""
    freed: float
    """Seconds from the end of the driver until nothing was held."""


def measure(fault: Fault, workers: int, keep: Path | None) -> Line:
    """Run one search and break it."""
    with folder(tmpfs=fault.root, keep=keep) as results, raylets(NODES) as cluster:
        settings = {"epochs": EPOCHS, "trials": fault.trials, "workers": workers, "cpus": CPUS[workers]}
        space = SPACE.format(**settings, base=fault.base, more=fault.more)
        (results / "search.yaml").write_text(space)
        options = ("--pause", "0.5", *fault.options)
        # Not on a disk that may become full.
        search = Search(results / "search.yaml", results, cluster.address, *options, log=Path(f"{results}.log"))
        search.start()
        try:
            search.until(lambda: len(search.running(3)) == 2, "two trials at epoch 3")
            before = {trial: {note["pid"] for note in notes} for trial, notes in search.notes().items()}
            at = time.time()
            victims = fault.act(cluster, search)
            if fault.title.endswith("again"):
                at = time.time()
            seconds = [wait_for(partial(_again, search, t, before[t], at), LIMIT, f"{t} again") for t in victims]
            if fault.after:
                fault.after(cluster)
            code = search.wait(LIMIT)
            freed, left = let_go(cluster)
            return Line(count(search, fault.trials), seconds, code, left, freed)
        except BaseException:
            print(search.said, file=sys.stderr)
            raise
        finally:
            if search.process and search.process.poll() is None:
                search.kill()


def let_go(cluster: Raylets, seconds: float = 60.0) -> tuple[float, list[str]]:
    """Wait until no trial holds anything: after how long, and what is still there."""
    began = time.monotonic()
    with suppress(TimeoutError):
        wait_for(lambda: not (cluster.orphans() or cluster.groups() or cluster.held()), seconds, "free")
    left = [process.name for process in cluster.orphans()]
    left += [f"placement group {group['placement_group_id']}" for group in cluster.groups()]
    return time.monotonic() - began, left + ([f"{cluster.held():g} CPUs"] if cluster.held() else [])


def _again(search: Search, trial: str, before: set[int], at: float) -> float | None:
    """Seconds from `at` until a new process of a trial began an epoch, or the trial ended."""
    for note in search.notes().get(trial, []):
        if note["what"] == "begin" and note["pid"] not in before and note["at"] > at:
            return float(note["at"]) - at
    ends = [event["time"] for event in search.events() if event["event"] == "end" and event["trial"] == trial]
    return float(ends[0]) - at if ends else None


@contextmanager
def folder(*, tmpfs: bool, keep: Path | None) -> Iterator[Path]:
    """A folder for results, on a disk of its own of 40 MB where it is to become full."""
    path = Path(tempfile.mkdtemp(prefix="faults-", dir=keep))
    if tmpfs:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        if tmpfs:
            subprocess.run(["umount", "-l", str(path)], check=True)
        if keep is None:
            shutil.rmtree(path, ignore_errors=True)
            Path(f"{path}.log").unlink(missing_ok=True)


# ---------------------------------------------------------------- what a stop frees


def measure_stops(workers: int, keep: Path | None) -> tuple[list[float], float, float]:
    """Seconds from ASHA's stop to the next trial's first epoch on the same processes; to an empty place where no
    trial is left to come; and from the driver's end to nothing held."""
    with folder(tmpfs=False, keep=keep) as results, raylets(NODES) as cluster:
        for name, trials, epochs in (("reused", 8, 12), ("freed", 2, 100)):
            settings = {"trials": trials, "epochs": epochs, "workers": workers, "cpus": CPUS[workers]}
            text = SPACE.format(**settings, base="seed: 0", more="").replace("grace: 6", "grace: 2")
            text = text.replace("[1.0e-8", "[1.0e-4")  # trial 0 is the best there can be
            (results / f"{name}.yaml").write_text(text)
        first = Search(results / "reused.yaml", results, cluster.address)
        first.start()
        first.wait(LIMIT)
        stops = {e["trial"]: e["time"] for e in first.events() if e["event"] == "end" and e["state"] == "stopped"}
        began = [note for notes in first.notes().values() for note in notes if note["what"] == "begin"]
        notes = first.notes()
        waits = []
        for trial, at in stops.items():
            pid = notes[trial][-1]["pid"]
            waits += [min((n["at"] - at for n in began if n["pid"] == pid and n["at"] > at), default=float("nan"))]
        second = Search(results / "freed.yaml", results, cluster.address, "--lag", "4")
        second.start()

        def stop() -> float | None:
            times = [e["time"] for e in second.events() if e["event"] == "end" and e["state"] == "stopped"]
            return float(times[0]) if times else None

        stopped = second.until(stop, "a trial is stopped")
        one = round(CPUS[workers] * workers + (0.001 if workers > 1 else 0.0), 4)
        ranks = workers if workers > 1 else 0
        second.until(lambda: cluster.held() <= one and len(cluster.groups()) <= 1, "one trial's place is free")
        second.until(lambda: len(cluster.of_kind("rank")) <= ranks, "the ranks of the stopped trial are gone")
        freed = time.time() - stopped
        if not second.running():
            freed = float("nan")  # it was the end of the search that freed it
        second.wait(LIMIT)
        return [wait for wait in waits if wait == wait], freed, let_go(cluster)[0]


# ---------------------------------------------------------------- the table


def show(fault: Fault, workers: int, line: Line) -> str:
    counted = line.counted
    again = max(counted.again.values(), default=0)
    seconds = " and ".join(f"{s:.0f} s" for s in sorted({round(min(line.seconds)), round(max(line.seconds))}))
    left = len(line.left) or "none"
    marks = f"{again} | {len(counted.lost)} | {len(counted.doubled)} | {left} | {seconds}"
    return f"| {fault.title} | {workers} | {marks} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=[*FAULTS, "stop"], default=[*FAULTS, "stop"], metavar="NAME")
    parser.add_argument("--workers", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="workers per trial")
    parser.add_argument("--keep", type=Path, help="folder in which the results stay")
    chosen = parser.parse_args()
    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
    from ray import __version__

    print(f"ray {__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first line\n")
    if chosen.only != ["stop"]:
        print("| what breaks | workers | epochs again | lost | doubled | left over | went on after |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    failed = False
    reasons: dict[str, str] = {}
    for name in chosen.only:
        if name == "stop":
            continue
        fault = FAULTS[name]
        if fault.root and os.geteuid():
            print(f"| {fault.title} | | not run: needs root to mount a small disk | | | | |")
            continue
        for workers in (mode for mode in fault.modes if mode in chosen.workers):
            line = measure(fault, workers, chosen.keep)
            print(f"{show(fault, workers, line)}", flush=True)
            for trial in line.counted.overlapping:
                print(f"  {fault.title}, {workers} workers: two processes trained {trial} at a time", file=sys.stderr)
            for what in (*line.counted.lost, *line.counted.doubled, *line.left):
                print(f"  NOT KEPT: {fault.title}, {workers} workers: {what}", file=sys.stderr)
            failed |= bool(line.counted.lost or line.counted.doubled or line.left or line.code)
            reasons |= {f"{fault.title}, {workers}": reason for reason in line.counted.reasons}
    for what, reason in reasons.items():
        print(f"\n{what}: {reason}", end="")
    if "stop" in chosen.only:
        print("\n\n| after ASHA's stop | workers | seconds |\n| --- | --- | --- |")
        for workers in chosen.workers:
            waits, freed, end = measure_stops(workers, chosen.keep)
            middle = f"{statistics.median(waits):.2f} (n = {len(waits)})" if waits else "no such stop"
            print(f"| the next trial trains on the same processes, median | {workers} | {middle} |")
            print(f"| no trial is left: its CPUs, placement group and ranks are free | {workers} | {freed:.2f} |")
            print(f"| after the end of the search nothing is held | {workers} | {end:.2f} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
