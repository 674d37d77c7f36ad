"""How long a search has run and how much is left of it, from what is known. Numbers in, numbers and text out."""

from __future__ import annotations

from collections import Counter

from hpcl.search.plan import Plan
from hpcl.search.tables import Tables
from hpcl.stages import stage_lengths


def elapsed(tables: Tables, now: float | None) -> float:
    """Seconds that the search has run, in all its processes; `now` is None where none runs."""
    if not tables.sessions:
        return 0.0
    session = tables.sessions[-1]
    return float(tables.seconds_before() + (session["until"] if now is None else now) - session["time"])


def epochs_left(tables: Tables, plan: Plan) -> float:
    """Epochs that trials to come, running trials and their shared prefixes are expected to train."""
    asked = plan.space.search.trials
    shared = sum(node.epochs for node in plan.prefixes.nodes) if plan.prefixes else 0
    own = Counter(row["trial_id"] for row in tables.epochs if not row["shared"])
    ended = [own[trial_id] for trial_id, trial in tables.trials.items() if trial["state"] != "running"]
    # Short trials end first: the plan's mean keeps the first of them from speaking for all.
    mean = ((plan.epochs_expected - shared) / asked + sum(ended)) / (1 + len(ended))
    rest = mean * max(0, asked - len(tables.trials))
    for trial_id in tables.unfinished():
        to_the_end = sum(lengths_of(tables, plan, trial_id)) - tables.trials[trial_id]["epochs"]
        rest += min(max(mean - own[trial_id], to_the_end / 2), to_the_end)
    if not tables.prefixes or any(prefix["state"] == "running" for prefix in tables.prefixes.values()):
        rest += max(0, shared - (tables.epochs_trained() - own.total()))
    return rest


def seconds_left(tables: Tables, plan: Plan, now: float) -> tuple[float, str | None] | None:
    """Expected seconds to the end at the pace so far, and the budget that ends the search earlier, if one does.

    None before the first epoch.
    """
    trained, used, search = tables.epochs_trained(), elapsed(tables, now), plan.space.search
    if not trained or not used:
        return None
    pace = used / trained
    ways: list[tuple[float, str | None]] = [(pace * epochs_left(tables, plan), None)]
    if search.max_hours is not None:
        ways.append((search.max_hours * 3600 - used, "max_hours"))
    if search.max_gpu_hours is not None and (spent := tables.total("gpu_hours")):
        ways.append((used / spent * (search.max_gpu_hours - spent), "max_gpu_hours"))
    if search.max_epochs is not None:
        ways.append((pace * (search.max_epochs - trained), "max_epochs"))
    seconds, why = min(ways, key=lambda way: way[0])
    return max(0.0, seconds), why


def lengths_of(tables: Tables, plan: Plan, trial_id: str) -> tuple[int, int, int, int, int]:
    """The five stage lengths of a trial in epochs."""
    stages = plan.space.base.stages
    for path, value in tables.values[trial_id].items():
        section, _, rest = path.partition(".")
        stage, _, field = rest.partition(".")
        if section == "stages" and field == "epochs":
            # Not through the whole configuration, which takes a hundred times as long.
            stages = stages.model_copy(update={stage: getattr(stages, stage).model_copy(update={field: value})})
    return stage_lengths(stages)
