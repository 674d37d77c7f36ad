"""The sampler against Optuna itself, without a cluster."""

from __future__ import annotations

import pickle
from typing import Any

import optuna

from hpcl.search.sampler import Suggest, TPESearch
from hpcl.search.space import Space, from_tree
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


def search(space: Space | None = None, startup: int = 3) -> TPESearch:
    return TPESearch(space or make(), startup)


def states(searcher: TPESearch) -> list[str]:
    return [trial.state.name for trial in searcher.study.trials]


METRIC = "acc_proto_ref"


def test_trial_zero_is_the_default_point() -> None:
    space = make()
    first = search(space).suggest("a")
    assert first == space.default_point()
    assert first["growth.stages"] == (3, 5) and first["growth.window"] == space.base.growth.window


def test_conditions_hold_and_values_stay_in_range() -> None:
    space = make()
    searcher = search(space)
    drawn = [searcher.suggest(f"t{i}") for i in range(40)]
    assert {"window", "fixed"} == {values["growth.policy"] for values in drawn}
    assert {(3, 5), (5,)} == {values["growth.stages"] for values in drawn}
    for values in drawn:
        assert ("growth.window" in values) == (values["growth.policy"] == "window")
        assert 1.2 <= values["clusters.multiplier"] <= 3.0
        assert space.config_for(values).clusters.multiplier == values["clusters.multiplier"]


def test_a_condition_on_the_base_can_hold_and_a_step_is_kept() -> None:
    searcher = search(make(base=", topk: {mode: add}"))
    drawn = {searcher.suggest(f"t{i}")["topk.far_weight"] for i in range(1, 30)}
    assert drawn == {0, 0.25, 0.5, 0.75, 1}


def test_suggest_survives_pickling() -> None:
    suggest = pickle.loads(pickle.dumps(Suggest(make())))
    assert "growth.policy" in suggest(optuna.create_study().ask())


def test_same_seed_same_suggestions() -> None:
    def run(seed: int) -> list[Any]:
        searcher, values = search(make(SPACE.replace("seed: 0", f"seed: {seed}"))), []
        for i in range(8):
            values.append(searcher.suggest(f"t{i}"))
            searcher.on_trial_complete(f"t{i}", {METRIC: values[-1]["clusters.multiplier"]})
        return values

    assert run(7) == run(7) != run(8)


def test_optuna_hears_values_failures_and_nothing_else() -> None:
    searcher = search()
    for name in "abcdef":
        searcher.suggest(name)
    searcher.on_trial_result("a", {"epoch": 1})
    searcher.on_trial_result("a", {"epoch": 2, METRIC: float("nan")})
    searcher.on_trial_result("a", {"epoch": 3, METRIC: 0.5})
    searcher.on_trial_result("a", {"epoch": 3, METRIC: 0.5})
    searcher.on_trial_complete("a", {"epoch": 4, METRIC: 0.6, "state": "finished"})
    searcher.on_trial_complete("b", {"epoch": 4, METRIC: None})
    searcher.on_trial_complete("c", {"epoch": 4, METRIC: float("nan")})
    searcher.on_trial_complete("d", None, error=True)
    searcher.on_trial_complete("e", {"epoch": 4, METRIC: 0.9, "state": "diverged"})
    searcher.on_trial_complete("a", {"epoch": 5, METRIC: 0.1})  # a second ending changes nothing
    assert states(searcher) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "FAIL", "RUNNING"]
    first = searcher.study.trials[0]
    assert first.value == 0.6 and first.intermediate_values == {3: 0.5}
    assert searcher.study.best_trial.number == 0


def test_tpe_learns_where_random_does_not() -> None:
    def regret(startup: int) -> float:
        text = "space: {clusters.multiplier: {float: [1.2, 9.2]}}\n"
        searcher = search(make(text + "search: {trials: 40, metric: nce_ref}"), startup)
        losses = []
        for i in range(40):
            value = searcher.suggest(f"t{i}")["clusters.multiplier"]
            losses.append((value - 5.0) ** 2)
            searcher.on_trial_complete(f"t{i}", {"nce_ref": losses[-1]})
        return sum(losses[20:]) / 20

    assert regret(startup=8) < 0.5 * regret(startup=1000)


def test_sampler_options_are_explicit() -> None:
    sampler = search(startup=5).study.sampler
    assert isinstance(sampler, optuna.samplers.TPESampler)
    assert (sampler._multivariate, sampler._constant_liar, sampler._n_startup_trials) == (False, False, 5)
