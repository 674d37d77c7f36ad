"""Rank correlations, their intervals, and what is left of them once the searched fields are known.

Numbers in, numbers out. n trials; a value that was not measured is NaN, and a pair of which one is NaN is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from hpcl.results.fields import Field

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

FEWEST = 8
"""Trials below which no correlation is told: of 7, one order in 20 reaches 0.7 by chance."""

SPARE = 10
"""Trials beyond the columns of the fields that a partial correlation needs."""

ENOUGH = 2000
"""Trials up to which all are resampled; of more, statistics look at :data:`PART` of them."""

PART = 1000
"""With so many trials the 95 % interval of a rank correlation is at most 0.13 wide."""

_CHUNK = 1_000_000
"""Numbers dealt at a time."""

_KEPT_SIDES = 6
"""Columns whose ranks are kept."""


def unit_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis, the mean rank among equals, centred and of length 1; zeros where all are equal.

    The product of two such vectors is Spearman's rank correlation.
    """
    ranks = np.asarray(rankdata(values, axis=-1), dtype=np.float64)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(ranks, axis=-1, keepdims=True)
    return np.asarray(np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 1e-9))


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rank correlation, -1..1; NaN for fewer than 8 pairs, or where one side has nothing but equals."""
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < FEWEST:
        return math.nan
    a, b = unit_ranks(x[known]), unit_ranks(y[known])
    return float(a @ b) if a.any() and b.any() else math.nan


def association(values: NDArray[np.float64], positions: NDArray[np.float64], field: Field) -> tuple[float, int]:
    """How strongly values go with a searched field, and the number of trials.

    Args:
        values: (n,).
        positions: (n,) of :meth:`~hpcl.results.Field.positions`, NaN where the field did not act.
        field: a choice of three or more has no order: there it is the correlation ratio of the ranks (Kruskal &
            Wallis 1952), adjusted for the number of groups (Kelley 1935), 0..1; else Spearman's correlation.

    Returns:
        NaN where it cannot be told.
    """
    known = np.isfinite(values) & np.isfinite(positions)
    n = int(known.sum())
    if field.kind != "choice" or len(field.choices) < 3:
        return spearman(values, positions), n
    if n < FEWEST or not (ranks := unit_ranks(values[known])).any():
        return math.nan, n
    groups = [ranks[positions[known] == code] for code in np.unique(positions[known])]
    if not 1 < len(groups) < n:
        return math.nan, n
    explained = sum(group.sum() ** 2 / len(group) for group in groups)
    return math.sqrt(max(0.0, 1 - (1 - explained) * (n - 1) / (n - len(groups)))), n


def design(fields: Mapping[str, Field], trials: pd.DataFrame) -> NDArray[np.float64]:
    """The searched fields of trials as columns to regress on.

    A number is its position in its range, a choice a column of 0 and 1 per value but the first; where a field did
    not act it has the mean of the others. Columns without differences are left out.

    Returns:
        float64 (n, columns), each column with mean 0.
    """
    columns = []
    for field in fields.values():
        if field.column not in trials:
            continue
        place = np.where(field.acts(trials), field.positions(trials[field.column]), np.nan)
        parts = [place]
        if field.kind == "choice":
            parts = [np.where(np.isnan(place), np.nan, place == code) for code in range(1, len(field.choices))]
        for part in parts:
            known = np.isfinite(part)
            if known.any() and np.ptp(part[known]) > 0:
                columns.append(np.where(known, part - part[known].mean(), 0.0))
    return np.column_stack(columns) if columns else np.zeros((len(trials), 0))


def partial(x: NDArray[np.float64], y: NDArray[np.float64], given: NDArray[np.float64]) -> tuple[float, float, float]:
    """Spearman's correlation of what linear regression on the fields leaves of the ranks, and its 95 % interval.

    The interval is Fisher's, with the variance of rank correlations 1.06/(n - p - 3) (Fieller et al. 1957) and p
    columns. A bootstrap would draw too few different trials for the regression.

    Args:
        x, y: (n,).
        given: (n, p) of :func:`design`.

    Returns:
        NaN three times where fewer than p + 10 trials have both values, or the fields leave nothing.
    """
    known = np.isfinite(x) & np.isfinite(y)
    n, columns = int(known.sum()), given[known] - given[known].mean(axis=0) if known.any() else given[known]
    rank = int(np.linalg.matrix_rank(columns)) if columns.size else 0
    if n < rank + SPARE:
        return math.nan, math.nan, math.nan
    pair = np.stack([unit_ranks(x[known]), unit_ranks(y[known])], axis=1)
    left = pair - columns @ np.linalg.lstsq(columns, pair)[0] if columns.size else pair
    length = np.linalg.norm(left, axis=0)
    if (length < 1e-9).any():
        return math.nan, math.nan, math.nan
    rho = float(np.clip((left[:, 0] @ left[:, 1]) / length.prod(), -1, 1))
    centre, half = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12)), 1.96 * math.sqrt(1.06 / (n - rank - 3))
    return rho, float(np.tanh(centre - half)), float(np.tanh(centre + half))


class Resamples:
    """Bootstrap samples of trials; the same ones for every pair of columns, so that differences are of pairs.

    Holds a few arrays of n x draws numbers: of more than :data:`ENOUGH` trials look at a part.

    Args:
        n: trials.
        seed: of the draws.
        draws: samples.
    """

    def __init__(self, n: int, seed: int, draws: int = 1000) -> None:
        self.draws = draws
        drawn = np.random.default_rng(seed).integers(0, max(n, 1), (draws, n))
        drawn += n * np.arange(draws)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=draws * n).reshape(draws, n)
        self._counts = np.ascontiguousarray(counts.T, dtype=np.float64)
        """(n, draws) how often a sample has each trial."""
        self._sides: dict[bytes, _Side] = {}

    def spearman(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Spearman's correlation (draws,) in each sample, NaN where one side has nothing but equals there.

        Trials with a NaN are left out. Equal to that of the drawn trials written out, without sorting each sample:
        the rank of a value is the number of smaller ones and half of its equals.
        """
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            return np.full(self.draws, np.nan)
        counts = self._counts if known.all() else self._counts[known]
        a, b = self._side(x, known, counts), self._side(y, known, counts)
        product = np.einsum("ij,ij->j", a.weighted, b.ranks)
        length = a.length * b.length
        return np.asarray(np.divide(product, length, out=np.full(self.draws, np.nan), where=length > 1e-9))

    def _side(self, values: NDArray[np.float64], known: NDArray[np.bool_], counts: NDArray[np.float64]) -> _Side:
        """A column in each sample; the last few are kept, as many curves are asked about one objective."""
        key = values[known].tobytes() + known.tobytes()
        side = self._sides.pop(key, None) or _Side(values[known], counts)
        self._sides[key] = side
        if len(self._sides) > _KEPT_SIDES:
            del self._sides[next(iter(self._sides))]
        return side

    def interval(self, x: NDArray[np.float64], y: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
        """The percentile interval of Spearman's correlation; NaN twice where :func:`spearman` is NaN."""
        if math.isnan(spearman(x, y)):
            return math.nan, math.nan
        low, high = np.nanquantile(self.spearman(x, y), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class _Side:
    """A column's centred ranks (n, draws) in samples of it.

    Args:
        values: (n,) finite.
        counts: (n, draws) how often a sample has each value.
    """

    def __init__(self, values: NDArray[np.float64], counts: NDArray[np.float64]) -> None:
        different, group = np.unique(values, return_inverse=True)
        among = counts[np.argsort(values, kind="stable")]
        if len(different) < len(values):
            among = np.add.reduceat(among, np.searchsorted(np.sort(values), different), axis=0)
        below = np.cumsum(among, axis=0)
        below -= among / 2
        below -= counts.sum(axis=0) / 2  # the mean of the ranks, whatever the ties
        self.ranks: NDArray[np.float64] = below[group.reshape(-1)]
        self.weighted: NDArray[np.float64] = counts * self.ranks
        self.length: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->j", self.weighted, self.ranks))


def _chunks(draws: int, n: int) -> Iterator[slice]:
    size = max(1, _CHUNK // max(n, 1))
    for start in range(0, draws, size):
        yield slice(start, min(start + size, draws))


def permuted_scores(
    curves: NDArray[np.float64], objective: NDArray[np.float64], seed: int, draws: int
) -> NDArray[np.float64]:
    """Mean rank correlation of each curve with objectives dealt to the trials by chance.

    Args:
        curves: (C, R, n) values of C curves at R rungs; a cell that cannot be told counts 0.
        objective: (n,) finite.
        seed: of the deals.
        draws: number of deals.

    Returns:
        float64 (draws, C).
    """
    count, rungs, n = curves.shape
    cells = curves.reshape(-1, n)
    known = np.isfinite(cells)
    patterns, of_cell = np.unique(known, axis=0, return_inverse=True)
    sides = []
    for number, pattern in enumerate(patterns):
        if pattern.sum() >= FEWEST:
            which = np.flatnonzero(of_cell.reshape(-1) == number)
            sides.append((pattern, which, unit_ranks(cells[which][:, pattern])))
    chance = np.random.default_rng(seed)
    scores = np.zeros((draws, count))
    for part in _chunks(draws, n):
        dealt = chance.permuted(np.broadcast_to(unit_ranks(objective), (part.stop - part.start, n)), axis=1)
        found = np.zeros((len(dealt), len(cells)))
        for pattern, which, ranks in sides:
            found[:, which] = (dealt if pattern.all() else unit_ranks(dealt[:, pattern])) @ ranks.T
        scores[part] = found.reshape(len(dealt), count, rungs).mean(axis=2)
    return scores
