"""What the finished trials say of a searched range: hit at an edge, of no effect, or good in a part of it.

Positions and objectives in, numbers out; :mod:`hpcl.analysis.suggest` makes the next space of them. Every test is
corrected for the number of tests (Bonferroni), and no range is judged by fewer than LEAST finished trials.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orth
from scipy.stats import binomtest, f, mannwhitneyu, ncf, permutation_test, rankdata

if TYPE_CHECKING:
    from hpcl.results import Field

LEAST = 8
"""Finished trials below which nothing is said: the good ones are 4 at least, which is then half of them."""
GOOD = 4
"""A quarter of the finished trials is good, and at least so many."""
EDGE = 0.1
"""Part of a range that is its edge, at each end."""
LEVEL = 0.05
"""Level of every test, after the correction."""
EFFECT = 0.125
"""Share of the variance of ranks that would have been seen, before seeing nothing means something."""
POWER = 0.8
"""Probability with which such an effect would have been seen."""
NO_EFFECT = 0.25
"""Probability by chance above which nothing is seen; between it and LEVEL nothing is said."""

Verdict = Literal["edge", "matters", "no effect", "unclear", "few"]


@dataclass(frozen=True)
class Seen:
    """What was seen of one field."""

    path: str
    n: int
    """Finished trials in which it acted, and whose value has a place in the range."""
    good: int
    """The best quarter of them."""
    at_low: int = 0
    """Good ones within the outer tenth at the low end."""
    at_high: int = 0
    p_low: float = 1.0
    """Probability of so many there by chance (binomial, uniform draws), times the number of tests, at most 1."""
    p_high: float = 1.0
    effect: float = math.nan
    """Share of the variance of the objective's ranks that a parabola over the range, or the choice, explains."""
    p_effect: float = math.nan
    """Probability of so much by chance (permutations), as it is."""
    chance: float = math.nan
    """Share that is explained where there is no effect, on average: terms / (n - 1)."""
    p_corrected: float = math.nan
    """The same times the number of fields, at most 1."""
    power: float = math.nan
    """Probability with which n trials show an effect of EFFECT at LEVEL, without the correction."""
    worse: tuple[Any, ...] = ()
    """Choices that are worse than the best one (Mann-Whitney, corrected)."""
    span: tuple[float, float] = (0.0, 1.0)
    """Least and largest position of the good trials."""
    peak: float | None = None
    """Position of the best value of that parabola; None for a choice, and where there is no effect to fit."""
    edge: tuple[float, float] = (EDGE, 1 - EDGE)
    """Positions at which the low edge ends and the high one begins."""
    no_place: int = 0
    """Finished trials that are left out, as their value has no place in the range, such as 0 on a logarithm."""

    @property
    def edges(self) -> tuple[str, ...]:
        """Edges that the best region is at, `low` and `high`: good ones pile up there, or the field matters and is best
        there, and a good one lies there."""
        matters = self.p_corrected <= LEVEL and self.peak is not None
        low = self.p_low <= LEVEL or (matters and self.at_low > 0 and (self.peak or 0.0) <= self.edge[0])
        high = self.p_high <= LEVEL or (matters and self.at_high > 0 and (self.peak or 0.0) >= self.edge[1])
        return ("low",) * low + ("high",) * high

    @property
    def verdict(self) -> Verdict:
        """What is to be said: the edge before all else, then whether the field matters.

        `no effect`: no more is seen than chance gives, and an effect of EFFECT would have been seen with probability
        POWER. `unclear`: neither an effect nor that there is none.
        """
        if self.n < LEAST:
            return "few"
        if self.edges:
            return "edge"
        if self.p_corrected <= LEVEL:
            return "matters"
        nothing = self.p_effect > NO_EFFECT and self.effect <= self.chance
        return "no effect" if nothing and self.power >= POWER else "unclear"

    def text(self) -> str:
        """The numbers behind the verdict, in words."""
        if self.n < LEAST:
            return f"{self._counts()} finished, {LEAST} are needed"
        edges = [
            f"{count} of the {self.good} best in the {name} tenth, p = {p:.2g} corrected"
            + ("" if p <= LEVEL else ", and the field matters and is best there")
            for name, count, p in (("lowest", self.at_low, self.p_low), ("highest", self.at_high, self.p_high))
            if name.removesuffix("est") in self.edges
        ]
        effect = (
            f"one value in {'all that have a place' if self.no_place else 'all of them'}"
            if math.isnan(self.effect)
            else f"explains {self.effect:.0%} of the ranks ({self.chance:.0%} by chance), p = {self.p_effect:.2g} "
            f"({self.p_corrected:.2g} corrected)"
        )
        return f"{self._counts()}: {'; '.join([*edges, effect])}"

    def _counts(self) -> str:
        return f"n = {self.n}{f' (and {self.no_place} without a place in the range)' if self.no_place else ''}"


def look(field: Field, values: Any, good: NDArray[np.float64], fields: int, seed: int = 0) -> Seen:
    """What finished trials say of a field.

    Args:
        field: its range.
        values: pandas Series (n,) of the field, in finished trials in which it acted.
        good: float64 (n,), their objectives, larger is better.
        fields: number of fields that are looked at, for the correction.
        seed: of the permutations.
    """
    places = field.positions(values)
    known = np.isfinite(places) & np.isfinite(good)
    no_place = int((~np.isfinite(places) & values.notna().to_numpy(dtype=bool)).sum())
    places, good = places[known], good[known]
    n = len(good)
    top = max(GOOD, -(-n // 4))
    if n < LEAST:
        return Seen(field.path, n, min(n, top), no_place=no_place)
    best = np.argsort(-good, kind="stable")[:top]
    facts: dict[str, Any] = {"no_place": no_place}
    if field.kind != "choice":
        low, high = _edge(field)
        for name, inside, share in (("low", places <= low[0], low[1]), ("high", places >= high[0], high[1])):
            count = int(inside[best].sum())
            chance = binomtest(count, top, share, alternative="greater").pvalue
            facts |= {f"at_{name}": count, f"p_{name}": min(1.0, float(chance) * 2 * fields)}
        facts["edge"] = (low[0], high[0])
        facts["span"] = (float(places[best].min()), float(places[best].max()))
    basis = _basis(places, field.kind == "choice")
    if basis.shape[1]:
        effect, chance = _effect(basis, good, seed)
        facts |= {"effect": effect, "p_effect": chance, "p_corrected": min(1.0, chance * fields)}
        facts["chance"] = basis.shape[1] / (n - 1)
        facts["power"] = _power(n, basis.shape[1])
        if field.kind == "choice":
            facts["worse"] = _worse(field, places, good, fields)
        else:
            facts["peak"] = _peak(places, good)
    return Seen(field.path, n, top, **facts)


def _edge(field: Field) -> tuple[tuple[float, float], tuple[float, float]]:
    """For the low and the high end: position where the edge begins, and the share of uniform draws in it.

    A range of few whole numbers, or of few steps, has an end that is more than a tenth; then that value is the edge.
    """
    step = field.step or (1.0 if field.kind == "int" else None)
    if step is None:
        return (EDGE, EDGE), (1 - EDGE, EDGE)
    count = math.floor((field.high - field.low) / step + 1e-9) + 1
    grid = field.low + step * np.arange(min(count, 100_000))
    if count > len(grid):
        return (EDGE, EDGE), (1 - EDGE, EDGE)
    if field.log:  # as Optuna draws them: evenly in the logarithm, half a step beyond both ends
        borders = np.log(np.append(grid - step / 2, field.high + step / 2))
        places = np.log(grid / field.low) / math.log(field.high / field.low)
    else:
        borders, places = np.arange(count + 1.0), np.linspace(0.0, 1.0, count)
    weights = np.diff(borders) / (borders[-1] - borders[0])
    low, high = EDGE + 1e-9, 1 - EDGE - 1e-9
    return (low, float(weights[places <= low].sum())), (high, float(weights[places >= high].sum()))


def _basis(places: NDArray[np.float64], choice: bool) -> NDArray[np.float64]:
    """float64 (n, r) orthonormal columns of mean 0: a parabola over the positions, or which value it is."""
    kinds = np.unique(places)
    if choice or len(kinds) <= 3:
        columns = (places[:, None] == kinds).astype(np.float64)
    else:
        columns = np.stack([places, places**2], axis=1)
    columns = columns - columns.mean(axis=0)
    return np.asarray(orth(columns, rcond=1e-9)) if np.abs(columns).max() > 1e-12 else np.zeros((len(places), 0))


def _effect(basis: NDArray[np.float64], good: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Share of the variance of ranks in the span of the basis, and its probability by chance."""
    ranks = rankdata(good) - (len(good) + 1) / 2
    whole = float(ranks @ ranks)
    if whole == 0:
        return 0.0, 1.0

    def share(r: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        inside: NDArray[np.float64] = ((r @ basis) ** 2).sum(axis=-1) / whole
        return inside

    # Permutations draw with a seed, so that two looks at one folder say the same.
    test = permutation_test(
        (ranks,), share, permutation_type="pairings", vectorized=True, n_resamples=1999, alternative="greater",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.statistic), float(test.pvalue)


def _peak(places: NDArray[np.float64], good: NDArray[np.float64]) -> float:
    """Position of the best value of a parabola through the ranks; with up to three positions, the best of them."""
    ranks = rankdata(good)
    kinds = np.unique(places)
    if len(kinds) <= 3:
        return float(max(kinds, key=lambda kind: float(ranks[places == kind].mean())))
    grid = np.linspace(0.0, 1.0, 101)
    return float(grid[np.polyval(np.polyfit(places, ranks, 2), grid).argmax()])


def _power(n: int, terms: int) -> float:
    """Probability that the F test at LEVEL sees an effect of EFFECT (Cohen, 1988, chapter 9)."""
    rest = n - 1 - terms
    if rest < 1:
        return 0.0
    return float(ncf.sf(f.isf(LEVEL, terms, rest), terms, rest, n * EFFECT / (1 - EFFECT)))


def trials_needed() -> int:
    """Finished trials from which on the absence of an effect of a number means something."""
    return next(n for n in itertools.count(LEAST) if _power(n, 2) >= POWER)


def _worse(field: Field, places: NDArray[np.float64], good: NDArray[np.float64], fields: int) -> tuple[Any, ...]:
    """Choices that are clearly worse than that of the best median; those never finished are not judged."""
    of = {code: good[places == code] for code in np.unique(places)}
    if len(of) < 2:
        return ()
    best = max(of, key=lambda code: float(np.median(of[code])))
    tests = (len(of) - 1) * fields
    return tuple(
        field.choices[int(code)]
        for code, values in of.items()
        if code != best and mannwhitneyu(values, of[best], alternative="less").pvalue * tests <= LEVEL
    )
