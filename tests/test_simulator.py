"""Whole searches in virtual time: the real scheduler and sampler over scripted curves."""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hpcl.errors import UserError
from hpcl.results import EPOCH_COLUMNS, epoch_schema, trial_schema, write_table
from hpcl.search.params import Search
from hpcl.search.simulator import MemoryLedger, Shipped, Simulation, ideal_epochs, name
from hpcl.search.synthetic import BEST, CHANCE, FAMILIES, LENGTHS, Curve, Family, Synthetic, unit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def script(which: str) -> ModuleType:
        return importlib.import_module(which)

    yield script


def settings(**changes: Any) -> Search:
    return Search(**{"grace": 4, "factor": 3, "sampler": "random", **changes})


def simulation(family: str, seed: int = 0, *, search: Search | None = None, **limits: Any) -> Simulation:
    task = Synthetic(FAMILIES[family], seed, search or settings())
    return Simulation(Shipped(task, limits.get("at_a_time", 4)), task, **limits)


@pytest.fixture(scope="module")
def thousands() -> Simulation:
    """A search of 1,500 trials over the hardest curves, with two brackets."""
    found = simulation("all", 3, search=settings(brackets=2), trials=1500, at_a_time=16)
    found.finish()
    return found


def shipped(simulation: Simulation) -> Shipped:
    assert isinstance(simulation.stack, Shipped)
    return simulation.stack


def test_every_trial_ends_once_and_as_its_curve_says(thousands: Simulation) -> None:
    ends = shipped(thousands).ledger.ends
    assert len(thousands.curves) == 1500 and ends.keys() == {name(i) for i in range(1500)}
    assert {i: ends[name(i)][0] for i in range(1500)} == thousands.states
    for i, curve in enumerate(thousands.curves):
        state, reason = ends[name(i)]
        whole = thousands.trained[i] == len(curve.values)
        assert whole == (state in ("finished", "diverged"))
        assert (state == "diverged") == (whole and curve.diverges)
        assert f"epoch {thousands.trained[i]}" in reason or reason == f"all {thousands.trained[i]} epochs trained"
    # All three happen often, else this shows nothing.
    assert all(sum(s == state for s in thousands.states.values()) > 50 for state in ("finished", "stopped", "diverged"))


def test_the_sampler_knows_the_same_ends_and_no_trial_is_left_running(thousands: Simulation) -> None:
    told = {"finished": "COMPLETE", "stopped": "PRUNED", "diverged": "FAIL"}
    trials = shipped(thousands).sampler.study.get_trials(deepcopy=False)
    assert [trial.state.name for trial in trials] == [told[thousands.states[i]] for i in range(1500)]
    metric = settings().metric
    for trial, rows in zip(trials, (shipped(thousands).ledger.rows[name(i)] for i in range(1500)), strict=True):
        values: dict[int, float] = {}
        for row in rows:  # the first value at each step of the common clock
            if math.isfinite(row[metric]):
                values.setdefault(math.ceil(row["clock"] - 1e-9), row[metric])
        assert trial.intermediate_values == values


def test_a_trial_is_recorded_at_most_once_at_a_rung_and_never_lower_later(thousands: Simulation) -> None:
    rungs: dict[str, list[float]] = defaultdict(list)
    brackets: dict[str, set[int]] = defaultdict(set)
    rows = shipped(thousands).ledger.rows
    for trial_id, bracket, rung, value in shipped(thousands).ledger.rungs:
        assert not rungs[trial_id] or rung > rungs[trial_id][-1]
        rungs[trial_id].append(rung)
        brackets[trial_id].add(bracket)
        assert rung in shipped(thousands).scheduler.rungs[bracket] and math.isfinite(value)
        assert any(row["clock"] >= rung - 1e-9 and row["acc_proto_ref"] == value for row in rows[trial_id])
    assert all(len(found) == 1 for found in brackets.values())
    assert {0, 1} == {next(iter(found)) for found in brackets.values()}


def test_rows_are_whole_and_in_order(thousands: Simulation) -> None:
    for i, epochs in thousands.trained.items():
        assert [row["epoch"] for row in shipped(thousands).ledger.rows[name(i)]] == list(range(1, epochs + 1))


def test_best_is_the_best_of_the_finished(thousands: Simulation) -> None:
    last = {i: thousands.curves[i].values[-1] for i, state in thousands.states.items() if state == "finished"}
    assert shipped(thousands).choose() == max(last, key=lambda i: last[i] or 0.0)


def test_the_rung_keeps_about_a_third_when_trials_come_by_chance() -> None:
    found = simulation("smooth", trials=400)
    found.finish()
    at = [record for record in shipped(found).ledger.rungs if record[2] == 4.0]
    stopped = sum(
        state == "stopped" and shipped(found).ledger.rows[trial_id][-1]["epoch"] == 4
        for trial_id, (state, _) in shipped(found).ledger.ends.items()
    )
    assert len(at) == 400 and 0.28 < 1 - stopped / 400 < 0.42


def test_the_same_seed_gives_the_same_search_and_another_one_another() -> None:
    def run(seed: int) -> tuple[Any, ...]:
        found = simulation("all", seed, search=settings(sampler="tpe", startup=5), epochs=250)
        return found.finish(), found.values, shipped(found).ledger.ends

    before = np.random.get_state()
    first, second, third = run(1), run(1), run(2)
    assert first == second != third
    after = np.random.get_state()
    assert before[0] == after[0] and np.array_equal(before[1], after[1]) and before[2:] == after[2:]


@pytest.mark.parametrize("cut", [3, 61, 150])
def test_a_search_that_broke_off_goes_on_as_an_unbroken_one(tmp_path: Path, cut: int) -> None:
    search = settings(sampler="tpe", startup=4, brackets=2)

    def start(folder: str) -> tuple[Synthetic, Simulation]:
        task = Synthetic(FAMILIES["all"], 5, search)
        (tmp_path / folder).mkdir()
        stack = Shipped(task, journal=tmp_path / folder / "optuna.journal")
        return task, Simulation(stack, task, trials=16)

    _, unbroken = start("unbroken")
    outcome = unbroken.finish()
    task, broken = start("broken")
    assert broken.run(cut)
    # A new scheduler and a new sampler, which know nothing but the ledger and Optuna's journal.
    broken.stack = Shipped(task, journal=tmp_path / "broken" / "optuna.journal", before=shipped(broken))
    assert broken.finish() == outcome
    assert broken.values == unbroken.values and broken.states == unbroken.states
    assert shipped(broken).ledger.rungs == shipped(unbroken).ledger.rungs
    assert shipped(broken).ledger.ends == shipped(unbroken).ledger.ends


def test_a_ledger_takes_a_row_once_and_refuses_a_second_end() -> None:
    ledger = MemoryLedger()
    assert ledger.add("0000", {"epoch": 1}) and ledger.add("0000", {"epoch": 1}) is None
    ledger.end("0000", "stopped", "why")
    with pytest.raises(ValueError, match="ended twice"):
        ledger.end("0000", "finished", "all")


def test_the_budget_is_spent_to_the_epoch_and_slots_hold() -> None:
    one = simulation("smooth", epochs=100, at_a_time=1)
    outcome = one.finish()
    assert outcome.epochs == 100 and outcome.realised >= 100
    busy = sum(sum(curve.seconds[: one.trained[i]]) for i, curve in enumerate(one.curves))
    assert one.now == pytest.approx(busy)
    # Four at a time take about a quarter of the time of one.
    four = simulation("smooth", epochs=100, at_a_time=4).finish()
    assert four.epochs == 100 and four.seconds < 0.5 * outcome.seconds


def test_nothing_is_stopped_without_rungs() -> None:
    outcome = simulation("smooth", search=settings(grace=None), trials=10).finish()
    assert outcome.states == {"finished": 10} and outcome.realised == outcome.ideal == 360


def test_a_late_curve_and_one_that_diverges_at_once() -> None:
    class Odd(Synthetic):
        def curve(self, number: int, values: Any) -> Curve:
            curve = super().curve(number, values)
            if number % 3 == 0:
                return replace(curve, values=(None,) * 6 + curve.values[6:])
            return replace(curve, values=(math.nan,), times=curve.times[:1]) if number % 3 == 1 else curve

    task = Odd(FAMILIES["smooth"], 0, settings())
    found = Simulation(Shipped(task), task, trials=30)
    outcome = found.finish()
    assert outcome.states["diverged"] == 10 and sum(outcome.states.values()) == 30
    answers = {trial_id: rung for trial_id, _, rung, _ in reversed(shipped(found).ledger.rungs)}
    # A curve that begins at epoch 7 answers there at the rung of epoch 4.
    assert answers["0003"] == 4.0 and found.trained[3] >= 7


def test_ideal_epochs_by_hand() -> None:
    def curve(*values: float) -> Curve:
        times = tuple(float(i) for i in range(1, len(values) + 1))
        return Curve(values, times, times, values[-1])

    level = [curve(*[float(i)] * 8) for i in range(6)]
    # Six to epoch 2, the best three to epoch 4, the best two of them to epoch 8.
    assert ideal_epochs(level, (2.0, 4.0), 2, 1.0) == 3 * 2 + 1 * 4 + 2 * 8
    assert ideal_epochs(level, (), 2, 1.0) == 48
    # Upside down the others survive; one that diverges at epoch 1 has trained 1 epoch and takes no place.
    assert ideal_epochs([*level, curve(math.nan)], (2.0, 4.0), 2, -1.0) == 6 + 4 + 16 + 1


def test_families_are_as_documented() -> None:
    def at_base(family: Family, seed: int = 2) -> tuple[Synthetic, dict[str, Any]]:
        task = Synthetic(family, seed)
        return task, task.space.default_point()

    task, point = at_base(Family("plain"))
    curve = task.curve(0, point)
    values = [value or 0.0 for value in curve.values]
    assert values == sorted(values) and values[-1] == pytest.approx(curve.final)
    assert CHANCE < curve.final < BEST and len(values) == sum(LENGTHS)
    # Drops: at some epochs the value falls by much more than it ever rises; the end is the same.
    dropped = Synthetic(Family("drops", drop=0.4), 2).curve(0, point)
    falls = [1 - (b or 0.0) / (a or 1.0) for a, b in zip(dropped.values, dropped.values[1:], strict=False)]
    assert 2 <= sum(fall > 0.1 for fall in falls) <= 4
    assert dropped.final == curve.final and dropped.values[-1] == pytest.approx(curve.final, rel=0.01)
    # Noise leaves the final value alone.
    noisy = Synthetic(Family("noise", noise=0.04), 2).curve(0, point)
    assert noisy.final == curve.final
    assert 0.02 < np.std(np.subtract(noisy.values, curve.values).astype(float)) < 0.06


def test_slow_starters_cross_and_diverging_trials_look_good_before() -> None:
    slow = Synthetic(FAMILIES["slow"], 0, settings())
    found = Simulation(Shipped(slow), slow, trials=200)
    found.run(600)
    early = [curve.values[3] or 0.0 for curve in found.curves]
    final = [curve.final for curve in found.curves]
    crossings = np.corrcoef(np.argsort(np.argsort(early)), np.argsort(np.argsort(final)))[0, 1]
    assert 0.0 < crossings < 0.9
    unstable = Synthetic(FAMILIES["divergence"], 0, settings())
    point = unstable.space.default_point()
    rate = unstable.space.params["stages.stage3.lr"]
    assert unit(rate, point["stages.stage3.lr"]) < 0.6
    bad = unstable.curve(1, {**point, "stages.stage3.lr": 0.25})
    good = unstable.curve(1, point)
    assert bad.diverges and not good.diverges and bad.final == CHANCE and len(bad.values) <= 18


def test_searched_lengths_keep_the_clock() -> None:
    task = Synthetic(FAMILIES["lengths"], 1, settings())
    point = task.space.default_point()
    long = task.curve(0, {**point, "stages.stage3.epochs": 24, "stages.stage5.epochs": 32})
    short = task.curve(0, {**point, "stages.stage3.epochs": 6, "stages.stage5.epochs": 8})
    assert len(long.values) == 64 and len(short.values) == 22
    assert long.times[-1] == short.times[-1] == task.total == 36.0
    # The end of stage 3 is epoch 30 of the one and epoch 12 of the other: the same time, the same place.
    assert long.times[29] == short.times[11] == 18.0


def test_rays_own_stack_chooses_unfinished_trials_and_ours_does_not(benchmark: Any) -> None:
    rays = benchmark("rays_own")
    before = np.random.get_state()[1].copy()
    ours, theirs = [], []
    for seed in range(4):
        task = Synthetic(FAMILIES["noise"], seed, settings(sampler="tpe"))
        theirs.append(Simulation(rays.RaysOwn(task), task, epochs=200).finish())
        task = Synthetic(FAMILIES["noise"], seed, settings())
        ours.append(Simulation(Shipped(task), task, epochs=200).finish())
    assert np.array_equal(before, np.random.get_state()[1])
    assert all(outcome.finished and outcome.epochs == 200 for outcome in ours)
    assert not all(outcome.finished for outcome in theirs) and all(outcome.epochs == 200 for outcome in theirs)


def table(path: Path, *, trials: int = 40, epochs: int = 9) -> Path:
    """A results folder with finished trials, one that diverged and one that was stopped."""
    rows, ends = [], []
    for i in range(trials):
        state = {1: "diverged", 2: "stopped"}.get(i, "finished")
        for epoch in range(1, epochs + 1 if state == "finished" else 4):
            row: dict[str, Any] = {column.name: None for column in EPOCH_COLUMNS}
            bad = state == "diverged" and epoch == 3
            row |= {"trial_id": name(i), "epoch": epoch, "clock": 2.0 * epoch, "seconds": 0.5}
            rows.append(row | {"acc_proto_ref": None if bad else i / trials * epoch / epochs})
        values = {"config.optimizer.weight_decay": 10.0 ** -(i / 10), "config.topk.mode": ("add", "none")[i % 2]}
        ends.append({"trial_id": name(i), "number": i, "state": state, **values})
    kinds: Any = {"optimizer.weight_decay": "float64", "topk.mode": "string"}
    write_table(path / "epochs.parquet", rows, epoch_schema())
    write_table(path / "trials.parquet", ends, trial_schema(kinds))
    return path


def test_a_results_folder_is_a_table(benchmark: Any, tmp_path: Path) -> None:
    data = benchmark("curve_tables").CurveTable(table(tmp_path), "acc_proto_ref", "max")
    assert len(data.curves) == 39 and data.left_out == 1 and data.total == 18.0 and data.longest == 9
    assert data.best == pytest.approx(39 / 40) and data.curves[1].diverges and len(data.curves[1].values) == 3
    task = data.task(0, settings())
    # Row i of the kept 39 has rank 1 - i / 38 in weight decay; the choice decides between neighbours.
    near = {"config.optimizer.weight_decay": 1 - 20 / 38, "config.topk.mode": "none"}
    assert task.curve(0, near) is data.curves[20]
    assert {task.curve(1, near), task.curve(2, near)} == {data.curves[18], data.curves[22]}
    assert {id(task.curve(i, near)) for i in range(3, 39)}.isdisjoint({id(data.curves[i]) for i in (18, 20, 22)})
    outcome = Simulation(Shipped(data.task(0, settings(grace=2))), data.task(0, settings(grace=2)), epochs=80).finish()
    assert outcome.epochs == 80 and outcome.finished and outcome.regret < 0.6


def test_a_table_that_cannot_be_used_says_why(benchmark: Any, tmp_path: Path) -> None:
    tables = benchmark("curve_tables")
    with pytest.raises(UserError, match="no such file"):
        tables.CurveTable(tmp_path / "none.parquet", "acc", "max")
    folder = table(tmp_path, trials=6)
    with pytest.raises(UserError, match="has no column acc; it has"):
        tables.CurveTable(folder, "acc", "max")
    with pytest.raises(UserError, match="4 trials were trained to their end, but at least 8"):
        tables.CurveTable(folder, "acc_proto_ref", "max")
    (folder / "trials.parquet").unlink()
    with pytest.raises(UserError, match=r"no columns config\.<name>"):
        tables.CurveTable(folder, "acc_proto_ref", "max")


def test_the_benchmark_prints_tables_and_targets(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = benchmark("search")
    flags = ["--seeds", "2", "--budget", "4"]
    script.main(["--families", "smooth", "divergence", *flags, "--variant", "told=complete,sampler=random"])
    text = capsys.readouterr().out
    assert "divergence: the upper third of learning rates diverges; 144 epochs each" in text
    for stack in ("shipped", "ray", "random", "asha", "told=complete,sampler=random"):
        assert text.count(f"\n  {stack} ") == 3
    assert "median regret no worse than ray's:" in text and "at most 1.1 x ideal:" in text
    script.main(["--table", str(table(tmp_path)), "--grace", "2", *flags])
    assert "39 curves of 9 epochs (1 left out); 36 epochs each" in capsys.readouterr().out
    with pytest.raises(UserError, match="no field tolds"):
        script.main(["--families", "smooth", "--variant", "tolds=complete"])
    with pytest.raises(UserError, match="--variant told=perhaps"):
        script.main(["--families", "smooth", "--variant", "told=perhaps"])
