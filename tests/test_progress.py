"""Best so far over hours: what counts when, what costs what, and what is said where times are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from landscapes import space_of_text, with_objectives, write_landscape

from hpcl.analysis.progress import best_so_far, finishes
from hpcl.errors import UserError

SPACE = space_of_text("space: {topk.margin: {float: [0.5, 2.0]}}")


def test_an_objective_counts_from_the_last_epoch_of_its_trial_on(tmp_path: Path) -> None:
    # Two epochs of 36 s each: 0.02 hours a trial, 0.01 for the one that was stopped.
    search = write_landscape(tmp_path / "a", SPACE, [0.5, None, 0.4, 0.7], trials=4)
    progress = best_so_far(search)
    np.testing.assert_allclose(progress.spent, [0.02, 0.07])
    np.testing.assert_allclose(progress.best, [0.5, 0.7])
    assert progress.trials == ("0000", "0003")
    assert progress.unit == "CPU-hours"
    assert progress.curve == "linear probe"
    assert progress.total == pytest.approx(0.07)
    assert progress.at(0.0199) is None
    assert progress.at(0.02) == 0.5
    assert progress.at(0.0699) == 0.5
    assert progress.at(10.0) == 0.7


def test_what_trials_share_costs_once_and_at_the_start(tmp_path: Path) -> None:
    progress = best_so_far(write_landscape(tmp_path / "a", SPACE, [0.5, 0.6], trials=2, shared=1))
    np.testing.assert_allclose(progress.spent, [0.02, 0.03])
    assert progress.total == pytest.approx(0.03)


def test_rows_are_taken_in_order_of_arrival(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], trials=2)
    order = {("0001", 1): 0, ("0001", 2): 1, ("0000", 1): 2, ("0000", 2): 3}
    arrival = [order[t, e] for t, e in zip(search.epochs["trial_id"], search.epochs["epoch"], strict=True)]
    progress = best_so_far(replace(search, epochs=search.epochs.assign(arrival=arrival)))
    assert progress.trials == ("0001",)
    np.testing.assert_allclose(progress.spent, [0.02])


def test_a_trial_costs_its_hours_also_where_a_retry_repeated_epochs(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], trials=2)
    dearer = replace(search, trials=search.trials.assign(cpu_hours=[1.0, 0.02]))
    np.testing.assert_allclose(best_so_far(dearer).spent, [1.0, 1.02])


def test_gpu_hours_are_counted_where_there_were_gpus(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], trials=2)
    progress = best_so_far(replace(search, trials=search.trials.assign(gpu_hours=[2.0, 3.0])))
    assert progress.unit == "GPU-hours"
    np.testing.assert_allclose(progress.spent, [2.0, 5.0])


def test_wall_time_is_the_search_s_length_spread_evenly(tmp_path: Path) -> None:
    wall = best_so_far(write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], trials=2)).wall()
    assert wall is not None
    np.testing.assert_allclose(wall, [0.1, 0.2])  # 720 s in all


def test_what_is_no_number_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.5, 0.6, 0.7], trials=3, facts={"seconds": "abc"})
    search = with_objectives(search, [0.5, float("inf"), 0.7])
    progress = best_so_far(search)
    np.testing.assert_allclose(progress.best, [0.5, 0.7])
    assert progress.wall_hours is None and progress.wall() is None
    assert len(finishes(search)[0]) == 2
    endless = replace(search, epochs=search.epochs.assign(acc_proto_ref=[0.1, np.inf, 0.2, 0.3, 0.1, 0.1]))
    np.testing.assert_allclose(best_so_far(endless, "acc_proto_ref").best, [0.1, 0.2, 0.3])
    search = write_landscape(tmp_path / "a", SPACE, [0.5, 0.6, 0.7], trials=3, chosen_by="acc_proto_ref")
    gone = replace(search, epochs=search.epochs[search.epochs["trial_id"] != "0000"])
    assert "1 finished trial without rows in epochs" in best_so_far(gone).notes[0]


def test_without_finished_trials_there_is_no_step(tmp_path: Path) -> None:
    progress = best_so_far(write_landscape(tmp_path / "a", SPACE, [None, None], trials=2))
    assert len(progress.spent) == 0
    assert progress.at(1.0) is None
    assert progress.total == pytest.approx(0.02)


def test_epochs_are_counted_where_no_times_are_known(tmp_path: Path) -> None:
    progress = best_so_far(write_landscape(tmp_path / "a", SPACE, [0.5, 0.7], trials=2, seconds=0.0, shared=1))
    assert progress.unit == "epochs"
    np.testing.assert_allclose(progress.spent, [2.0, 3.0])
    assert "no times are known" in progress.notes[0]


def test_a_curve_counts_in_every_epoch_and_smaller_losses_are_better(tmp_path: Path) -> None:
    search = write_landscape(tmp_path / "a", SPACE, [0.5, None], trials=2)
    progress = best_so_far(search, "acc_proto_ref")
    np.testing.assert_allclose(progress.best, [0.4, 0.5])
    loss = replace(search, epochs=search.epochs.assign(loss=[3.0, 2.0, 1.0]))
    np.testing.assert_allclose(best_so_far(loss, "loss").best, [3.0, 2.0, 1.0])
    with pytest.raises(UserError, match="has no curve growth"):
        best_so_far(search, "growth")
