"""What a search will do, before it does it: trials at a time, rungs, epochs, hours. Numbers in, numbers out.

The trials at a time are computed from the cluster's resources so that no combination
can deadlock: two trials of several workers that each hold a part of what the other
waits for would wait for ever, without an error. Ray counts resources in ten-thousandths,
and so does this file, so that 0.1 fits ten times into 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcl.errors import ConfigError
from hpcl.search.budget import Budget
from hpcl.search.check import device_problems
from hpcl.search.clock import rung_times
from hpcl.search.expected import Expected, Lengths, Measured, expect, trial_lengths
from hpcl.search.facts import ImageFacts
from hpcl.search.params import PROTOTYPE_CURVES, Resources
from hpcl.search.prefixes import PrefixPlan, acting_stages, plan_prefixes
from hpcl.search.space import Space
from hpcl.stages import stage_lengths
from hpcl.validation import show

DRIVER_CPUS = 0.001
"""CPUs that a trial with several workers needs beside them, for the process that leads them."""

MOST_CPUS_PER_WORKER = 8.0
"""CPUs that `auto` gives to a worker with a GPU at most."""


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: float
    gpus: float = 0.0
    accelerator: str | None = None
    """Kind of its GPUs as Ray calls it, such as `A100`; empty: none that Ray knows; None: not known here."""


@dataclass(frozen=True)
class Concurrency:
    """How many trials run at a time, and what each worker gets."""

    trials: int
    """Trials at a time."""
    cpus_per_worker: float
    gpus_per_worker: float
    slots: int
    """Workers for which the cluster has room."""

    accelerator: str | None = None
    """Kind of the GPUs; None: any."""

    @property
    def worker(self) -> dict[str, float]:
        """What a worker holds, as Ray names it."""
        kind = {f"accelerator_type:{self.accelerator}": 0.001} if self.accelerator and self.gpus_per_worker else {}
        return {
            "CPU": self.cpus_per_worker,
            **({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}),
            **kind,
        }

    def each(self, workers: int) -> str:
        """What a trial of so many workers gets, such as "1 x 2 CPUs + 1 GPUs"."""
        kind = f" ({self.accelerator})" if self.accelerator else ""
        gpus = f" + {self.gpus_per_worker:g} GPUs{kind}" if self.gpus_per_worker else ""
        return f"{workers} x {self.cpus_per_worker:g} CPUs{gpus}"


@dataclass(frozen=True)
class Plan:
    """What a search will do."""

    space: Space
    concurrency: Concurrency
    cluster: str
    """The machines the concurrency was computed for, in words."""
    acting: dict[str, int]
    """The first stage in which each searched field acts."""
    prefixes: PrefixPlan | None
    """What trials have in common and is trained once; None: nothing."""
    rungs: tuple[float, ...]
    """Times on the clock (:mod:`hpcl.search.clock`) at which ASHA decides."""
    startup: int
    """Finished trials before TPE replaces random sampling."""
    lengths: Lengths
    epochs_at_most: int
    """Epochs trained if no trial is stopped early, those of a prefix counted once."""
    epochs: Expected
    """Epochs trained to expect."""
    measured: Measured | None
    """What an epoch takes, where that was measured."""
    seconds: Expected | None
    """Seconds to expect, where an epoch was measured."""
    notes: tuple[str, ...]
    """What a reader should know before starting."""
    folder: Path
    """Where the results go."""
    resumes: bool
    """Whether an unfinished search there goes on."""
    images: ImageFacts | None = None
    """The decoded images, where they are known."""

    @property
    def fork(self) -> float:
        """Time on the clock up to which trials share their prefixes."""
        return self.prefixes.fork_time if self.prefixes else 0.0

    @property
    def epochs_expected(self) -> float:
        """Epochs trained to expect with ASHA, those of a prefix counted once."""
        return self.epochs.work

    @property
    def gpus_per_trial(self) -> float:
        """GPUs that a trial holds; 0 where it uses none."""
        return self.space.resources.workers * self.concurrency.gpus_per_worker

    @property
    def budget(self) -> Budget:
        """What ends the search."""
        search = self.space.search
        return Budget(search.trials, search.max_hours, search.max_gpu_hours, search.max_epochs)

    @property
    def ends(self) -> str:
        """Which of the limits is expected to end the search, in words."""
        return self.budget.binding(
            expected_epochs=self.epochs.work,
            seconds_per_epoch=self.seconds.work / self.epochs.work if self.seconds else None,
            trials_at_a_time=self.concurrency.trials,
            gpus_per_trial=self.gpus_per_trial,
        )


def concurrency(resources: Resources, nodes: Sequence[Node], *, limit: int | None = None) -> Concurrency:
    """Trials that can run at a time without ever waiting for each other.

    A node has room for ``min(floor(cpus / c), GPUs' room)`` workers, where c is a worker's
    CPUs; a GPU has room for ``floor(1 / g)`` workers that use a fraction g of it (a worker
    never has parts of two GPUs), and g >= 1 GPUs for one. Trials at a time =
    floor(sum of room / workers), because any workers fit into any room. Trials of several
    workers have a driver besides, whose 0.001 CPUs are kept free on every node.

    Args:
        resources: what a trial uses.
        nodes: the cluster.
        limit: trials at a time at most.

    Raises:
        NoRoom: not even one trial fits; the sum is shown.

    Example:
        >>> concurrency(Resources(), [Node(cpus=2)]).trials
        2
    """
    everything, wanted = nodes, resources.accelerator_type
    if wanted:
        nodes = [node for node in nodes if node.accelerator in (None, wanted)]
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if wanted or any(node.gpus >= 1 for node in nodes) else 0.0
    cpus = resources.cpus_per_worker
    if cpus == "auto":
        cpus = _share_of_cpus(resources.workers, float(gpus), nodes)
    cpus, gpus = float(cpus), float(gpus)
    workers = resources.workers
    reserve = 0.0
    if workers > 1:
        reserve = DRIVER_CPUS * max(1, sum(_room(node, cpus, gpus) for node in nodes) // workers)
    slots = sum(_room(node, cpus, gpus, reserve) for node in nodes)
    trials = slots // workers
    if trials < 1:
        raise NoRoom(_refusal(resources, cpus, gpus, everything, reserve, slots))
    return Concurrency(min(trials, limit or trials), cpus, gpus, slots, wanted)


class NoRoom(ConfigError):
    """These machines have no room for one trial."""


def startup_trials(trials: int, at_a_time: int) -> int:
    """Finished trials before TPE replaces random sampling, for `startup: auto`.

    A third of the search, at most Optuna's own 10, but at least as many as run at a time:
    those are drawn before any of them can teach anything.
    """
    return max(at_a_time, min(10, -(-trials // 3)))


def make_plan(
    space: Space,
    nodes: Sequence[Node],
    *,
    cluster: str,
    folder: Path,
    resumes: bool = False,
    measured: Measured | None = None,
    images: ImageFacts | None = None,
) -> Plan:
    """The plan of a search on these machines.

    Args:
        space: the checked space.
        nodes: the cluster.
        cluster: where `nodes` comes from, for example "this machine".
        folder: where the results go.
        resumes: an unfinished search lies there and goes on.
        measured: what an epoch takes.
        images: the decoded images, where they are known.

    Raises:
        ConfigError: the cluster has no room for one trial, or no GPU for a space that wants one.
    """
    search = space.search
    most = search.trials if search.max_concurrent == "auto" else min(search.trials, search.max_concurrent)
    room = concurrency(space.resources, nodes, limit=most)
    if problems := device_problems(space, room.gpus_per_worker, f"{cluster} has {describe_nodes(nodes)}"):
        raise ConfigError(*problems)
    shared = plan_prefixes(space)
    fork = shared.fork_time if shared else 0.0
    lengths, acting = trial_lengths(space), acting_stages(space)
    decided = rung_times(search.grace, search.factor, space.epochs, fork=fork)

    epochs = expect(space, shared, decided, room.trials)
    return Plan(
        space=space,
        concurrency=room,
        cluster=f"{cluster}: {describe_nodes(nodes)}",
        acting=acting,
        prefixes=shared,
        rungs=decided,
        startup=startup_trials(search.trials, room.trials) if search.startup == "auto" else search.startup,
        lengths=lengths,
        epochs_at_most=search.trials * lengths.most - (round(shared.saved(search.trials)) if shared else 0),
        epochs=epochs,
        measured=measured,
        seconds=expect(space, shared, decided, room.trials, measured.seconds) if measured else None,
        notes=_notes(space, decided, min(acting.values())),
        folder=folder,
        resumes=resumes,
        images=images,
    )


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Machines in words, such as "2 x (8 CPUs, 1 GPU)"."""
    nodes = [node for node in nodes if node.cpus or node.gpus] or nodes  # a head that only leads
    kinds = Counter(
        f"{counted(node.cpus, 'CPU')}, {counted(node.gpus, 'GPU')}"
        + (f" of kind {node.accelerator}" if node.accelerator else "")
        for node in nodes
    )
    texts = [(n, text) for text, n in kinds.items()]
    return " + ".join(text if n == 1 else f"{n} x ({text})" for n, text in texts)


def number(value: float) -> str:
    """A number with at most 6 digits: 20, 0.5."""
    return f"{value:.6g}"


def counted(amount: float, noun: str) -> str:
    """An amount of something, such as "1 trial" or "2 trials"."""
    return f"{number(amount)} {noun}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in words, two units at most.

    >>> duration(75.2), duration(5), duration(7300)
    ('1 min 15 s', '5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _units(amount: float) -> int:
    return round(amount * 10_000)


def _gpu_room(node: Node, gpus: float) -> int:
    """Workers that the node's GPUs have room for; `gpus` is above 0."""
    if gpus < 1:
        return int(node.gpus + 1e-9) * (_units(1) // _units(gpus))
    return _units(node.gpus) // _units(gpus)


def _room(node: Node, cpus: float, gpus: float, reserve: float = 0.0) -> int:
    """Workers that a node has room for."""
    by_cpus = max(0, _units(node.cpus) - _units(reserve)) // _units(cpus)
    return by_cpus if gpus == 0 else min(by_cpus, _gpu_room(node, gpus))


def _share_of_cpus(workers: int, gpus: float, nodes: Sequence[Node]) -> float:
    """A worker's CPUs for `auto`: one without GPUs, else what keeps all GPUs of a node busy."""
    # Beside drivers a worker gets a thousandth less, so that as many fit as there are CPUs.
    spare = DRIVER_CPUS if workers > 1 else 0.0
    shares = [node.cpus / _gpu_room(node, gpus) for node in nodes if gpus and _gpu_room(node, gpus)]
    share = min([*shares, MOST_CPUS_PER_WORKER]) if shares else 1.0
    return max(0.01, int((share - spare * max(1.0, share)) * 10_000) / 10_000)


def _refusal(resources: Resources, cpus: float, gpus: float, nodes: Sequence[Node], reserve: float, slots: int) -> str:
    workers, wanted = resources.workers, resources.accelerator_type
    if wanted and not any(node.gpus and node.accelerator in (None, wanted) for node in nodes):
        kinds = sorted({node.accelerator for node in nodes if node.accelerator})
        other = f"name one that is there ({', '.join(kinds)}), or " if kinds else ""
        has = describe_nodes(nodes) or "no machine"
        return f"resources.accelerator_type is {wanted}, but the cluster has {has}; {other}leave it out"
    sums = [f"{workers} x {number(cpus)}{f' + {number(reserve)} (driver)' if reserve else ''} CPUs"]
    sums[0] += f" = {number(workers * cpus + reserve)}"
    if gpus:
        kind = f" of kind {wanted}" if wanted else ""
        sums.append(f"{workers} x {number(gpus)} GPUs{kind} = {number(workers * gpus)}")
    has = describe_nodes(nodes) or "no machine"
    advice = ["resources.workers", "resources.cpus_per_worker", *(["resources.gpus_per_worker"] if gpus else [])]
    return (
        f"resources: a trial needs {' and '.join(sums)}, but the cluster has {has}, which has room for "
        f"{counted(slots, 'such worker')} (a worker lies on one machine); lower {' or '.join(advice)}, or use auto"
    )


def _notes(space: Space, decided: Sequence[float], first: int) -> tuple[str, ...]:
    search = space.search
    notes = [
        f"{path} is {show(base)} in the base, which the space does not contain: trial 0 takes {show(value)}"
        for path, base, value in space.default_notes()
    ]
    source = space.base.data.source
    if source != "mnist5k" and not Path(source).expanduser().exists():
        notes.append(f"there are no images at {source} here; --data says where yours are")
    lengths = stage_lengths(space.base.stages)
    blind = [rung for rung in decided if rung <= lengths[0]]
    equal = [rung for rung in decided if rung <= sum(lengths[: first - 1])]
    if blind and search.metric in PROTOTYPE_CURVES:
        notes.append(f"{search.metric} has no value in stage 1: no trial is stopped at the rung of epoch {blind[-1]:g}")
    elif equal:
        notes.append(
            f"the rung at epoch {equal[-1]:g} lies before stage {first}, the first in which a searched field acts: it "
            f"would stop trials by chance; raise search.grace above {sum(lengths[: first - 1])}"
        )
    return tuple(notes)
