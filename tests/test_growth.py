"""The count sequence, and the three growth policies by tables of traces."""

from __future__ import annotations

import doctest
import json
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hpcl.growth
from hpcl.growth import Decision, Policy, level_counts, make_policy, next_count
from hpcl.sections import Growth

SEQUENCE = (2, 4, 7, 12, 21, 36, 62, 106, 181, 308)
"""The notes' counts from 2 with multiplier 1.7."""


def policy_of(total: int = 100, most: int = 1000, **fields: Any) -> Policy:
    return make_policy(Growth.model_validate(fields), total, most)


def trace(policy: Policy, rows: list[tuple[float, float]], first_epoch: int = 1, next_finest: int = 4) -> str:
    """The rule numbers of the decisions on (acc_proto, acc_inst), one digit per epoch."""
    numbers = ""
    for epoch, (proto, inst) in enumerate(rows, start=first_epoch):
        decision = policy.update(epoch, proto, inst, next_finest=next_finest)
        assert decision.reason[1:3] == ": "
        assert decision.grow == (decision.reason[0] == "5")
        numbers += decision.reason[0]
    return numbers


# ---------------------------------------------------------------- counts


def test_the_notes_sequence() -> None:
    assert level_counts(2, 1.7, 0, 10) == SEQUENCE
    k, seen = 2, [2]
    for _ in range(9):
        k = next_count(k, 1.7)
        seen.append(k)
    assert tuple(seen) == SEQUENCE


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_levels_are_consecutive_counts_and_growth_moves_them_by_one(index: int, levels: int) -> None:
    assert level_counts(2, 1.7, index, levels) == SEQUENCE[index : index + levels]


@settings(deadline=None, max_examples=100)
@given(first=st.integers(1, 500), hundredths=st.integers(101, 1000), index=st.integers(0, 6), levels=st.integers(1, 8))
def test_counts_are_the_rule_in_whole_numbers(first: int, hundredths: int, index: int, levels: int) -> None:
    counts = level_counts(first, hundredths / 100, index, levels)
    assert len(counts) == levels
    assert level_counts(first, hundredths / 100, 0, index + 1)[-1] == counts[0]
    for k, following in pairwise(counts):
        assert following == max(k + 1, -(-hundredths * k // 100))


@pytest.mark.parametrize(
    ("k", "multiplier", "wanted"),
    [(1, 1.7, 2), (1, 1.01, 2), (50, 1.1, 55), (25, 1.12, 28), (25, 2.2, 55), (3, 10.0, 30)],
)
def test_next_count_closed_cases(k: int, multiplier: float, wanted: int) -> None:
    """Among them multipliers whose float product lies a hair above a whole number."""
    assert next_count(k, multiplier) == wanted


def test_counts_refuse_what_is_no_count() -> None:
    with pytest.raises(ValueError, match="k is 0, but must be >= 1"):
        next_count(0, 1.7)
    with pytest.raises(ValueError, match="levels is 0"):
        level_counts(2, 1.7, 0, 0)


# ---------------------------------------------------------------- window

TRACES: list[tuple[str, dict[str, Any], list[tuple[float, float]], str]] = [
    ("flat accuracies grow as soon as the window is full", {}, [(0.5, 0.5)] * 9, "222522252"),
    ("a window of one epoch", {"window": 1}, [(0.5, 0.5)] * 6, "252525"),
    ("acc_proto gains for ever", {}, [(0.1 + 0.01 * e, 0.5) for e in range(9)], "222333333"),
    ("acc_proto equal to the best is no gain", {}, [(0.3, 0.5), (0.5, 0.5), (0.4, 0.5), (0.5, 0.5)], "2225"),
    ("acc_proto a hair above the best is", {}, [(0.3, 0.5), (0.5, 0.5), (0.4, 0.5), (0.5001, 0.5)], "2223"),
    (
        "the best is that of the window only, which 0.9 has left",
        {},
        [(0.9, 0.1), (0.1, 0.1), (0.1, 0.1), (0.1, 0.5), (0.2, 0.5)],
        "22243",
    ),
    ("theta_proto asks for a relative gain", {"theta_proto": 0.1}, [(0.5, 0.5)] * 3 + [(0.55, 0.5)], "2225"),
    ("and holds above it", {"theta_proto": 0.1}, [(0.5, 0.5)] * 3 + [(0.5501, 0.5)], "2223"),
    ("acc_inst gains more than theta", {"theta_end": 0.05}, [(0.5, 0.5)] * 3 + [(0.5, 0.53)], "2224"),
    ("acc_inst gains less than theta", {"theta_end": 0.05}, [(0.5, 0.5)] * 3 + [(0.5, 0.52)], "2225"),
    ("3 is asked before 4", {"theta_end": 0.05}, [(0.5, 0.5)] * 3 + [(0.6, 0.9)], "2223"),
    ("a gain from 0 is a gain", {}, [(0.5, 0.0)] * 3 + [(0.5, 1e-3)], "2224"),
    ("an accuracy of 0 throughout grows", {}, [(0.0, 0.0)] * 4, "2225"),
    (
        "a loss of 4 % counts as a gain where theta is -5 %",
        {"theta_start": -0.05, "theta_end": -0.05, "step": 0.0},
        [(0.5, 0.50)] * 3 + [(0.5, 0.48), (0.5, 0.47)],
        "22245",
    ),
    (
        "theta rises at every hold of kind 4 until the same gain no longer holds",
        {"theta_start": 0.05, "theta_end": 0.05, "step": 0.02},
        [(0.5, 0.40)] * 3 + [(0.5, 0.4 * 1.08**e) for e in range(1, 4)],
        "222445",
    ),
    (
        "and a growth restores it",
        {"theta_start": 0.05, "theta_end": 0.05, "step": 0.02},
        [(0.5, 0.40)] * 3 + [(0.5, 0.4 * 1.08**e) for e in range(1, 4)] + [(0.5, 0.4)] * 3 + [(0.5, 0.4 * 1.08)],
        "2224452224",
    ),
    (
        "a hold of kind 3 leaves theta as it was raised",
        {"theta_start": 0.05, "theta_end": 0.05, "step": 0.02},
        [(0.5, 0.40)] * 3 + [(0.5, 0.432), (0.6, 0.432), (0.5, 0.432 * 1.06)],
        "222435",
    ),
    ("max_hold overrides 3", {"max_hold": 5}, [(0.01 * e, 0.5) for e in range(1, 11)], "2223522235"),
    ("max_hold overrides 4", {"max_hold": 5}, [(0.5, 0.1 * 1.5**e) for e in range(1, 6)], "22245"),
    ("max_hold does not override 2", {"max_hold": 1}, [(0.01 * e, 0.5) for e in range(1, 9)], "22252225"),
    ("nor does it wait where 5 comes earlier", {"max_hold": 9}, [(0.5, 0.5)] * 4, "2225"),
]


@pytest.mark.parametrize(("fields", "rows", "wanted"), [t[1:] for t in TRACES], ids=[t[0] for t in TRACES])
def test_window_traces(fields: dict[str, Any], rows: list[tuple[float, float]], wanted: str) -> None:
    fields = {"theta_start": 0.05, "theta_end": 0.05} | fields
    assert trace(policy_of(**fields), rows) == wanted


@pytest.mark.parametrize("name", ["window", "plateau", "fixed"])
def test_rule_1_holds_where_the_next_count_is_too_large_and_stores_nothing(name: str) -> None:
    policy = policy_of(policy=name, most=12, window=1, max_hold=1)
    before = policy.state_dict()
    decision = policy.update(1, 0.5, 0.5, next_finest=13)
    assert decision.grow is False
    assert decision.reason == "1: next finest count 13 > 12 clusters at most"
    after = policy.state_dict()
    assert {k: v for k, v in after.items() if k != "held"} == {k: v for k, v in before.items() if k != "held"}
    at_most = policy_of(policy=name, most=12, window=1, hold=1, patience=1)
    assert trace(at_most, [(0.5, 0.5)] * 2, next_finest=12) == ("55" if name == "fixed" else "25")


def test_the_epoch_that_grows_is_not_stored() -> None:
    """It belongs to the old count: a high acc_proto in it must not bar the next count."""
    policy = policy_of(window=1)
    policy.update(1, 0.9, 0.5, next_finest=4)
    assert policy.update(2, 0.8, 0.5, next_finest=4).grow
    assert policy.state_dict()["proto"] == []
    assert trace(policy, [(0.3, 0.5), (0.4, 0.5)], first_epoch=3) == "23"


def test_theta_loosens_from_start_to_end_and_goes_with_every_decision() -> None:
    fields: dict[str, Any] = {"theta_start": 0.09, "theta_end": -0.01, "gamma": 2.0, "step": 0.5}
    policy = policy_of(total=10, **fields)
    for epoch in range(1, 13):
        decision = policy.update(epoch, 0.01 * epoch, 0.5, next_finest=4)
        left = max(0.0, 1 - epoch / 10)
        assert decision.theta == pytest.approx(-0.01 + 0.1 * left**2)
    assert policy_of(policy="fixed").update(1, 0.5, 0.5, next_finest=4).theta is None
    assert policy_of(policy="plateau").update(1, 0.5, 0.5, next_finest=4).theta is None


def test_theta_of_a_decision_is_the_one_it_compared_with() -> None:
    policy = policy_of(window=1, theta_start=0.05, theta_end=0.05, step=0.02)
    thetas = [policy.update(e, 0.5, 0.1 * 2**e, next_finest=4).theta for e in range(1, 5)]
    assert thetas == pytest.approx([0.05, 0.05, 0.07, 0.09])


def test_reasons_carry_the_figures() -> None:
    def last(rows: list[tuple[float, float]], **fields: Any) -> str:
        policy = policy_of(theta_start=0.05, theta_end=0.05, **fields)
        return [policy.update(e, *row, next_finest=4).reason for e, row in enumerate(rows, 1)][-1]

    held = [(0.39, 0.5)] * 3
    assert last([(0.5, 0.5)] * 2) == "2: 2 of 3 epochs in the window"
    assert last([*held, (0.412, 0.5)]) == "3: acc_proto 0.412 > 0.39 of the window"
    assert last([*held, (0.3, 0.6)]) == "4: acc_inst gained 0.2 > theta 0.05"
    assert last([*held, (0.3, 0.5)]) == "5: acc_proto 0.3 <= 0.39, acc_inst gained 0 <= theta 0.05"
    assert last([*held, (0.412, 0.5)], max_hold=4) == (
        "5: 4 epochs at this count, max_hold 4 (over 3: acc_proto 0.412 > 0.39 of the window)"
    )


def test_a_stage_switch_empties_the_window_and_keeps_theta_and_the_hold() -> None:
    policy = policy_of(theta_start=0.05, theta_end=0.05, step=0.02, max_hold=9)
    assert trace(policy, [(0.5, 0.4)] * 3 + [(0.5, 0.5)]) == "2224"
    policy.clear()
    assert policy.state_dict() == {"policy": "window", "proto": [], "inst": [], "raises": 1, "held": 4}
    assert trace(policy, [(0.1 * e, 0.5) for e in range(1, 6)], first_epoch=5) == "22235"


# ---------------------------------------------------------------- plateau, fixed

PLATEAU_TRACES: list[tuple[str, dict[str, Any], list[tuple[float, float]], str]] = [
    ("two flat epochs after the first grow", {}, [(0.5, 0.5)] * 7, "2252252"),
    ("patience 1", {"patience": 1}, [(0.5, 0.5)] * 4, "2525"),
    ("acc_proto gains 1 % over the mean", {}, [(0.5, 0.5), (0.505001, 0.5), (0.5, 0.5), (0.5, 0.5)], "2325"),
    ("acc_proto gains less", {}, [(0.5, 0.5), (0.504, 0.5), (0.504, 0.5)], "225"),
    ("acc_inst gains alone", {}, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7)], "244"),
    ("a gain starts the patience anew", {}, [(0.5, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 0.5), (0.5, 0.5)], "22325"),
    ("compared with the mean, not the best", {}, [(0.2, 0.5), (0.8, 0.5), (0.6, 0.5)], "233"),
    ("max_hold", {"max_hold": 3}, [(0.1 * e, 0.5) for e in range(1, 7)], "235235"),
]


@pytest.mark.parametrize(
    ("fields", "rows", "wanted"), [t[1:] for t in PLATEAU_TRACES], ids=[t[0] for t in PLATEAU_TRACES]
)
def test_plateau_traces(fields: dict[str, Any], rows: list[tuple[float, float]], wanted: str) -> None:
    assert trace(policy_of(policy="plateau", **fields), rows) == wanted


def test_plateau_forgets_at_a_stage_switch() -> None:
    policy = policy_of(policy="plateau")
    assert trace(policy, [(0.5, 0.5)] * 2) == "22"
    policy.clear()
    assert trace(policy, [(0.5, 0.5)] * 3) == "225"


@pytest.mark.parametrize(
    ("fields", "wanted"), [({"hold": 3}, "225225225"), ({"hold": 1}, "555555555"), ({"max_hold": 2}, "252525252")]
)
def test_fixed_grows_by_the_clock(fields: dict[str, Any], wanted: str) -> None:
    rows = [(0.1 * e % 1, 0.3) for e in range(9)]
    assert trace(policy_of(policy="fixed", **fields), rows) == wanted


def test_fixed_counts_on_over_a_stage_switch() -> None:
    policy = policy_of(policy="fixed", hold=3)
    assert trace(policy, [(0.5, 0.5)] * 2) == "22"
    policy.clear()
    assert trace(policy, [(0.5, 0.5)]) == "5"


# ---------------------------------------------------------------- all three


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["window", "plateau", "fixed"]),
    rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    switch=st.integers(0, 30),
    max_hold=st.sampled_from([None, 4]),
)
def test_resuming_anywhere_gives_the_same_decisions(
    name: str, rows: list[tuple[float, float]], cut: int, switch: int, max_hold: int | None
) -> None:
    def fresh() -> Policy:
        return policy_of(total=30, policy=name, theta_end=-0.3, hold=3, max_hold=max_hold)

    def run(cuts: set[int]) -> tuple[list[Decision], dict[str, Any]]:
        policy, decisions = fresh(), []
        for epoch, (proto, inst) in enumerate(rows, start=1):
            if epoch in cuts:
                text = json.dumps(policy.state_dict(), allow_nan=False)
                policy = fresh()
                policy.load_state_dict(json.loads(text))
            if epoch == switch:
                policy.clear()
            decisions.append(policy.update(epoch, proto, inst, next_finest=4))
        return decisions, policy.state_dict()

    assert run({cut}) == run(set()) == run(set(range(31)))


def test_resuming_in_mid_window_by_hand() -> None:
    policy = policy_of(theta_start=0.05, theta_end=0.05)
    assert trace(policy, [(0.4, 0.5), (0.6, 0.5), (0.5, 0.5), (0.5, 0.6)]) == "2224"
    state = policy.state_dict()
    assert state == {"policy": "window", "proto": [0.6, 0.5, 0.5], "inst": [0.5, 0.5, 0.6], "raises": 1, "held": 4}
    resumed = policy_of(theta_start=0.05, theta_end=0.05)
    resumed.load_state_dict(state)
    # Without its window it would answer 2 first, without its raise 4 at the end; the
    # best of (0.6, 0.5, 0.5) must have left the window by the second epoch.
    held, last = [(0.5, 0.8), (0.55, 0.8)], [(0.55, 0.8 * 1.055)]
    assert trace(resumed, held, first_epoch=5) == trace(policy, held, first_epoch=5) == "43"
    assert resumed.state_dict() == policy.state_dict()
    assert trace(resumed, last, first_epoch=7) == trace(policy, last, first_epoch=7) == "5"


def test_a_state_is_a_copy() -> None:
    policy = policy_of()
    state = policy.state_dict()
    policy.update(1, 0.5, 0.5, next_finest=4)
    assert state["proto"] == []
    assert state["held"] == 0


@pytest.mark.parametrize("name", ["window", "plateau", "fixed"])
def test_a_state_of_another_policy_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"growth policy 'other', but this run uses '{name}'"):
        policy_of(policy=name).load_state_dict({"policy": "other"})


@pytest.mark.parametrize("name", ["window", "plateau"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_accuracy_that_is_no_number_is_refused_instead_of_growing(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"acc_inst is (nan|inf), but must be a finite fraction"):
        policy_of(policy=name).update(1, 0.5, value, next_finest=4)


def test_a_run_of_no_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="total_epochs is 0"):
        policy_of(total=0)


def imports_torch(module: str) -> bool:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_growth_is_pure() -> None:
    assert not imports_torch("hpcl.growth")
    assert imports_torch("hpcl.losses"), "the check must be able to fail"


def test_the_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(hpcl.growth)
    assert result.attempted > 0
    assert result.failed == 0
