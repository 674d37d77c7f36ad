"""Experiment folders of Ray Tune, as other scripts leave them: read without Ray, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from hpcl.errors import UserError
from hpcl.results import load_search


def _trial(folder: Path, name: str, config: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    trial = folder / f"train_{name}_x"
    trial.mkdir(parents=True)
    (trial / "params.json").write_text(json.dumps(config))
    lines = [
        json.dumps(
            {"training_iteration": i, "trial_id": name, "time_this_iter_s": 2.0, "pid": 7, "config": config, **r}
        )
        for i, r in enumerate(reports, start=1)
    ]
    (trial / "result.json").write_text("\n".join(lines) + "\n")


def _state(folder: Path, **status: str) -> None:
    trials = [[json.dumps({"trial_id": name, "status": state}), "{}"] for name, state in status.items()]
    (folder / "experiment_state-2026-01-01.json").write_text(json.dumps({"trial_data": trials}))


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    folder = tmp_path / "experiment"
    _trial(folder, "a", {"lr": 0.1, "net": {"width": 8}, "kind": "x"}, [{"accuracy": 0.1}, {"accuracy": 0.5}])
    _trial(folder, "b", {"lr": 0.2, "net": {"width": 16}, "kind": "y"}, [{"accuracy": 0.2}])
    _trial(folder, "c", {"lr": 0.3, "net": {"width": 32}, "kind": "y"}, [{"accuracy": 0.2}, {"accuracy": float("nan")}])
    _trial(folder, "d", {"lr": 0.4, "net": {"width": 64}, "kind": "x"}, [{"accuracy": 0.3}])
    _state(folder, a="TERMINATED", b="TERMINATED", c="TERMINATED", d="ERROR")
    return folder


def test_a_foreign_experiment_is_read_as_far_as_its_files_go(experiment: Path) -> None:
    search = load_search(experiment, metric="accuracy")
    assert search.trials["state"].tolist() == ["finished", "stopped", "finished", "failed"]
    assert search.trials["epochs"].tolist() == [2, 1, 2, 1]
    assert search.trials["config.net.width"].tolist() == [8, 16, 32, 64]
    assert search.epochs["accuracy"].isna().tolist() == [False, False, False, False, True, False]  # NaN is no value
    assert (search.best["trial_id"], search.chosen_by, search.about.kind) == ("train_a_x", "accuracy", "tune")
    assert search.base_trial is None and search.cost_unit == "trial-hours" and search.cost == pytest.approx(12 / 3600)
    assert set(search.fields) == {"lr", "net.width", "kind"} and search.fields["kind"].choices == ("x", "y")


def test_it_says_which_curves_there_are_where_it_cannot_guess(experiment: Path) -> None:
    with pytest.raises(
        UserError, match="does not say which curve its trials are compared by; name one of these: accuracy"
    ):
        load_search(experiment)
    with pytest.raises(UserError, match="has no curve speed"):
        load_search(experiment, metric="speed")


def test_a_loss_is_better_lower(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    _trial(folder, "a", {"lr": 1}, [{"val_loss": 3.0}])
    _trial(folder, "b", {"lr": 2}, [{"val_loss": 2.0}])
    search = load_search(folder, metric="val_loss")
    assert search.sign == -1 and search.best is None  # without a state file nothing is known to have ended
    _state(folder, a="TERMINATED", b="TERMINATED")
    assert load_search(folder, metric="val_loss").best["trial_id"] == "train_b_x"
    assert load_search(folder, metric="val_loss", mode="max").best["trial_id"] == "train_a_x"


def test_csv_serves_where_there_is_no_json(experiment: Path) -> None:
    trial = experiment / "train_a_x"
    (trial / "result.json").unlink()
    (trial / "progress.csv").write_text(
        "training_iteration,accuracy,trial_id,time_this_iter_s,config/lr\n1,0.1,a,2,0.1\n2,0.5,a,2,0.1\n"
    )
    search = load_search(experiment, metric="accuracy")
    assert search.trials["objective"].iloc[0] == 0.5 and search.trials["state"].iloc[0] == "finished"


def test_damaged_lines_and_files_are_left_out_and_said(experiment: Path) -> None:
    path = experiment / "train_a_x" / "result.json"
    path.write_text(path.read_text() + '{"accuracy": 0.9, "training_it')
    (experiment / "experiment_state-2026-01-01.json").write_text("[")
    search = load_search(experiment, metric="accuracy")
    said = " / ".join(search.about.notes)
    assert "train_a_x/result.json: line 3 is no JSON" in said and "cannot be read" in said
    assert len(search.epochs) == 6


def test_a_retried_epoch_counts_once(tmp_path: Path) -> None:
    _trial(
        tmp_path / "e",
        "a",
        {"lr": 1},
        [{"loss": 3.0}, {"loss": 9.0, "training_iteration": 1}, {"loss": 2.0, "training_iteration": 2}],
    )
    assert load_search(tmp_path / "e").epochs["loss"].tolist() == [9.0, 2.0]


@pytest.mark.parametrize(
    "report",
    [{"stage": "warmup"}, {"loss": "abc"}, {"objective": "abc"}, {"clusters": 2.5}, {"seconds": "1s"}, {"big": 2**70},
     {"note": "\ud800"}, {"shared": 3}, {"level_clusters": 4}, {"nested": {"a": {"b": [1, {"c": 2}]}}}, {"x": 1e308}],
    ids=str,
)  # fmt: skip
def test_reports_may_hold_whatever_they_like(tmp_path: Path, report: dict[str, Any]) -> None:
    for name, value in (("a", 0.1), ("b", 0.2)):
        _trial(tmp_path / "e", name, {"lr": value, "odd": report}, [{"accuracy": value, **report, "done": True}] * 2)
    search = load_search(tmp_path / "e", metric="accuracy")
    assert search.best["trial_id"] == "train_b_x" and len(search.epochs) == 4  # `done` says that they ended
    assert search.epochs["stage"].isna().all() or "stage" not in report


def test_an_epoch_beyond_belief_is_no_report(tmp_path: Path) -> None:
    _trial(tmp_path / "e", "a", {"lr": 1}, [{"loss": 1.0}, {"loss": 2.0, "epoch": 9_000_000}])
    assert load_search(tmp_path / "e").epochs["epoch"].tolist() == [1]


def test_no_pickle_is_read(experiment: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("tuner.pkl", "searcher-state-1.pkl", "train_a_x/params.pkl"):
        (experiment / name).write_bytes(pickle.dumps(Trap()))
    load_search(experiment, metric="accuracy")
    assert not (tmp_path / "sprung").exists()


def test_this_projects_own_experiment_folder_gives_the_values_of_its_jobs(tmp_path: Path) -> None:
    job = {"trial": "0000", "folder": "x", "home": "y", "values": {"clusters.first": 2}}
    other = {**job, "trial": "0001", "values": {"clusters.first": 5}}
    rows = [
        {"epoch": 1, "stage": 1, "acc_proto_ref": 0.1, "seconds": 1.0},
        {"epoch": 2, "acc_proto_ref": 0.2, "state": "finished"},
    ]
    for name, config in (("0000", job), ("0001", other), ("prefix-1", {**job, "trial": "prefix-1"})):
        trial = tmp_path / "tune" / name
        trial.mkdir(parents=True)
        (trial / "params.json").write_text(json.dumps(config))
        (trial / "result.json").write_text("\n".join(json.dumps(r) for r in [{"begun": True}, *rows]))
    search = load_search(tmp_path / "tune")
    assert search.trials["trial_id"].tolist() == ["0000", "0001"]
    assert search.trials["config.clusters.first"].tolist() == [2, 5]
    assert search.trials["state"].tolist() == ["finished", "finished"]


def test_a_folder_of_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(
        UserError, match=r"not the results of a search; there is no trials.parquet, and no folder of a Tune"
    ):
        load_search(tmp_path)
