"""The stopping rule over random curves, without a cluster: beside Ray's own, beside a plain reference, broken off."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler
from rungs import NO_CONTROLLER, Log, Row, add, asha, complete, decide_again, fake, feed, report

from hpcl.config import Config
from hpcl.search.asha import StageASHA, finite
from hpcl.search.clock import StageClock

# ---------------------------------------------------------------- beside Ray's own


def random_search(chance: random.Random, names: Sequence[str], epochs: int) -> Iterator[tuple[str, int, float]]:
    """Full reports of several trials, in any order; `send` True ends the trial of the newest row."""
    at = dict.fromkeys(names, 0)
    quality = {name: chance.random() for name in names}
    while at:
        name = chance.choice(list(at))
        at[name] += 1
        value = round(quality[name] * at[name] / (at[name] + 3) + 0.2 * chance.random(), 2)
        if (yield name, at[name], value) or at[name] == epochs:
            del at[name]


def drive(steps: Any, decide: Callable[[str, int, float], bool]) -> None:
    """Run a search; `decide` says whether a trial is to stop."""
    try:
        name, epoch, value = next(steps)
        while True:
            name, epoch, value = steps.send(decide(name, epoch, value))
    except StopIteration:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sampled_from([2, 3, 4, 2.5]),
    st.integers(1, 5),
    st.integers(5, 30),
    st.integers(1, 12),
    st.sampled_from(["max", "min"]),
)
def test_every_decision_is_rays_where_nothing_is_amiss(
    seed: int, factor: Any, grace: int, epochs: int, trials: int, mode: Any
) -> None:
    names = [f"{i:04d}" for i in range(trials)]
    log = Log()
    ours = asha(log, mode, total=epochs, grace=grace, factor=factor)
    rays = AsyncHyperBandScheduler("epoch", "m", mode, epochs, grace, factor, stop_last_trials=False)
    for name in names:
        add(ours, name)
        add(rays, name)

    def decide(name: str, epoch: int, value: float) -> bool:
        own = feed(ours, name, epoch, value, state="finished" if epoch == epochs else "running")
        # Ray's may stop a trial by its last row, when it has finished: ours never does.
        assert own == (feed(rays, name, epoch, value) if epoch < epochs else "CONTINUE")
        return own == "STOP"

    drive(random_search(random.Random(seed), names, epochs), decide)
    for rung, recorded in ours._brackets[0]._rungs:
        assert {f"tune-{name}": value for name, value in recorded.items()} == dict(rays._brackets[0]._rungs)[rung]
    assert len(ours.rungs[0]) == sum(rung < epochs for rung, _ in rays._brackets[0]._rungs)
    again = decide_again(log.rows, ours.rungs, factor, mode=mode)
    assert again.rungs == log.rungs and again.stops.keys() == log.stopped.keys()
    assert all(log.stopped[name].startswith(f"epoch {epoch}: m ") for name, epoch in again.stops.items())


def test_some_of_these_searches_stop_many_trials() -> None:
    log = Log()
    ours = asha(log)
    names = [f"{i:04d}" for i in range(12)]
    drive(random_search(random.Random(1), names, 16), lambda *row: feed(ours, *row) == "STOP")
    assert 4 <= len(log.stopped) < 12 and len({rung for _, _, rung, _ in log.rungs}) == 4


def test_a_skipped_rung_is_not_answered_later_as_rays_is() -> None:
    rays = AsyncHyperBandScheduler("epoch", "m", "max", 16, 2, 2)  # as it comes
    log = Log()
    ours = asha(log)
    for scheduler in (rays, ours):
        add(scheduler, "0001")
    for epoch in (9, 10, 11, 12):
        feed(rays, "0001", epoch, 0.5)
        feed(ours, "0001", epoch, 0.5)
    assert sorted(rung for rung, recorded in rays._brackets[0]._rungs if recorded) == [2, 4, 8]
    assert log.rungs == [("0001", 0, 8.0, 0.5)]


# ---------------------------------------------------------------- what is no question


@pytest.mark.parametrize("nothing", [{}, {"m": None}, {"m": "0.5"}, {"m": True}])
def test_a_row_without_a_value_is_not_asked_and_stands_in_no_rung(nothing: Row) -> None:
    log = Log()
    scheduler = asha(log)
    assert report(scheduler, "0000", {"epoch": 2, **nothing}) == "CONTINUE"
    assert feed(scheduler, "0001", 2, 0.5) == "CONTINUE"
    assert log.rungs == [("0001", 0, 2.0, 0.5)]
    # The curve of 0000 begins at epoch 3: that row is its answer at the rung of epoch 2.
    assert feed(scheduler, "0000", 3, 0.1) == "STOP"
    assert log.stopped == {"0000": "epoch 3: m 0.1, below the rung's top 1/2 at 0.5 (n = 1)"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_value_that_is_not_finite_ends_the_trial_as_diverged(value: Any, mode: Any, epoch: int) -> None:
    log = Log()
    scheduler = asha(log, mode)
    assert feed(scheduler, "0000", epoch, value) == "STOP"
    assert log.ends == {"0000": ("diverged", f"epoch {epoch}: m is not finite ({float(value)})")}
    assert log.rungs == [] and log.order == ["row", "end"]
    assert feed(scheduler, "0001", 2, 0.0) == feed(scheduler, "0001", 4, 0.0) == "CONTINUE"


def test_also_the_last_row_of_a_trial_may_diverge() -> None:
    log = Log()
    feed(asha(log), "0000", 16, math.nan, state="finished")
    assert log.ends["0000"] == ("diverged", "epoch 16: m is not finite (nan)")


def test_a_trial_that_says_it_diverged_ends_by_itself() -> None:
    log = Log()
    assert feed(asha(log), "0000", 4, math.nan, state="diverged") == "CONTINUE"
    assert log.ends == {"0000": ("diverged", "epoch 4: the loss is not finite")} and log.rungs == []


@pytest.mark.parametrize("epoch", [2, 8, 9, 16])
def test_a_finished_trial_is_never_stopped_and_stands_in_no_rung(epoch: int) -> None:
    log = Log()
    scheduler = asha(log, draining=lambda: True)
    for i in range(4):
        feed(scheduler, f"000{i}", epoch, 0.9)
    before = list(log.rungs)
    assert feed(scheduler, "0009", epoch, 0.1, state="finished") == "CONTINUE"
    # Tune asks again with the same row when the function returns, then reports the completion.
    assert feed(scheduler, "0009", epoch, 0.1, state="finished", done=True) == "CONTINUE"
    complete(scheduler, "0009", {"epoch": epoch, "m": 0.1})
    assert log.ends == {"0009": ("finished", f"all {epoch} epochs trained")} and log.rungs == before
    assert all("0009" not in recorded for _, recorded in scheduler._brackets[0]._rungs)


def test_what_has_no_epoch_is_no_row() -> None:
    log = Log()
    scheduler = asha(log, draining=lambda: True)
    assert report(scheduler, "0000", {"state": "failed"}) == "CONTINUE"
    assert log.order == []


def test_a_repeated_row_is_asked_once() -> None:
    log = Log()
    scheduler = asha(log)
    feed(scheduler, "0001", 2, 0.5)
    feed(scheduler, "0000", 2, 0.9)
    # A resume brings row 2 again, now below 0000: the trial was already let through here.
    assert feed(scheduler, "0001", 2, 0.5) == feed(scheduler, "0001", 3, 0.5) == "CONTINUE"
    assert log.ends == {} and len(log.rows) == 3 and len(log.rungs) == 2


def test_shared_epochs_stand_in_no_rung() -> None:
    log = Log()
    scheduler = asha(log)
    assert feed(scheduler, "0000", 2, 0.5, shared=True) == feed(scheduler, "0000", 3, 0.6) == "CONTINUE"
    assert log.rungs == [("0000", 0, 2.0, 0.6)] and log.rows[0]["clock"] == 2.0


def test_prefixes_are_logged_and_never_asked() -> None:
    log = Log()
    scheduler = asha(log, brackets=2, clock=lambda trial_id, epoch: epoch / 2)
    add(scheduler, "prefix-0a1b")
    for epoch in (2, 4, 8):
        assert feed(scheduler, "prefix-0a1b", epoch, math.nan) == "CONTINUE"
    assert feed(scheduler, "prefix-0a1b", 9, 0.1, state="finished") == "CONTINUE"
    complete(scheduler, "prefix-0a1b", {})
    assert [row["clock"] for row in log.rows] == [1.0, 2.0, 4.0, 4.5]
    assert log.order == ["row"] * 4 + ["end"] and log.ends == {"prefix-0a1b": ("finished", "all 9 epochs trained")}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["max", "min"]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_the_plain_rule_holds_with_holes_repeats_and_skips(seed: int, mode: Any, min_peers: int, brackets: int) -> None:
    chance = random.Random(seed)
    log = Log()
    scheduler = asha(log, mode, min_peers=min_peers, brackets=brackets, seed=seed, factor=chance.choice([2, 3, 2.5]))
    at = {f"{i:04d}": 0 for i in range(10)}
    rows: list[Row] = []
    while at:
        name = chance.choice(list(at))
        at[name] = min(at[name] + chance.choice([1, 1, 1, 2, 5]), 16)
        state = "finished" if at[name] == 16 else "running"
        row: Row = {"epoch": at[name], "m": chance.choice([None, *[chance.random()] * 5]), "state": state}
        for again in [row] * chance.choice([1, 1, 2]):
            rows.append({**again, "trial_id": name, "clock": float(row["epoch"])})
            stop = report(scheduler, name, again) == "STOP"
        if stop or state == "finished":
            del at[name]
    wanted = decide_again(
        rows,
        scheduler.rungs,
        scheduler._reduction_factor,
        mode=mode,
        min_peers=min_peers,
        bracket_of=scheduler.bracket,
    )
    assert wanted.rungs == log.rungs and wanted.stops.keys() == log.stopped.keys()
    per_trial: dict[str, list[float]] = {}
    for trial_id, _, rung, _ in log.rungs:
        per_trial.setdefault(trial_id, []).append(rung)
    assert all(rungs == sorted(set(rungs)) for rungs in per_trial.values())  # each once, and upwards only


# ---------------------------------------------------------------- the clock


def test_trials_meet_at_the_same_place_of_the_schedule() -> None:
    lengths = {"0000": (20, 5, 50, 5, 70), "0001": (10, 5, 100, 5, 70), "0002": (40, 0, 25, 5, 70)}
    stage = StageClock(Config())
    log = Log()
    scheduler = asha(log, total=stage.total, grace=25, factor=2, clock=lambda t, epoch: stage.time(lengths[t], epoch))
    assert scheduler.rungs == ((25.0, 50.0, 100.0),)
    for trial_id in lengths:
        for epoch in range(1, sum(lengths[trial_id])):
            assert feed(scheduler, trial_id, epoch, 0.5) == "CONTINUE"
    ends = {trial_id: [row for row in log.rows if row["trial_id"] == trial_id] for trial_id in lengths}
    first = {t: next(row["epoch"] for row in rows if row["clock"] >= 25) for t, rows in ends.items()}
    assert first == {"0000": 25, "0001": 15, "0002": 41}  # the end of stage 2; 0002 has none
    assert Counter(rung for _, _, rung, _ in log.rungs) == {25.0: 3, 50.0: 3, 100.0: 3}


def test_rungs_count_from_the_fork_and_none_without_a_grace() -> None:
    assert asha(total=150, grace=8, fork=25).rungs == ((33.0, 41.0, 57.0, 89.0),)
    assert asha(total=20, grace=2, fork=0, brackets=3).rungs == ((2, 4, 8, 16), (4, 8, 16), (8, 16))
    log = Log()
    free = asha(log, grace=None, brackets=2)
    assert free.rungs == ((), ())
    for trial_id, value in (("0000", 0.9), ("0001", 0.1)):
        assert {feed(free, trial_id, epoch, value) for epoch in range(1, 16)} == {"CONTINUE"}
        feed(free, trial_id, 16, value, state="finished")
    assert log.rungs == [] and len(log.ends) == 2


# ---------------------------------------------------------------- reasons


def test_a_stop_says_where_why_and_against_how_many_after_its_rung_is_logged() -> None:
    log = Log()
    scheduler = asha(log, grace=8, factor=3)
    for trial_id, value in (("0000", 0.3), ("0001", 0.4)):
        assert feed(scheduler, trial_id, 8, value) == "CONTINUE"
    assert feed(scheduler, "0002", 8, 0.2) == "STOP"
    assert log.ends == {"0002": ("stopped", "epoch 8: m 0.2, below the rung's top 1/3 at 0.3667 (n = 2)")}
    assert log.order[-3:] == ["row", "rung", "end"] and log.rungs[-1] == ("0002", 0, 8.0, 0.2)


def test_smaller_is_better_in_mode_min_and_values_are_logged_as_reported() -> None:
    log = Log()
    scheduler = asha(log, "min")
    feed(scheduler, "0000", 2, 1.0)
    assert feed(scheduler, "0001", 2, 1.5) == "STOP"
    assert log.stopped == {"0001": "epoch 2: m 1.5, above the rung's top 1/2 at 1 (n = 1)"}
    assert log.rungs == [("0000", 0, 2.0, 1.0), ("0001", 0, 2.0, 1.5)]


@pytest.mark.parametrize(
    ("value", "bound", "texts"),
    [
        (0.28901, 0.28902, ("0.28901", "0.28902")),
        (0.2, 0.20000000001, ("0.2", "0.20000000001")),
        (0.1, math.nextafter(0.1, 1), ("0.10000000000000001", "0.10000000000000002")),
    ],
)
def test_a_reason_never_has_two_equal_numbers(value: float, bound: float, texts: tuple[str, str]) -> None:
    log = Log()
    scheduler = asha(log)
    feed(scheduler, "0000", 2, bound)
    feed(scheduler, "0001", 2, value)
    assert log.stopped["0001"] == f"epoch 2: m {texts[0]}, below the rung's top 1/2 at {texts[1]} (n = 1)"


# ---------------------------------------------------------------- peers and brackets


def test_a_decision_needs_min_peers_others() -> None:
    for min_peers in (1, 2, 3, 5):
        log = Log()
        scheduler = asha(log, min_peers=min_peers)
        answers = [feed(scheduler, f"{i:04d}", 2, 1.0 - i / 10) for i in range(7)]
        assert answers == ["CONTINUE"] * min_peers + ["STOP"] * (7 - min_peers)
        assert len(log.rungs) == 7  # also those that were let through


def test_brackets_are_seeded_and_as_frequent_as_rays() -> None:
    trials = 3000
    rays = AsyncHyperBandScheduler("t", "m", "max", 16, 2, 2, brackets=3)
    np.random.seed(0)  # Ray's draw is from the global generator
    for i in range(trials):
        add(rays, f"{i:04d}")
    first, second, other = (asha(brackets=3, seed=seed, total=17) for seed in (7, 7, 8))

    def drawn(scheduler: Any, order: Iterable[int]) -> dict[str, int]:
        for i in order:
            add(scheduler, f"{i:04d}")
        return {trial_id: scheduler._brackets.index(bracket) for trial_id, bracket in scheduler._trial_info.items()}

    ours = drawn(first, range(trials))
    assert ours == drawn(second, reversed(range(trials))) != drawn(other, range(trials))
    counts, expected = Counter(ours.values()), Counter(drawn(rays, ()).values())
    weights = np.exp([0, -1, -2])  # 4, 3 and 2 rungs
    for s, share in enumerate(weights / weights.sum()):
        spread = math.sqrt(trials * share * (1 - share))
        assert abs(counts[s] - trials * share) < 4 * spread and abs(expected[s] - trials * share) < 4 * spread


def test_a_trial_that_is_tried_again_keeps_bracket_and_rungs() -> None:
    log = Log()
    scheduler = asha(log, brackets=3, total=17)
    names = [f"{i:04d}" for i in range(20)]
    for name in names:
        add(scheduler, name)
        feed(scheduler, name, 8, 0.5)
    brackets, rungs = dict(scheduler._trial_info), list(log.rungs)
    for name in names:
        scheduler.on_trial_error(NO_CONTROLLER, fake(name))  # Tune tells of the error, then adds the trial again
        add(scheduler, name)
        assert feed(scheduler, name, 8, 0.5) == feed(scheduler, name, 9, 0.1) == "CONTINUE"
    assert scheduler._trial_info == brackets and log.rungs == rungs


def test_an_unknown_trial_can_be_removed() -> None:
    scheduler = asha()
    scheduler.on_trial_remove(NO_CONTROLLER, fake("0042"))
    complete(scheduler, "0042", {"epoch": 2, "m": 0.5})
    assert all(not recorded for _, recorded in scheduler._brackets[0]._rungs)


def test_finite_takes_numbers_only() -> None:
    assert finite(np.float32(0.5)) == 0.5 and finite(3) == 3.0
    assert all(finite(x) is None for x in (None, True, "1", float("nan"), -float("inf"), [1.0]))


def test_a_free_process_goes_to_the_newest_trial_and_never_to_one_whose_own_is_starting() -> None:
    """Tune gives the process of an ended trial to the trial that the scheduler names."""
    trials: list[SimpleNamespace] = []
    freed: list[bool] = []
    inside = SimpleNamespace(_cleanup_cached_actors=lambda force_all: freed.append(force_all))
    tune_controller: Any = SimpleNamespace(get_trials=lambda: trials, _tune_controller=inside)
    left = [1]
    scheduler = StageASHA(
        "acc", "max", total=10, grace=2, factor=2, clock=lambda trial, epoch: epoch, ledger=None,  # type: ignore[arg-type]
        exhausted=lambda: not left,
    )  # fmt: skip

    def named() -> str | None:
        chosen = scheduler.choose_trial_to_run(tune_controller)
        return chosen.trial_id if chosen else None

    assert named() is None and not freed
    trials += [SimpleNamespace(trial_id=name, status="PENDING", init_local_path=lambda: None) for name in "abc"]
    assert named() == "a"  # all drawn at once: the first one first, which is the base
    assert named() == "c"  # a and b have asked for processes of their own
    trials[2].status = "RUNNING"
    assert named() == "b"
    trials.append(SimpleNamespace(trial_id="d", status="PENDING", init_local_path=lambda: None))
    assert named() == "d"
    left.clear()
    assert named() == "d" and not freed
    for trial in trials:
        trial.status = "RUNNING"
    assert named() is None and freed == [True]


def test_where_the_search_is_cut_short_nothing_that_waits_begins() -> None:
    stopped: list[str] = []

    def trial(name: str, status: str, actor: str | None) -> SimpleNamespace:
        place = SimpleNamespace(ray_actor=actor)
        folder = lambda: stopped.append(f"folder of {name}")  # noqa: E731
        return SimpleNamespace(trial_id=name, status=status, temporary_state=place, init_local_path=folder)

    trials = [trial("a", "RUNNING", "an actor"), trial("b", "PENDING", None), trial("c", "PENDING", "taken over")]
    tune_controller: Any = SimpleNamespace(
        get_trials=lambda: trials, stop_trial=lambda trial: stopped.append(trial.trial_id)
    )
    scheduler = StageASHA(
        "acc", "max", total=10, grace=2, factor=2, clock=lambda trial, epoch: epoch, ledger=None,  # type: ignore[arg-type]
        draining=lambda: True,
    )  # fmt: skip
    assert scheduler.choose_trial_to_run(tune_controller) is None
    assert stopped == ["folder of b", "folder of c", "b"]
