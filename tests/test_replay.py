"""Other stopping rules on recorded curves: beside the scheduler itself, and where the answer is known."""

from __future__ import annotations

import heapq
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import known_search, run_script, write_search
from rungs import Log, add, asha, feed

from hpcl.analysis.audit import audit
from hpcl.analysis.replay import Recording, cutoff, replay
from hpcl.analysis.text import aligned
from hpcl.errors import UserError
from hpcl.results import load_search

SCRIPT = Path(__file__).parent.parent / "analysis" / "replay.py"


def as_the_scheduler(
    curve: Any, lengths: Any, seconds: Any, clock: Any, mode: str, at_a_time: int, diverged: Any, **rule: Any
) -> Log:
    """The same curves through `StageASHA`, epoch by epoch, in the documented order of arrival."""
    log = Log()
    scheduler = asha(log, mode, clock=lambda trial, epoch: float(clock[int(trial), epoch - 1]), **rule)
    spent = np.cumsum(seconds, axis=1)
    running: list[tuple[float, int, int]] = []
    begun: dict[int, float] = {}
    waiting = list(range(len(curve)))

    def begin(now: float) -> None:
        if waiting:
            i = waiting.pop(0)
            begun[i] = now
            add(scheduler, f"{i:04d}")
            heapq.heappush(running, (now + spent[i, 0], i, 1))

    for _ in range(at_a_time):
        begin(0.0)
    while running:
        now, i, epoch = heapq.heappop(running)
        last = epoch == lengths[i]
        value = None if math.isnan(curve[i, epoch - 1]) else float(curve[i, epoch - 1])
        state = ("diverged" if i in diverged else "finished") if last else "running"
        if feed(scheduler, f"{i:04d}", epoch, value, state=state) == "STOP" or last:
            begin(now)
        else:
            heapq.heappush(running, (begun[i] + spent[i, epoch], i, epoch + 1))
    return log


rules = st.tuples(st.sampled_from([2, 3, 4]), st.integers(1, 4), st.sampled_from([1, 3]), st.sampled_from([1, 2, 5]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**9),
    st.lists(rules, min_size=6, max_size=6, unique=True),
    st.sampled_from(["acc_proto_ref", "nce_ref"]),
    st.booleans(),
)
def test_decides_as_the_scheduler(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rules: Any, metric: str, even: bool
) -> None:
    chance = np.random.default_rng(seed)
    trials, epochs = int(chance.integers(1, 12)), int(chance.integers(5, 18))
    # Few different values make ties; holes are epochs without a value.
    curve = chance.integers(0, 6, (trials, epochs)) / 7.0
    curve[chance.random(curve.shape) < 0.15] = np.nan
    seconds = np.ones(curve.shape) if even else chance.random(curve.shape)
    clock = np.cumsum(chance.choice([0.3, 0.5, 1.0, 2.0], curve.shape), axis=1)
    diverged = {i: int(chance.integers(2, epochs)) for i in range(trials) if chance.random() < 0.2}
    lengths = [diverged.get(i, epochs) for i in range(trials)]
    folder = tmp_path_factory.mktemp("search")
    search = write_search(
        folder, {metric: curve}, chance.random(trials), metric=metric, clock=clock, seconds=seconds, diverged=diverged
    )
    recording = Recording.of(search)
    assert [f"{i:04d}" for i in range(trials)] == list(search.trials["trial_id"].iloc[recording.rows])
    mode = "min" if metric == "nce_ref" else "max"
    for factor, grace, min_peers, at_a_time in rules:
        rule: dict[str, Any] = {"grace": grace, "factor": factor, "min_peers": min_peers}
        result = replay(recording, metric, at_a_time=at_a_time, **rule)
        total = recording.total
        log = as_the_scheduler(curve, lengths, seconds, clock, mode, at_a_time, diverged, total=total, **rule)
        assert {f"{i:04d}" for i in np.flatnonzero(~result.kept)} == set(log.stopped)
        answered = {trial: rung for trial, _, rung, _ in log.rungs}
        for i in np.flatnonzero(~result.kept):
            assert result.stopped_at[i] == answered[f"{i:04d}"]
        assert result.epochs == len(log.rows)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.sampled_from([1.5, 2, 2.5, 3, 4, 7]))
def test_the_cutoff_is_numpys_to_the_last_bit(values: list[float], factor: float) -> None:
    assert cutoff(sorted(values), factor) == np.nanpercentile(values, (1 - 1 / factor) * 100)


def rising(tmp_path: Path, **more: Any) -> Recording:
    """Eight trials of 8 epochs, each better than the one before; epochs of 10 s."""
    quality = np.arange(8.0)
    curve = quality[:, None] + np.linspace(0, 0.5, 8)
    options: dict[str, Any] = {"seconds": 10.0, "hours": np.full(8, 2.0)}
    return Recording.of(write_search(tmp_path, {"acc_proto_ref": curve, "nce_ref": curve}, quality, **options | more))


def test_rising_trials_are_all_kept_and_falling_ones_stopped_but_the_first(tmp_path: Path) -> None:
    recording = rising(tmp_path)
    good = replay(recording, "acc_proto_ref", grace=2, factor=2)
    assert good.rungs == (2.0, 4.0) and good.kept.all() and good.epochs == 64 and good.epochs_share == 1
    assert (good.hours, good.quarter, good.lost, good.best_rank, good.regret) == (16.0, 2, 0, 1, 0.0)
    bad = replay(recording, "nce_ref", grace=2, factor=2)  # the best have the highest loss
    assert bad.kept.tolist() == [True] + [False] * 7 and set(bad.stopped_at[1:]) == {2.0}
    assert bad.epochs == 8 + 7 * 2 and bad.epochs_share == 22 / 64 and bad.hours == pytest.approx(2 + 7 * 0.5)
    assert (bad.lost, bad.best_rank, bad.regret) == (2, 8, 7.0)


def test_where_the_objective_is_a_loss_the_least_is_the_best(tmp_path: Path) -> None:
    recording = rising(tmp_path, chosen_by="nce_ref", metric="nce_ref")
    assert recording.ranking.tolist() == list(range(8))
    result = replay(recording, "nce_ref", grace=2, factor=2)
    assert (result.lost, result.best_rank, result.regret) == (1, 1, 0.0)  # the second of the best two is stopped


def test_equals_go_on_and_min_peers_let_trials_pass(tmp_path: Path) -> None:
    curve = np.repeat([[0.5], [0.5], [0.4], [0.4], [0.5]], 8, axis=1)
    recording = Recording.of(write_search(tmp_path, {"acc_proto_ref": curve}, np.arange(5.0)))
    assert replay(recording, "acc_proto_ref", grace=2, factor=2).kept.tolist() == [True, True, False, False, True]
    passed = replay(recording, "acc_proto_ref", grace=2, factor=2, min_peers=3)
    assert passed.kept.tolist() == [True, True, True, False, True]


def test_with_more_places_later_trials_are_judged_by_fewer(tmp_path: Path) -> None:
    recording = rising(tmp_path, seconds=np.where(np.arange(8) == 0, 100.0, 1.0)[:, None])
    one = replay(recording, "nce_ref", grace=2, factor=2)
    two = replay(recording, "nce_ref", grace=2, factor=2, at_a_time=2)
    assert np.flatnonzero(one.kept).tolist() == [0]
    assert np.flatnonzero(two.kept).tolist() == [0, 1]  # 0 comes to its rung after all others


def test_a_trial_without_a_value_at_any_rung_is_kept(tmp_path: Path) -> None:
    curve = np.repeat([[0.9], [0.1], [0.1]], 8, axis=1)
    curve[1, :7] = np.nan  # its only value is that of the last epoch
    recording = Recording.of(write_search(tmp_path, {"acc_proto_ref": curve}, np.arange(3.0)))
    assert replay(recording, "acc_proto_ref", grace=2, factor=2).kept.tolist() == [True, True, False]


def test_shared_epochs_cost_nothing_and_ask_nothing(tmp_path: Path) -> None:
    curve = np.repeat([[0.9], [0.1]], 8, axis=1)
    search = write_search(tmp_path, {"acc_proto_ref": curve}, np.arange(2.0), fork=3, rungs=(5.0,), seconds=10.0)
    recording = Recording.of(search)
    assert search.about.fork == 3 and recording.rungs() == (5.0,) and recording.rungs(factor=2) == (5.0, 7.0)
    assert recording.grace == 2 and recording.spent[:, -1].tolist() == [50, 50]
    result = replay(recording, "acc_proto_ref")
    assert result.epochs == 5 + 2 and result.stopped_at[1] == 5


def test_default_rungs_are_those_of_the_search_or_at_a_quarter_and_half_of_the_way(tmp_path: Path) -> None:
    assert rising(tmp_path).rungs() == (2.0, 4.0)
    assert rising(tmp_path, rungs=(3.0, 6.0)).rungs() == (3.0, 6.0)


def test_only_trials_whose_outcome_is_known_are_replayed(tmp_path: Path) -> None:
    recording = rising(tmp_path, rungs=(2.0,), stopped={1: 2, 3: 2}, diverged={2: 5}, at_a_time=3)
    assert recording.rows.tolist() == [0, 2, 4, 5, 6, 7] and recording.last.tolist() == [7, 4, 7, 7, 7, 7]
    assert (recording.n, recording.diverged, recording.stopped, recording.at_a_time) == (5, 1, 2, 3)
    assert "stopped 2 of 8 trials on acc_proto_ref" in recording.notes[0] and "survivors" in recording.notes[0]
    assert rising(tmp_path).notes == ()
    result = replay(recording, "acc_proto_ref", grace=2, factor=2)
    assert result.quarter == 2 and len(result.kept) == 6


def test_nothing_finished(tmp_path: Path) -> None:
    recording = rising(tmp_path, stopped={i: 2 for i in range(8)})
    result = replay(recording, "acc_proto_ref", grace=2, factor=2)
    assert (recording.n, result.epochs, result.lost, result.best_rank) == (0, 0, 0, None)
    assert math.isnan(result.regret) and math.isnan(result.epochs_share)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    recording = rising(tmp_path)
    with pytest.raises(UserError, match="no numeric column acc_porto"):
        replay(recording, "acc_porto")
    with pytest.raises(UserError, match=r"grace is 0 and factor 2.0, but they must be > 0 and > 1"):
        replay(recording, "nce_ref", grace=0)
    with pytest.raises(UserError, match="factor 0, but"):
        replay(recording, "nce_ref", factor=0)
    with pytest.raises(UserError, match="min_peers is 0"):
        replay(recording, "nce_ref", min_peers=0)
    with pytest.raises(UserError, match=r"grace is 1e-09 and factor 1.0000001, but .* at most 1000 rungs up to 8, not"):
        replay(recording, "nce_ref", grace=1e-9, factor=1.0000001)  # before: hours
    assert len(recording.rungs(1e-3, 1.01)) == 904


@pytest.mark.parametrize("factor", ["abc", 0.5, -3, 1, math.nan, math.inf, True, [2], None])
def test_a_factor_that_cannot_be_is_as_none(tmp_path: Path, factor: Any) -> None:
    recording = rising(tmp_path)
    about = replace(recording.search.about, factor=factor)
    recording = replace(recording, search=replace(recording.search, about=about))
    assert recording.factor == 2 and replay(recording, "nce_ref").rungs == (2.0, 4.0)


def test_the_searchs_own_mode_says_which_end_is_better(tmp_path: Path) -> None:
    rising(tmp_path)
    told = Recording.of(load_search(tmp_path, metric="acc_proto_ref", mode="min"))
    assert replay(told, "acc_proto_ref", grace=2, factor=2).kept.tolist() == [True] + [False] * 7
    assert (told.values("acc_proto_ref") == -rising(tmp_path).values("acc_proto_ref")).all()
    for name, values in (("val_loss", range(8, 0, -1)), ("val_f1", range(8))):  # better from trial to trial
        folder = tune_folder(tmp_path / name, name, values)
        assert replay(Recording.of(load_search(folder, metric=name)), name, grace=1, factor=2).kept.all(), name


def test_in_tunes_folders_a_stop_is_only_inferred(tmp_path: Path) -> None:
    folder = tune_folder(tmp_path / "x", "val_loss", range(8), reports=[4] * 6 + [2] * 2)
    recording = Recording.of(load_search(folder, metric="val_loss"))
    assert recording.stopped == 2
    assert recording.notes[0].startswith("2 of 8 trials ended after fewer reports than others (stopped, or a shorter s")
    assert "the search stopped" not in recording.notes[0] and "tends to look worse" in recording.notes[0]


def tune_folder(folder: Path, metric: str, values: Any, reports: Any = (4,) * 8) -> Path:
    """An experiment of Ray Tune: constant curves of these values, and as many reports."""
    for i, (value, count) in enumerate(zip(values, reports, strict=True)):
        (folder / f"t{i}").mkdir(parents=True)
        lines = [{"training_iteration": k + 1, "trial_id": f"x{i}", metric: value} for k in range(count)]
        (folder / f"t{i}" / "result.json").write_text("\n".join(map(json.dumps, lines)))
    ended = [[json.dumps({"trial_id": f"x{i}", "status": "TERMINATED"}), "{}"] for i in range(8)]
    (folder / "experiment_state-1.json").write_text(json.dumps({"trial_data": ended}))
    return folder


def test_the_script_prints_a_row_per_combination(tmp_path: Path) -> None:
    rising(tmp_path / "s")
    more = ["--metric", "nce_ref", "acc_proto_ref", "--grace", "2", "--factor", "2", "3"]
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "s"), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [row[:3] for row in table[1:]] == [
        ["nce_ref", "2", "2"], ["nce_ref", "2", "3"], ["acc_proto_ref", "2", "2"], ["acc_proto_ref", "2", "3"],
    ]  # fmt: skip
    assert "34 %" in done.stdout and "2 of 2" in done.stdout


def test_the_script_has_defaults_and_names_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rising(tmp_path / "s")
    assert run_script(SCRIPT, [tmp_path / "s"], monkeypatch) == 0
    assert capsys.readouterr().out.count("  acc_proto_ref") == 9
    for arguments, said in (
        ([tmp_path / "s", "--metric", "acc_porto"], "acc_porto"),
        ([tmp_path / "s", "--grace", "1e-9", "--factor", "1.0000001"], "at most 1000 rungs"),
        ([tmp_path / "no\nnote: forged\x1b[31m"], "no note: forged\\x1b[31m: there is no such folder"),
    ):
        assert run_script(SCRIPT, arguments, monkeypatch) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_the_script_shows_no_table_where_nothing_finished_and_prints_names_harmlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none\nnote: forged \x1b[31m"
    rising(folder, stopped={i: 2 for i in range(8)}, rungs=(2.0,))
    assert run_script(SCRIPT, [folder], monkeypatch) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("none note: forged \\x1b[31m: 0 trials finished") and len(out) == 3
    assert out[1] == "no trial finished with an objective: nothing can be lost"
    assert out[2].startswith("note: the search stopped 8 of 8 trials")


def test_names_forge_no_line_of_the_audit(tmp_path: Path) -> None:
    hostile = "a\nnote: forged\x1b[31m"
    search = known_search(tmp_path / "s")
    column = search.fields["moco.temperature"].column
    fields = {hostile: replace(search.fields["moco.temperature"], path=hostile)}
    named = search.trials.rename(columns={column: "config." + hostile})
    about = replace(search.about, name=hostile, notes=())
    text = audit(replace(search, trials=named, fields=fields, about=about)).lines()
    assert text[0].startswith("a note: forged\\x1b[31m: 40 trials")
    assert all(line.isprintable() for line in text) and not any(line.startswith("note: forged") for line in text)
    assert any(line.endswith(" a note: forged\\x1b[31m") for line in text)
    assert aligned([["a\nb", "c"], ["d", "\x1b"]], "  ") == ["  a b  c", "  d    \\x1b"]
