"""How much of a search is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_live import History, history, plan_of, state_of

from hpcl.search.forecast import elapsed, epochs_left, lengths_of, seconds_left
from hpcl.stages import stage_lengths


def test_epochs_left_follow_the_trials_that_ended(tmp_path: Path) -> None:
    made, plan = History(cpus=1.0), plan_of(tmp_path)
    assert epochs_left(state_of(made.events, plan)[0], plan) == pytest.approx(plan.epochs_expected)
    trial = made.begin(0)
    for epoch in range(1, 9):
        made.row(trial, epoch, 0.1)
    made.end(trial, "stopped")
    mean = (plan.epochs_expected / 8 + 8) / 2
    assert epochs_left(state_of(made.events, plan)[0], plan) == pytest.approx(7 * mean)
    trial = made.begin(1)
    made.row(trial, 18, 0.1)
    assert epochs_left(state_of(made.events, plan)[0], plan) == pytest.approx(6 * mean + 2)  # two are its last


def test_epochs_left_count_a_shared_prefix_until_it_is_trained(tmp_path: Path) -> None:
    made, plan = History(cpus=1.0), plan_of(tmp_path, "search.share_prefix=true")
    assert plan.prefixes is not None
    shared = plan.prefixes.nodes[-1].last_epoch
    assert epochs_left(state_of(made.events, plan)[0], plan) == pytest.approx(plan.epochs_expected)
    made.add("trial", trial="prefix-01", number=0, values={}, optuna=None)
    for epoch in range(1, shared + 1):
        made.row("prefix-01", epoch)
    made.end("prefix-01", "finished")
    assert epochs_left(state_of(made.events, plan)[0], plan) == pytest.approx(plan.epochs_expected - shared)


def test_lengths_are_those_of_the_trial_s_configuration(tmp_path: Path) -> None:
    made, plan = history(), plan_of(tmp_path)
    for sets, total in (((), 27), (("stages.total=40",), 40)):
        plan = plan_of(tmp_path, *sets)
        tables, _ = state_of(made.events, plan)
        config = plan.space.config_for(tables.values["0005"])
        assert lengths_of(tables, plan, "0005") == stage_lengths(config.stages)
        assert sum(stage_lengths(config.stages)) == total
        assert lengths_of(tables, plan, "0004") == stage_lengths(plan.space.base.stages)


def test_the_budget_that_is_used_up_first_ends_the_search(tmp_path: Path) -> None:
    made, plan = history(gpus=1.0), plan_of(tmp_path, gpus=1.0)
    tables, _ = state_of(made.events, plan)
    used, pace = 36 * 6.0, 6.0  # one epoch after the other
    assert elapsed(tables, made.now) == used and elapsed(tables, None) == used

    def left(*sets: str) -> tuple[float, str | None] | None:
        return seconds_left(tables, plan_of(tmp_path, *sets, gpus=1.0), made.now)

    assert left() == (pytest.approx(pace * epochs_left(tables, plan)), None)
    assert left("search.max_epochs=40") == (pytest.approx(pace * 4), "max_epochs")
    assert left("search.max_epochs=40", "search.max_hours=0.061") == (pytest.approx(0.061 * 3600 - used), "max_hours")
    assert left("search.max_gpu_hours=0.07") == (pytest.approx(36.0), "max_gpu_hours")
    assert left("search.max_epochs=30") == (0.0, "max_epochs")
    assert seconds_left(state_of(made.events[:2], plan)[0], plan, made.now) is None  # before the first epoch
