"""Says where the metric ranks trials by a knob instead of by how well they learn. It changes no decision.

A curve such as `acc_proto` depends on the number of clusters: by it, trials with few
clusters always win. The monitor compares, at every rung, the metric with the number of
clusters and with each searched field, and names what nearly fixes the order of the trials.

A rung is looked at when it has 8, 16, 32, ... records, each time at the first so many, so
that a resumed search makes the same looks and finds the same. What is named passes two tests:

- strength: Spearman's rank correlation of at least 0.75 in size, so that a field that
  merely matters is not named. Fields of text have no order: there it is the correlation
  ratio of the metric's ranks (Kruskal & Wallis 1952), adjusted for the number of groups.
- chance: a permutation test, exact with any ties, at the level `alarm` divided by all tests
  that the search can make, (fields + 1) x rungs x looks (Bonferroni). So in a search where
  the metric depends on nothing, anything is named with a probability below `alarm`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from hpcl.rng import seed_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST_LOOK = 8
"""Records of a rung at its first look; each later look has twice as many."""

FLOOR = 0.75
"""Least size of a rank correlation that is named."""

_CLUSTERS = "clusters"
_EXCEEDING = 5
"""Permutations as strong as the trials' own order that are expected at the level of one test."""
_CHUNK = 200_000
"""Numbers permuted at a time."""


class Monitor:
    """Watches one search; each field, and the number of clusters, is named once.

    Args:
        fields: paths of the searched fields.
        rungs: different rungs of the search; rungs beyond so many are not looked at.
        trials: trials of the search; sets the number of looks.
        alarm: probability below which a search is to name anything where nothing but chance acts.
    """

    def __init__(self, fields: Sequence[str], rungs: int, trials: int, alarm: float = 0.05) -> None:
        self._fields = (_CLUSTERS, *fields)
        self._rungs = rungs
        self._sizes = looks(trials)
        tests = len(self._fields) * max(1, rungs) * max(1, len(self._sizes))
        self._level = alarm / tests
        self._looked: dict[float, int] = {}
        self._named: set[str] = set()

    def look(self, rung: float, metric: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Compare, where the rung has enough new records for it.

        Args:
            rung: epoch of the rung on the search's clock.
            metric: name of the curve.
            rows: one per trial recorded at the rung, in the order of recording: `value` (the
                metric there), `clusters` and each field. Null, NaN and missing entries are left
                out (a field that is not active, clusters before stage 2); what then has fewer
                than 8 rows is not tested.

        Returns:
            A sentence for each field that is named now.
        """
        if rung not in self._looked and len(self._looked) >= self._rungs:
            return []
        recorded = [row for row in rows if _present(row.get("value"))]
        found = []
        for size in self._sizes[self._looked.get(rung, 0) :]:
            if size > len(recorded):
                break
            self._looked[rung] = self._looked.get(rung, 0) + 1
            for place, field in enumerate(self._fields):
                if field not in self._named and (text := self._compare(rung, field, place, recorded[:size])):
                    self._named.add(field)
                    found.append(f"at epoch {round(rung, 1):g} {metric} ranks trials by {text}")
        return found

    def restore(self, notes: Iterable[str]) -> None:
        """Take the sentences of an earlier session: what they name is not named again."""
        texts = list(notes)
        for field in self._fields:
            if any(f" ranks trials by {_subject(field)}: " in text for text in texts):
                self._named.add(field)

    def _compare(self, rung: float, field: str, place: int, rows: Sequence[Mapping[str, Any]]) -> str | None:
        pairs = [(float(row["value"]), row[field]) for row in rows if _present(row.get(field))]
        if len(pairs) < FIRST_LOOK:
            return None
        metric = [value for value, _ in pairs]
        ordered = all(isinstance(value, Real) for _, value in pairs)
        given: list[Any] = [value if ordered else repr(value) for _, value in pairs]
        if len(set(metric)) == 1 or len(set(given)) == 1:
            return None
        order = _unit_ranks(metric)
        weights = _unit_ranks(given)[:, None] if ordered else _groups(given)
        projected = order @ weights
        explained = float((projected**2).sum())
        strength = explained if ordered else _adjusted(explained, *weights.shape)
        if strength < FLOOR**2 - 1e-12:
            return None
        seed = seed_of(0, "monitor", round(rung * 1000), place, len(rows))
        if not _beyond_chance(order, weights, explained, self._level, seed):
            return None
        size = f"{projected[0]:.2f}" if ordered else f"correlation ratio {math.sqrt(explained):.2f}"
        return f"{_subject(field)}: {size}, n = {len(pairs)}"


def looks(trials: int) -> tuple[int, ...]:
    """Records at which a rung of a search of so many trials is looked at.

    Example:
        >>> looks(40)
        (8, 16, 32)
    """
    sizes = []
    size = FIRST_LOOK
    while size <= trials:
        sizes.append(size)
        size *= 2
    return tuple(sizes)


def _subject(field: str) -> str:
    return "their number of clusters" if field == _CLUSTERS else field


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _unit_ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks (n,), the mean rank among equals, centred and of length 1; not all values are equal.

    The product of two such vectors is Spearman's rank correlation.
    """
    import numpy as np

    ordered = sorted(values)
    ranks = np.array([bisect_left(ordered, value) + bisect_right(ordered, value) - len(values) for value in values])
    return np.asarray(ranks / np.sqrt(ranks @ ranks))


def _groups(values: Sequence[str]) -> NDArray[np.float64]:
    """A column (n, k) per group, 1/sqrt(size) for its members.

    The squared product of unit ranks with it is the part of the ranks' variance between groups.
    """
    import numpy as np

    counts = Counter(values)
    return np.array([[(value == group) / math.sqrt(size) for group, size in counts.items()] for value in values])


def _adjusted(explained: float, n: int, groups: int) -> float:
    """The explained part of the variance less what so many groups explain by chance (Kelley 1935)."""
    return 0.0 if n <= groups else 1 - (1 - explained) * (n - 1) / (n - groups)


def _beyond_chance(
    order: NDArray[np.float64], weights: NDArray[np.float64], explained: float, level: float, seed: int
) -> bool:
    """Whether at most a part `level` of all orders explain so much, by random permutations.

    With b of B permutations as strong, (b + 1)/(B + 1) is a valid p-value for every B, n and
    pattern of ties (Phipson & Smyth 2010).
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    left = math.ceil(_EXCEEDING / level)
    allowed = level * (left + 1) - 1
    exceeding, chunk = 0, _EXCEEDING
    while left > 0 and exceeding <= allowed:
        chunk = min(left, 2 * chunk, max(1, _CHUNK // len(order)))  # mere chance shows soon
        orders = draw.permuted(np.broadcast_to(order, (chunk, len(order))), axis=1)
        products = (orders @ weights).reshape(chunk, -1)
        exceeding += int(((products**2).sum(axis=1) >= explained - 1e-9).sum())
        left -= chunk
    return exceeding <= allowed
