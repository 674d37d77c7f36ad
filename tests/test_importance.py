"""Importance of fields: what matters is told from chance, and chance is not told as something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded import write_search

from hpcl.results import SearchResults
from hpcl.search.importance import LEAST, METHODS, importance


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
def test_a_field_that_decides_is_told_from_chance(tmp_path: Path, method: str) -> None:
    temperature = np.random.default_rng(0).random(60)  # the first draw of _search
    found = importance(_search(tmp_path / "s", 1 - (temperature - 0.3) ** 2), method)
    assert found is not None and found.told == ["moco.temperature"], found
    assert found.fields["field"].iloc[0] == "moco.temperature"
    assert found.fields["importance"].sum() == pytest.approx(1) and found.n == 60
    assert "moco.temperature" in found.sentence() and "n = 60" in found.sentence()


def test_chance_alone_is_named_in_about_one_search_of_twenty(tmp_path: Path) -> None:
    named = [importance(_search(tmp_path / str(seed), _points(100 + seed, 20), seed)) for seed in range(20)]
    assert sum(bool(found is not None and found.told) for found in named) <= 3  # of 20 at 5 %: 4 and more in 1.6 %


def test_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    search = _search(tmp_path / "s", _points(1, 24))
    one, two = importance(search, "fANOVA", seed=3), importance(search, "fANOVA", seed=3)
    assert one is not None and two is not None and one.floor == two.floor and one.fields.equals(two.fields)


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
