"""The tables of a search, fed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpcl.results import read_rows
from hpcl.search.space import from_tree
from hpcl.search.tables import Tables
from hpcl.yamlio import read_tree

SPACE = """
base: {preset: embedded, topk: {mode: none}}
space:
  topk.mode: {choice: [none, add]}
  topk.k: {int: [1, 5], when: {topk.mode: add}}
  growth.stages: {choice: [[3, 5], [5]]}
  moco.symmetric: {choice: [true, false]}
  clusters.size_tolerance: {choice: [null, 0.25, 0.5]}
search: {metric: METRIC, objective: OBJECTIVE}
"""


def tables(folder: Path, objective: str = "auto", metric: str = "acc_proto_ref") -> Tables:
    text = SPACE.replace("OBJECTIVE", objective).replace("METRIC", metric)
    return Tables(folder, from_tree(read_tree(text)))


def finish(made: Tables, trial_id: str, number: int, **row: Any) -> None:
    made.begin(trial_id, number, {})
    made.add(trial_id, {"epoch": 1, "state": "finished", "seconds": 2.0, **row})
    made.end(trial_id, "finished", "finished its 1 epochs")


def test_columns_of_searched_fields_keep_their_types(tmp_path: Path) -> None:
    made = tables(tmp_path)
    values = {"topk.mode": "add", "topk.k": 2, "growth.stages": (5,), "moco.symmetric": True}
    made.begin("b", 1, {**values, "clusters.size_tolerance": None})
    made.begin("a", 0, {"topk.mode": "none", "growth.stages": (3, 5), "moco.symmetric": False})
    made.write()
    first, second = read_rows(tmp_path / "trials.parquet")
    assert (first["trial_id"], second["trial_id"]) == ("a", "b")
    assert second["config.topk.k"] == 2 and first["config.topk.k"] == 3  # not sampled: the base's value
    assert second["config.growth.stages"] == "[5]" and second["config.moco.symmetric"] is True
    assert second["config.clusters.size_tolerance"] is None
    assert first["config.clusters.size_tolerance"] == pytest.approx(1 / 3)
    assert first["state"] == "running" and first["objective"] is None


def test_a_row_comes_once_and_nan_becomes_null(tmp_path: Path) -> None:
    made = tables(tmp_path)
    made.begin("a", 0, {})
    assert made.add("a", {"epoch": 1, "state": "running", "seconds": 1.5, "loss": math.nan, "acc_proto_ref": 0.5})
    assert made.add("a", {"epoch": 1, "state": "running", "seconds": 9.0, "acc_proto_ref": 0.9}) is None
    assert made.add("a", {"state": "failed"}) is None
    assert made.add("a", {"epoch": 2, "state": "running", "seconds": 1.0, "clusters": 4.0, "training_iteration": 7})
    made.write()
    rows = read_rows(tmp_path / "epochs.parquet")
    assert [(row["epoch"], row["arrival"], row["loss"], row["clusters"]) for row in rows] == [
        (1, 0, None, None),
        (2, 1, None, 4),
    ]
    trial = made.trials["a"]
    assert (trial["epochs"], trial["seconds"], trial["metric"]) == (2, 2.5, 0.5)


def test_best_by_the_probe_then_by_the_metric(tmp_path: Path) -> None:
    made = tables(tmp_path)
    assert made.best() is None
    finish(made, "a", 0, acc_proto_ref=0.9)
    assert made.best() == made.trials["a"] and made.trials["a"]["objective"] == 0.9
    assert made.chosen_by() == "acc_proto_ref"  # the fallback is called by its name
    finish(made, "b", 1, acc_proto_ref=0.1, objective=0.6)
    finish(made, "c", 2, acc_proto_ref=0.1, objective=0.7)
    finish(made, "d", 3, acc_proto_ref=0.1, objective=0.7)
    assert made.best() == made.trials["c"] and made.chosen_by() == "linear probe"
    assert tables(tmp_path, "nce_ref").chosen_by() == "nce_ref"


@pytest.mark.parametrize(("objective", "metric"), [("nce_ref", "acc_proto_ref"), ("auto", "nce_ref")])
def test_best_is_the_smallest_where_smaller_is_better(tmp_path: Path, objective: str, metric: str) -> None:
    made = tables(tmp_path, objective, metric)
    for number, value in enumerate([2.0, 1.0, 3.0]):
        measured = value if objective == "nce_ref" else None
        finish(made, f"t{number}", number, nce_ref=value, objective=measured)
    assert made.best() == made.trials["t1"]


def test_only_finished_trials_have_an_objective(tmp_path: Path) -> None:
    made = tables(tmp_path)
    finish(made, "a", 0, objective=0.5)
    finish(made, "b", 1, objective=0.9)
    made.end("b", "stopped", "epoch 1: why")
    assert made.best() == made.trials["a"] and made.trials["b"]["objective"] is None


def test_the_time_left_follows_the_epochs(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from hpcl.search.plan import Node, make_plan
    from hpcl.search.progress import Follow

    made = tables(tmp_path)
    space = from_tree(read_tree(SPACE.replace("METRIC", "nce_ref").replace("OBJECTIVE", "auto")))  # 16 trials of 20
    plan = make_plan(space, [Node(2)], cluster="x", folder=tmp_path)
    follow = Follow(made, plan, {}, {}, say=lambda line: None)
    assert follow.epochs_left() == pytest.approx(plan.epochs_expected)
    made.begin("a", 0, {})
    made.add("a", {"epoch": 8})
    made.end("a", "stopped", "why")
    mean = (plan.epochs_expected / 16 + 8) / 2
    assert follow.epochs_left() == pytest.approx(15 * mean)
    made.begin("b", 1, {})
    made.add("b", {"epoch": 18})
    assert follow.epochs_left() == pytest.approx(14 * mean + 1)  # beyond the mean: half of what it may still train
    assert " left" in follow.overview() and "1 running, 1 of 16 ended" in follow.overview()
