"""A search in memory: its tables, its searched fields, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcl.errors import UserError
from hpcl.results.about import About
from hpcl.results.columns import LOWER_IS_BETTER
from hpcl.results.fields import Field, is_missing, shown
from hpcl.results.frames import LARGEST

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_NOTHING = object()

PROBE = "linear probe"
"""What `chosen_by` calls the probe on a validation split; any other is the name of a curve."""


@dataclass(frozen=True)
class SearchResults:
    """A search: its tables, its searched fields, and what is known about it."""

    folder: Path
    about: About
    fields: Mapping[str, Field]
    """Searched fields by path."""
    trials: pd.DataFrame
    """One row per trial, in the order of drawing: :data:`~hpcl.results.TRIAL_COLUMNS` and ``config.<path>``."""
    epochs: pd.DataFrame
    """One row per trial and epoch: :data:`~hpcl.results.EPOCH_COLUMNS`; counts with gaps are float64."""
    retrain: pd.DataFrame
    """One row per run of ``hpcl retrain``: :data:`~hpcl.results.RETRAIN_COLUMNS`; empty where there was none."""

    # ------------------------------------------------------------ what chooses

    @cached_property
    def chosen_by(self) -> str:
        """What chooses the best trial: ``linear probe``, or the name of a curve."""
        if self.about.objective == "auto":
            measured = "objective" in self.epochs and bool(self.epochs["objective"].notna().any())
            return PROBE if measured else str(self.about.metric)
        return PROBE if self.about.objective in ("linear", "linear@val") else self.about.objective

    @property
    def sign(self) -> float:
        """1 where a larger objective is better, else -1."""
        return self.sign_of(self.chosen_by)

    def sign_of(self, curve: str) -> float:
        """1 where a larger value of a curve is better, else -1."""
        if self.about.mode is not None and curve == self.about.metric:
            return 1.0 if self.about.mode == "max" else -1.0
        return sign_of(curve)

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The trials that finished their schedule and have an objective, the best first; of equals the earlier one."""
        done = self.trials[(self.trials["state"] == "finished") & self.trials["objective"].notna()]
        if self.chosen_by == PROBE and "objective" in self.epochs:
            # A probe's accuracy and the metric that stands in for it are not on one scale.
            probed = self.epochs.loc[self.epochs["objective"].notna(), "trial_id"].unique()
            done = done[done["trial_id"].isin(probed)]
        order = done.assign(_good=-self.sign * done["objective"]).sort_values(["_good", "number"], kind="stable")
        return order.drop(columns="_good")

    @property
    def best(self) -> pd.Series | None:
        """The best trial's row; None where none finished with an objective."""
        return None if self.finished.empty else self.finished.iloc[0]

    @property
    def base_trial(self) -> pd.Series | None:
        """The row of trial 0, which has the base's configuration; None where it was not drawn."""
        rows = self.trials[self.trials["number"] == 0]
        known = self.about.kind == "hpcl" and len(rows) == 1
        return rows.iloc[0] if known else None

    def values(self, trial_id: str) -> dict[str, Any]:
        """A trial's searched values by path, as plain Python values; a field that did not act is left out.

        Raises:
            UserError: there is no such trial.
        """
        row = self._rows.get(trial_id)
        if row is None:
            raise UserError(f"{self.folder}: there is no trial {trial_id}; trials.parquet has them all")
        return {path: values[row] for path, values in self._values.items() if values[row] is not _NOTHING}

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {trial_id: row for row, trial_id in enumerate(self.trials["trial_id"])}

    @cached_property
    def _values(self) -> dict[str, list[Any]]:
        """Path -> the value of each trial; nothing where the field did not act."""
        return {
            path: [
                _NOTHING if is_missing(value, f) or not acted else plain(value, f)
                for value, acted in zip(self.trials[f.column].tolist(), f.acts(self.trials), strict=True)
            ]
            for path, f in self.fields.items()
            if f.column in self.trials
        }

    # ------------------------------------------------------------ curves

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Row and column of each row of `epochs` in an array (trials, epochs), and its number of columns."""
        import numpy as np
        import pandas as pd

        order = pd.Index(self.trials["trial_id"])
        rows = order.get_indexer(pd.Index(self.epochs["trial_id"])).astype(np.int64)
        columns = self.epochs["epoch"].to_numpy(dtype=np.int64) - 1
        return rows, columns, int(columns.max(initial=-1)) + 1

    def curves(self, column: str) -> NDArray[np.float64]:
        """A column of `epochs` as an array, one row per trial in the order of `trials`, one column per epoch.

        Returns:
            float64 (trials, most epochs), NaN where nothing was measured.

        Raises:
            UserError: there is no such numeric column.
        """
        import numpy as np

        if column not in self.numeric:
            raise UserError(
                f"{self.folder}: epochs has no numeric column {column}; there are: {', '.join(self.numeric)}"
            )
        rows, columns, width = self._places
        grid = np.full((len(self.trials), width), np.nan)
        known = rows >= 0
        values = self.epochs[column].to_numpy(dtype=np.float64, na_value=np.nan)
        grid[rows[known], columns[known]] = np.where(np.abs(values) < LARGEST, values, np.nan)[known]
        return grid

    @cached_property
    def numeric(self) -> tuple[str, ...]:
        """The numeric columns of `epochs`."""
        import pandas as pd

        kinds = {str(name): self.epochs[name] for name in self.epochs.columns}
        return tuple(
            name
            for name, values in kinds.items()
            if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        )

    def measured(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the columns of `epochs` in which there is at least one value."""
        return tuple(n for n in names if n in self.numeric and bool(self.epochs[n].notna().any()))

    # ------------------------------------------------------------ cost

    @property
    def cost_column(self) -> Literal["gpu_hours", "cpu_hours"]:
        """What the search's cost is counted in: GPU-hours where it had GPUs, else CPU-hours."""
        return "gpu_hours" if float(self.trials["gpu_hours"].sum()) > 0 else "cpu_hours"

    @property
    def cost_unit(self) -> str:
        """The same in words."""
        if self.about.kind == "tune":
            return "trial-hours"
        return "GPU-hours" if self.cost_column == "gpu_hours" else "CPU-hours"

    @property
    def cost(self) -> float:
        """All hours of the search in that unit, what trials share counted once."""
        return float(self.trials[self.cost_column].sum()) + self.about.hours_shared.get(self.cost_column, 0.0)


def sign_of(curve: str | None) -> float:
    """1 for a curve where larger is better, -1 for one where smaller is."""
    return -1.0 if curve in LOWER_IS_BETTER else 1.0


def plain(value: Any, f: Field) -> Any:
    """A table's value as the configuration has it: an int for an int field, the choice itself for a choice."""
    if f.kind == "choice":
        return next((choice for choice in f.choices if shown(choice) == shown(value)), value)
    return int(value) if f.kind == "int" else float(value)
