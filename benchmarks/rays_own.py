"""Ray's ASHA with Ray's Optuna searcher, as they come, for the simulator."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from hpcl.search.asha import STOP
from hpcl.search.clock import rung_times
from hpcl.search.params import Choice, Float, Param
from hpcl.search.sampler import label
from hpcl.search.simulator import Row, Task, name, trial_of
from hpcl.search.synthetic import Curve


class RaysOwn:
    """Ray's ``ASHAScheduler`` and ``OptunaSearch`` with their own defaults, called in the controller's order.

    Grace, factor, metric, seed and the first point are those of ``space.search`` and the space; the
    best trial is ``get_best_result``'s: the best last value of any trial, stopped or not.

    Args:
        task: what is searched; its space has no conditions.
    """

    stage_clock = False

    def __init__(self, task: Task) -> None:
        space, search = task.space, task.space.search
        if search.grace is None or any(param.when for param in space.params.values()):
            raise ValueError("Ray's own stack is simulated with a grace and without conditions")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.rungs = rung_times(search.grace, search.factor, task.longest)
        self._params, self._metric, self._seed = space.params, search.metric, search.seed
        self._sign = 1.0 if search.mode == "max" else -1.0
        self._last: dict[int, float] = {}
        self.scheduler = ASHAScheduler(
            "training_iteration",
            search.metric,
            search.mode,
            max_t=task.longest,
            grace_period=search.grace,
            reduction_factor=search.factor,
        )
        first = {path: _told(space.params[path], value) for path, value in space.default_point().items()}
        self.searcher = OptunaSearch(
            {path: distribution(param) for path, param in space.params.items()},
            metric=search.metric,
            mode=search.mode,
            points_to_evaluate=[first],
            seed=search.seed,
        )

    def ask(self, number: int) -> dict[str, Any]:
        """Let the searcher suggest a trial."""
        values = self.searcher.suggest(name(number))
        assert values is not None  # it never runs out
        choices = {path: param.choices for path, param in self._params.items() if isinstance(param, Choice)}
        return {
            path: next(choice for choice in choices[path] if label(choice) == value) if path in choices else value
            for path, value in values.items()
        }

    def begin(self, number: int, curve: Curve) -> None:
        """Add the trial to the scheduler, which draws its bracket from numpy's global generator."""
        with _numpy_seeded(self._seed * 100_003 + number):
            self.scheduler.on_trial_add(None, trial_of(number))  # type: ignore[arg-type]

    def row(self, number: int, row: Row) -> bool:
        """Ask the scheduler; the searcher hears of rows that do not end the trial."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, at a rung that holds nothing but NaN
            decision = self.scheduler.on_trial_result(None, trial_of(number), row)  # type: ignore[arg-type]
        if decision != STOP:
            self.searcher.on_trial_result(name(number), row)
        self._last[number] = self._sign * row[self._metric]
        return str(decision) == STOP

    def complete(self, number: int, row: Row) -> None:
        """Both hear of the end; Optuna's refusal of a NaN is a warning that Ray logs."""
        self.scheduler.on_trial_complete(None, trial_of(number), row)  # type: ignore[arg-type]
        log = logging.getLogger("ray.tune.search.optuna.optuna_search")
        level = log.level
        log.setLevel(logging.ERROR)
        self.searcher.on_trial_complete(name(number), row)
        log.setLevel(level)

    def choose(self) -> int | None:
        """The best last value of any trial; NaN is filtered as Ray does."""
        scores = {number: value for number, value in self._last.items() if math.isfinite(value)}
        return max(scores, key=lambda number: (scores[number], -number)) if scores else None


def distribution(param: Param) -> BaseDistribution:
    """A searched field as Optuna's distribution; choices as text."""
    if isinstance(param, Choice):
        return CategoricalDistribution([label(choice) for choice in param.choices])
    if isinstance(param, Float):
        return FloatDistribution(param.low, param.high, log=param.log, step=param.step)
    return IntDistribution(param.low, param.high, log=param.log, step=param.step)


def _told(param: Param, value: Any) -> Any:
    return label(value) if isinstance(param, Choice) else value


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator as seeded here, and afterwards as it was."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
