"""A plan as text, as ``--dry-run`` prints it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hpcl.downstream.scores import OBJECTIVES
from hpcl.files import bytes_in_words
from hpcl.methods import METHODS
from hpcl.search.params import Choice, Param
from hpcl.search.places import shown
from hpcl.search.plan import Plan, counted, duration, number
from hpcl.search.space import Space
from hpcl.stages import stage_lengths
from hpcl.validation import show


def render(plan: Plan) -> str:
    """The plan as text."""
    space, search = plan.space, plan.space.search
    winner = {
        "linear": "linear probe on the validation split",
        "auto": f"linear probe on the validation split where labels exist, else {search.metric}",
    }.get(search.objective, f"{search.objective} at the last epoch")
    if search.objective in OBJECTIVES:
        task = search.objective.partition("@")[0]
        images = "the training images' clusters" if task == "clusters" else "the validation split"
        winner = f"{task} on {images} at the end of a trial"
    tpe = f", TPE after {counted(plan.startup, 'finished trial')}" if search.sampler == "tpe" else ""
    end = "higher" if search.mode == "max" else "lower"
    rows = [
        ("images", _images(plan)),
        ("trials", _trials(plan)),
        ("shared", _shared(plan)),
        ("at a time", _at_a_time(plan)),
        ("stopped by", f"ASHA on {search.metric} ({end} is better)" if plan.rungs else "nothing"),
        ("rungs", _rungs(plan)),
        ("sampler", f"trial 0 is the base, then random{tpe}; seed {search.seed}"),
        ("winner", f"among finished trials: {winner}"),
        ("epochs", f"at most {plan.epochs_at_most}, expected about {round(plan.epochs_expected)}"),
        *([("hours", _hours(plan))] if plan.seconds else []),
        ("budget", plan.ends),
        ("results", f"{shown(plan.folder)}{' (the unfinished search there goes on)' if plan.resumes else ''}"),
    ]
    lines = [f"search {space.name}: {counted(len(space.params), 'field')} searched", ""]
    lines += _table([("field", "values", "scale", "trial 0"), *_param_rows(space)])
    lines += ["", *(f"{name:<11}{text}" for name, text in rows)]
    lines += [f"note       {note}" for note in plan.notes]
    return "\n".join(lines)


def _trials(plan: Plan) -> str:
    space, lengths = plan.space, plan.lengths
    stage_epochs = stage_lengths(space.base.stages)
    method = METHODS[space.base.method]
    how = "stages " + "/".join(str(n) for n in stage_epochs)
    if not method.staged:
        how = f"one schedule, {stage_epochs[0]} of warm-up" if method.prototypes else "one schedule"
    each = f"{space.epochs} epochs ({how}{', searched' if _lengths_searched(space) else ''})"
    if not _same_length(plan):
        each = f"{lengths.least} to {lengths.most} epochs, on average {sum(lengths.typical):.0f}; the base has {each}"
    return f"{space.search.trials} of {each}"


def _lengths_searched(space: Space) -> bool:
    return any(path.startswith("stages.") and path.endswith(".epochs") for path in space.params)


def _same_length(plan: Plan) -> int | None:
    """Epochs of every trial, where all have the same."""
    return plan.lengths.most if plan.lengths.least == plan.lengths.most else None


def _shared(plan: Plan) -> str:
    """What is trained once, and what that spares: work and wall time apart."""
    search, tree = plan.space.search, plan.prefixes
    if tree is None:
        if not search.share_prefix:
            return "nothing (search.share_prefix is false)"
        early = [path for path, stage in plan.acting.items() if stage == 1]
        others = f" and {len(early) - 1} more act" if len(early) > 1 else " acts"
        few = "there are too few trials, or search.grace leaves no room for a rung after the shared stages"
        return f"nothing: {early[0]}{others} from stage 1 on" if early else f"nothing: {few}"
    spans: dict[int, list[int]] = {}
    for node in tree.nodes:
        spans.setdefault(node.stage, []).append(node.epochs)
    parts: list[str] = []
    for times, group in itertools.groupby(spans, key=lambda stage: len(spans[stage])):
        stages = list(group)
        least, most = (sum(pick(spans[stage]) for stage in stages) for pick in (min, max))
        epochs = counted(most, "epoch") if least == most else f"{least} to {most} epochs"
        often = {1: "once", 2: "twice"}.get(times, f"{times} times")
        verb = ("is" if len(stages) == 1 else "are") + " trained " if not parts else ""
        parts.append(f"{_stages(stages)} ({epochs}) {verb}{often}")
    saved = round(plan.epochs.work_saved)
    alone = plan.epochs_at_most + saved
    text = f"{' and '.join(parts)}, not {search.trials} times: saves {saved} of {alone} epochs"
    if plan.seconds:
        return f"{text}, {_device_hours(plan, plan.seconds.work_saved)} and {_wall(plan.seconds.wall_saved)}"
    wall = max(0.0, plan.epochs.wall_saved * plan.concurrency.trials / alone)
    unit = "GPU" if plan.gpus_per_trial else "CPU"
    return f"{text} ({100 * saved / alone:.0f} % of the {unit}-hours) and {100 * wall:.0f} % of the wall time"


def _stages(stages: Sequence[int]) -> str:
    if len(stages) == 1:
        return f"stage {stages[0]}"
    return f"stages {stages[0]} {'and' if len(stages) == 2 else 'to'} {stages[-1]}"


def _at_a_time(plan: Plan) -> str:
    room = plan.concurrency
    each = counted(plan.space.resources.workers, "worker") + f" of {counted(room.cpus_per_worker, 'CPU')}"
    gpus = room.gpus_per_worker
    kind = f" of kind {room.accelerator}" if room.accelerator else ""
    each += f" and {counted(gpus, 'GPU')}{kind}" if gpus else ""
    sharing = min(int(1 / gpus + 1e-9), room.trials) if 0 < gpus <= 0.5 else 1
    packed = f"; up to {sharing} share a GPU" if sharing > 1 else ""
    return f"{counted(room.trials, 'trial')} of {each}{packed} (for {plan.cluster})"


def _rungs(plan: Plan) -> str:
    space, search = plan.space, plan.space.search
    if not plan.rungs:
        return f"none: every trial trains all {_same_length(plan) or 'its'} epochs"
    where = f"epoch {', '.join(number(rung) for rung in plan.rungs)} of {space.epochs}"
    if search.clock == "stage" and _lengths_searched(space):
        where += " in the base's schedule, the same places in every trial's"
    text = f"{where}; about 1 in {search.factor} trials goes on from each"
    if search.min_peers > 1:
        text += f", all while fewer than {search.min_peers} others have come there"
    return text + (f"; {search.brackets} brackets leave out 0 to {search.brackets - 1} rungs" * (search.brackets > 1))


def _hours(plan: Plan) -> str:
    assert plan.seconds is not None and plan.measured is not None
    first, later = plan.measured.seconds[0], plan.measured.seconds[-1]
    return (
        f"expected about {_device_hours(plan, plan.seconds.work)} and {_wall(plan.seconds.wall)}: an epoch took "
        f"{first:.2g} s in stage 1 and {later:.2g} s with prototypes, one worker alone on {plan.measured.device}"
    )


def _device_hours(plan: Plan, seconds: float) -> str:
    gpus = plan.gpus_per_trial
    cpus = plan.space.resources.workers * plan.concurrency.cpus_per_worker
    return f"{seconds / 3600 * (gpus or cpus):.2g} {'GPU' if gpus else 'CPU'}-hours"


def _wall(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} of wall time"


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
    return f"{number(param.low)} .. {number(param.high)}"


def _scale(param: Param) -> str:
    parts: list[str] = [param.kind]
    if not isinstance(param, Choice):
        parts += ["log"] if param.log else []
        parts += [f"step {number(param.step)}"] if param.step not in (None, 1) else []
    for parent, allowed in param.when.items():
        parts.append(f"if {parent} is {' or '.join(show(value) for value in allowed)}")
    return ", ".join(parts)


def _images(plan: Plan) -> str:
    """Which images, how large they are, and where they lie while trials run."""
    text, facts = f"{plan.space.base.data.source}{_subset(plan.space)}", plan.images
    if facts is not None:
        shape = "x".join(str(side) for side in facts.shape)
        about = "" if facts.exact else "about "
        text += f": {facts.count:,} x {shape} = {about}{bytes_in_words(facts.bytes)}"
    text += ", one mapped copy per machine, shared by all trials"
    if plan.gpus_per_trial:
        text += "; copied to the GPU if it fits half of its free memory, else streamed with prefetch"
    return text


def _subset(space: Space) -> str:
    return "" if space.base.data.subset == 1 else f" ({space.base.data.subset:.4g} of its training images)"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [f"  {'  '.join(row)}".rstrip() for row in cells]
