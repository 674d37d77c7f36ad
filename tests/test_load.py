"""Whole results folders as frames: what is in them, what is missing, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recorded import write_search

from hpcl.errors import UserError
from hpcl.results import EPOCH_COLUMNS, RETRAIN_COLUMNS, TRIAL_COLUMNS, load_search, retrain_schema, write_table
from hpcl.results.fields import Field, from_space, from_table
from hpcl.results.load import load_searches
from hpcl.results.search import PROBE
from hpcl.search.space import load as load_space
from hpcl.yamlio import dump

SPACES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four trials of five epochs: one was stopped after two, one diverged after three."""
    curve = np.linspace(0.1, 0.5, 20).reshape(4, 5)
    write_search(
        tmp_path / "four", {"acc_proto_ref": curve, "nce_ref": 5 - curve}, [0.5, 0.7, np.nan, np.nan],
        {"clusters.first": [2, 4, 8, 16], "topk.mode": ["add", "none", "add", "none"]},
        rungs=[2.0], stopped={2: 2}, diverged={3: 3},
    )  # fmt: skip
    return tmp_path / "four"


def test_frames_have_every_documented_column_and_one_row_per_trial_and_epoch(folder: Path) -> None:
    search = load_search(folder)
    assert list(search.trials.columns[: len(TRIAL_COLUMNS)]) == [column.name for column in TRIAL_COLUMNS]
    assert list(search.epochs.columns) == [column.name for column in EPOCH_COLUMNS]
    assert list(search.retrain.columns) == [column.name for column in RETRAIN_COLUMNS] and search.retrain.empty
    assert search.epochs.groupby("trial_id").size().tolist() == [5, 5, 2, 3]
    assert search.trials["config.clusters.first"].tolist() == [2, 4, 8, 16]
    assert (search.chosen_by, search.best["trial_id"], search.base_trial["trial_id"]) == (PROBE, "0001", "0000")
    assert search.finished["trial_id"].tolist() == ["0001", "0000"]


def test_curves_stand_where_they_were_measured(folder: Path) -> None:
    search = load_search(folder)
    grid = search.curves("acc_proto_ref")
    expected = np.linspace(0.1, 0.5, 20).reshape(4, 5)
    expected[2, 2:] = expected[3, 3:] = np.nan
    np.testing.assert_allclose(grid, expected)
    with pytest.raises(UserError, match="no numeric column growth_reason"):
        search.curves("growth_reason")
    # The order of rows in the file does not matter.
    table = pq.read_table(folder / "epochs.parquet")
    pq.write_table(table.take(pa.array(np.random.default_rng(0).permutation(len(table)))), folder / "epochs.parquet")
    np.testing.assert_array_equal(load_search(folder).curves("acc_proto_ref"), grid)


def test_types_are_those_of_the_documentation(folder: Path) -> None:
    search = load_search(folder)
    kinds = {"int64": pd.api.types.is_numeric_dtype, "float64": pd.api.types.is_float_dtype,
             "string": pd.api.types.is_string_dtype, "bool": pd.api.types.is_bool_dtype}  # fmt: skip
    for frame, columns in ((search.epochs, EPOCH_COLUMNS), (search.trials, TRIAL_COLUMNS), (search.retrain, ())):
        for column in columns:
            assert kinds[column.type](frame[column.name]), (column.name, frame[column.name].dtype)


def test_the_objective_is_the_metric_where_nothing_was_probed(tmp_path: Path) -> None:
    write_search(tmp_path / "one", {"nce_ref": np.array([[3.0, 2.0], [3.0, 1.0]])}, [2.0, 1.0], metric="nce_ref",
                 chosen_by="nce_ref")  # fmt: skip
    search = load_search(tmp_path / "one")
    assert (search.chosen_by, search.sign, search.best["trial_id"]) == ("nce_ref", -1.0, "0001")


def test_values_of_a_trial_are_plain_and_only_those_that_acted(tmp_path: Path) -> None:
    write_search(tmp_path / "w", {"acc_proto_ref": np.ones((2, 1))}, [0.1, 0.2], {"topk.k": [1, 5]})
    searched = {"topk.mode": {"choice": ["add", "none"]}, "topk.k": {"int": [1, 5], "when": {"topk.mode": ["add"]}}}
    space = {"base": {"topk": {"k": 3, "mode": "none"}}, "space": searched}
    (tmp_path / "w" / "space.yaml").write_text(dump(space))
    rows = pq.read_table(tmp_path / "w" / "trials.parquet").to_pandas()
    rows["config.topk.mode"] = ["add", "none"]
    rows.to_parquet(tmp_path / "w" / "trials.parquet")
    search = load_search(tmp_path / "w")
    assert search.values("0000") == {"topk.mode": "add", "topk.k": 1}
    assert search.values("0001") == {"topk.mode": "none"}
    assert search.fields["topk.k"].base == 3
    with pytest.raises(UserError, match="no trial 9999"):
        search.values("9999")


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_fields_are_those_of_the_space_file(path: Path) -> None:
    space = load_space(path)
    fields = from_space(space.to_tree())
    assert list(fields) == list(space.params)
    for name, param in space.params.items():
        field = fields[name]
        assert field.kind == param.kind and field.base == space.base.at(name) and dict(field.when) == param.when
        if param.kind != "choice":
            ends = field.positions(pd.Series([param.low, param.high]))
            np.testing.assert_allclose(ends, [0, 1], atol=1e-12)
        else:
            codes = field.positions(pd.Series(list(param.choices), dtype=object))
            np.testing.assert_array_equal(codes, range(len(param.choices)))


def test_positions_follow_the_scale_that_was_sampled() -> None:
    field = Field("stages.stage1.lr", "float", 0.01, 1.0, log=True)
    np.testing.assert_allclose(field.positions(pd.Series([0.01, 0.1, 1.0, None])), [0, 0.5, 1, np.nan])
    modes = Field("topk.k", "choice", choices=(1, 2.5, None, True))
    np.testing.assert_array_equal(modes.positions(pd.Series(["null", "1", "2.5", "true", "x"])), [2, 0, 1, 3, np.nan])


def test_a_folder_without_search_json_or_space_yaml_is_read_as_far_as_it_goes(folder: Path) -> None:
    (folder / "search.json").write_text("{broken")
    (folder / "space.yaml").unlink()
    search = load_search(folder)
    assert [note.split(" cannot")[0] for note in search.about.notes] == ["search.json", "space.yaml"]
    assert search.fields["clusters.first"] == Field("clusters.first", "int", 2, 16, guessed=True)
    assert search.fields["topk.mode"].choices == ("add", "none")


def test_what_a_table_lacks_is_empty_not_missing(folder: Path) -> None:
    for name in ("trials", "epochs"):
        table = pq.read_table(folder / f"{name}.parquet")
        pq.write_table(table.drop_columns(["seconds"]), folder / f"{name}.parquet")
    search = load_search(folder)
    assert search.epochs["seconds"].isna().all() and search.trials["seconds"].isna().all()
    (folder / "epochs.parquet").unlink()
    assert load_search(folder).epochs.empty and "no epochs.parquet" in load_search(folder).about.notes[-1]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all" * 50])
def test_a_damaged_table_is_said_with_its_name(folder: Path, content: bytes) -> None:
    (folder / "trials.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"trials.parquet: cannot be read as a table"):
        load_search(folder)


def test_a_column_of_another_type_is_said(folder: Path) -> None:
    table = pq.read_table(folder / "epochs.parquet")
    wrong = table.set_column(table.column_names.index("epoch"), "epoch", pa.array(["one"] * len(table)))
    pq.write_table(wrong, folder / "epochs.parquet")
    with pytest.raises(UserError, match=r"epochs.parquet: cannot be read as a table"):
        load_search(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("metric", ["a"]), ("rungs", 5), ("rungs", ["x", -1, None]), ("notes", 5), ("notes", "abc"), ("seconds", "abc"),
     ("factor", "abc"), ("factor", -3), ("prefixes", [{"gpu_hours": "x"}, 3]), ("images", {"val": "many"}),
     ("state", 1), ("data", {"a": 1}), ("objective", True)],
)  # fmt: skip
def test_a_fact_of_another_kind_is_left_out_and_said(folder: Path, name: str, value: Any) -> None:
    path = folder / "search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    search = load_search(folder)
    assert search.about.factor is None or search.about.factor > 1
    assert all(rung > 0 for rung in search.about.rungs) and search.cost > 0
    assert isinstance(search.about.metric, str) and all(len(note) > 3 for note in search.about.notes)
    if name not in ("factor", "rungs") or isinstance(value, str):
        assert any("cannot be used: it is left out" in note for note in search.about.notes)


def test_trials_that_cannot_be_told_apart_are_refused(folder: Path) -> None:
    frame = pd.read_parquet(folder / "trials.parquet")
    for ids, said in (
        (["0000", "0000", "0002", "0003"], "the id 0000 twice"),
        (["0000", None, "0002", "0003"], "no id"),
    ):
        frame.assign(trial_id=ids).to_parquet(folder / "trials.parquet")
        with pytest.raises(UserError, match=f"has a trial with {said}"):
            load_search(folder)


def test_epochs_that_cannot_be_are_left_out_and_said(folder: Path) -> None:
    frame = pd.read_parquet(folder / "epochs.parquet")
    strange = frame.iloc[[0, 0, 0, 0, 0]].assign(epoch=[10**9, -50, 0, None, 2], trial_id=["0000"] * 4 + ["gone"])
    pd.concat([frame, strange, frame.iloc[[1]].assign(acc_proto_ref=0.77)]).to_parquet(folder / "epochs.parquet")
    search = load_search(folder)
    assert len(search.epochs) == len(frame) and search.curves("acc_proto_ref").shape == (4, 5)
    assert search.curves("acc_proto_ref")[0, 1] == 0.77  # the later row of an epoch counts
    assert [note.split(" ")[0] for note in search.about.notes] == ["1", "4", "1"]


def test_values_that_are_no_numbers_are_left_out_and_said(folder: Path) -> None:
    frame = pd.read_parquet(folder / "trials.parquet")
    frame["config.clusters.first"] = ["2", "x", "8", "16"]
    frame["objective"] = [np.inf, 0.7, np.nan, np.nan]
    frame.to_parquet(folder / "trials.parquet")
    search = load_search(folder)
    assert search.trials["config.clusters.first"].tolist()[::2] == [2.0, 8.0]
    assert search.values("0001") == {"topk.mode": "none"} and search.finished["trial_id"].tolist() == ["0001"]
    assert "1 values of clusters.first are no numbers" in " / ".join(search.about.notes)


def test_all_folders_that_cannot_be_read_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        load_searches([tmp_path / "gone", folder, tmp_path / "empty"])
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="give the folder"):
        load_searches([])


def test_another_metric_can_be_asked_for(folder: Path) -> None:
    assert load_search(folder, metric="nce_ref").about.metric == "nce_ref"
    with pytest.raises(UserError, match="has no curve nonsense; there are: acc_proto_ref, nce_ref"):
        load_search(folder, metric="nonsense")


def test_retrained_seeds_are_read(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"trial_id": "0001", "seed": seed, "state": "finished", "objective": 0.7} for seed in (0, 1)
    ]
    write_table(folder / "retrain.parquet", rows, retrain_schema())
    assert load_search(folder).retrain["objective"].tolist() == [0.7, 0.7]


def test_shared_hours_and_the_fork_are_known(folder: Path) -> None:
    facts = json.loads((folder / "search.json").read_text())
    facts |= {"prefixes": [{"cpu_hours": 0.5, "gpu_hours": 0.0}], "images": {"train": 10, "val": 4, "test": 4}}
    (folder / "search.json").write_text(json.dumps(facts))
    search = load_search(folder)
    own = float(search.trials["cpu_hours"].sum())
    assert search.cost == pytest.approx(own + 0.5) and search.cost_unit == "CPU-hours"
    assert search.about.val_images == 4


def test_loading_imports_neither_ray_nor_torch_nor_optuna(folder: Path) -> None:
    code = (
        "import sys; from hpcl.results import load_search; load_search(sys.argv[1]).curves('acc_proto_ref');"
        "print(sorted({'ray', 'torch', 'optuna'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_columns_of_config_without_a_space_are_fields_only_where_they_vary() -> None:
    frame = pd.DataFrame({"config.a": [1.0, 1.0], "config.b": [0.001, 1.0], "config.c": ["x", "y"], "other": [1, 2]})
    fields = from_table(frame)
    assert list(fields) == ["b", "c"] and fields["b"].log
