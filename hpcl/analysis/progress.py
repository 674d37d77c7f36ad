"""Best so far over what a search had spent: hours, or epochs where no times are known.

Rows of ``epochs`` in the order in which the scheduler saw them each cost their seconds, priced by what their trial
held; what trials share costs at the start, once. So two searches can be asked what each had found after the same
hours, whatever their numbers of trials and of trials at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcl.analysis.text import counted
from hpcl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hpcl.results import SearchResults


@dataclass(frozen=True)
class Progress:
    """Best so far as a step function: from ``spent[i]`` on it is ``best[i]``, before ``spent[0]`` there is none."""

    spent: NDArray[np.float64]
    """float64 (steps,), ascending, in `unit`; empty where nothing was found."""
    best: NDArray[np.float64]
    """float64 (steps,), each better than the one before."""
    trials: tuple[str, ...]
    """The trial of each step."""
    total: float
    """All that the search spent, in `unit`."""
    unit: str
    """``GPU-hours``, ``CPU-hours``, or ``epochs`` where no times are known."""
    curve: str
    """What is the best of: what chooses the best trial, or a curve."""
    wall_hours: float | None = None
    """How long the search ran, in hours; None where it is not known."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""

    def at(self, spent: float) -> float | None:
        """The best that was found for so much, in `unit`; None where nothing was."""
        place = int(self.spent.searchsorted(spent * (1 + 1e-9), side="right"))
        return float(self.best[place - 1]) if place else None

    def wall(self) -> NDArray[np.float64] | None:
        """`spent` as hours since the search began, as if it had spent evenly; None where its length is not known.

        Evenly is nearly so while all its slots for trials are taken: tables have no times of day.
        """
        if self.wall_hours is None or self.total <= 0:
            return None
        return self.spent * (self.wall_hours / self.total)


def best_so_far(search: SearchResults, curve: str | None = None) -> Progress:
    """The best that a search had found, over what it had spent.

    Args:
        search: of :func:`hpcl.results.load_search`.
        curve: a column of ``epochs``, counted in every trial and epoch; None: the objective of finished trials, which
            counts from a trial's last epoch on.

    Raises:
        UserError: there is no such curve.
    """
    import numpy as np

    rows, price, at_start, unit, notes = _priced(search)
    after = at_start + np.cumsum(price)
    if curve is None:
        good = search.sign
        ends = _ends(search, rows, after)
        if lost := len(search.finished) - len(ends):
            notes.append(f"{counted(lost, 'finished trial')} without rows in epochs: the time of the end is not known")
        ends.sort(key=lambda end: float(end[0]))
    else:
        if curve not in search.numeric:
            raise UserError(f"{search.folder}: has no curve {curve}; there are: {', '.join(search.numeric)}")
        good = search.sign_of(curve)
        values = rows[curve].to_numpy(dtype=np.float64, na_value=np.nan)
        known = np.flatnonzero(np.isfinite(values))
        ends = [(after[i], float(values[i]), rows["trial_id"].iloc[i]) for i in known]
    steps: list[tuple[Any, float, str]] = []
    for end in ends:
        if not steps or good * end[1] > good * steps[-1][1]:
            steps.append(end)
    total = float(after[-1]) if len(after) else at_start
    return Progress(
        spent=np.array([step[0] for step in steps], dtype=np.float64),
        best=np.array([step[1] for step in steps], dtype=np.float64),
        trials=tuple(step[2] for step in steps),
        total=total if unit == "epochs" else max(total, search.cost),
        unit=unit,
        curve=curve or search.chosen_by,
        wall_hours=search.about.seconds / 3600 if search.about.seconds else None,
        notes=tuple(notes),
    )


def finishes(search: SearchResults) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """When each finished trial ended, in the unit of :func:`best_so_far`, and its objective; both float64 (n,)."""
    import numpy as np

    rows, price, at_start, _, _ = _priced(search)
    ends = _ends(search, rows, at_start + np.cumsum(price))
    return np.array([end[0] for end in ends], dtype=np.float64), np.array([end[1] for end in ends], dtype=np.float64)


def _ends(search: SearchResults, rows: Any, after: NDArray[np.float64]) -> list[tuple[Any, float, str]]:
    """(spent at its last row, objective, trial) of each finished trial."""
    last = {trial: place for place, trial in enumerate(rows["trial_id"])}
    return [
        (after[last[trial]], float(value), trial)
        for trial, value in zip(search.finished["trial_id"], search.finished["objective"], strict=True)
        if trial in last
    ]


def _priced(search: SearchResults) -> tuple[Any, NDArray[np.float64], float, str, list[str]]:
    """Rows of `epochs` in order of arrival, the price of each, what was spent before them, the unit, and notes."""
    import numpy as np

    rows = search.epochs
    if "arrival" in rows and bool(rows["arrival"].notna().any()):  # else the file's order, which is the same
        rows = rows.sort_values("arrival", kind="stable", na_position="last", ignore_index=True)
    own = ~rows["shared"].fillna(False).to_numpy(dtype=bool)
    seconds = rows["seconds"].to_numpy(dtype=np.float64, na_value=0.0)
    seconds = np.where(own & np.isfinite(seconds) & (seconds > 0), seconds, 0.0)
    hours = search.trials.set_index("trial_id")[search.cost_column].fillna(0.0)
    if seconds.sum() <= 0 or float(hours.sum()) <= 0:
        shared = _shared_epochs(search, own)
        return rows, own.astype(np.float64), shared, "epochs", ["no times are known: epochs are counted in their place"]
    # All rows of a trial together cost what its trial did, also where a retry repeated some of its epochs.
    of_trial = rows.assign(_seconds=seconds).groupby("trial_id")["_seconds"].transform("sum").to_numpy()
    of_row = rows["trial_id"].map(hours).to_numpy(dtype=np.float64, na_value=0.0)
    price = np.divide(seconds * of_row, of_trial, out=np.zeros(len(rows)), where=of_trial > 0)
    return rows, price, search.about.hours_shared.get(search.cost_column, 0.0), search.cost_unit, []


def _shared_epochs(search: SearchResults, own: NDArray[np.bool_]) -> float:
    """Epochs of the prefixes that trials share: what ``search.json`` says, else the longest that a trial has."""
    prefixes = search.about.facts.get("prefixes")
    known = (
        [p["epochs"] for p in prefixes if isinstance(p, dict) and isinstance(p.get("epochs"), int)] if prefixes else []
    )
    if known:
        return float(sum(known))
    shared = search.epochs[search.epochs["shared"].fillna(False).astype(bool)]
    return float(shared.groupby("trial_id").size().max()) if len(shared) and not own.all() else 0.0
