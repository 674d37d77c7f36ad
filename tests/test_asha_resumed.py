"""The stopping rule of a search that was cut short: what it takes up again, and that it decides as an unbroken one."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rungs import Killed, Log, Row, add, asha, feed


def test_draining_lets_a_trial_go_after_its_epoch_without_ending_it() -> None:
    log = Log()
    draining = False
    scheduler = asha(log, draining=lambda: draining)
    feed(scheduler, "0000", 2, 0.9)
    draining = True
    assert feed(scheduler, "0001", 2, 0.95) == feed(scheduler, "0000", 3, 0.9) == "STOP"
    assert feed(scheduler, "prefix-1", 1) == "STOP"
    assert log.ends == {} and len(log.rows) == 4 and len(log.rungs) == 2
    # What ends anyway ends.
    assert feed(scheduler, "0002", 2, 0.1) == "STOP" and feed(scheduler, "0003", 2, math.nan) == "STOP"
    assert [state for state, _ in log.ends.values()] == ["stopped", "diverged"]


def test_ended_trials_are_asked_no_more() -> None:
    log = Log()
    scheduler = asha(log)
    scheduler.restore([("0000", 0, 2.0, 0.5), ("0001", 0, 2.0, 0.4)], ended=["0001", "0002"])
    for trial_id in ("0001", "0002"):
        add(scheduler, trial_id)
        assert feed(scheduler, trial_id, 4, 0.9) == "STOP"
    assert log.order == []


def test_a_resumed_trial_keeps_the_bracket_of_the_log_also_against_the_draw() -> None:
    log = Log()
    scheduler = asha(log, brackets=3, total=17)
    drawn = {name: scheduler.bracket(name) for name in (f"{i:04d}" for i in range(20))}
    logged = {name: (bracket + 1) % 3 for name, bracket in drawn.items()}
    resumed = asha(log, brackets=3, total=17)
    resumed.restore([(name, bracket, 8.0, 0.5) for name, bracket in logged.items()])
    for name in drawn:
        add(resumed, name)
        feed(resumed, name, 16, 0.5)
    assert {name: resumed.bracket(name) for name in drawn} == logged
    assert {name: bracket for name, bracket, rung, _ in log.rungs if rung == 16} == logged


@pytest.mark.parametrize(("bracket", "rung"), [(0, 3.0), (1, 2.0), (-1, 2.0)])
def test_the_rungs_of_another_search_are_refused(bracket: int, rung: float) -> None:
    with pytest.raises(
        ValueError, match=f"0000 at rung {rung:g} of bracket {bracket}, but this search's rungs are 2, 4"
    ):
        asha().restore([("0000", bracket, rung, 0.5)])


def test_tune_can_pickle_it_while_its_ledger_is_open() -> None:
    scheduler = asha(brackets=2)
    scheduler._ledger = lambda: "no lambda can be pickled"  # type: ignore[assignment]
    assert pickle.loads(pickle.dumps(scheduler)).rungs == scheduler.rungs


@pytest.mark.parametrize(("lives", "kept"), [(2, "nothing"), (3, "row"), (4, "rung"), (5, "end")])
def test_a_stop_holds_whatever_the_log_had_of_it(lives: int, kept: str) -> None:
    log = Log(lives)
    first = asha(log)
    feed(first, "0000", 2, 0.9)
    if kept == "end":
        assert feed(first, "0001", 2, 0.1) == "STOP"
    else:
        with pytest.raises(Killed):
            feed(first, "0001", 2, 0.1)
    log.lives = math.inf
    second = asha(log)
    second.restore(list(log.rungs), ended=log.ends)
    assert feed(second, "0000", 2, 0.9) == "CONTINUE"
    assert feed(second, "0001", 2, 0.1) == "STOP"  # a resumed trial repeats its last row
    assert log.stopped == {"0001": "epoch 2: m 0.1, below the rung's top 1/2 at 0.9 (n = 1)"}
    assert log.rungs == [("0000", 0, 2.0, 0.9), ("0001", 0, 2.0, 0.1)] and len(log.rows) == 2


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["max", "min"]), st.integers(1, 3), st.sampled_from([1, 3]))
def test_a_search_killed_at_any_moment_decides_as_an_unbroken_one(
    seed: int, mode: Any, min_peers: int, brackets: int
) -> None:
    chance = random.Random(seed)
    rules: Row = {"min_peers": min_peers, "brackets": brackets, "seed": seed, "factor": chance.choice([2, 3])}
    order = [f"{i:04d}" for i in range(8)] * 16
    chance.shuffle(order)
    rows: list[tuple[str, int, Any, str]] = []
    for place, name in enumerate(order):
        epoch = order[: place + 1].count(name)
        value = math.nan if chance.random() < 0.01 else chance.choice([None, *[round(chance.random(), 2)] * 9])
        rows.append((name, epoch, value, "finished" if epoch == 16 else "running"))

    def session(log: Log, place: int) -> int:
        """Take the search up after row `place`, which may be half done; the row in work at the kill, or the last."""
        scheduler = asha(log, mode, **rules)
        scheduler.restore(list(log.rungs), ended=log.ends)
        repeated = list({row[0]: row for row in rows[: place + 1]}.values())
        chance.shuffle(repeated)
        try:
            for name, epoch, value, state in repeated:
                if name not in log.ends:
                    feed(scheduler, name, epoch, value, state=state)
            while place + 1 < len(rows):
                place += 1
                name, epoch, value, state = rows[place]
                if name not in log.ends:
                    feed(scheduler, name, epoch, value, state=state)
        except Killed:
            pass
        return place

    whole, log = Log(), Log()
    session(whole, -1)
    place = -1
    for log.lives in (chance.randrange(len(whole.order)), chance.randrange(3), chance.randrange(30), math.inf):
        place = session(log, place)
    assert log.rows == whole.rows and log.rungs == whole.rungs and log.ends == whole.ends
