"""What a search will do, before it does it: trials at a time, rungs, epochs. Numbers in, numbers and text out.

The trials at a time are computed from the cluster's resources so that no combination
can deadlock: two trials of several workers that each hold a part of what the other
waits for would wait for ever, without an error. Ray counts resources in ten-thousandths,
and so does this file, so that 0.1 fits ten times into 1.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcl.errors import ConfigError, UserError
from hpcl.search.params import PROTOTYPE_CURVES, Choice, Param, Resources
from hpcl.search.space import Space, with_overrides
from hpcl.stages import stage_lengths
from hpcl.validation import show

DRIVER_CPUS = 0.001
"""CPUs that a trial with several workers needs beside them, for the process that leads them."""

MOST_CPUS_PER_WORKER = 8.0
"""CPUs that `auto` gives to a worker with a GPU at most."""

_FROM_STAGE_2 = ("clusters.", "growth.", "prototypes.", "topk.")


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Concurrency:
    """How many trials run at a time, and what each worker gets."""

    trials: int
    """Trials at a time."""
    cpus_per_worker: float
    gpus_per_worker: float
    slots: int
    """Workers for which the cluster has room."""


@dataclass(frozen=True)
class Plan:
    """What a search will do."""

    space: Space
    concurrency: Concurrency
    cluster: str
    """The machines the concurrency was computed for, in words."""
    rungs: tuple[int, ...]
    """Epochs at which ASHA decides."""
    startup: int
    """Finished trials before TPE replaces random sampling."""
    epochs_at_most: int
    """Epochs if no trial is stopped early."""
    epochs_expected: float
    """Epochs to expect with ASHA; see `expected_epochs`."""
    notes: tuple[str, ...]
    """What a reader should know before starting."""
    folder: Path
    """Where the results go."""


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
        ConfigError: not even one trial fits; the sum is shown.

    Example:
        >>> concurrency(Resources(), [Node(cpus=2)]).trials
        2
    """
    gpus = resources.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
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
        raise ConfigError(_refusal(resources, cpus, gpus, nodes, reserve, slots))
    return Concurrency(min(trials, limit or trials), cpus, gpus, slots)


def rungs(grace: int | None, factor: int, epochs: int) -> tuple[int, ...]:
    """Epochs at which ASHA decides: grace · factor^i below the total; none where grace is null.

    Example:
        >>> rungs(8, 2, 20)
        (8, 16)
    """
    found = []
    rung = grace
    while rung is not None and rung < epochs:
        found.append(rung)
        rung *= factor
    return tuple(found)


def survivors(arrivals: float, factor: int) -> float:
    """Trials that go on from a rung to which `arrivals` trials come one after another.

    ASHA lets the first go on; the j-th goes on if it reaches the (1 - 1/factor) quantile
    of the j - 1 before it. If every order of the trials is equally likely, that has the
    probability (j - 2 + factor) / (factor · j), exactly so for values drawn uniformly. The
    sum over j is a little more than arrivals / factor: the price of not waiting. Fractional
    arrivals are interpolated.
    """
    whole = int(arrivals)
    total = sum(1.0 if j == 1 else (j - 2 + factor) / (factor * j) for j in range(1, whole + 1))
    following = 1.0 if whole == 0 else (whole - 1 + factor) / (factor * (whole + 1))
    return total + (arrivals - whole) * following


def expected_epochs(trials: int, epochs: int, rung_epochs: Sequence[int], factor: int) -> float:
    """Epochs that ASHA is expected to let `trials` trials train.

    ``n_0 r_0 + n_1 (r_1 - r_0) + ... + n_s (E - r_(s-1))`` with rungs r, n_0 the trials and
    n_(i+1) = `survivors(n_i)`. Trials that improve during the search, as TPE's should,
    make it somewhat more.

    Example:
        >>> expected_epochs(16, 20, [], 2)
        320.0
    """
    total, running, before = 0.0, float(trials), 0
    for rung in (*rung_epochs, epochs):
        total += running * (rung - before)
        running, before = survivors(running, factor), rung
    return total


def startup_trials(trials: int, at_a_time: int) -> int:
    """Finished trials before TPE replaces random sampling, for `startup: auto`.

    A third of the search, at most Optuna's own 10, but at least as many as run at a time:
    those are drawn before any of them can teach anything.
    """
    return max(at_a_time, min(10, -(-trials // 3)))


def make_plan(space: Space, nodes: Sequence[Node], *, cluster: str, folder: Path) -> Plan:
    """The plan of a search on these machines.

    Args:
        space: the checked space.
        nodes: the cluster.
        cluster: where `nodes` comes from, for example "this machine".
        folder: where the results go.

    Raises:
        ConfigError: the cluster has no room for one trial.
    """
    search, epochs = space.search, space.epochs
    most = search.trials if search.max_concurrent == "auto" else min(search.trials, search.max_concurrent)
    room = concurrency(space.resources, nodes, limit=most)
    decided = rungs(search.grace, search.factor, epochs)
    return Plan(
        space=space,
        concurrency=room,
        cluster=f"{cluster}: {describe_nodes(nodes)}",
        rungs=decided,
        startup=startup_trials(search.trials, room.trials) if search.startup == "auto" else search.startup,
        epochs_at_most=search.trials * epochs,
        epochs_expected=expected_epochs(search.trials, epochs, decided, search.factor),
        notes=_notes(space, decided),
        folder=folder,
    )


def results_folder(space: Space, name: str | None, results: str | Path) -> Path:
    """The results folder of a search to be, ``<results>/<name>``; without a name the space's and the time.

    Raises:
        UserError: there is such a folder, or there can be none.
    """
    if name is not None:
        with_overrides(space, name=name)
    folder = Path(results).expanduser().resolve() / (name or f"{space.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        taken = folder.exists()
    except OSError as error:  # a name of 300 letters
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); choose another with --results or --name"
        ) from None
    if taken:
        raise UserError(
            f"{folder}: there are results of this name already; give another with --name, or remove the folder"
        )
    return folder


def render(plan: Plan) -> str:
    """The plan as text, as `--dry-run` prints it."""
    space, search, room = plan.space, plan.space.search, plan.concurrency
    end = "higher" if search.mode == "max" else "lower"
    each = _count(space.resources.workers, "worker") + f" of {_count(room.cpus_per_worker, 'CPU')}"
    each += f" and {_count(room.gpus_per_worker, 'GPU')}" if room.gpus_per_worker else ""
    if plan.rungs:
        where = ", ".join(str(rung) for rung in plan.rungs)
        stops = f"epoch {where} of {space.epochs}; about 1 in {search.factor} trials goes on from each"
    else:
        stops = f"none: every trial trains all {space.epochs} epochs"
    winner = {
        "linear": "linear probe on the validation split",
        "auto": f"linear probe on the validation split where labels exist, else {search.metric}",
    }.get(search.objective, f"{search.objective} at the last epoch")
    lengths = "/".join(str(n) for n in stage_lengths(space.base.stages))
    searched = any(path.startswith("stages.") and path.endswith(".epochs") for path in space.params)
    rows = [
        ("images", f"{space.base.data.source}" + _subset(space)),
        ("trials", f"{search.trials} of {space.epochs} epochs (stages {lengths}{', searched' if searched else ''})"),
        ("at a time", f"{_count(room.trials, 'trial')} of {each} (for {plan.cluster})"),
        ("stopped by", f"ASHA on {search.metric} ({end} is better)" if plan.rungs else "nothing"),
        ("rungs", stops),
        (
            "sampler",
            f"trial 0 is the base, then random, TPE after {_count(plan.startup, 'finished trial')}; seed {search.seed}",
        ),
        ("winner", f"among finished trials: {winner}"),
        ("epochs", f"at most {plan.epochs_at_most}, expected about {round(plan.epochs_expected)}"),
        ("results", f"{shown(plan.folder)}"),
    ]
    lines = [f"search {space.name}: {_count(len(space.params), 'field')} searched", ""]
    lines += _table([("field", "values", "scale", "trial 0"), *_param_rows(space)])
    lines += ["", *(f"{name:<11}{text}" for name, text in rows)]
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)


def shown(path: Path) -> Path:
    """The path as short as the current folder allows."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Machines in words, such as "2 x (8 CPUs, 1 GPU)"."""
    kinds = Counter(nodes)
    texts = [(n, f"{_count(node.cpus, 'CPU')}, {_count(node.gpus, 'GPU')}") for node, n in kinds.items()]
    return " + ".join(text if n == 1 else f"{n} x ({text})" for n, text in texts)


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
    workers = resources.workers
    sums = [f"{workers} x {_number(cpus)}{f' + {_number(reserve)} (driver)' if reserve else ''} CPUs"]
    sums[0] += f" = {_number(workers * cpus + reserve)}"
    if gpus:
        sums.append(f"{workers} x {_number(gpus)} GPUs = {_number(workers * gpus)}")
    has = describe_nodes(nodes) or "no machine"
    advice = ["resources.workers", "resources.cpus_per_worker", *(["resources.gpus_per_worker"] if gpus else [])]
    return (
        f"resources: a trial needs {' and '.join(sums)}, but the cluster has {has}, which has room for "
        f"{_count(slots, 'such worker')} (a worker lies on one machine); lower {' or '.join(advice)}, or use auto"
    )


def _notes(space: Space, decided: Sequence[int]) -> tuple[str, ...]:
    notes = [
        f"{path} is {show(base)} in the base, which the space does not contain: trial 0 takes {show(value)}"
        for path, base, value in space.default_notes()
    ]
    source = space.base.data.source
    if source != "mnist5k" and not Path(source).expanduser().exists():
        notes.append(f"there are no images at {source} here; --data says where yours are")
    first = stage_lengths(space.base.stages)[0]
    early = [rung for rung in decided if rung <= first]
    if early and space.search.metric in PROTOTYPE_CURVES:
        notes.append(
            f"{space.search.metric} has no value in stage 1: no trial is stopped at the rung of epoch {early[-1]}"
        )
    elif early and all(path.startswith(_FROM_STAGE_2) for path in space.params):
        notes.append(
            f"the rung at epoch {early[-1]} lies in stage 1, where no searched field acts: it would stop trials by "
            f"chance; raise search.grace above {first}"
        )
    return tuple(notes)


def _param_rows(space: Space) -> list[tuple[str, str, str, str]]:
    point = space.default_point()
    rows = []
    for path, param in space.params.items():
        default = show(point[path]) if path in point else "-"
        rows.append((path, _values(param), _scale(param), default))
    return rows


def _values(param: Param) -> str:
    if isinstance(param, Choice):
        return " | ".join(show(value) for value in param.choices)
    return f"{_number(param.low)} .. {_number(param.high)}"


def _scale(param: Param) -> str:
    parts: list[str] = [param.kind]
    if not isinstance(param, Choice):
        parts += ["log"] if param.log else []
        parts += [f"step {_number(param.step)}"] if param.step not in (None, 1) else []
    for parent, allowed in param.when.items():
        parts.append(f"if {parent} is {' or '.join(show(value) for value in allowed)}")
    return ", ".join(parts)


def _subset(space: Space) -> str:
    return "" if space.base.data.subset == 1 else f" ({space.base.data.subset:.4g} of its training images)"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [f"  {'  '.join(row)}".rstrip() for row in cells]


def _number(value: float | None) -> str:
    return f"{value:.6g}"


def _count(amount: float, noun: str) -> str:
    return f"{_number(amount)} {noun}{'' if amount == 1 else 's'}"
