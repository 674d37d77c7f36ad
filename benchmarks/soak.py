"""A long search on three raylets whose processes are killed at random: ranks, trials, raylets and the driver.

    python benchmarks/soak.py                              # 500 trials, 20 minutes of kills
    python benchmarks/soak.py --minutes 3 --trials 60

Every trial trains on two processes (`resources.workers: 2`), three trials at a time; an epoch is a sleep, a
sum over the ranks and a checkpoint, as long as makes the search last about as long as the kills. Each kill
is a kill -9 of what the seed draws at that moment, also of processes that are just starting. A raylet comes back
after a while; the driver is started again at once with the same command, and is not killed in the second
half, so that its memory can be followed. Printed at the end:

    lost       trials that were drawn and never ended, or were never drawn
    doubled    trials that ended twice, have an epoch twice, or stand twice in Optuna's study
    memory     resident memory of the driver, of the first one and of the last one: when ten trials have ended
               in it, and at its end
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import let_go
from raylets import Raylets, Search, count, raylets

NODES, WORKERS, CPUS = 3, 2, 0.4
EPOCHS, EPOCHS_EXPECTED = 16, 4
WEIGHTS = {"rank": 4, "trial": 4, "raylet": 2, "driver": 1}
AWAY = 20.0
"""Seconds after which a killed raylet comes back."""
STUCK = 240.0
"""Seconds without an event in the journal after which the search is given up."""
WARM = 10
"""Trials that a driver has ended when its memory is looked at for the first time."""

SPACE = """
base: {{preset: embedded, stages: {{total: {epochs}}}}}
space:
  optimizer.weight_decay: {{float: [1.0e-8, 1.0], log: true}}
  moco.temperature: {{float: [0.05, 1.0], log: true}}
search: {{trials: {trials}, grace: 2, factor: 2, seed: {seed}}}
resources: {{workers: {workers}, cpus_per_worker: {cpus}, gpus_per_worker: 0}}
"""


@dataclass
class Driver:
    """One process that runs the search."""

    pid: int
    ended: int
    """Trials that had ended when it began."""
    memory: list[float] = field(default_factory=list)
    """MB, once it is warm."""
    files: list[int] = field(default_factory=list)
    """Open files, likewise."""

    def look(self, ended: int) -> None:
        """Take down its memory and its open files."""
        if ended - self.ended >= WARM:
            with suppress(OSError):
                pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
                files = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
                if pages and files:  # else it has just ended
                    self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
                    self.files.append(files)

    def said(self) -> str:
        """Its memory and open files, first and last."""
        if not self.memory:
            return "killed before ten trials had ended in it"
        (first, last), (begun, ended) = ((values[0], values[-1]) for values in (self.memory, self.files))
        return f"{first:.0f} MB to {last:.0f} MB ({last / first - 1:+.1%}), {begun} to {ended} open files"


class Soak:
    """A search, and what is done to it."""

    def __init__(self, cluster: Raylets, search: Search, seed: int, minutes: float, every: float) -> None:
        self._cluster, self._search = cluster, search
        self._random, self._every = random.Random(seed), every
        self._end = time.monotonic() + 60 * minutes
        self._half = time.monotonic() + 30 * minutes
        self.kills: Counter[str] = Counter()
        self.drivers: list[Driver] = []
        self.began = time.monotonic()
        self._back: list[float] = []
        """When a killed raylet comes back."""

    def run(self) -> int:
        """Kill until the time is over, then wait for the end; the driver's exit code."""
        self._start()
        next_kill = time.monotonic() + self._every
        events, moved = 0, time.monotonic()
        while (code := self._process.poll()) is None:
            time.sleep(1.0)
            now = time.monotonic()
            journal = self._search.events()
            if len(journal) > events:
                events, moved = len(journal), now
            if now - moved > STUCK:
                raise TimeoutError(f"nothing happened for {STUCK:g} s after {dict(self.kills)}")
            if not any(event["event"] == "state" for event in journal[-1:]):  # then it is being taken down
                self.drivers[-1].look(sum(event["event"] == "end" for event in journal))
            while self._back and now > self._back[0]:
                self._back.pop(0)
                self._cluster.add()
            if next_kill < now < self._end:
                self._kill(now)
                next_kill = time.monotonic() + self._random.uniform(0.3, 1.7) * self._every
        return code

    @property
    def _process(self) -> Any:
        assert self._search.process is not None
        return self._search.process

    def _start(self) -> None:
        ended = sum(event["event"] == "end" for event in self._search.events())
        self._search.start()
        self.drivers.append(Driver(self._process.pid, ended))

    def _kill(self, now: float) -> None:
        kinds = [kind for kind in WEIGHTS if kind != "driver" or now < self._half]
        kind = self._random.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        if kind == "driver":
            self._search.kill()
            self._start()
        elif kind == "raylet":
            if len(self._cluster.nodes) < 2:
                return
            self._cluster.kill(self._random.choice(self._cluster.nodes))
            self._back.append(now + AWAY)
        else:
            there = sorted(process.pid for process in self._cluster.of_kind(kind))
            if not there:
                return
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(there), signal.SIGKILL)
        self.kills[kind] += 1
        seconds = now - self.began
        print(f"{seconds:6.0f} s  kill -9 of a {kind:6} ({len(self._cluster.nodes)} raylets)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of kills (default: 20)")
    parser.add_argument("--trials", type=int, default=500, help="trials in all (default: 500)")
    parser.add_argument("--every", type=float, default=25.0, help="seconds between kills, mean (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the search and of the kills (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the results go (default: a temporary folder)")
    chosen = parser.parse_args()
    if min(chosen.minutes, chosen.trials, chosen.every) <= 0:
        parser.error("--minutes, --trials and --every must be > 0")
    results = chosen.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    results.mkdir(parents=True, exist_ok=True)
    if (results / "soak").exists():
        parser.error(f"{results / 'soak'}: is there already; give another --folder")
    pause = 60 * chosen.minutes * NODES / (3 * chosen.trials * EPOCHS_EXPECTED)
    space = SPACE.format(trials=chosen.trials, seed=chosen.seed, epochs=EPOCHS, workers=WORKERS, cpus=CPUS)
    (results / "soak.yaml").write_text(space)
    with raylets(NODES) as cluster:
        before = len(cluster.processes())
        search = Search(results / "soak.yaml", results, cluster.address, "--pause", f"{pause:.3g}")
        soak = Soak(cluster, search, chosen.seed, chosen.minutes, chosen.every)
        try:
            code = soak.run()
        except BaseException:
            print(search.said[-5000:], file=sys.stderr)
            raise
        finally:
            if search.process and search.process.poll() is None:
                search.kill()
        seconds = time.monotonic() - soak.began
        freed, left = let_go(cluster)
        while len(cluster.nodes) < NODES:
            cluster.add()
        after = len([process for process in cluster.processes().values() if process.kind != "idle"])
    counted = count(search, chosen.trials)
    states = {state: counted.states[state] for state in ("finished", "stopped", "failed")}
    never_ended = [trial for trial in counted.lost if counted.state_of.get(trial) != "failed"]
    print(
        f"\n{chosen.trials} trials asked, {EPOCHS} epochs of {pause:.2g} s, in {seconds / 60:.1f} min; exit code {code}"
    )
    print("  " + ", ".join(f"{n} {s}" for s, n in states.items()), end="")
    print(f", {len(never_ended)} lost, {len(counted.doubled)} doubled")
    names = {"rank": "ranks", "trial": "trials' processes", "raylet": "raylets", "driver": "drivers"}
    print("kills    " + ", ".join(f"{soak.kills[kind]} {name}" for kind, name in names.items()))
    again = {trial: number for trial, number in counted.again.items() if number}
    print(
        f"again    {sum(again.values())} epochs begun more than once, in {len(again)} trials; "
        f"{len(counted.overlapping)} trained by two processes at a time"
    )
    warm = [driver for driver in soak.drivers if driver.memory]
    growth = warm[-1].memory[-1] / warm[0].memory[0] - 1 if warm else float("nan")
    for name, driver in (("first", soak.drivers[0]), ("last", soak.drivers[-1])):
        print(f"memory   {name} driver: {driver.said()}")
    print(f"         from the first one's start to the last one's end: {growth:+.1%}")
    print(f"left     {len(left)} trials, ranks or placement groups, {freed:.1f} s after the end of the search")
    print(f"         processes: {before} of Ray's own before the search, {after} after it")
    for what in (*never_ended, *counted.doubled, *left):
        print(f"NOT KEPT: {what}")
    if not chosen.folder:
        print(f"results  {results}")
    sys.exit(bool(code or never_ended or counted.doubled or left))


if __name__ == "__main__":
    main()
