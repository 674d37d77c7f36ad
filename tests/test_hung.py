"""Which trials are taken as hung, and what a failure costs a trial; the kill itself is in test_search_hung."""

from __future__ import annotations

import pytest

from hpcl.search.failures import MOST_LOSSES, Attempts, machine_lost
from hpcl.search.hung import FIRST, LEAST, STALL, START, Watch


def watch(times: float | None = 20) -> Watch:
    """Two trials that have trained an epoch of 60 s, `b` a second before `a`."""
    found = Watch(times)
    for trial, second in (("b", 69.0), ("a", 70.0)):
        found.began(trial, 0.0)
        found.reported(trial, {"begun": True}, 1.0)
        found.reported(trial, {"epoch": 1, "seconds": 60.0}, second)
    return found


def test_silence_is_measured_in_epochs_of_the_search() -> None:
    found = watch()
    assert found.hung(1269.0) == []  # 20 epochs of 60 s are allowed
    assert found.hung(1270.0) == ["b"]
    assert found.hung(1271.0) == ["a"]  # and b is not named again
    assert found.left("a") == "it hung: no report for 20 min 1 s (an epoch took 1 min 0 s at most)"


def test_a_kill_that_did_not_help_is_tried_again() -> None:
    found = watch()
    named = [second for second in range(60, 3600) if found.hung(float(second)) == ["b"]]
    assert named == [1270, 2471]  # as long again
    assert str(found.left("b")).startswith("it hung: no report for 20 min 1 s")  # the first time counts


def test_where_this_process_stood_still_nobody_was_silent() -> None:
    found = watch()
    assert found.hung(71.0) == []
    assert found.hung(5000.0) == []  # Ctrl-Z, or a write that took an hour: reports of that time are still to be read
    assert found.hung(5000.0 + STALL) == []
    assert found.hung(5000.0 + 2 * STALL) == []
    seconds = [second for second in range(5020, 7000) if found.hung(float(second))]
    assert seconds[0] == 5000 + 1270 - 71


def test_short_epochs_leave_time_for_a_pass_over_all_images() -> None:
    found = Watch(20)
    found.began("a", 0.0)
    found.reported("a", {"epoch": 1, "seconds": 0.1}, 0.0)
    assert found.hung(LEAST) == []
    assert found.hung(LEAST + 1) == ["a"]


def test_a_process_has_time_to_start() -> None:
    found = Watch(2)
    found.began("a", 0.0)
    found.reported("a", {}, 0.0)
    assert found.hung(FIRST) == []  # the first epoch of a search may be long: nobody knows
    assert found.hung(FIRST + 1) == ["a"]
    assert "no epoch has ended yet" in str(found.left("a"))
    found = Watch(2)
    found.epoch(1.0)
    found.began("a", 0.0)  # it has said nothing yet: it may hang while it starts
    assert found.hung(START) == []
    assert found.hung(START + 1) == ["a"]


def test_a_trial_that_ended_or_began_anew_is_not_hung() -> None:
    found = watch()
    assert found.left("a") is None
    found.began("b", 5000.0)
    assert found.hung(5001.0) == []


def test_never_where_it_is_switched_off() -> None:
    assert watch(None).hung(9e9) == []


def test_epochs_of_an_earlier_process_count() -> None:
    found = Watch(20)
    found.epoch(None)
    found.epoch(600.0)
    found.began("a", 0.0)
    found.reported("a", {}, 0.0)
    assert found.hung(11_999.0) == []
    assert found.hung(12_001.0) == ["a"]


def test_failures_count_and_lost_machines_do_not() -> None:
    attempts = Attempts(retries=2)
    for epoch in range(20):
        assert attempts.failed("a", epoch, lost=True)
    assert [attempts.failed("a", 3, lost=False) for _ in range(3)] == [True, True, False]
    assert attempts.failed("b", 3, lost=False)


def test_a_trial_that_always_loses_its_machine_at_one_epoch_ends() -> None:
    attempts = Attempts(retries=0)
    assert [attempts.failed("a", 4, lost=True) for _ in range(MOST_LOSSES)] == [True] * (MOST_LOSSES - 1) + [False]
    assert attempts.failed("a", 5, lost=True)


@pytest.mark.parametrize(
    "text, lost",
    [
        ("The actor died because its node has died. Node Id: 4f", True),
        ("ray.exceptions.ActorUnavailableError: The actor is temporarily unavailable: RPC error", True),
        ("rank 1: its machine was lost (Ray: ActorDiedError)", True),
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", False),
        ("ValueError: node 3 of the tree has no child", False),
    ],
)
def test_what_a_lost_machine_sounds_like(text: str, lost: bool) -> None:
    assert machine_lost(text) is lost
