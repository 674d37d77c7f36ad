"""Trials that hang: which one has been silent too long, and how its process is ended.

A trial may wait for ever for a data set on a mount that has gone, for a GPU that does not
answer, or for a rank that does not come. Nothing raises, so Ray sees nothing. Here a trial
that has been silent for many times the longest epoch so far is ended by killing its
process, whatever it does; Tune then takes it as a lost process and tries it again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcl.search.elastic import alive_nodes
from hpcl.search.plan import duration

LEAST = 300.0
"""Seconds of silence that are never too long: a pass over all images, a probe at the end."""
START = 1800.0
"""Seconds of silence that are never too long before a process reports its first epoch: it starts, and reads images."""
FIRST = 6 * 3600.0
"""The same as long as no epoch of the search has ended: nobody knows yet how long one takes."""
STALL = 10.0
"""Seconds between two looks from which on it is we who were silent: reports of that time may still wait to be read."""


@dataclass
class _Sign:
    """The last sign of a trial's process."""

    time: float
    actor: str | None = None
    """Ray's id of the process."""
    epochs: bool = False
    """Whether it has reported an epoch."""
    killed: str | None = None
    """Why its process was killed."""


class Watch:
    """Signs of life of all running trials.

    Args:
        times: silence as a multiple of the longest epoch; None: nothing is ever taken as hung.
    """

    def __init__(self, times: float | None) -> None:
        self._times, self._longest = times, 0.0
        self._signs: dict[str, _Sign] = {}
        self._looked: float | None = None

    def epoch(self, seconds: float | None) -> None:
        """An epoch of any trial took so long."""
        self._longest = max(self._longest, seconds or 0.0)

    def began(self, trial: str, now: float, actor: str | None = None) -> None:
        """A trial's process was started, or took it over; `actor`: Ray's id of it."""
        self._signs[trial] = _Sign(now, actor)

    def reported(self, trial: str, result: Mapping[str, Any], now: float) -> None:
        """A trial reported."""
        sign = self._signs.setdefault(trial, _Sign(now))
        sign.time = now
        sign.epochs = sign.epochs or "epoch" in result
        self.epoch(result.get("seconds"))

    def watches(self, trial: str) -> bool:
        """Whether a process of the trial is watched."""
        return trial in self._signs

    def left(self, trial: str) -> str | None:
        """A trial has no process any more; why it was killed here, None where it was not."""
        sign = self._signs.pop(trial, None)
        return sign.killed if sign else None

    def hung(self, now: float) -> list[str]:
        """Trials that have been silent too long; each is named once, and again where killing it did not help.

        To be asked often. Time in which nobody asked is nobody's silence: this process stood still, and
        what trials reported meanwhile has not been read.
        """
        if self._looked is not None and now - self._looked > STALL:
            for sign in self._signs.values():
                sign.time += now - self._looked
        self._looked = now
        if self._times is None:
            return []
        found = []
        for trial, sign in self._signs.items():
            least = LEAST if sign.epochs or sign.killed else START if self._longest else FIRST
            if now - sign.time > max(least, self._times * self._longest):
                took = f"an epoch took {duration(self._longest)} at most" if self._longest else "no epoch has ended yet"
                sign.killed = sign.killed or f"it hung: no report for {duration(now - sign.time)} ({took})"
                sign.time = now
                found.append(trial)
        return found

    def kill(self, trial: str) -> None:
        """End the process of a trial, on whatever machine it is; returns at once."""
        actor = self._signs[trial].actor
        if actor is not None and (found := process_of(actor)):
            kill_process(*found)


def process_of(actor: str) -> tuple[str, int] | None:
    """(address of the machine, number) of the process of one of Ray's actors; None where it has none."""
    from ray._private import state

    facts = state.actors(actor_id=actor)
    ip, pid = (facts or {}).get("Address", {}).get("IPAddress"), (facts or {}).get("Pid")
    return (ip, pid) if ip and pid else None


def kill_process(ip: str, pid: int) -> None:
    """``kill -9`` of one of Ray's processes on the machine with this address; returns at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = next((node for node in alive_nodes() if node["NodeManagerAddress"] == ip), None)
    if node is not None:  # else the machine is gone, and its processes with it
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy, max_retries=3).remote(pid)


def _kill(pid: int) -> None:
    """In a process on the trial's machine."""
    with suppress(OSError):  # it has ended meanwhile
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
