"""What a broken-off process costs a trial, told by Tune's own calls; fake trials, no Ray.

Tune tells of a process that dies between two trials twice: it recovers the next trial, then gives it up.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcl.search import progress
from hpcl.search.budget import Budget
from hpcl.search.interrupt import Draining
from hpcl.search.monitor import Monitor
from hpcl.search.plan import Node, make_plan
from hpcl.search.progress import Follow
from hpcl.search.queue import Prefixes, WorkQueue
from hpcl.search.sampler import Sampler
from hpcl.search.space import Space, apply_overrides, from_tree
from hpcl.search.store import PrefixStore
from hpcl.search.tables import Tables
from hpcl.yamlio import read_tree

SPACE = """
base: {stages: {total: 12}}
space: {clusters.first: {int: [2, 8]}}
search: {trials: 2, retries: 1, share_prefix: false}
"""
DIED = "Failure # 1\nray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n"
LOST = "Failure # 1\nray.exceptions.ActorDiedError: The actor died because its node has died. Node Id: 4f\n"


class Search:
    """A search of two trials, of which Tune has begun the first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
        self.space: Space = apply_overrides(from_tree(read_tree(SPACE)), changes)
        self.folder = folder
        self.tables = Tables(folder, self.space)
        self.plan = make_plan(self.space, [Node(2)], cluster="here", folder=folder)
        sampler = Sampler(self.space, startup=2)
        prefixes = None
        if self.plan.prefixes is not None:
            store = PrefixStore(folder / "prefixes", "s")
            prefixes = Prefixes(self.plan.prefixes, store, lambda node: f"key{node.stage}", lambda trial, epoch: epoch)
        self.draining = Draining()
        self.queue = WorkQueue(
            self.tables, sampler, trials=2, at_a_time=lambda: 1, folder=folder, prefixes=prefixes, closed=self.draining
        )
        self.said: list[str] = []
        monitor = Monitor(list(self.space.params), 1, 2)
        self.follow = Follow(
            self.tables, self.plan, Budget(trials=2), monitor, self.draining, self.queue, say=self.said.append
        )
        self.kills: list[Any] = []
        monkeypatch.setattr(progress.Watch, "kill", lambda watch, trial: self.kills.append(trial))
        self.number = 0

    def start(self) -> Any:
        """Tune's trial of the next job, with a process."""
        self.number += 1
        job = self.queue.suggest(f"t{self.number}")
        assert isinstance(job, dict)
        trial = SimpleNamespace(
            trial_id=f"t{self.number}", config=job, status="RUNNING", ERROR="ERROR", PENDING="PENDING", error_file=None,
            last_result={}, run_metadata=SimpleNamespace(), temporary_state=SimpleNamespace(ray_actor=None),
        )  # fmt: skip
        self.follow.on_trial_start(0, [], trial)
        return trial

    def fails(self, trial: Any, text: str, *, recovers: bool) -> None:
        """Its process breaks off, and Tune takes it up again or does not."""
        trial.error_file = str(self.folder / f"{trial.trial_id}.txt")
        Path(trial.error_file).write_text(text)
        for left in Path(trial.config["folder"]).glob("error.txt"):
            left.unlink()  # as a new process of the trial does
        if recovers:
            self.follow.on_trial_recover(0, [], trial)
        else:
            self.queue.on_trial_complete(trial.trial_id, error=True)
            self.follow.on_trial_error(0, [], trial)

    @property
    def first(self) -> dict[str, Any]:
        return self.tables.trials["0000"]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    return Search(tmp_path, monkeypatch)


def test_a_death_that_is_told_twice_is_one_attempt(search: Search) -> None:
    trial = search.start()
    search.fails(trial, DIED, recovers=True)
    search.fails(trial, DIED, recovers=False)
    assert search.first["state"] == "running" and search.first["retries"] == 1
    again = search.start()
    assert again.config["trial"] == "0000"
    search.fails(again, DIED, recovers=False)  # the second attempt of `retries: 1`
    assert search.first["state"] == "failed" and search.first["retries"] == 1


def test_a_process_that_never_starts_is_not_tried_for_ever(search: Search) -> None:
    state = "running"
    while state == "running" and search.number < 10:
        trial = search.start()
        search.fails(trial, DIED, recovers=True)
        search.fails(trial, DIED, recovers=True)
        search.fails(trial, DIED, recovers=False)
        state = search.first["state"]
    assert state == "failed" and search.number <= 2


def test_machines_that_were_lost_take_no_attempt_from_the_trials_own_errors(search: Search) -> None:
    trial = search.start()
    for _ in range(3):
        search.fails(trial, LOST, recovers=True)
        search.follow.on_trial_start(0, [], trial)
    search.fails(trial, "RuntimeError: NCCL\n", recovers=False)  # Tune's count is used up, ours is not
    assert search.first["state"] == "running" and search.first["retries"] == 4
    again = search.start()
    search.fails(again, "RuntimeError: NCCL\n", recovers=False)
    assert search.first["state"] == "failed"


def test_a_prefix_is_tried_again_like_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(tmp_path, monkeypatch, "search.share_prefix=true")
    prefix = search.start()
    assert prefix.config["trial"].startswith("prefix-")
    search.fails(prefix, LOST, recovers=False)
    again = search.start()
    assert again.config["trial"] == prefix.config["trial"] and again.config["until"] == prefix.config["until"]
    search.fails(again, DIED, recovers=True)
    search.fails(again, DIED, recovers=False)  # told twice
    third = search.start()
    assert third.config["trial"] == prefix.config["trial"]
    search.fails(third, DIED, recovers=False)
    assert search.tables.prefixes[prefix.config["trial"]]["state"] == "failed"
    assert search.start().config["trial"] == "0000"  # which trains the stages itself


def test_a_full_disk_is_no_failure_of_the_trial(search: Search) -> None:
    """Tune takes what its own callbacks raise for the trial's error."""
    trial = search.start()
    search.fails(trial, f"OSError: [Errno 28] {os.strerror(28)}: 'optuna.journal'\n", recovers=False)
    assert search.first["state"] == "running"
    assert search.draining.interrupted and "No space left" in str(search.draining.reason)


def test_a_trial_whose_process_was_not_let_go_is_handed_out_again(search: Search) -> None:
    trial = search.start()
    trial.status = "ERROR"  # Tune's answer to a process that did not leave its last trial; it tells nobody
    search.follow.on_step_end(0, [trial])
    assert search.first["state"] == "running" and search.first["retries"] == 1
    search.follow.on_step_end(0, [trial])
    assert search.start().config["trial"] == "0000"


def test_a_process_that_is_taken_over_is_watched_before_its_trial_begins(search: Search) -> None:
    trial = search.start()
    search.follow._watch.left("0000")
    trial.status = "PENDING"
    trial.temporary_state.ray_actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "4f"))
    search.follow.on_step_end(0, [trial])
    assert search.follow._watch.watches("0000")


def test_tune_keeps_no_means_over_the_last_reports(search: Search) -> None:
    from ray.tune.trainable.metadata import _TrainingRunMetadata

    trial = search.start()
    trial.run_metadata = _TrainingRunMetadata()
    search.follow.on_trial_start(0, [], trial)
    for step in range(20):
        trial.run_metadata.update_metric("loss", 1.0 / (step + 1), step=step + 1)
    assert trial.run_metadata.metric_n_steps == {"loss": {}}
    assert trial.run_metadata.metric_analysis["loss"].keys() == {"max", "min", "avg", "last"}
