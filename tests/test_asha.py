"""ASHA over scripted curves, without a cluster."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler

from hpcl.search.asha import CurveASHA, finite

Row = dict[str, Any]


def fake(trial_id: str) -> Any:
    return SimpleNamespace(trial_id=trial_id)


def asha(trials: list[str], mode: Any = "max", **kwargs: Any) -> CurveASHA:
    scheduler = CurveASHA("m", mode, **{"epochs": 16, "grace": 2, "factor": 2.0, **kwargs})
    for trial_id in trials:
        scheduler.on_trial_add(None, fake(trial_id))  # type: ignore[arg-type]
    return scheduler


def feed(scheduler: Any, trial_id: str, row: Row) -> str:
    return str(scheduler.on_trial_result(None, fake(trial_id), row))


def decide_again(rows: list[tuple[str, Row]], rungs: list[float], factor: float, sign: float = 1.0) -> dict[str, int]:
    """Which trials ASHA stops at which epoch, from the rows in order of arrival (plain reference)."""
    recorded: dict[float, dict[str, float]] = {rung: {} for rung in rungs}
    seen: dict[str, int] = {}
    stops: dict[str, int] = {}
    for trial_id, row in rows:
        if trial_id in stops or row["epoch"] <= seen.get(trial_id, 0):
            continue
        seen[trial_id] = row["epoch"]
        value = row.get("m")
        if value is None or not np.isfinite(value) or row.get("state", "running") != "running":
            continue
        reached = [rung for rung in rungs if rung <= row["epoch"]]
        if not reached or trial_id in recorded[reached[-1]]:
            continue
        peers = list(recorded[reached[-1]].values())
        recorded[reached[-1]][trial_id] = sign * value
        if peers and sign * value < np.percentile(peers, 100 * (1 - 1 / factor)):
            stops[trial_id] = row["epoch"]
    return stops


def test_rungs_are_grace_times_powers_of_the_factor() -> None:
    assert asha([], epochs=27, grace=3, factor=3).rungs == [3, 9, 27]
    assert asha([], epochs=20, grace=2, factor=2).rungs == [2, 4, 8, 16]
    assert asha([], epochs=3, grace=5, factor=2).rungs == [5]


def test_a_stop_says_where_why_and_against_how_many() -> None:
    scheduler = asha(["a", "b", "c"], grace=8)
    assert feed(scheduler, "a", {"epoch": 8, "m": 0.3}) == "CONTINUE"
    assert feed(scheduler, "b", {"epoch": 8, "m": 0.4}) == "CONTINUE"
    assert feed(scheduler, "c", {"epoch": 8, "m": 0.2}) == "STOP"
    assert scheduler.reasons == {"c": "epoch 8: m 0.2, below the rung's top 1/2 at 0.35 (n = 2)"}


def test_smaller_is_better_in_mode_min() -> None:
    scheduler = asha(["a", "b"], mode="min")
    feed(scheduler, "a", {"epoch": 2, "m": 1.0})
    assert feed(scheduler, "b", {"epoch": 2, "m": 1.5}) == "STOP"
    assert scheduler.reasons["b"] == "epoch 2: m 1.5, above the rung's top 1/2 at 1 (n = 1)"


@pytest.mark.parametrize("nothing", [{}, {"m": None}, {"m": float("nan")}, {"m": float("inf")}, {"m": "0.5"}])
def test_a_row_without_a_value_is_not_asked_and_stands_in_no_rung(nothing: Row) -> None:
    scheduler = asha(["a", "b", "c"])
    assert feed(scheduler, "a", {"epoch": 2, **nothing}) == "CONTINUE"
    assert feed(scheduler, "b", {"epoch": 2, "m": 0.5}) == "CONTINUE"
    assert feed(scheduler, "c", {"epoch": 2, "m": 0.4}) == "STOP"
    assert "n = 1" in scheduler.reasons["c"]
    # The curve of a begins at epoch 3: that row is its answer at the rung of epoch 2.
    assert feed(scheduler, "a", {"epoch": 3, "m": 0.1}) == "STOP"


@pytest.mark.parametrize("state", ["finished", "diverged"])
def test_the_last_row_is_not_asked(state: str) -> None:
    scheduler = asha(["a", "b"])
    feed(scheduler, "a", {"epoch": 16, "m": 0.9})
    assert feed(scheduler, "b", {"epoch": 16, "m": 0.1, "state": state}) == "CONTINUE"
    scheduler.on_trial_complete(None, fake("b"), {"epoch": 16, "m": 0.1})  # type: ignore[arg-type]
    assert all("b" not in recorded for _, recorded in scheduler._brackets[0]._rungs)


def test_a_repeated_row_is_asked_once() -> None:
    scheduler = asha(["a", "b"])
    feed(scheduler, "b", {"epoch": 2, "m": 0.5})
    feed(scheduler, "a", {"epoch": 2, "m": 0.9})
    # A resume brings row 2 again, now below a: the trial was already let through here.
    assert feed(scheduler, "b", {"epoch": 2, "m": 0.5}) == "CONTINUE"
    assert feed(scheduler, "b", {"epoch": 3, "m": 0.5}) == "CONTINUE"
    assert scheduler.reasons == {}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2.0, 3.0, 2.5]), st.integers(1, 5), st.sampled_from(["max", "min"]))
def test_decisions_equal_rays_own_where_every_row_has_a_value(seed: int, factor: float, grace: int, mode: Any) -> None:
    chance = random.Random(seed)
    names = [f"t{i}" for i in range(8)]
    ours = CurveASHA("m", mode, epochs=20, grace=grace, factor=factor)
    rays = AsyncHyperBandScheduler("epoch", "m", mode, 20, grace, factor, stop_last_trials=False)
    for name in names:
        ours.on_trial_add(None, fake(name))  # type: ignore[arg-type]
        rays.on_trial_add(None, fake(name))
    at = dict.fromkeys(names, 0)
    rows = []
    while at:
        name = chance.choice(list(at))
        at[name] += 1
        row = {"epoch": at[name], "m": round(chance.random(), 2)}
        rows.append((name, row))
        decision = feed(ours, name, row)
        assert decision == feed(rays, name, row)
        if decision == "STOP" or at[name] == 20:
            del at[name]
    stops = decide_again(rows, ours.rungs, factor, 1.0 if mode == "max" else -1.0)
    assert stops.keys() == ours.reasons.keys()
    assert all(ours.reasons[name].startswith(f"epoch {epoch}:") for name, epoch in stops.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_decisions_follow_the_plain_rule_with_holes_and_repeats(seed: int) -> None:
    chance = random.Random(seed)
    names = [f"t{i}" for i in range(6)]
    scheduler = asha(names)
    rows: list[tuple[str, Row]] = []
    stopped: set[str] = set()
    for epoch, name in itertools.product(range(1, 17), names):
        if name in stopped:
            continue
        value = chance.choice([None, float("nan"), chance.random(), chance.random()])
        row: Row = {"epoch": epoch, "m": value, "state": "finished" if epoch == 16 else "running"}
        for again in [row] * chance.choice([1, 1, 2]):
            if name in stopped:
                break
            rows.append((name, again))
            if feed(scheduler, name, again) == "STOP":
                stopped.add(name)
    assert decide_again(rows, scheduler.rungs, 2.0).keys() == stopped == scheduler.reasons.keys()


def test_finite_takes_numbers_only() -> None:
    assert finite(np.float32(0.5)) == 0.5 and finite(3) == 3.0
    assert all(finite(x) is None for x in (None, True, "1", float("nan"), -float("inf"), [1.0]))
