"""benchmarks/search_real.py: what it makes of two searches' folders, and what it refuses."""

from __future__ import annotations

import argparse
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import run_script, write_search

from hpcl.errors import UserError
from hpcl.results import SearchResults
from hpcl.search import space as spaces

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "search_real.py"
OBJECTIVE = [0.90, 0.88, 0.93, 0.91]


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    """The script's functions."""
    return runpy.run_path(str(SCRIPT), run_name="a_script")


def written(folder: Path, **more: Any) -> SearchResults:
    """A search of 4 trials of 10 epochs."""
    curves = {"acc_proto_ref": np.arange(40.0).reshape(4, 10) / 100, "loss": np.tile(np.arange(10.0), (4, 1))}
    search = write_search(folder, curves, OBJECTIVE, **more)
    return replace(search, about=replace(search.about, val_images=400, seconds=120.0))


def test_runs_are_read_from_their_folders(bench: dict[str, Any], tmp_path: Path) -> None:
    """Trial 2, the best, is stopped in the second search, whose two first epochs are shared by all."""
    asked: list[Path] = []

    def held_out(checkpoint: Path) -> Any:
        asked.append(checkpoint)
        return bench["HeldOut"](0.92, 0.8, 500)

    whole = bench["read_run"](written(tmp_path / "a"), 0, "all", held_out)
    stopped = bench["read_run"](written(tmp_path / "b", fork=2, stopped={1: 4, 2: 6}), 0, "stopped", held_out)
    assert (whole.epochs, whole.finished, whole.best, whole.winner) == (40, 4, 0.93, "0002")
    assert (stopped.epochs, stopped.finished, stopped.best, stopped.winner) == (2 + 8 + 2 + 4 + 8, 2, 0.91, "0003")
    assert (whole.trials, whole.images, whole.minutes, whole.unit) == (4, 400, 2.0, "CPU-hours")
    assert whole.error == pytest.approx(math.sqrt(0.93 * 0.07 / 400))
    assert stopped.hours == pytest.approx(22 / 3600)
    assert asked == [tmp_path / "a/trials/0002/checkpoint.pt", tmp_path / "b/trials/0003/checkpoint.pt"]


def test_a_shared_epoch_counts_once_for_each_run_that_is_shared(bench: dict[str, Any], tmp_path: Path) -> None:
    """Two prefixes of two epochs, each of two trials."""
    search = written(tmp_path / "tree", fork=2)
    second = search.epochs["trial_id"].isin(["0002", "0003"])
    epochs = search.epochs.assign(loss=search.epochs["loss"] + second.astype(float))
    assert bench["epochs_trained"](replace(search, epochs=epochs)) == 4 * 8 + 2 * 2


def test_a_search_without_a_probe_is_refused(bench: dict[str, Any], tmp_path: Path) -> None:
    search = written(tmp_path / "knn", chosen_by="knn")
    with pytest.raises(UserError, match="chosen by knn, but must be by a linear probe"):
        bench["read_run"](search, 0, "all", lambda _: None)


def run(bench: dict[str, Any], seed: int, arm: str, epochs: int, best: float, linear: float) -> Any:
    """A search as `read_run` gives it."""
    return bench["Run"](
        seed=seed, arm=arm, epochs=epochs, trials=16, finished=4, best=best, winner="0003", images=450,
        hours=epochs / 1000, unit="CPU-hours", minutes=epochs / 40, test=bench["HeldOut"](linear, 0.8, 500),
    )  # fmt: skip


def test_the_table_and_the_target(bench: dict[str, Any]) -> None:
    runs = [
        run(bench, 0, "all", 320, 0.910, 0.900),
        run(bench, 0, "stopped", 96, 0.906, 0.890),
        run(bench, 1, "all", 320, 0.900, 0.910),
        run(bench, 1, "stopped", 128, 0.880, 0.920),
    ]
    lines = bench["report"](runs)
    cells = [line.split() for line in lines]
    assert cells[1][:8] == ["0", "all", "16", "4", "320", "100.0%", "0.9100", "0.9000"]
    assert cells[4][:8] == ["1", "stopped", "16", "4", "128", "40.0%", "0.8800", "0.9200"]
    text = "\n".join(lines)
    assert "over 2 seeds" in text
    assert "epochs     35.0% ± 7.1% of all's" in text
    assert "+0.0120 ± 0.0113   one standard error of a probe is 0.0138 (n = 450); within it in 1 of 2" in text
    assert "linear +0.0000 ± 0.0141, kNN +0.0000 ± 0.0000" in text
    assert lines[-1] == "target <= 40% of the epochs at the same best value: met (35.0%, best -0.0120)"


def test_what_is_missed_is_said(bench: dict[str, Any]) -> None:
    verdict = bench["verdict"]
    assert ": met (40.0%, best -0.0140)" in verdict(0.40, 0.014, 0.014)
    assert ": met (30.0%, best +0.0200)" in verdict(0.30, -0.02, 0.014)
    assert ": missed by 5.5 points of epochs (" in verdict(0.455, 0.0, 0.014)
    assert ": missed by 0.0060 in the best value beyond one standard error (" in verdict(0.3, 0.02, 0.014)
    assert "points of epochs and by 0.0060" in verdict(0.5, 0.02, 0.014)


def test_both_searches_are_one_space_but_for_what_stops(bench: dict[str, Any]) -> None:
    options = argparse.Namespace(
        space=SCRIPT.parents[1] / "search_spaces" / "clusters.yaml", seeds=2, first_seed=3, set=["search.trials=9"],
        grace=3, factor=None, min_peers=2, metric="knn",
    )  # fmt: skip
    found = bench["spaces_of"](options)
    assert [(seed, arm) for seed, arm, *_ in found] == [(3, "all"), (3, "stopped"), (4, "all"), (4, "stopped")]
    (_, _, name, whole), (_, _, other, stopped) = found[2:]
    assert (name, other) == ("clusters-all-seed4", "clusters-grace3-factor2-peers2-knn-seed4")
    assert (whole.search.seed, whole.base.seed, whole.search.trials) == (4, 4, 9)
    same = {"grace": 3, "share_prefix": True, "min_peers": 2, "metric": "knn"}
    assert stopped.search == whole.search.model_copy(update=same)
    assert (whole.search.grace, whole.search.share_prefix) == (None, False)
    assert (stopped.base, stopped.params) == (whole.base, whole.params)


def test_only_the_same_search_is_read_instead_of_run(bench: dict[str, Any], tmp_path: Path) -> None:
    has_ended, folder = bench["has_ended"], tmp_path / "there"
    written(folder, fields={"moco.temperature": np.array([0.1, 0.2, 0.3, 0.4])})
    space = spaces.load(folder / "space.yaml")
    assert has_ended(folder, space)
    assert not has_ended(tmp_path / "nowhere", space)
    assert not has_ended(folder, spaces.with_overrides(space, trials=5))  # goes on with it
    with pytest.raises(UserError, match=r"holds another search \(optimizer.batch: 512 there, 64 here\)"):
        has_ended(folder, spaces.apply_overrides(space, ["optimizer.batch=64"]))
    record = folder / "search.json"
    record.write_text(record.read_text().replace("finished", "interrupted"))
    assert not has_ended(folder, space)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds is 0, but must be at least 1"),
        (["--space", "nowhere.yaml"], "nowhere.yaml"),
        (["--grace", "0"], "search.grace"),
        (["--metric", "acc_prot"], "acc_prot is no curve"),
        (["--set", "search.nothing=1"], "search.nothing"),
        (["--set", "search.grace=null"], "say where with --grace"),
    ],
)
def test_mistakes_end_with_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script(SCRIPT, [*arguments, "--results", tmp_path], monkeypatch) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
