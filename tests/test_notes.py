"""The rules that judge the research notes' observations, on curves made by hand: each can say yes, in part and no.

What they say of real runs is in docs/notes.md; nothing is trained here.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpcl.losses import pcl_ceiling

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COUNTS = (2, 4, 7, 12, 21, 36, 62, 106, 181)
BATCH, CLASSES = 64, 10
ANSWERS = ("confirmed", "in part", "not confirmed")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/notes_rules.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("notes_rules")


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/notes_verdict.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("notes_verdict")


def run(seed: int, clusters: Sequence[int], **columns: Any) -> list[dict[str, Any]]:
    """Rows of a run with these counts, an epoch each; a column is one value, one an epoch, or made of the count."""
    base = {"set": "sweep", "targets": "pcl", "policy": "fixed", "head": "v2", "batch": BATCH, "stage": 3}
    base |= {"acc_proto": 0.5, "acc_inst": 0.5, "loss_proto": 1.0, "knn": 0.5, "objective": 0.5}
    rows = []
    for place, count in enumerate(clusters):
        values = {
            name: value(count) if callable(value) else value[place] if isinstance(value, (list, tuple)) else value
            for name, value in (base | columns).items()
        }
        rows.append({"seed": seed, "epoch": place + 6, "clusters": count, **values})
    return rows


def table(*runs: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([row for rows in runs for row in rows])


def three(make: Callable[[int, bool], list[dict[str, Any]]], shown: int) -> pd.DataFrame:
    """Three seeds, so many of which show it."""
    return table(*(make(seed, seed < shown) for seed in range(3)))


def twice(counts: Sequence[int]) -> list[int]:
    """Two epochs at each count."""
    return [count for count in counts for _ in range(2)]


# Each observation as runs of a seed that show it, or do not.


def ceiling(seed: int, shows: bool) -> list[dict[str, Any]]:
    return run(seed, COUNTS, acc_proto=lambda k: pcl_ceiling(k, BATCH) * (0.95 if shows else 0.5))


def rising(seed: int, shows: bool) -> list[dict[str, Any]]:
    return run(seed, COUNTS, acc_proto=lambda k: k / 200 if shows else 1 / k)


def falling(seed: int, shows: bool) -> list[dict[str, Any]]:
    """Falls at growths from the number of classes on, or nowhere."""
    return run(seed, COUNTS, acc_proto=lambda k: 1 / k if shows and k > CLASSES else 0.05 + k / 200)


def lowest(seed: int, shows: bool) -> list[dict[str, Any]]:
    return run(seed, COUNTS, loss_proto=lambda k: abs(np.log(k / (12 if shows else 106))))


def steady(seed: int, shows: bool) -> list[dict[str, Any]]:
    """Jumps by .1 at a growth, and by .01 or .1 in between."""
    steps = np.resize([0.1, 0.01 if shows else 0.1], 2 * len(COUNTS)).cumsum()
    return run(seed, twice(COUNTS), acc_proto=steps.tolist())


def recovering(seed: int, shows: bool) -> list[dict[str, Any]]:
    return run(seed, twice(COUNTS), acc_proto=[0.4, 0.5 if shows else 0.3] * len(COUNTS))


def policies(seed: int, plateau: Sequence[int], window: Sequence[int], **ends: tuple[float, float]) -> list[Any]:
    """Both rules' runs; `ends` are values of the plateau and the window."""
    given = [{name: value[which] for name, value in ends.items()} for which in (0, 1)]
    return run(seed, plateau, set="rule", policy="plateau", **given[0]) + run(
        seed, window, set="rule", policy="window", **given[1]
    )


STUCK, GONE = (2,) * 4 + (4,) * 4 + (7,) * 2, (2, 4, 7, 12, 21, 36, 62, 62, 62, 62)


def sticking(seed: int, shows: bool) -> list[dict[str, Any]]:
    return policies(seed, STUCK if shows else GONE, STUCK)


def going(seed: int, shows: bool) -> list[dict[str, Any]]:
    return policies(seed, STUCK, GONE if shows else STUCK)


def costing(seed: int, shows: bool) -> list[dict[str, Any]]:
    return policies(seed, STUCK, GONE, objective=(0.8, 0.9 if shows else 0.7))


def ahead(seed: int, shows: bool) -> list[dict[str, Any]]:
    return policies(seed, STUCK, GONE, acc_inst=(0.8, 0.5) if shows else (0.2, 0.5))


def alone(seed: int, shows: bool) -> list[dict[str, Any]]:
    curve = np.linspace(0.4, 0.8 if shows else 0.41, 9).tolist()
    return run(seed, (2,) * 9, set="rule", policy="plateau", acc_inst=curve)


def past(seed: int, shows: bool) -> list[dict[str, Any]]:
    falls = [0.9, 0.7, 0.6]
    return run(seed, (12, 21, 36), acc_proto=falls, acc_inst=[0.4, 0.5, 0.6] if shows else [0.6, 0.5, 0.4])


def heads(seed: int, shows: bool) -> list[dict[str, Any]]:
    """v1 falls slowly and is worse, or is as good as v2 is otherwise."""
    slow, fast = [3.0, 2.9], [3.0, 1.0]
    first, second = (slow, fast) if shows else (fast, slow)
    v1 = run(seed, (21, 21), set="head", head="v1", loss_proto=first, knn=0.5)
    return v1 + run(seed, (21, 21), set="head", head="v2", loss_proto=second, knn=0.6 if shows else 0.4)


CASES: dict[str, tuple[Callable[[int, bool], list[dict[str, Any]]], tuple[Any, ...]]] = {
    "near_ceiling": (ceiling, (BATCH,)),
    "rises_below_batch": (rising, (BATCH,)),
    "falls_beyond_classes": (falling, (BATCH, CLASSES, "pcl")),
    "turns_at_classes": (falling, (BATCH, CLASSES, "pcl")),
    "little_change_at_a_count": (steady, (BATCH,)),
    "recovers": (recovering, (BATCH, CLASSES, "pcl")),
    "lowest_loss": (lowest, (BATCH, CLASSES, "sweep")),
    "plateau_sticks": (sticking, (BATCH, "pcl")),
    "window_goes_on": (going, (BATCH, "pcl")),
    "few_clusters_cost": (costing, (BATCH, "pcl")),
    "inst_grows_alone": (alone, (BATCH,)),
    "inst_ahead": (ahead, (BATCH,)),
    "inst_grows_past_turn": (past, (BATCH, "pcl")),
    "slow_with_v1": (heads, (BATCH,)),
    "v2_is_better": (heads, (BATCH, "knn")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_confirms_what_every_seed_shows_in_part_what_most_do_else_not(rules: Any, name: str) -> None:
    make, arguments = CASES[name]
    rule = getattr(rules, name)
    found = [rule(three(make, shown), *arguments) for shown in (3, 2, 0)]
    assert [verdict.answer for verdict in found] == list(ANSWERS) or (
        # where nothing turns there is no place to judge
        name == "turns_at_classes" and [v.answer for v in found] == [*ANSWERS[:2], "not seen here"]
    )
    assert all(verdict.rule and verdict.figures and verdict.name for verdict in found)


def test_the_fix_must_lift_the_accuracy_and_leave_the_loss(rules: Any) -> None:
    def runs(accuracy: float, loss: float) -> pd.DataFrame:
        return table(
            *(run(s, COUNTS, acc_proto=lambda k: pcl_ceiling(k, BATCH)) for s in range(2)),
            *(run(s, COUNTS, targets="adjusted", acc_proto=accuracy, loss_proto=loss) for s in range(2)),
        )

    found = [rules.fix_restores(runs(*pair), BATCH).answer for pair in ((0.9, 1.0), (0.9, 1.1), (0.03, 1.1))]
    assert found == list(ANSWERS)


@pytest.mark.parametrize(("moved", "said"), [(0, "confirmed"), (1, "in part"), (3, "not confirmed")])
def test_the_classes_are_the_cause_only_where_the_batch_moves_nothing(rules: Any, moved: int, said: str) -> None:
    def both(seed: int) -> list[dict[str, Any]]:
        return lowest(seed, True) + run(
            seed, COUNTS, batch=256, loss_proto=lambda k: abs(np.log(k / (106 if seed < moved else 12)))
        )

    assert rules.classes_cause_it(table(*map(both, range(3))), (BATCH, 256)).answer == said


def test_growths_of_two_seeds_are_not_mixed(verdict: Any) -> None:
    steps = verdict.growths(table(run(0, (2, 4), acc_proto=[0.1, 0.4]), run(1, (2, 2), acc_proto=[0.9, 0.8])))
    assert steps[["seed", "old", "new"]].to_numpy().tolist() == [[0, 2, 4], [1, 2, 2]]
    assert steps["proto"].to_numpy() == pytest.approx([0.3, -0.1])


def test_what_did_not_come_up_is_not_judged(rules: Any) -> None:
    few = table(run(0, (2, 4, 7)))
    assert rules.falls_beyond_classes(few, BATCH, CLASSES, "pcl").answer == "not seen here"
    assert rules.little_change_at_a_count(few, BATCH).answer == "not seen here"
    assert rules.lowest_loss(few, 256, CLASSES, "sweep").answer == "not seen here"


@pytest.mark.parametrize(("k", "batch"), [(2, 8), (7, 64), (300, 64), (1, 5)])
def test_the_floor_of_pcl_targets_is_that_of_drawn_batches(verdict: Any, k: int, batch: int) -> None:
    draws = np.random.default_rng(0).integers(0, k, (4000, batch))
    shared = (draws == draws[:, :1]).sum(axis=1)  # images at the prototype of the first, itself among them
    assert verdict.pcl_floor(k, batch) == pytest.approx(np.log(shared).mean(), abs=0.03)


def test_mistakes_of_the_user_are_told_in_a_line() -> None:
    command = [sys.executable, str(BENCHMARKS / "notes.py"), "--only", "AX"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "letters of ABCDEF" in ended.stderr
    assert "Traceback" not in ended.stderr
