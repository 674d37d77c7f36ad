"""What several seeds say of a search's best configurations: means, their spread, ranks, and which one is the best.

Numbers in, numbers and text out. The best is the best mean among the configurations of which
every seed finished: one that diverges with some seed is no configuration to go on with.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import kendalltau

from hpcl.results import LOWER_IS_BETTER

FEW = 5
"""Of fewer configurations a rank correlation tells little: of 4, one order in 24 agrees fully by chance."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """One configuration: its value in the search, and those of its seeds at the end of a retraining."""

    trial_id: str
    search: float | None
    """The objective in the search; None where the trial did not finish there."""
    values: tuple[float, ...]
    """Objectives of the seeds that finished."""
    lost: tuple[str, ...] = ()
    """Seeds that failed or diverged, in words."""
    open: tuple[int, ...] = ()
    """Seeds that have not ended."""

    @property
    def n(self) -> int:
        """Seeds that finished."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that finished; None where none did."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over them (n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def text(self) -> str:
        """Mean, standard deviation and n, such as ``0.9213 ± 0.0031 (n = 3)``."""
        if self.mean is None:
            return "no seed finished" if self.lost else "not yet"
        spread = "" if self.sd is None else f" ± {self.sd:.4f}"
        seeds = self.n + len(self.lost) + len(self.open)
        return f"{self.mean:.4f}{spread} (n = {self.n}{f' of {seeds}' if seeds > self.n else ''})"


class Evidence:
    """The configurations of a retraining, the best mean first.

    Args:
        rows: of ``retrain.parquet``.
        base: the trial with the base's configuration, the yardstick.
        chosen_by: what the objective of the runs is: `linear probe`, or the name of a curve.
        searched_by: the same of the search.
    """

    def __init__(self, rows: Iterable[Row], *, base: str, chosen_by: str, searched_by: str) -> None:
        self.base, self.chosen_by, self.searched_by = base, chosen_by, searched_by
        of_trial: dict[str, list[Row]] = {}
        for row in rows:
            of_trial.setdefault(row["trial_id"], []).append(row)
        standings = [_standing(trial, of_trial[trial]) for trial in of_trial]
        self.standings = tuple(sorted(standings, key=lambda s: (s.mean is None, -self._good(s), s.trial_id)))

    def _good(self, standing: Standing) -> float:
        """A configuration's mean, larger for better ones."""
        return _upwards(standing.mean or 0.0, self.chosen_by)

    @property
    def candidates(self) -> tuple[Standing, ...]:
        """The configurations of which every seed finished, or all with a mean where there is none; the best first."""
        with_mean = tuple(s for s in self.standings if s.mean is not None)
        return tuple(s for s in with_mean if not s.lost) or with_mean

    @property
    def best(self) -> Standing | None:
        """The configuration to go on with; None where no run finished."""
        return self.candidates[0] if self.candidates else None

    @property
    def left_out(self) -> tuple[Standing, ...]:
        """Configurations with a better mean than the best, of which a seed was lost."""
        ahead = [] if self.best is None else self.standings[: self.standings.index(self.best)]
        return tuple(ahead)

    def agreement(self) -> tuple[float | None, int]:
        """Kendall's tau-b between the search's objective and the means, 1 for the same order, and its n.

        Tau is None for fewer than two configurations with both values, or where one side has
        nothing but equal values.
        """
        pairs = [
            (_upwards(s.search, self.searched_by), _upwards(s.mean, self.chosen_by))
            for s in self.standings
            if s.search is not None and s.mean is not None
        ]
        if len(pairs) < 2:
            return None, len(pairs)
        tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
        return (None if math.isnan(tau) else tau), len(pairs)

    def facts(self) -> dict[str, Any]:
        """What `search.json` keeps of it."""
        tau, n = self.agreement()
        return {
            "objective": self.chosen_by,
            "configurations": [
                {
                    "trial": s.trial_id,
                    "base": s.trial_id == self.base,
                    "search": s.search,
                    "mean": s.mean,
                    "sd": s.sd,
                    "n": s.n,
                    "lost": list(s.lost),
                }
                for s in self.standings
            ],
            "kendall_tau": tau,
            "kendall_n": n,
            "best": self.best and self.best.trial_id,
        }

    # ---------------------------------------------------------------- in words

    def lines(self) -> list[str]:
        """The table, the rank agreement, and what was lost."""
        ranks = self._search_ranks()
        scored = [s for s in self.standings if s.mean is not None]
        cells = [("rank", "trial", self.chosen_by, f"in the search ({self.searched_by}, rank here)", "")]
        for s in self.standings:
            rank = str(scored.index(s) + 1) if s in scored else "-"
            then = "-" if s.search is None else f"{s.search:.4f} ({ranks[s.trial_id]})"
            notes = ["base"] * (s.trial_id == self.base)
            notes += [f"seed{'s' * (len(s.open) > 1)} {_listed(s.open)} to come"] * bool(s.open)
            cells.append((rank, s.trial_id, s.text(), then, "; ".join([*notes, *s.lost])))
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        table = ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return [*table, f"agreement {self.agreement_text()}"]

    def agreement_text(self) -> str:
        """The rank agreement with the search in a sentence."""
        tau, n = self.agreement()
        if tau is None:
            why = "their values are equal" if n > 1 else "there are too few configurations with both values"
            return f"with the search's ranks: none can be told, {why} (n = {n})"
        few = "" if n >= FEW else "; so few tell little" if n > 2 else "; of two it is 1 or -1 in any case"
        return f"with the search's ranks: Kendall's tau {tau:.2f} (n = {n}{few})"

    def lead(self) -> str:
        """How far the best is ahead of the next one, in a sentence."""
        if len(self.candidates) < 2:
            return "there is no other to compare it with"
        first, second = self.candidates[:2]
        return f"next is trial {second.trial_id} with {second.text()}: {_apart(first, second)}"

    def over_base(self) -> str | None:
        """How far the best is ahead of the base, in a sentence; None where it is the base, or the base has no value."""
        base = next((s for s in self.standings if s.trial_id == self.base and s.mean is not None), None)
        if self.best is None or base is None or base is self.best:
            return None
        return f"over the base, {_apart(self.best, base)}"

    def _search_ranks(self) -> dict[str, int]:
        known = [s for s in self.standings if s.search is not None]
        known.sort(key=lambda s: (-_upwards(s.search or 0.0, self.searched_by), s.trial_id))
        return {s.trial_id: rank for rank, s in enumerate(known, start=1)}


def _apart(first: Standing, second: Standing) -> str:
    """The difference of two means beside its standard error."""
    assert first.mean is not None and second.mean is not None
    ahead = abs(first.mean - second.mean)
    text = f"the difference of {ahead:.4f} "
    if first.sd is None or second.sd is None:
        return text + "cannot be judged with one seed; give more --seeds"
    error = math.sqrt(first.sd**2 / first.n + second.sd**2 / second.n)
    does = "is more than" if ahead > error else "is not more than"
    return text + f"{does} its standard error, {error:.4f}"


def _standing(trial: str, rows: Sequence[Row]) -> Standing:
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    return Standing(
        trial_id=trial,
        search=rows[0]["search_objective"],
        values=tuple(row["objective"] for row in rows if row["objective"] is not None),
        lost=tuple(
            f"seed {row['seed']} {row['state']}: {row['stop_reason']}"
            if row["state"] != "finished"
            else f"seed {row['seed']} finished without a value"
            for row in rows
            if row["state"] != "running" and row["objective"] is None
        ),
        open=tuple(row["seed"] for row in rows if row["state"] == "running"),
    )


def _upwards(value: float, curve: str) -> float:
    """The value, larger for better ones."""
    return -value if curve in LOWER_IS_BETTER else value


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)
