"""What ends a search, and what the plan says about it."""

from __future__ import annotations

from typing import Any

import pytest

from hpcl.search.budget import Budget


def spent(budget: Budget, **more: Any) -> str | None:
    return budget.exhausted(**{"trials_begun": 3, "seconds": 0.0, "gpu_seconds": 0.0, "epochs": 0, **more})


def binding(budget: Budget, **more: Any) -> str:
    facts = {"expected_epochs": 260.0, "seconds_per_epoch": None, "trials_at_a_time": 2, "gpus_per_trial": 0.5}
    return budget.binding(**{**facts, **more})


@pytest.mark.parametrize(
    ("budget", "facts", "words"),
    [
        (Budget(16, hours=1.5), {"seconds": 5400}, "1.5 hours are used up"),
        (Budget(16, gpu_hours=2), {"gpu_seconds": 7200}, "2 GPU-hours are used up"),
        (Budget(16, epochs=100), {"epochs": 100}, "100 epochs are used up"),
        (Budget(16, hours=1), {"seconds": 3600}, "1 hour is used up"),
    ],
)
def test_the_limit_that_is_reached_ends_the_search_and_only_that(
    budget: Budget, facts: dict[str, float], words: str
) -> None:
    ((name, value),) = facts.items()
    everything = {"seconds": 1e9, "gpu_seconds": 1e9, "epochs": 10**9}
    assert spent(budget, **facts) == f"{words} (3 of 16 trials begun)"
    assert spent(budget, **{**everything, name: value - 1}) is None


def test_limits_reached_at_once_are_both_told() -> None:
    both = spent(Budget(16, hours=1, epochs=100), seconds=3700.0, epochs=101)
    assert both == "1 hour and 100 epochs are used up (3 of 16 trials begun)"


def test_the_last_drawn_trial_ends_no_search() -> None:
    assert spent(Budget(16), trials_begun=16, seconds=1e9, gpu_seconds=1e9, epochs=10**9) is None


@pytest.mark.parametrize(
    ("budget", "facts", "words"),
    [
        (Budget(16), {}, "16 trials, after about 260 epochs"),
        (Budget(16, epochs=260), {}, "16 trials, after about 260 epochs"),
        (Budget(16, epochs=259), {}, "259 epochs, before the about 260 of 16 trials"),
        # 260 epochs of 60 s are 15,600 s for one trial at a time, 2.17 hours for two.
        (Budget(16, hours=2.2), {"seconds_per_epoch": 60.0}, "16 trials, after about 260 epochs"),
        (Budget(16, hours=2), {"seconds_per_epoch": 60.0}, "2 hours, after about 240 of the about 260 epochs of"),
        (Budget(16, hours=2), {"seconds_per_epoch": 60.0, "trials_at_a_time": 1}, "2 hours, after about 120 of"),
        # On half a GPU each they are 2.17 GPU-hours, however many trials run at a time.
        (Budget(16, gpu_hours=2), {"seconds_per_epoch": 60.0, "trials_at_a_time": 9}, "2 GPU-hours, after about 240"),
        (Budget(16, gpu_hours=2, hours=1, epochs=119), {"seconds_per_epoch": 60.0}, "119 epochs, before"),
        (Budget(16, gpu_hours=2, hours=1, epochs=121), {"seconds_per_epoch": 60.0}, "1 hour, after about 120 of"),
        (Budget(1), {"expected_epochs": 20.0}, "1 trial, after about 20 epochs"),
    ],
)
def test_the_plan_names_the_limit_that_comes_first(budget: Budget, facts: dict[str, Any], words: str) -> None:
    assert binding(budget, **facts).startswith(words)


def test_hours_are_not_compared_without_a_measured_epoch() -> None:
    text = binding(Budget(16, hours=0.001, gpu_hours=3, epochs=100))
    assert text == (
        "100 epochs, before the about 260 of 16 trials; whether 0.001 hours or 3 GPU-hours come first is known "
        "with a measured epoch only (--measure)"
    )


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_gpu_hours_never_bind_without_gpus(seconds: float | None) -> None:
    text = binding(Budget(16, gpu_hours=0.001), gpus_per_trial=0, seconds_per_epoch=seconds)
    assert text == "16 trials, after about 260 epochs; never 0.001 GPU-hours: the trials use no GPU"
