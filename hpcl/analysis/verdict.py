"""Which curve to stop trials on, said only where the trials can tell.

A curve's score is its rank correlation with the final objective, averaged over the rungs; where fewer than 8 trials
have a value it counts 0, as a curve that is not there ranks nothing. Two questions are asked:

- *Is there a signal?* The objective is dealt to the trials by chance 2,000 times. A curve has a signal if at most 2.5 %
  of the deals give **any** curve so high a score (Westfall & Young's max-T): over all curves together, a signal is seen
  with a probability of at most 2.5 % where there is none, whatever n, ties and the curves' likeness.
- *Is a curve clearly worse than the best?* Trials are resampled, the same ones for both curves; it is, if 97.5 % of the
  samples, corrected for the number of curves (Bonferroni), have its score below that of the best.

Then: no curve with a signal → the data can't tell. The curve in use is clearly worse than the best → the best one. It
is not, and has a signal (it was given before, so its own deals are enough once any curve has one) → keep it. It is not,
but has no signal of its own → the data can't tell: a signal beside none is no difference between two curves, and among
equally good ones it is common. No curve in use was measured → the best one. If the search stopped trials, those that
finished are survivors of the curve in use: it tends to look worse among them, so none is put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hpcl.analysis.signals import FEWEST, Resamples, permuted_scores, spearman
from hpcl.rng import seed_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.025
"""Probability of each of the two errors: a signal where there is none, a worse curve that is none."""

DEALS = 2000
"""Permutations of the objective."""


@dataclass(frozen=True)
class Score:
    """How well a curve ranks trials."""

    metric: str
    value: float
    """Mean over the rungs of the rank correlation with the objective, -1..1; larger is better."""
    low: float
    """Low end of its 95 % bootstrap interval."""
    high: float
    p: float
    """Share of the chance deals in which any curve has so high a score, 0..1."""
    p_alone: float
    """Share of those in which this curve has."""
    worse: bool
    """Whether it is clearly worse than the best."""

    @property
    def signal(self) -> bool:
        """Whether the score is beyond chance."""
        return self.p <= LEVEL

    def text(self, between: str | None = None) -> str:
        """The score with its interval, such as ``0.71 (0.55 to 0.83)``, or with something else between them."""
        ends = f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.value:.2f} ({ends})" if between is None else f"{self.value:.2f}{between}{ends}"


@dataclass(frozen=True)
class Verdict:
    """Which curve to stop on, in a sentence."""

    kind: Literal["named", "kept", "unknown"]
    """Another curve than that in use is named; the one in use is kept; the data can't tell."""
    curve: str | None
    """The curve to stop on; None: the data can't tell."""
    sentence: str
    scores: tuple[Score, ...] = ()
    """Of the curves that were compared, the best first."""


def judge(
    curves: Mapping[str, NDArray[np.float64]],
    objective: NDArray[np.float64],
    *,
    in_use: str | None,
    chosen_by: str = "objective",
    stops: bool = True,
    stopped: int = 0,
    inferred: bool = False,
    seed: int = 0,
) -> Verdict:
    """Which of these curves to stop trials on.

    Args:
        curves: name -> (n, R) value of each finished trial at each rung, larger for better ones, NaN where there is
            none; only curves that need no labels.
        objective: (n,) of the same trials, finite, larger for better ones.
        in_use: the curve that trials are stopped on now; None, or none of `curves`: there is none to keep.
        chosen_by: what the objective is, in words; a name of `curves`: nothing independent judges them.
        stops: whether the search stops trials on `in_use`; else that is merely its metric.
        stopped: trials that the search stopped.
        inferred: whether that they were stopped is merely concluded from fewer reports.
        seed: of resampling and permutations.
    """
    n = len(objective)
    cannot = "The data can't tell which curve to stop on: "
    measured = {
        name: values for name, values in curves.items() if np.isfinite(values).sum(axis=0).max(initial=0) >= FEWEST
    }
    if chosen_by in curves:
        return Verdict("unknown", None, f"{cannot}trials are judged by {chosen_by} itself, one of them (n = {n}).")
    if n < FEWEST:
        return Verdict(
            "unknown", None, f"{cannot}only {n} trials finished with a {chosen_by}, and {FEWEST} are needed."
        )
    if not measured:
        return Verdict("unknown", None, f"{cannot}at no rung have {FEWEST} trials a value (n = {n}).")
    scores = _scores(measured, objective, seed)
    best, current = scores[0], next((s for s in scores if s.metric == in_use), None)
    if not best.signal:
        text = f"no curve ranks {n} trials by {chosen_by} beyond chance (best of {len(scores)}: {best.metric} "
        return Verdict("unknown", None, f"{cannot}{text}{best.text()}, p = {best.p:.2f}).", scores)
    role = "in use" if stops else "the metric of this search"
    among = f"n = {n}"
    if stopped:
        among = f"among the {n} survivors of {stopped + n} trials"
        among = f"among the {n} of {stopped + n} trials with the most reports" if inferred else among
    if current is not None and current.p_alone <= LEVEL and not current.worse:
        others = [s for s in scores if s is not current and s.signal and not s.worse]
        reason = "every other curve is clearly worse or has no signal beyond chance"
        if others:
            reason = f"not told apart from it: {_listed(others)}"
        text = f"Keep stopping on {in_use}" if stops else f"Stop on {in_use}, {role}"
        text += f": its mean rank correlation with {chosen_by} is {current.text()}, {among}; {reason}."
        return Verdict("kept", in_use, text, scores)
    if stopped:
        on = in_use or "a curve"
        how = f"were stopped on {on}, and among its survivors"
        if inferred:
            how = f"ended after fewer reports than others, and if they were stopped on {on}, then among the rest"
        text = f"{stopped} trials {how} (n = {n}) it tends to look worse than it is"
        text += f" (best there: {best.metric} {best.text()}{f', {on} {current.value:.2f}' if current else ''})."
        return Verdict("unknown", None, cannot + text, scores)
    if current is not None and not current.worse:
        text = f"{best.metric} ({best.text(', ')}) has a signal; {in_use}, {role} ({current.text(', ')}), "
        text += f"has none of its own and is not told apart from it (n = {n})."
        return Verdict("unknown", None, cannot + text, scores)
    text = f"Stop on {best.metric}: its mean rank correlation with {chosen_by} is {best.text()}, {among}"
    if current is not None:
        text += f", clearly above {in_use}, {role} ({current.value:.2f})"
    tied = [s for s in scores[1:] if s.signal and not s.worse]
    text += f"; not told apart from it: {_listed(tied)}." if tied else "."
    return Verdict("named", best.metric, text, scores)


def _scores(curves: Mapping[str, NDArray[np.float64]], objective: NDArray[np.float64], seed: int) -> tuple[Score, ...]:
    """The curves' scores, the best first."""
    names = list(curves)
    grid = np.stack([curves[name].T for name in names])  # (C, R, n)
    cells = np.array([[spearman(values, objective) for values in curve] for curve in grid])
    told = np.isfinite(cells)
    found = np.where(told, cells, 0.0).mean(axis=1)
    by_chance = permuted_scores(grid, objective, seed_of(seed, "audit", 0), DEALS)
    alone = (1 + (by_chance >= found - 1e-9).sum(axis=0)) / (1 + DEALS)
    p = (1 + (by_chance.max(axis=1)[:, None] >= found - 1e-9).sum(axis=0)) / (1 + DEALS)
    resamples = Resamples(len(objective), seed_of(seed, "audit", 1))
    drawn = np.zeros((resamples.draws, len(names)))
    for c, r in np.argwhere(told):
        drawn[:, c] += np.nan_to_num(resamples.spearman(grid[c, r], objective)) / grid.shape[1]
    order = np.argsort(-found, kind="stable")
    best = order[0]
    ahead = np.quantile(drawn[:, [best]] - drawn, LEVEL / max(1, len(names) - 1), axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return tuple(
        Score(
            names[c],
            float(found[c]),
            float(low[c]),
            float(high[c]),
            float(p[c]),
            float(alone[c]),
            bool(c != best and ahead[c] > 0),
        )
        for c in order
    )


def _listed(scores: list[Score]) -> str:
    return ", ".join(f"{s.metric} ({s.value:.2f})" for s in scores)
