"""Whole searches through real Ray processes, with the scripted trainer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import scripted
from rungs import decide_again

import hpcl.search
from hpcl import load_config
from hpcl.errors import UserError
from hpcl.results import epoch_schema, read_rows
from hpcl.search.cluster import connected
from hpcl.search.found import Found, summary
from hpcl.search.space import Space, apply_overrides, from_tree, load
from hpcl.yamlio import read_tree

SPACE = """
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}
  model.dim: {choice: [16, 17, 18, 19, 20, 21, 22]}
  topk.k: {int: [1, 4], when: {model.dim: [16, 17]}}
search: {trials: 16, grace: 2, factor: 2, startup: 16, max_concurrent: 2, seed: 11}
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
    assert {scripted.KINDS[t["config.model.dim"]] for t in trials} == set(scripted.KINDS.values()) - {"same", "hangs"}
    assert [t["trial_id"] for t in trials] == [f"{n:04d}" for n in range(16)]
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
        assert "Traceback" in error and "at epoch 3" in error and error.splitlines()[1] == "after epoch 2"
        assert trial["retries"] == 1  # the same error at the same epoch: not a third time
    for trial in of_kind(found, "mistake"):
        assert (trial["state"], trial["epochs"]) == ("failed", 0)
        assert trial["stop_reason"] == "the data do not fit; choose others"
        error = (found.folder / "trials" / trial["trial_id"] / "error.txt").read_text()
        assert error == "the data do not fit; choose others\nafter epoch 0\n"  # a mistake of the user: no traceback
    for trial in of_kind(found, "diverges"):
        assert (trial["state"], trial["stop_reason"]) == ("diverged", "epoch 4: the loss is not finite")
    for trial in of_kind(found, "nan"):
        if trial["epochs"] == 3:
            assert (trial["state"], trial["stop_reason"]) == ("diverged", "epoch 3: acc_proto_ref is not finite (nan)")
        else:
            assert trial["state"] == "stopped"
    assert any(trial["epochs"] == 3 for trial in of_kind(found, "nan"))
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
    again = decide_again(rows, [rungs], 2, metric="acc_proto_ref")
    stopped = {t["trial_id"]: t for t in found.trials if t["state"] == "stopped"}
    assert stopped.keys() == again.stops.keys() and len(stopped) >= 2
    for trial_id, epoch in again.stops.items():
        assert stopped[trial_id]["epochs"] == epoch
        assert stopped[trial_id]["stop_reason"].startswith(f"epoch {epoch}: acc_proto_ref ")
    assert all(row["clock"] == row["epoch"] for row in rows)  # no length is searched


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
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(found.folder / "optuna.journal"))
    )
    study = optuna.load_study(study_name="all kinds", storage=storage)
    names = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "diverged": "FAIL"}
    told = {t.user_attrs["trial"]: t for t in study.trials}
    assert {t["trial_id"]: names[t["state"]] for t in found.trials} == {n: t.state.name for n, t in told.items()}
    for trial in found.trials:
        values = {row["epoch"]: row["acc_proto_ref"] for row in rows_of(found, trial)}
        theirs = told[trial["trial_id"]]
        assert theirs.intermediate_values == {epoch: value for epoch, value in values.items() if value is not None}
        if theirs.state.name == "COMPLETE":
            assert theirs.value == trial["metric"] == values[trial["epochs"]]


def test_ray_tools_open_the_folder(found: Found) -> None:
    from ray import tune

    analysis = tune.ExperimentAnalysis(str(found.folder / "tune"))
    frames = [frame for frame in analysis.trial_dataframes.values() if "epoch" in frame]
    assert sorted(frame["config/trial"][0] for frame in frames) == sorted(
        t["trial_id"] for t in found.trials if t["epochs"]
    )
    config = analysis.get_best_config(metric="acc_proto_ref", mode="max")
    assert set(config["values"]) >= {"optimizer.weight_decay", "model.dim"}


def test_space_and_record_say_what_ran(found: Found) -> None:
    again = load(found.folder / "space.yaml")
    assert again.params == make().params and again.base == make().base and again.search == make().search
    record = json.loads((found.folder / "search.json").read_text())
    assert record["state"] == "finished" and record["best"] == found.best_trial["trial_id"]
    assert record["seed"] == {"sampler": 11, "trials": 0}
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


def test_a_finished_search_is_left_alone(found: Found) -> None:
    before = (found.folder / "trials.parquet").read_bytes()
    with pytest.raises(UserError, match=r"all kinds.*finished"):
        hpcl.search.run(make(), name=found.folder.name, results=found.folder.parent, train=scripted.train)
    assert (found.folder / "trials.parquet").read_bytes() == before


def test_when_all_fail_there_is_no_best(ray: None, tmp_path: Path) -> None:
    text = SPACE.replace("[16, 17, 18, 19, 20, 21]", "[20, 22]").replace("{model.dim: [16, 17]}", "{model.dim: [22]}")
    space = make(text.replace("{dim: 16}", "{dim: 20}"), "search.trials=1")
    found = hpcl.search.run(space, name="none", results=tmp_path, train=scripted.train, say=lambda line: None)
    assert found.best is None and not (found.folder / "best.yaml").exists()
    assert found.count("failed") == 1
    assert "the data do not fit; choose others" in summary(space, found)


def test_the_same_error_in_the_first_trials_ends_the_search(ray: None, tmp_path: Path) -> None:
    text = SPACE.replace("[16, 17, 18, 19, 20, 21, 22]", "[23, 22]").replace("{dim: 16}", "{dim: 23}")
    space = make(text.replace("{model.dim: [16, 17]}", "{model.dim: [22]}"), "search.max_concurrent=1")
    space = replace(space, params={path: p for path, p in space.params.items() if path != "model.dim"})
    lines: list[str] = []
    found = hpcl.search.run(space, name="same", results=tmp_path, train=scripted.train, say=lines.append)
    assert found.count("failed") == len(found.trials) == 3 and found.state == "failed"
    assert found.reason == "the first 3 trials failed with the same error: ValueError: always the same mistake"
    assert found.reason in summary(space, found) and "Traceback" in summary(space, found)


def test_budgets_end_a_search_at_the_next_epoch_and_more_lets_it_go_on(ray: None, tmp_path: Path) -> None:
    text = SPACE.replace("[16, 17, 18, 19, 20, 21, 22]", "[16, 17]").replace("grace: 2", "grace: null")
    few, more = (make(text, "search.trials=4", f"search.max_epochs={n}") for n in (15, 1000))
    found = hpcl.search.run(few, name="budget", results=tmp_path, train=scripted.train, say=lambda line: None)
    assert found.state == "finished" and found.reason.startswith("15 epochs are used up")
    assert 15 <= found.epochs_trained <= 17  # what ran finished its epoch
    assert found.count("running") >= 1 and len(found.trials) < 4
    found = hpcl.search.run(more, name="budget", results=tmp_path, train=scripted.train, say=lambda line: None)
    assert found.states == {"finished": 4, "stopped": 0, "failed": 0, "diverged": 0, "running": 0}
    assert found.epochs_trained == 48 and len(found.epochs) == 48
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(found.folder / "optuna.journal"))
    )
    told: dict[str, set[str]] = {}
    for trial in optuna.load_study(study_name="budget", storage=storage).trials:
        told.setdefault(trial.user_attrs["trial"], set()).add(trial.state.name)
    # Those that were cut short had been told as PRUNED, and finished under another number.
    assert len(told) == 4 and all("COMPLETE" in states <= {"COMPLETE", "PRUNED"} for states in told.values())


def knob(config: Any, folder: Path, report: Any, **options: Any) -> None:
    """A curve that merely reports a searched field."""
    for epoch in range(1, 13):
        row = {"epoch": epoch, "stage": 1, "state": "finished" if epoch == 12 else "running", "seconds": 0.01}
        report(row | {"acc_proto_ref": config.topk.k / 100 + epoch / 1000})


def test_a_trial_that_hangs_is_killed_and_goes_on(ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcl.search.hung.LEAST", 3.0)
    said: list[str] = []
    space = make("""
base: {preset: embedded, model: {dim: 24}, stages: {total: 12}}
space: {optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}}
search: {trials: 1, grace: null}
""")
    found = hpcl.search.run(space, name="hangs", results=tmp_path, train=scripted.train, say=said.append)
    (trial,) = found.trials
    assert (trial["state"], trial["epochs"], trial["retries"]) == ("finished", 12, 1)
    assert [row["epoch"] for row in found.epochs] == list(range(1, 13))
    assert "trial 0000 hangs: its process is killed" in said
    (why,) = (line for line in said if "is tried again" in line)
    assert why.startswith("trial 0000 broke off and is tried again: it hung: no report for ")


def test_a_curve_that_merely_reports_a_field_is_named_once(ray: None, tmp_path: Path) -> None:
    text = """
base: {preset: embedded, stages: {total: 12}}
space: {topk.k: {int: [1, 90]}, optimizer.weight_decay: {float: [1.0e-8, 1.0], log: true}}
search: {trials: 9, grace: 2, factor: 2, startup: 9, max_concurrent: 2, sampler: random, share_prefix: false}
"""
    lines: list[str] = []
    space = from_tree(read_tree(text), name="knob")
    found = hpcl.search.run(space, name="knob", results=tmp_path, train=knob, say=lines.append)
    assert found.notes == ["at epoch 2 acc_proto_ref ranks trials by topk.k: 1.00, n = 8"]
    assert lines.count(f"note: {found.notes[0]}") == 1
    record = json.loads((found.folder / "search.json").read_text())
    assert record["notes"] == found.notes and record["state"] == "finished"


def test_a_search_learns_from_an_earlier_one(found: Found, ray: None, tmp_path: Path) -> None:
    lines: list[str] = []
    space = make(SPACE, "search.trials=1")
    options: dict[str, Any] = {"train": scripted.train, "say": lines.append}
    hpcl.search.run(space, name="warm", results=tmp_path, warm_from=[found.folder], **options)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "warm" / "optuna.journal"))
    )
    study = optuna.load_study(study_name="warm", storage=storage)
    earlier = [t for t in study.trials if "from" in t.user_attrs]
    finished = [t for t in found.trials if t["state"] == "finished"]
    assert sorted(t.value for t in earlier) == sorted(t["metric"] for t in finished) and earlier
    assert f"warm start: {len(finished)} finished trials of earlier searches" in lines
    assert any("skipped" in line and "stopped" in line for line in lines)


def slow_to_leave(config: Any, folder: Path, report: Any, **options: Any) -> None:
    try:
        scripted.train(config, folder, report, **options)
    finally:
        time.sleep(3)  # longer than Tune waits by itself


@pytest.mark.slow  # 16 s
def test_a_trial_that_is_slow_to_leave_costs_no_other_trial(ray: None, tmp_path: Path) -> None:
    text = SPACE.replace("[16, 17, 18, 19, 20, 21, 22]", "[16, 17]").replace("trials: 16", "trials: 5")
    space = make(text, "search.max_concurrent=1", "search.share_prefix=false")
    found = hpcl.search.run(space, name="slow", results=tmp_path, train=slow_to_leave, say=lambda line: None)
    assert found.count("stopped") >= 1 and found.count("stopped") + found.count("finished") == 5
