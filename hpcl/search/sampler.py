"""Which configuration is tried next: Optuna's TPE behind Tune, told only what is true.

TPE (Bergstra et al. 2011) models each searched field by itself (``multivariate=False``)
and does not pretend results for running trials (``constant_liar=False``): beside ASHA
this did best of the variants compared on public learning curves. A trial without a
finite value is told to Optuna as failed; None and NaN never reach it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from hpcl.search.asha import finite
from hpcl.search.params import Choice, Float, Int, Param
from hpcl.search.space import Space


def label(value: Any) -> str:
    """A choice as Optuna keeps it: text, for Optuna cannot keep lists or tell 1 from true."""
    return value if isinstance(value, str) else json.dumps(value)


class Suggest:
    """Asks an Optuna trial for the searched fields whose conditions (`when`) hold.

    A picklable callable for :class:`OptunaSearch`'s define-by-run mode.
    """

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, trial: Any) -> dict[str, Any]:
        """The sampled values by config path; a field whose condition fails is left out."""
        values: dict[str, Any] = {}
        for path, param in self._space.params.items():  # parents stand before their children
            if self._space.is_active(path, values):
                values[path] = _draw(trial, path, param)
        return values

    def point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by config path as Optuna keeps them, to enqueue a trial."""
        params = self._space.params
        return {path: label(value) if isinstance(params[path], Choice) else value for path, value in values.items()}


def _draw(trial: Any, path: str, param: Param) -> Any:
    if isinstance(param, Float):
        return trial.suggest_float(path, param.low, param.high, step=param.step, log=param.log)
    if isinstance(param, Int):
        return trial.suggest_int(path, param.low, param.high, step=param.step, log=param.log)
    chosen = trial.suggest_categorical(path, [label(value) for value in param.choices])
    return next(value for value in param.choices if label(value) == chosen)


class TPESearch(OptunaSearch):
    """Optuna's TPE as a Tune searcher; trial 0 is the space's default point.

    Args:
        space: what is searched; its `metric` at a trial's last epoch is the trial's value.
        startup: finished trials before TPE replaces random sampling.
    """

    def __init__(self, space: Space, startup: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.numbers: dict[str, int] = {}
        """Trial id -> the order in which it was drawn, from 0."""
        self._newest: dict[str, int] = {}
        suggest, search = Suggest(space), space.search
        super().__init__(
            space=suggest,
            metric=search.metric,
            mode=search.mode,
            points_to_evaluate=[suggest.point(space.default_point())],
            sampler=optuna.samplers.TPESampler(
                n_startup_trials=startup, multivariate=False, group=False, constant_liar=False, seed=search.seed
            ),
        )

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        assert self._ot_study is not None  # made in the constructor
        return self._ot_study

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The sampled values of a new trial by config path."""
        values: dict[str, Any] | None = super().suggest(trial_id)
        self.numbers[trial_id] = self._ot_trials[trial_id].number
        return values

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on a running trial's value at its epoch, if it has one."""
        value, epoch = finite(result.get(self.metric)), result.get("epoch")
        if value is None or epoch is None or trial_id not in self._ot_trials or trial_id in self._completed_trials:
            return
        if epoch > self._newest.get(trial_id, 0):
            self._newest[trial_id] = epoch
            self._ot_trials[trial_id].report(value, epoch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna a trial's last value, or that it failed."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        value = finite((result or {}).get(self.metric))
        if error or (result or {}).get("state") in ("failed", "diverged"):
            value = None
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        self.study.tell(self._ot_trials[trial_id], value, state=state)
        self._completed_trials.add(trial_id)
