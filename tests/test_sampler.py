"""The sampler against Optuna itself, without a cluster."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpcl.errors import UserError
from hpcl.search.sampler import Sampler
from hpcl.search.space import Space, from_tree
from hpcl.search.warm import Point
from hpcl.yamlio import read_tree

SPACE = """
space:
  growth.window: {int: [1, 5], when: {growth.policy: window}}
  growth.policy: {choice: [window, fixed]}
  growth.stages: {choice: [[3, 5], [5]]}
  clusters.multiplier: {float: [1.2, 3.0], log: true}
  topk.far_weight: {float: [0.0, 1.0], step: 0.25, when: {topk.mode: [add, replace]}}
search: {trials: 20, seed: 0}
"""


def make(text: str = SPACE, base: str = "") -> Space:
    return from_tree(read_tree(f"base: {{preset: embedded{base}}}\n{text}"))


def search(space: Space | None = None, startup: int = 3, **options: Any) -> Sampler:
    return Sampler(space or make(), startup=startup, **options)


def states(sampler: Sampler) -> list[str]:
    return [trial.state.name for trial in sampler.study.trials]


# -------------------------------------------------------------------- what is drawn


def test_trial_zero_is_the_default_point() -> None:
    space = make()
    sampler = search(space)
    first, optuna_number = sampler.ask(0)
    assert first == space.default_point() and optuna_number == 0
    assert first["growth.stages"] == (3, 5) and first["growth.window"] == space.base.growth.window
    trial = sampler.study.trials[0]
    assert trial.params == {**first, "growth.stages": "[3, 5]"} and trial.state.name == "RUNNING"
    assert trial.user_attrs == {"trial": "0000"}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_conditions_hold_and_values_stay_in_range(kind: Any) -> None:
    space = make()
    sampler = search(space, kind=kind)
    drawn = []
    for number in range(40):
        values, trial = sampler.ask(number)
        sampler.tell(trial, "finished", values["clusters.multiplier"])
        drawn.append(values)
    assert {"window", "fixed"} == {values["growth.policy"] for values in drawn}
    assert {(3, 5), (5,)} == {values["growth.stages"] for values in drawn}
    for values in drawn:
        assert ("growth.window" in values) == (values["growth.policy"] == "window")
        assert 1.2 <= values["clusters.multiplier"] <= 3.0
        assert space.config_for(values).clusters.multiplier == values["clusters.multiplier"]


def test_a_condition_on_the_base_can_hold_and_a_step_is_kept() -> None:
    sampler = search(make(base=", topk: {mode: add}"))
    drawn = {sampler.ask(i)[0]["topk.far_weight"] for i in range(1, 30)}
    assert drawn == {0, 0.25, 0.5, 0.75, 1}


def test_an_end_that_optuna_lowers_by_a_digit_can_be_the_default() -> None:
    text = "space: {topk.far_weight: {float: [0.0, 1.0], step: 0.3333333333}}\n"
    sampler = search(make(text, base=", topk: {far_weight: 1.0}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler.ask(0)[0] == {"topk.far_weight": 1.0}
        assert sampler.ask(1)[0]["topk.far_weight"] <= 1.0


def test_same_seed_same_draws() -> None:
    def run(seed: int) -> list[Any]:
        sampler, drawn = search(make(SPACE.replace("seed: 0", f"seed: {seed}"))), []
        for number in range(8):
            values, trial = sampler.ask(number)
            sampler.tell(trial, "finished", values["clusters.multiplier"])
            drawn.append(values)
        return drawn

    assert run(7) == run(7) != run(8)


def test_tpe_learns_where_random_does_not() -> None:
    def regret(kind: Any) -> float:
        text = "space: {clusters.multiplier: {float: [1.2, 9.2]}}\n"
        sampler = search(make(text + "search: {trials: 40, metric: nce_ref}"), 8, kind=kind)
        losses = []
        for number in range(40):
            values, trial = sampler.ask(number)
            losses.append((values["clusters.multiplier"] - 5.0) ** 2)
            sampler.tell(trial, "finished", losses[-1])
        return sum(losses[20:]) / 20

    assert regret("tpe") < 0.5 * regret("random")


def test_sampler_options_are_explicit() -> None:
    sampler = search(startup=5)
    sampler.ask(1)
    tpe = sampler.study.sampler
    assert isinstance(tpe, optuna.samplers.TPESampler)
    assert (tpe._multivariate, tpe._group, tpe._constant_liar, tpe._n_startup_trials) == (False, False, False, 5)


def test_a_conditional_field_is_modelled_from_the_trials_that_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = search(startup=4)
    drawn = []
    for number in range(12):
        values, trial = sampler.ask(number)
        sampler.tell(trial, "finished", float(number % 3 + (values["growth.policy"] == "window")))
        drawn.append(values)
    seen: dict[str, list[float]] = {}
    tpe, real = optuna.samplers.TPESampler, optuna.samplers.TPESampler._get_internal_repr

    def spy(self: Any, trials: Any, search_space: Any, study: Any) -> Any:
        observed = real(self, trials, search_space, study)
        for path, values in observed.items():
            seen.setdefault(path, []).extend(values)
        return observed

    monkeypatch.setattr(tpe, "_get_internal_repr", spy)
    number = 12
    for number in range(12, 100):
        if "growth.window" in sampler.ask(number)[0]:
            break
    had = [values["growth.window"] for values in drawn if "growth.window" in values]
    assert 0 < len(had) < 12
    assert sorted(seen["growth.window"]) == sorted(had)
    assert len(seen["clusters.multiplier"]) == 12 * (number - 11)


# -------------------------------------------------------------------- what is told


def test_optuna_hears_the_truth() -> None:
    sampler = search()
    a, b, c, d, e, f, g = (sampler.ask(number)[1] for number in range(7))
    for value, step in [(None, 1), (float("nan"), 2), (0.5, 3), (0.7, 3), (0.6, 4)]:
        sampler.report(a, value, step)
    sampler.tell(a, "finished", 0.6)
    sampler.tell(b, "finished", None)
    sampler.tell(c, "finished", float("nan"))
    sampler.tell(d, "failed", 0.9)
    sampler.tell(e, "diverged", 0.9)
    for step in (1, 2, 3):
        sampler.report(f, 0.5 + step / 4, step)
    sampler.tell(f, "stopped", 1.25)
    assert states(sampler) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "FAIL", "PRUNED", "RUNNING"]
    ended = [trial.user_attrs.get("state") for trial in sampler.study.trials]
    assert ended == ["finished", "finished", "finished", "failed", "diverged", "stopped", None]
    first, stopped = sampler.study.trials[0], sampler.study.trials[5]
    assert first.value == 0.6 and first.intermediate_values == {3: 0.5, 4: 0.6}
    assert stopped.value == 1.25 and stopped.intermediate_values == {1: 0.75, 2: 1.0, 3: 1.25}
    assert sampler.study.best_trial.number == a  # though the stopped one had more
    # A second ending, a late row and an unknown state.
    sampler.tell(a, "stopped", 0.1)
    sampler.report(a, 0.9, 5)
    assert sampler.study.trials[0].value == 0.6 and 5 not in sampler.study.trials[0].intermediate_values
    with pytest.raises(ValueError, match="state is running, but must be finished"):
        sampler.tell(g, "running")
    sampler.close_running()
    assert states(sampler)[6] == "PRUNED" and "RUNNING" not in states(sampler)


def test_stopped_trials_can_be_told_as_complete() -> None:
    sampler = search(told="complete")
    a, b = sampler.ask(0)[1], sampler.ask(1)[1]
    sampler.report(a, 0.4, 2)
    sampler.tell(a, "stopped", 0.4)
    sampler.tell(b, "stopped", None)  # nothing was measured
    assert states(sampler) == ["COMPLETE", "PRUNED"]
    assert sampler.study.trials[0].value == 0.4 and sampler.study.trials[0].user_attrs["state"] == "stopped"


def test_the_better_end_follows_the_metric() -> None:
    sampler = search(make("space: {clusters.levels: {int: [1, 4]}}\nsearch: {metric: nce_ref}"))
    for number, value in enumerate([0.5, 0.2, 0.9]):
        sampler.tell(sampler.ask(number)[1], "finished", value)
    assert sampler.study.best_value == 0.2


def test_warm_trials_come_first_and_once(tmp_path: Path) -> None:
    space = make()
    point = {"growth.policy": "fixed", "growth.stages": (5,), "clusters.multiplier": 2.0, "topk.far_weight": 0.25}
    points = [Point(point, 0.1 * i, f"/results/a/trials/000{i}") for i in range(4)]
    path = tmp_path / "optuna.journal"
    sampler = search(space, startup=4, journal=path)
    assert sampler.add_finished(points[:3]) == 3
    # The same command again, after a crash in the midst of adding.
    sampler = search(space, startup=4, journal=path)
    assert sampler.add_finished(points) == 1
    assert sampler.ask(0) == (space.default_point(), 4)
    assert states(sampler) == ["COMPLETE"] * 4 + ["RUNNING"]
    warm = sampler.study.trials[3]
    assert (warm.value, warm.user_attrs) == (pytest.approx(0.3), {"from": "/results/a/trials/0003"})
    assert warm.params == {**point, "growth.stages": "[5]"}
    # They count as started up: other draws than with an empty study.
    assert sampler.ask(1)[0] != search(space, startup=4).ask(1)[0]


# -------------------------------------------------------------------- crashes


class Log:
    """A search with three trials at a time, as its own log knows it; `play` goes on from there."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.values: list[dict[str, Any]] = []
        self.optuna: list[int] = []
        self.ended: dict[int, tuple[str, float]] = {}

    def known(self) -> dict[int, tuple[str, float | None]]:
        return {o: self.ended.get(number, ("running", None)) for number, o in enumerate(self.optuna)}

    def play(self, sampler: Sampler, asks: int) -> None:
        """Go on until so many trials were drawn; with all drawn, to the end."""
        while len(self.values) < asks or (asks == self.trials and len(self.ended) < asks):
            running = [number for number in range(len(self.values)) if number not in self.ended]
            if len(self.values) < asks and len(running) < 3:
                values, optuna_number = sampler.ask(len(self.values))
                self.values.append(values)
                self.optuna.append(optuna_number)
                continue
            number = running[-1] if len(self.ended) % 2 else running[0]
            value = self.values[number]["clusters.multiplier"]
            for epoch in (1, 2):
                sampler.report(self.optuna[number], value + epoch / 10, epoch)
            state = ["finished", "stopped", "stopped", "failed"][number % 4]
            self.ended[number] = (state, value + 0.2)
            sampler.tell(self.optuna[number], state, value + 0.2)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_killed_search_draws_what_an_unbroken_one_would(tmp_path: Path, kind: Any) -> None:
    space, trials = make(), 12

    def start(path: Path) -> Sampler:
        return search(space, startup=3, journal=path, kind=kind)

    log, sampler = Log(trials), start(tmp_path / "whole")
    killed: list[tuple[Path, Log]] = []
    for asks in range(trials + 1) if kind == "tpe" else (0, 1, 7, 12):
        log.play(sampler, asks)
        killed.append((tmp_path / f"killed-{asks}", copy.deepcopy(log)))
        shutil.copyfile(tmp_path / "whole", killed[-1][0])
    for path, half in killed:
        asks = len(half.values)
        if asks < trials:
            # The worst moment: drawn, but not yet in the log. It is drawn again.
            start(path).ask(asks)
        sampler = start(path)
        sampler.reconcile(half.known())
        half.play(sampler, trials)
        assert half.values == log.values, asks
        told = states(sampler)
        assert told.count("RUNNING") == 0 and told.count("FAIL") == 3 + (asks < trials)


def test_reconcile_tells_what_the_log_knows_and_keeps_what_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    sampler = search(journal=path)
    a, b, c, d, e = (sampler.ask(number)[1] for number in range(5))
    sampler.report(b, 0.2, 1)
    sampler.tell(a, "finished", 0.5)
    sampler = search(journal=path)
    sampler.report(b, 0.3, 2)  # rows of the log that the study missed
    sampler.report(b, 0.9, 1)
    known: dict[int, tuple[str, float | None]] = {
        a: ("finished", 0.5), b: ("stopped", 0.3), c: ("diverged", None), d: ("running", 0.1),
    }  # fmt: skip
    sampler.reconcile(known)
    assert states(sampler) == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "FAIL"]
    assert sampler.study.trials[b].intermediate_values == {1: 0.2, 2: 0.3}
    assert sampler.study.trials[e].user_attrs == {"trial": "0004", "state": "lost"}
    sampler.report(d, 0.7, 3)
    sampler.tell(d, "finished", 0.7)
    assert sampler.study.trials[d].value == 0.7
    with pytest.raises(UserError, match=r"optuna.journal: has 5 trials, but the search drew 1 more .*number 5"):
        sampler.reconcile({**known, 5: ("running", None)})


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    sampler = search(journal=path)
    sampler.ask(0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker_id":"x","stu')
    again = search(journal=path)
    assert path.read_bytes() == whole
    again.ask(1)
    assert states(search(journal=path)) == ["RUNNING", "RUNNING"]
    path.write_bytes(whole[:20])
    assert states(search(journal=path)) == []


def test_a_damaged_journal_and_a_folder_that_is_none_are_said(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    for text in ("what\nis\nthis\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"optuna.journal: is no Optuna journal, or is damaged .*--fresh"):
            search(journal=path)
    with pytest.raises(UserError, match="cannot be written"):
        search(journal=tmp_path / "missing" / "optuna.journal")


def test_a_renamed_folder_keeps_its_study(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    search(journal=path, name="before").ask(0)
    assert search(journal=path, name="after").study.study_name == "before"
    assert states(search(journal=path, name="after")) == ["RUNNING"]


@pytest.mark.parametrize("kind", ["JournalFileOpenLock", "JournalFileSymlinkLock"])
def test_a_lock_left_by_a_killed_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Ours and the dashboard's, whose link points nowhere where it was started with a relative path."""
    folder = tmp_path / "results" / "x"
    folder.mkdir(parents=True)
    path = folder / "optuna.journal"
    sampler = search(journal=path)
    sampler.ask(0)
    code = (
        f"import time; from optuna.storages.journal import {kind} as Lock\n"
        "Lock('results/x/optuna.journal').acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
    lock = Path(f"{path}.lock")
    assert os.path.lexists(lock) and lock.exists() == (kind == "JournalFileOpenLock")
    monkeypatch.setattr("hpcl.search.sampler.LOCK_GRACE", 0.3)
    sampler.ask(1)
    assert states(search(journal=path)) == ["RUNNING", "RUNNING"] and not os.path.lexists(lock)


def test_nothing_reaches_the_terminal(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from test_sampler import make, search
for turn in (0, 1):
    sampler = search(make(), journal=Path({str(tmp_path)!r}) / "optuna.journal")
    for number in range(turn * 5, turn * 5 + 5):
        values, trial = sampler.ask(number)
        sampler.report(trial, 0.5, 1); sampler.report(trial, 0.5, 1)
        sampler.tell(trial, ["finished", "stopped", "failed"][number % 3], 0.5)
        sampler.tell(trial, "failed")
    sampler.ask(99)
sampler.close_running()
"""
    environment = {**os.environ, "PYTHONWARNINGS": "default::UserWarning"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
