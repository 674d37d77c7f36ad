"""When a trial is stopped early: Ray's ASHA, asked only where the curve has a value.

ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"): at
the epochs grace, grace·factor, grace·factor², ... (the rungs) a trial goes on only
if its curve is within the top 1/factor of the trials that came to this rung before
it. The decision is Ray's; this class adds what a search over real curves needs:

- a row without a finite value (a curve that has not begun, a NaN) is no question:
  such a value would pass every rung and then stand in it;
- the last row of a trial (``state`` finished or diverged) is no question either:
  nothing is left to stop, and a finished trial must not look like a stopped one;
- a row that arrives twice (a trial resumed from its checkpoint repeats its last
  row) is asked once;
- each stop has a reason in words.

The clock is ``epoch``, counted over the whole run: Tune's own iteration count
starts again when a trial is retried.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

Mode = Literal["max", "min"]


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or not finite."""
    if value is None or isinstance(value, (bool, str)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


class CurveASHA(AsyncHyperBandScheduler):
    """Ray's asynchronous successive halving with the rules above.

    Args:
        metric: the curve, a column of ``epochs.parquet``.
        mode: ``max`` or ``min``, the better end of the curve.
        epochs: epochs of the longest schedule.
        grace: epoch of the first rung.
        factor: a trial goes on if it is in the top 1/factor; also the rungs' ratio.
    """

    def __init__(self, metric: str, mode: Mode, *, epochs: int, grace: int, factor: float) -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=max(epochs, grace),
            grace_period=grace,
            reduction_factor=factor,
            brackets=1,
            # True would stop a trial at its very last report, before it can end by itself.
            stop_last_trials=False,
        )
        self._curve, self._sign = metric, 1.0 if mode == "max" else -1.0
        self.reasons: dict[str, str] = {}
        """Trial id -> why it was stopped."""
        self._newest: dict[str, int] = {}

    @property
    def rungs(self) -> list[float]:
        """The rungs' epochs, ascending; a rung is asked by the first row at or after it."""
        return sorted(epoch for epoch, _ in self._brackets[0]._rungs)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE or STOP for a trial's newest row."""
        epoch = result.get("epoch")
        value = finite(result.get(self._curve))
        if epoch is None or epoch <= self._newest.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._newest[trial.trial_id] = epoch
        if value is None or result.get("state", "running") != "running":
            return str(TrialScheduler.CONTINUE)
        peers = self._peers(trial.trial_id, epoch)
        decision = super().on_trial_result(tune_controller, trial, {**result, self._curve: value})
        if decision == TrialScheduler.STOP:
            self.reasons[trial.trial_id] = self._reason(epoch, value, peers)
        return str(decision)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Forget the trial; unlike Ray's, a last row is not written into a rung it was not asked at."""
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget the trial."""
        self._trial_info.pop(trial.trial_id, None)

    def _peers(self, trial_id: str, epoch: int) -> list[float]:
        """Values (times -1 where smaller is better) in the highest rung at or below this epoch."""
        for rung, recorded in self._brackets[0]._rungs:  # descending
            if epoch >= rung:
                return [] if trial_id in recorded else list(recorded.values())
        return []

    def _reason(self, epoch: int, value: float, peers: list[float]) -> str:
        factor = self._reduction_factor
        cutoff = float(np.percentile(peers, (1 - 1 / factor) * 100)) * self._sign
        side = "below" if self._sign > 0 else "above"
        place = f"{side} the rung's top 1/{factor:g} at {cutoff:.4g} (n = {len(peers)})"
        return f"epoch {epoch}: {self._curve} {value:.4g}, {place}"
