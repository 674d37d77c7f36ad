"""Importance of fields: what matters is told from chance, and chance is not told as something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recorded import write_search

from hpcl.results import SearchResults
from hpcl.search import importance as module
from hpcl.search.importance import LEAST, METHODS, Method, _Points, importance


def _search(folder: Path, objective: np.ndarray, seed: int = 0) -> SearchResults:
    draw = np.random.default_rng(seed)
    n = len(objective)
    fields = {
        "moco.temperature": draw.random(n), "clusters.first": draw.integers(2, 33, n), "topk.margin": draw.random(n),
        "topk.mode": draw.choice(["add", "none", "replace"], n),
    }  # fmt: skip
    return write_search(folder, {"acc_proto_ref": np.tile(objective[:, None], (1, 2))}, objective, fields)


def _points(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_decides_is_told_from_chance(tmp_path: Path, method: Method) -> None:
    temperature = np.random.default_rng(0).random(30)  # the first draw of _search
    found = importance(_search(tmp_path / "s", 1 - (temperature - 0.3) ** 2), method)
    assert found is not None and found.told == ["moco.temperature"], found
    assert found.fields["field"].iloc[0] == "moco.temperature"
    assert found.fields["importance"].sum() == pytest.approx(1) and (found.n, found.deals) == (30, 39)
    assert "moco.temperature" in found.sentence() and "n = 30" in found.sentence()
    assert "chance stays below it in 39 of 40 searches" in found.sentence()


class _Cheap:
    """As `_Points`, but a field's importance is its correlation with the objective."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.names = [name for name, (f, _) in columns.items() if f.kind != "choice"]
        table = np.array([columns[name][1] for name in self.names], dtype=float)
        self._table = (table - table.mean(axis=1, keepdims=True)) / table.std(axis=1, keepdims=True)

    def evaluate(self, method: Method, values: np.ndarray, seed: int) -> np.ndarray:
        return np.abs(self._table @ values)


def test_chance_alone_is_named_in_one_search_of_forty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = _search(tmp_path / "s", _points(0, 20))
    real = [importance(_dealt(search, seed), seed=seed) for seed in range(5)]
    assert sum(bool(found is not None and found.told) for found in real) <= 1  # of 5 at 1/40: 2 and more in 0.6 %
    monkeypatch.setattr(module, "_Points", _Cheap)
    named = [importance(_dealt(search, 100 + seed), seed=seed) for seed in range(240)]
    count = sum(bool(found is not None and found.told) for found in named)
    assert 1 <= count <= 13, count  # 6 are expected; the .95 quantile of 40 deals would give 17


def _dealt(search: SearchResults, seed: int) -> SearchResults:
    """The same trials with objectives that depend on nothing."""
    return replace(search, trials=search.trials.assign(objective=_points(seed, len(search.trials))))


def test_the_floor_is_the_largest_importance_in_39_deals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[float] = []

    class Recorded(_Points):
        def evaluate(self, *arguments: Any) -> np.ndarray:
            found = super().evaluate(*arguments)
            most.append(found.max() if most else found.sum())
            return found

    monkeypatch.setattr(module, "_Points", Recorded)
    found = importance(_search(tmp_path / "s", _points(0, 12)))
    assert found is not None and len(most) == 40 and found.floor == pytest.approx(max(most[1:]) / most[0])


def test_the_same_seed_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEALS", 5)
    search = _search(tmp_path / "s", _points(1, 12))
    one, two = importance(search, "fANOVA", seed=3), importance(search, "fANOVA", seed=3)
    assert one is not None and two is not None and one.floor == two.floor and one.fields.equals(two.fields)


def test_a_part_of_many_trials_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEALS", 5)
    monkeypatch.setattr(module, "MOST", {"PED-ANOVA": 30, "fANOVA": 12})
    temperature = np.random.default_rng(0).random(50)
    search = _search(tmp_path / "s", temperature)
    found = [importance(search, method) for method in METHODS]
    assert [each.n for each in found if each] == [30, 12]
    assert found[0] is not None and found[0].told == ["moco.temperature"]


def test_tiny_and_huge_objectives_are_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEALS", 2)
    search = _search(tmp_path / "s", _points(0, 12))
    for method in METHODS:
        found = [
            importance(replace(search, trials=search.trials.assign(objective=_points(0, 12) * scale)), method)
            for scale in (1.0, 2.0**-1015, 2.0**900)  # powers of two, so that nothing is rounded
        ]
        assert found[0] is not None and [each and each.floor for each in found] == [found[0].floor] * 3


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_another_kind_are_left_out_and_gaps_are_filled(
    tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEALS", 1)
    search = _search(tmp_path / "s", _points(0, 12))
    trials = search.trials
    for column, values in {
        "moco.temperature": [[1, i] for i in range(12)],  # lists
        "clusters.first": ["a", None, *"bcdefghijk"],  # texts
        "topk.margin": [*range(9), np.inf, None, np.nan],
        "topk.mode": [f"mode {i}" for i in range(12)],  # fANOVA's time doubles with each value: 12 took minutes
    }.items():
        trials = trials.assign(**{f"config.{column}": pd.Series(values, dtype=object)})
    found = importance(replace(search, trials=trials), method)
    assert found is not None and set(found.fields["field"]) == {"topk.margin", "topk.mode"}
    huge = trials.assign(**{"config.topk.margin": [1e38 * i for i in range(12)]})
    found = importance(replace(search, trials=huge), method)
    assert found is not None and set(found.fields["field"]) == {"topk.mode"}
    infinite = trials.assign(objective=[np.inf, np.nan, *range(10)])
    found = importance(replace(search, trials=infinite), method)
    assert found is not None and found.n == 10
    lists = trials.assign(**{f"config.{f}": trials["config.moco.temperature"] for f in ("topk.margin", "topk.mode")})
    lists["config.topk.mode"] = [[1]] * 12
    assert importance(replace(search, trials=lists), method) is None


def test_where_no_tree_sees_two_objectives_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TREES", 1)
    monkeypatch.setattr(module, "DEALS", 1)
    objective = np.zeros(12)
    objective[0] = 1
    search = _search(tmp_path / "s", objective)
    found = [importance(search, "fANOVA", seed=seed) for seed in range(4)]
    assert None in found and any(each is not None for each in found)


def test_too_few_trials_or_equal_ones_tell_nothing(tmp_path: Path) -> None:
    assert importance(_search(tmp_path / "few", _points(0, LEAST - 1))) is None
    assert importance(_search(tmp_path / "same", np.ones(20))) is None


def test_lower_is_better_where_the_objective_says_so(tmp_path: Path) -> None:
    """PED-ANOVA looks at the best quarter: with a loss that is the lowest."""
    draw = np.random.default_rng(0)
    temperature = draw.random(80)
    loss = np.where(temperature < 0.1, 1.0, 2.0) + 0.001 * draw.random(80)
    fields = {"moco.temperature": temperature, "topk.margin": draw.random(80)}
    curve = np.tile(loss[:, None], (1, 2))
    search = write_search(tmp_path / "s", {"nce_ref": curve}, loss, fields, metric="nce_ref", chosen_by="nce_ref")
    found = importance(search, "PED-ANOVA")
    assert found is not None and found.told == ["moco.temperature"]
