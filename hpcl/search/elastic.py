"""A cluster whose machines join and leave: how many trials have room now, and waiting until one has.

What a trial holds is fixed when the search starts; how many run at a time follows the
machines that are alive. On a cluster a few trials more are drawn than there is room for
(``search.ahead``): they wait as Ray's own requests for resources, which is what an
autoscaler adds machines for, and which end with the search however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcl.search.params import Resources
from hpcl.search.plan import Concurrency, Node, NoRoom, concurrency, describe_nodes, duration

LOOK_EVERY = 5.0
"""Seconds between two looks at the cluster's machines."""
WAIT_AT_MOST = 900.0
"""Seconds to wait for the first machine with room for a trial: an autoscaler's may have to be bought and set up."""
SAY_EVERY = 60.0
"""Seconds between two lines while waiting."""

_KIND = "accelerator_type:"


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's account of the machines that are alive (``ray.nodes()``)."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def machines(nodes: Sequence[dict[str, Any]]) -> list[Node]:
    """What the plan needs to know of Ray's nodes."""
    found = []
    for node in nodes:
        has = node["Resources"]
        kind = next((name.removeprefix(_KIND) for name in sorted(has) if name.startswith(_KIND)), "")
        found.append(Node(has.get("CPU", 0.0), has.get("GPU", 0.0), kind))
    return found


class Room:
    """Trials at a time, as the machines are now.

    Args:
        room: what was computed when the search started; a worker's share stays as it is.
        workers: workers of a trial.
        most: trials at a time at most.
        ahead: trials drawn beyond the room.
        look: gives the machines; None: they stay as they were.
        changed: told when the room has changed: the machines in words, and trials at a time.
    """

    def __init__(
        self,
        room: Concurrency,
        workers: int,
        *,
        most: int,
        ahead: int = 0,
        look: Callable[[], Sequence[Node]] | None = None,
        changed: Callable[[str, int], None] = lambda machines, trials: None,
    ) -> None:
        self._held = Resources(
            workers=workers,
            cpus_per_worker=room.cpus_per_worker,
            gpus_per_worker=room.gpus_per_worker,
            accelerator_type=room.accelerator,
        )
        self._most, self._ahead = most, ahead
        self._look, self._changed = look, changed
        self._trials, self._looked = room.trials, time.monotonic()

    def __call__(self) -> int:
        """Trials to have in work now: those that have room, and those that wait for machines."""
        return min(self._most, self.trials + self._ahead)

    @property
    def trials(self) -> int:
        """Trials that have room now; 0 where all machines are gone."""
        now = time.monotonic()
        if self._look is not None and now - self._looked >= LOOK_EVERY:
            self._looked = now
            nodes = self._look()
            try:
                trials = concurrency(self._held, nodes, limit=self._most).trials
            except NoRoom:
                trials = 0
            if trials != self._trials:
                self._trials = trials
                self._changed(describe_nodes(nodes) or "no machine", trials)
        return self._trials


def nodes_with_room(resources: Resources, address: str | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Ray's nodes, as soon as they have room for one trial.

    On a cluster the trial's resources are asked for meanwhile, so that an autoscaler brings a machine.

    Args:
        resources: what a trial uses.
        address: of the cluster; None: Ray on this machine, which gets no more than it has.
        say: prints one line.

    Raises:
        NoRoom: there is none, on a cluster after 15 minutes.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    start = said = time.monotonic()
    asked = None
    try:
        while True:
            nodes = alive_nodes()
            try:
                concurrency(resources, machines(nodes))
                return nodes
            except NoRoom as error:
                if address is None or time.monotonic() - start >= WAIT_AT_MOST:
                    raise
                if asked is None:
                    say(str(error))
                    say(f"waiting for machines to join, {duration(WAIT_AT_MOST)} at most; Ctrl-C ends it ...")
                    asked = placement_group([_least(resources)] * resources.workers)
            if time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                say(f"... {duration(said - start)}: the cluster has {describe_nodes(machines(nodes)) or 'no machine'}")
            asked.wait(timeout_seconds=LOOK_EVERY)
    finally:
        if asked is not None:
            remove_placement_group(asked)


def _least(resources: Resources) -> dict[str, float]:
    """What one worker surely holds, as Ray names it; what is `auto` is known when there are machines."""
    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    auto_gpus = 1.0 if resources.accelerator_type else 0.0
    held = Concurrency(
        1,
        1.0 if cpus == "auto" else float(cpus),
        auto_gpus if gpus == "auto" else float(gpus),
        1,
        resources.accelerator_type,
    )
    return held.worker
