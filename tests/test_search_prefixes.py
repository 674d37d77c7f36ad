"""Shared prefixes through real Ray processes and the real trainer: each trained once, children as without sharing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted
import torch
from conftest import TINY

import hpcl.search
from hpcl.config import Config
from hpcl.results import TIME_COLUMNS
from hpcl.search.cluster import connected
from hpcl.search.found import Found
from hpcl.search.journal import read_events
from hpcl.search.space import Space, apply_overrides, from_tree
from hpcl.search.store import PrefixStore
from hpcl.yamlio import dump, read_tree

SPACE = """
space:
  stages.stage2.lr: {choice: [0.03, 0.06]}
  growth.window: {int: [1, 3]}
  stages.stage3.lr: {float: [0.01, 0.1], log: true}
search: {trials: 6, grace: null, startup: 6, max_concurrent: 2, seed: 0}
"""
"""Stage 2 with two choices of its learning rate, the other fields act from stage 3 on."""


def make(*changes: str) -> Space:
    text = "base:\n" + "".join(f"  {line}\n" for line in dump(Config.model_validate(TINY)).splitlines()) + SPACE
    return apply_overrides(from_tree(read_tree(text), name="tree"), changes)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with connected(None):
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def shared(ray: None, results: Path) -> Found:
    return hpcl.search.run(make(), name="shared", results=results)


@pytest.fixture(scope="module")
def alone(ray: None, results: Path) -> Found:
    return hpcl.search.run(make("search.share_prefix=false"), name="alone", results=results)


def rows_of(found: Found, trial_id: str) -> list[dict[str, Any]]:
    leave = {*TIME_COLUMNS, "shared"}
    return [{k: v for k, v in row.items() if k not in leave} for row in found.epochs if row["trial_id"] == trial_id]


def test_one_prefix_of_stage_1_and_two_of_stage_2_are_trained(shared: Found, results: Path) -> None:
    events = read_events(shared.folder / "journal.jsonl")
    trained = Counter(e["trial"] for e in events if e["event"] == "row" and e["trial"].startswith("prefix-"))
    # TINY has one epoch of stage 1 and one of stage 2; a prefix that goes on from another repeats its last row.
    own = [e["row"]["epoch"] for e in events if e["event"] == "row" and e["trial"] in trained]
    assert sorted(own) == [1, 2, 2] and len(trained) == 3
    assert [prefix["state"] for prefix in shared.prefixes] == ["finished"] * 3
    assert len([p for p in (results / "prefixes").iterdir() if not p.name.startswith(".")]) == 3
    assert not list((results / "prefixes").glob(".*"))
    assert len({t["config.stages.stage2.lr"] for t in shared.trials}) == 2


def test_trials_begin_with_the_rows_of_their_prefix(shared: Found) -> None:
    assert shared.count("finished") == 6
    for trial in shared.trials:
        rows = [row for row in shared.epochs if row["trial_id"] == trial["trial_id"]]
        assert [row["epoch"] for row in rows] == list(range(1, 9))
        assert [row["shared"] for row in rows] == [True, True] + [False] * 6
        assert [row["clock"] for row in rows] == list(range(1, 9))
        assert trial["seconds"] == pytest.approx(sum(row["seconds"] for row in rows[2:]))
    assert shared.epochs_trained == 3 + 6 * 6


def test_children_are_bit_equal_to_unshared_runs(shared: Found, alone: Found) -> None:
    assert alone.prefixes == [] and alone.epochs_trained == 6 * 8
    for one, two in zip(shared.trials, alone.trials, strict=True):
        columns = [c for c in one if c.startswith("config.")]
        assert [one[c] for c in columns] == [two[c] for c in columns]
        assert rows_of(shared, one["trial_id"]) == rows_of(alone, two["trial_id"])
        weights = [
            torch.load(f.folder / "trials" / one["trial_id"] / "checkpoint.pt", weights_only=True)["pair"]
            for f in (shared, alone)
        ]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow  # 15 s
def test_another_search_takes_the_prefixes_that_are_there(shared: Found, results: Path, ray: None) -> None:
    lines: list[str] = []
    again = hpcl.search.run(make("search.seed=5"), name="again", results=results, say=lines.append)
    events = read_events(again.folder / "journal.jsonl")
    rows = [e for e in events if e["event"] == "row" and e["trial"].startswith("prefix-")]
    assert rows and all(e["row"]["shared"] for e in rows)  # taken over, not trained
    assert again.epochs_trained == 6 * 6 and {p["gpu_hours"] + p["seconds"] for p in again.prefixes} == {0.0}


def test_where_a_prefix_fails_trials_train_by_themselves(ray: None, tmp_path: Path) -> None:
    text = """
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  growth.window: {int: [1, 3]}
search: {trials: 4, grace: null, startup: 4, max_concurrent: 2, seed: 0}
"""
    space = from_tree(read_tree(text), name="broken")
    found = hpcl.search.run(space, name="broken", results=tmp_path, train=fails_as_prefix, say=lambda line: None)
    assert [prefix["state"] for prefix in found.prefixes] == ["failed"]
    assert found.count("finished") == 4 and found.epochs_trained == 48
    assert not any(row["shared"] for row in found.epochs)


def fails_as_prefix(config: Config, folder: Path, report: Any, **options: Any) -> None:
    if options["until_stage"] is not None:
        raise ValueError("prefixes do not work today")
    scripted.train(config, folder, report, **options)


def ignores_the_end(config: Config, folder: Path, report: Any, **options: Any) -> None:
    scripted.train(config, folder, report, **{**options, "until_stage": None})


def test_a_prefix_that_trains_too_much_is_not_taken_and_not_tried_again(ray: None, tmp_path: Path) -> None:
    text = """
base: {preset: embedded, model: {dim: 16}, stages: {total: 12}}
space:
  growth.window: {int: [1, 3]}
search: {trials: 2, grace: null, startup: 2, max_concurrent: 2, seed: 0}
"""
    space = from_tree(read_tree(text), name="much")
    found = hpcl.search.run(space, name="much", results=tmp_path, train=ignores_the_end, say=lambda line: None)
    assert len(found.prefixes) == 1 and found.count("finished") == 2
    assert not any(row["shared"] for row in found.epochs)


def test_a_prefix_without_its_table_is_trained_anew(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, "mine")
    rows = [{"epoch": 1, "stage": 1, "state": "running"}, {"epoch": 2, "stage": 1, "state": "running"}]
    for broken in ("absent", "not a table"):
        shutil.rmtree(tmp_path / "k", ignore_errors=True)
        (tmp_path / "k").mkdir()
        store.checkpoint("k").write_text("copied in part")
        if broken != "absent":
            (tmp_path / "k" / "prefix.parquet").write_text(broken)
        assert store.rows("k", 2) is None
        store.work("k").mkdir()
        (store.work("k") / "checkpoint.pt").write_text("whole")
        store.publish("k", rows)
        assert [row["epoch"] for row in store.rows("k", 2) or []] == [1, 2] and store.rows("k", 3) is None
        assert store.checkpoint("k").read_text() == "whole" and not store.work("k").exists()
    store.work("k").mkdir()  # another search was first
    store.publish("k", rows)
    assert store.checkpoint("k").read_text() == "whole" and not store.work("k").exists()
