"""Whole searches through real Ray processes, with the scripted trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted
from test_asha import decide_again

import hpcl.search
from hpcl import load_config
from hpcl.errors import UserError
from hpcl.results import epoch_schema, read_rows
from hpcl.search.cluster import connected
from hpcl.search.runner import Found
from hpcl.search.space import Space, apply_overrides, from_tree, load
from hpcl.yamlio import read_tree

SPACE = """
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}
  model.dim: {choice: [16, 17, 18, 19, 20, 21]}
  topk.k: {int: [1, 4], when: {model.dim: [16, 17]}}
search: {trials: 16, grace: 2, factor: 2, startup: 16, max_concurrent: 2, seed: 3}
"""
"""Random sampling; with this seed every kind of the script occurs."""


def make(text: str = SPACE, *changes: str) -> Space:
    return apply_overrides(from_tree(read_tree(text), name="scripted"), changes)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with connected(None):
        yield


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(ray: None, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Found:
    results = tmp_path_factory.mktemp("results")
    return hpcl.search.run(make(), name="all kinds", results=results, train=scripted.train, say=said.append)


def of_kind(found: Found, kind: str) -> list[dict[str, Any]]:
    return [t for t in found.trials if scripted.KINDS[t["config.model.dim"]] == kind]


def rows_of(found: Found, trial: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found.epochs if row["trial_id"] == trial["trial_id"]]


def test_every_trial_is_there_once_and_trial_zero_is_the_default(found: Found) -> None:
    trials = read_rows(found.folder / "trials.parquet")
    assert len(trials) == len({t["trial_id"] for t in trials}) == 16
    assert sorted(t["number"] for t in trials) == list(range(16))
    first = next(t for t in trials if t["number"] == 0)
    assert first["config.optimizer.weight_decay"] == 5e-4 and first["config.topk.k"] == 3
    assert {scripted.KINDS[t["config.model.dim"]] for t in trials} == set(scripted.KINDS.values())
    assert all((found.folder / "trials" / t["trial_id"]).is_dir() for t in trials)


def test_epochs_have_the_schema_one_row_each_and_the_order_of_arrival(found: Found) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(found.folder / "epochs.parquet")
    assert table.schema.equals(epoch_schema())
    rows = table.to_pylist()
    assert [row["arrival"] for row in rows] == list(range(len(rows)))
    assert len({(row["trial_id"], row["epoch"]) for row in rows}) == len(rows)
    for trial in found.trials:
        assert [row["epoch"] for row in rows_of(found, trial)] == list(range(1, trial["epochs"] + 1))


def test_not_measured_is_null(found: Found) -> None:
    rows = read_rows(found.folder / "epochs.parquet")
    assert all(row["knn"] is None for row in rows)
    late = [row for trial in of_kind(found, "late") for row in rows_of(found, trial)]
    assert late and all((row["acc_proto_ref"] is None) == (row["epoch"] < 5) for row in late)
    assert any(row["loss"] is None for row in rows)  # was NaN


def test_states_and_reasons(found: Found) -> None:
    for trial in of_kind(found, "raises"):
        assert (trial["state"], trial["epochs"]) == ("failed", 2)
        assert trial["stop_reason"] == "ValueError: the script raises"
        error = (found.folder / "trials" / trial["trial_id"] / "error.txt").read_text()
        assert "Traceback" in error and "at epoch 3" in error
    for trial in of_kind(found, "mistake"):
        assert (trial["state"], trial["epochs"]) == ("failed", 0)
        assert trial["stop_reason"] == "the data do not fit; choose others"
        error = (found.folder / "trials" / trial["trial_id"] / "error.txt").read_text()
        assert error == "the data do not fit; choose others\n"  # a mistake of the user: no traceback
    for trial in of_kind(found, "diverges"):
        assert (trial["state"], trial["stop_reason"]) == ("diverged", "epoch 4: the loss is not finite")
    for kind in ("plain", "late", "dies"):
        assert {trial["state"] for trial in of_kind(found, kind)} <= {"finished", "stopped"}
    assert {trial["state"] for trial in found.trials} == {"finished", "stopped", "failed", "diverged"}


def test_a_lost_process_costs_nothing(found: Found) -> None:
    for trial in of_kind(found, "dies"):
        assert (found.folder / "trials" / trial["trial_id"] / "died").exists()
        assert trial["epochs"] > 4 and len(rows_of(found, trial)) == trial["epochs"]


def test_every_stop_follows_from_the_table(found: Found) -> None:
    rows = read_rows(found.folder / "epochs.parquet")
    rungs = json.loads((found.folder / "search.json").read_text())["rungs"]
    assert rungs == [2, 4, 8]
    in_order = [(row["trial_id"], {**row, "m": row["acc_proto_ref"]}) for row in rows]
    expected = decide_again(in_order, rungs, 2.0)
    stopped = {t["trial_id"]: t for t in found.trials if t["state"] == "stopped"}
    assert stopped.keys() == expected.keys() and len(stopped) >= 2
    for trial_id, epoch in expected.items():
        assert stopped[trial_id]["epochs"] == epoch
        assert stopped[trial_id]["stop_reason"].startswith(f"epoch {epoch}: acc_proto_ref ")


def test_best_is_the_best_of_the_finished(found: Found) -> None:
    finished = [t for t in found.trials if t["state"] == "finished"]
    assert all(t["objective"] is None for t in found.trials if t["state"] != "finished")
    assert found.best_trial == max(finished, key=lambda t: t["objective"])
    best = load_config(found.folder / "best.yaml")
    assert best == found.best
    assert scripted.probe(best) == pytest.approx(found.best_trial["objective"])
    assert best.optimizer.weight_decay == found.best_trial["config.optimizer.weight_decay"]
    header = (found.folder / "best.yaml").read_text().splitlines()[0]
    assert header.startswith("# Best of the ") and found.best_trial["trial_id"] in header


def test_optuna_was_told_the_truth(found: Found) -> None:
    import pickle

    (state,) = (found.folder / "tune").glob("searcher-state-*.pkl")
    study = pickle.loads(state.read_bytes())["_ot_study"]
    told = [t.state.name for t in study.trials]
    ours = sorted(found.trials, key=lambda t: t["number"])
    assert told == ["FAIL" if t["state"] in ("failed", "diverged") else "COMPLETE" for t in ours]
    for theirs, trial in zip(study.trials, ours, strict=True):
        values = {row["epoch"]: row["acc_proto_ref"] for row in rows_of(found, trial)}
        assert all(values[epoch] == value for epoch, value in theirs.intermediate_values.items())
        if theirs.state.name == "COMPLETE":
            assert theirs.value == trial["metric"] == values[trial["epochs"]]


def test_ray_tools_open_the_folder(found: Found) -> None:
    from ray import tune

    analysis = tune.ExperimentAnalysis(str(found.folder / "tune"))
    epochs = {trial_id: len(frame) for trial_id, frame in analysis.trial_dataframes.items() if "epoch" in frame}
    assert epochs.keys() >= {t["trial_id"] for t in found.trials if t["epochs"]}
    config = analysis.get_best_config(metric="acc_proto_ref", mode="max")
    assert set(config) >= {"optimizer.weight_decay", "model.dim"}


def test_space_and_record_say_what_ran(found: Found) -> None:
    again = load(found.folder / "space.yaml")
    assert again.params == make().params and again.base == make().base and again.search == make().search
    record = json.loads((found.folder / "search.json").read_text())
    assert record["state"] == "finished" and record["best"] == found.best_trial["trial_id"]
    assert record["seed"] == {"sampler": 3, "trials": 0}
    assert {"hpcl", "python", "torch", "ray", "optuna", "numpy"} <= record["versions"].keys()
    assert {"cpu", "cpus", "ram_gb", "gpus"} <= record["hardware"].keys()
    assert sum(record["trials"].values()) == 16


def test_what_was_said(found: Found, said: list[str]) -> None:
    ends = [line for line in said if line.startswith("[")]
    assert len(ends) == 16 and ends[-1].startswith("[16/16] trial ")
    assert any("broke off and is tried again" in line for line in said)
    assert any("the best so far" in line for line in ends)


def test_all_cpus_are_free_afterwards(found: Found) -> None:
    import ray

    until = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < until:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def test_a_name_is_used_once(found: Found) -> None:
    before = (found.folder / "trials.parquet").read_bytes()
    with pytest.raises(UserError, match=r"results of this name already; give another with --name"):
        hpcl.search.run(make(), name=found.folder.name, results=found.folder.parent, train=scripted.train)
    assert (found.folder / "trials.parquet").read_bytes() == before


def test_when_all_fail_there_is_no_best(ray: None, tmp_path: Path) -> None:
    text = SPACE.replace("[16, 17, 18, 19, 20, 21]", "[20, 22]").replace("{model.dim: [16, 17]}", "{model.dim: [22]}")
    space = make(text.replace("{dim: 16}", "{dim: 20}"), "search.trials=1")
    found = hpcl.search.run(space, name="none", results=tmp_path, train=scripted.train, say=lambda line: None)
    assert found.best is None and not (found.folder / "best.yaml").exists()
    assert found.count("failed") == 1

    from hpcl.search.cli import summary

    assert "the data do not fit; choose others" in summary(space, found)


INTERRUPT = """
import sys, time, functools
sys.path[:0] = [{tests!r}]
import scripted
from hpcl.search import cli, runner

def slow(config, folder, report, **options):
    def wait(row):
        report(row)
        time.sleep(0.3)
    scripted.train(config, folder, wait, **options)

runner.run = functools.partial(runner.run, train=slow)
raise SystemExit(cli.main(["--space", {space!r}, "--results", {results!r}, "--name", "cut"]))
"""


def test_ctrl_c_leaves_the_tables_and_exits_130(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    space = tmp_path / "scripted.yaml"
    space.write_text(SPACE.replace("[16, 17, 18, 19, 20, 21]", "[16, 17]").replace("grace: 2", "grace: null"))
    code = INTERRUPT.format(tests=tests, space=str(space), results=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("["):  # the first trial has ended, others run
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + rest
    assert "interrupted after" in rest and "best     trial" in rest and "Traceback" not in rest
    trials = read_rows(tmp_path / "cut" / "trials.parquet")
    assert {t["state"] for t in trials} == {"finished", "running"}
    assert json.loads((tmp_path / "cut" / "search.json").read_text())["state"] == "interrupted"
    assert load_config(tmp_path / "cut" / "best.yaml").model.dim in (16, 17)
