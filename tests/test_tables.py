"""The tables of a search, fed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpcl.results import read_rows
from hpcl.search.journal import Journal, read_events
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


def tables(
    folder: Path, objective: str = "auto", metric: str = "acc_proto_ref", journal: Journal | None = None
) -> Tables:
    text = SPACE.replace("OBJECTIVE", objective).replace("METRIC", metric)
    return Tables(folder, from_tree(read_tree(text)), journal)


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
    made.begin("b", 1, {})
    made.add("b", {"epoch": 1, "state": "finished", "objective": 0.9})
    made.end("b", "failed", "the process was lost before it could end")
    assert made.best() == made.trials["a"] and made.trials["b"]["objective"] is None


def test_an_end_is_final(tmp_path: Path) -> None:
    made = tables(tmp_path)
    finish(made, "a", 0, objective=0.5)
    assert made.end("a", "failed", "afterwards")["state"] == "finished"
    assert made.trials["a"]["stop_reason"] == "finished its 1 epochs"


def test_a_shared_prefix_gives_its_rows_and_is_counted_once(tmp_path: Path) -> None:
    made = tables(tmp_path)
    made.session(gpus=2.0, cpus=1.0)
    made.begin("prefix-k", 0, {})
    for epoch in (1, 2):
        made.add("prefix-k", {"epoch": epoch, "seconds": 1800.0, "acc_proto_ref": epoch / 10})
    made.end("prefix-k", "finished", "trained through stage 1")
    for number in (0, 1):
        made.begin(f"000{number}", number, {})
        made.fork(f"000{number}", "prefix-k")
        made.add(f"000{number}", {"epoch": 2, "seconds": 1800.0})  # the trial repeats the last row
        made.add(f"000{number}", {"epoch": 3, "seconds": 3600.0, "acc_proto_ref": 0.5})
    rows = [(row["trial_id"], row["epoch"], row["shared"], row["arrival"]) for row in made.epochs]
    assert rows == [
        ("0000", 1, True, 0), ("0000", 2, True, 1), ("0000", 3, False, 2),
        ("0001", 1, True, 3), ("0001", 2, True, 4), ("0001", 3, False, 5),
    ]  # fmt: skip
    assert made.epochs_trained() == 4 and made.total("gpu_hours") == pytest.approx((1 + 1 + 1) * 2)
    assert [made.trials[t]["gpu_hours"] for t in ("0000", "0001")] == [2.0, 2.0]
    assert [made.trials[t]["epochs"] for t in ("0000", "0001")] == [3, 3]
    assert set(made.trials) == {"0000", "0001"} and set(made.prefixes) == {"prefix-k"}
    made.fork("0000", "prefix-k")  # it has its rows
    assert len(made.epochs) == 6


def test_replay_gives_the_same_tables(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    made = tables(tmp_path / "one", journal=journal)
    made.session(gpus=0.0, cpus=2.0)
    made.begin("prefix-k", 0, {})
    made.add("prefix-k", {"epoch": 1, "seconds": 1.0})
    values = {"topk.mode": "add", "topk.k": 2, "growth.stages": (5,), "clusters.size_tolerance": None}
    made.begin("0000", 0, values, optuna=3)
    made.fork("0000", "prefix-k")
    made.add("0000", {"epoch": 2, "seconds": 2.0, "acc_proto_ref": 0.25, "clusters": 4, "clock": 2.0})
    made.rung("0000", 0, 2.0, 0.25)
    made.end("0000", "stopped", "epoch 2: why")
    made.begin("0001", 1, {})
    made.retry("0001", "lost")
    made.note("look here")
    journal.close()
    again = tables(tmp_path / "two")
    again.replay(read_events(tmp_path / "journal.jsonl"))
    assert again.trials == made.trials and again.epochs == made.epochs and again.prefixes == made.prefixes
    assert again.rungs == made.rungs == [("0000", 0, 2.0, 0.25)] and again.notes == ["look here"]
    assert again.unfinished() == ["0001"] and again.optuna == {"0000": 3}
    assert again.rung_rows(2.0) == made.rung_rows(2.0)
    assert (again.rung_rows(2.0)[0]["value"], again.rung_rows(2.0)[0]["clusters"]) == (0.25, 4)
    for t in (made, again):
        (t._folder).mkdir()
        t.write()
    one, two = (read_rows(tmp_path / name / "trials.parquet") for name in ("one", "two"))
    assert one == two and one[0]["config.growth.stages"] == "[5]" and one[1]["retries"] == 1
