"""A whole results folder in memory: tidy pandas frames and what is known about the search.

    search = load_search("results/clusters")
    search.trials.sort_values("objective")        # one row per trial
    search.epochs.query("trial_id == '0003'")     # one row per trial and epoch
    search.curves("acc_proto_ref")                # (trials, epochs) array, NaN where there is none

Neither Ray nor torch is needed, and nothing is run or unpickled: Parquet, JSON and YAML are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcl.errors import ConfigError, UserError
from hpcl.files import read_object
from hpcl.results.columns import (
    EPOCH_COLUMNS,
    LOWER_IS_BETTER,
    NO_CURVES,
    RETRAIN_COLUMNS,
    TRIAL_COLUMNS,
    Column,
    arrow_type,
)
from hpcl.results.fields import PREFIX, Field, from_space, from_table
from hpcl.yamlio import load_tree

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

Mode = Literal["max", "min"]

PROBE = "linear probe"
"""What `chosen_by` calls the probe on a validation split; any other is the name of a curve."""


@dataclass(frozen=True)
class About:
    """What is known about a search besides its tables."""

    name: str
    """Name of the folder."""
    kind: Literal["hpcl", "tune"] = "hpcl"
    """Who wrote it: this project, or Ray Tune."""
    state: str = "unknown"
    """finished, interrupted, failed, or running (also of one that was killed)."""
    metric: str | None = None
    """The curve that stopped trials, or by which trials are compared."""
    mode: Mode | None = None
    """Its better end; None: by its name (:data:`~hpcl.results.LOWER_IS_BETTER`)."""
    objective: str = "auto"
    """What the search was told to choose by: `auto`, `linear` or a curve."""
    rungs: tuple[float, ...] = ()
    """Where ASHA compared trials, ascending, on the search's clock; empty where nothing was stopped."""
    factor: float | None = None
    """ASHA's reduction factor."""
    fork: float = 0.0
    """Time on the clock up to which all trials share one run."""
    data: str | None = None
    """Source of the images."""
    val_images: int | None = None
    """Images of the validation split, by which a probe's accuracy is measured; None: not known."""
    command: str | None = None
    """The command that began it."""
    started: str | None = None
    """When it began, as ISO 8601."""
    seconds: float | None = None
    """How long it ran, all sessions together."""
    hours_shared: Mapping[str, float] = field(default_factory=dict)
    """`gpu_hours` and `cpu_hours` of the prefixes that trials share; in no row of `trials`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """All of ``search.json``: versions, hardware, seeds, commit."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The base configuration, nested as in ``space.yaml``."""
    notes: tuple[str, ...] = ()
    """What the reader should know: of the search, and of what its files lack."""


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
        return PROBE if self.about.objective == "linear" else self.about.objective

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
        rows = self.trials[self.trials["trial_id"] == trial_id]
        if rows.empty:
            raise UserError(f"{self.folder}: there is no trial {trial_id}; trials.parquet has them all")
        return {
            path: plain(rows.iloc[0][f.column], f)
            for path, f in self.fields.items()
            if bool(f.acts(rows)[0]) and not _missing(rows.iloc[0][f.column])
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
        grid[rows[known], columns[known]] = self.epochs[column].to_numpy(dtype=np.float64, na_value=np.nan)[known]
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
        from hpcl.results.fields import shown

        return next((choice for choice in f.choices if shown(choice) == shown(value)), value)
    return int(value) if f.kind == "int" else float(value)


def load_search(path: str | os.PathLike[str], *, metric: str | None = None, mode: Mode | None = None) -> SearchResults:
    """Read a results folder, or an experiment folder of Ray Tune as far as its files go.

    Args:
        path: ``results/<name>``; it may be of a search that runs, was cut short, or was made by an older version.
            Or a folder of Tune's, with a folder per trial that has ``result.json`` or ``progress.csv``.
        metric: curve by which trials are compared, where the folder does not say it, or another one.
        mode: its better end, where its name does not tell.

    Returns:
        The frames have all documented columns, also those that the files lack (then empty).

    Raises:
        UserError: there is no such folder, nothing in it can be read, or it has no such curve.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give that of a search, results/<name>")
    if not (folder / "trials.parquet").is_file():
        from hpcl.results.tune import load_tune

        return load_tune(folder, metric, mode)
    search = _own(folder)
    if metric is None and mode is None:
        return search
    known = [name for name in search.measured(search.numeric) if name not in NO_CURVES]
    if metric is not None and metric not in known:
        raise UserError(f"{folder}: has no curve {metric}; there are: {', '.join(known) or 'none'}")
    about = replace(search.about, metric=metric or search.about.metric, mode=mode)
    return replace(search, about=about)


def load_searches(
    paths: Sequence[str | os.PathLike[str]], *, metric: str | None = None, mode: Mode | None = None
) -> list[SearchResults]:
    """Several folders by :func:`load_search`.

    Raises:
        UserError: none is given, or some cannot be read; names all of them.
    """
    found: list[SearchResults] = []
    problems: list[str] = []
    for path in paths:
        try:
            found.append(load_search(path, metric=metric, mode=mode))
        except UserError as error:
            problems += error.problems
    if problems or not paths:
        raise UserError(*(problems or ["give the folder of a search, results/<name>"]))
    return found


def _own(folder: Path) -> SearchResults:
    import pyarrow as pa

    notes: list[str] = []
    trials = read_frame(folder / "trials.parquet", TRIAL_COLUMNS)
    trials = trials.sort_values("number", kind="stable", ignore_index=True)
    if (folder / "epochs.parquet").is_file():
        epochs = read_frame(folder / "epochs.parquet", EPOCH_COLUMNS)
    else:
        epochs = to_frame(pa.table({}), EPOCH_COLUMNS)
        notes.append("there is no epochs.parquet: no curves can be shown")
    retrained = folder / "retrain.parquet"
    retrain = read_frame(retrained, RETRAIN_COLUMNS) if retrained.is_file() else to_frame(pa.table({}), RETRAIN_COLUMNS)
    facts = _facts(folder / "search.json", notes)
    space = _space(folder / "space.yaml", notes)
    fields = from_space(space)
    if not fields:
        fields = from_table(trials)
    return SearchResults(folder, _about(folder, facts, space, epochs, notes), fields, trials, epochs, retrain)


def _facts(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        notes.append(f"search.json cannot be read ({error}): what the search ran on is not known")
        return {}


def _space(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = load_tree(path).value
    except (ConfigError, OSError) as error:
        notes.append(f"space.yaml cannot be read ({error}): ranges are those of the values seen")
        return {}
    return value if isinstance(value, dict) else {}


def _about(
    folder: Path, facts: Mapping[str, Any], space: Mapping[str, Any], epochs: pd.DataFrame, notes: list[str]
) -> About:
    settings = space.get("search") if isinstance(space.get("search"), dict) else {}
    assert settings is not None
    rungs = tuple(sorted(float(rung) for rung in facts.get("rungs") or () if isinstance(rung, (int, float))))
    grace = settings.get("grace")
    shared = facts.get("prefixes") if isinstance(facts.get("prefixes"), list) else []
    hours = {
        column: float(sum(p.get(column) or 0.0 for p in shared or () if isinstance(p, dict)))
        for column in ("gpu_hours", "cpu_hours")
    }
    base = space.get("base")
    return About(
        name=folder.resolve().name,
        state=str(facts.get("state", "unknown")),
        metric=facts.get("metric") or settings.get("metric"),
        objective=str(facts.get("objective") or settings.get("objective") or "auto"),
        rungs=rungs,
        factor=facts.get("factor") or settings.get("factor"),
        fork=rungs[0] - float(grace) if rungs and isinstance(grace, (int, float)) else _fork(epochs),
        data=facts.get("data"),
        val_images=_count(facts.get("images"), "val"),
        command=facts.get("command"),
        started=facts.get("started"),
        seconds=facts.get("seconds"),
        hours_shared=hours,
        facts=facts,
        base=base if isinstance(base, dict) else {},
        notes=(*(str(note) for note in facts.get("notes") or ()), *notes),
    )


def _count(counts: Any, name: str) -> int | None:
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _fork(epochs: pd.DataFrame) -> float:
    """Time on the clock up to which all trials share one run, by their rows."""
    if epochs.empty or not bool(epochs["shared"].any()):
        return 0.0
    ends = epochs[epochs["shared"].fillna(False).astype(bool)].groupby("trial_id")["clock"].max()
    return float(ends.min()) if len(ends) == epochs["trial_id"].nunique() else 0.0


def read_frame(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    """A Parquet table as a frame that has all these columns, each of its type.

    Raises:
        UserError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return to_frame(pq.ParquetFile(path).read(), columns)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as a table ({' '.join(str(error).split())[:200]}); put a copy back, or leave this "
            "folder aside"
        ) from error


def to_frame(table: pa.Table, columns: Sequence[Column]) -> pd.DataFrame:
    """The table as a frame with these columns first, each of its type; those that it lacks hold nothing.

    Raises:
        pyarrow.ArrowException: a column's values are not of its type.
    """
    import pandas as pd
    import pyarrow as pa

    made = {
        column.name: table[column.name].cast(arrow_type(column.type))
        if column.name in table.column_names
        else pa.nulls(len(table), arrow_type(column.type))
        for column in columns
    }
    made |= {name: table[name] for name in table.column_names if name not in made}
    mapper = {pa.bool_(): pd.BooleanDtype()}.get
    frame: pd.DataFrame = pa.table(made).to_pandas(split_blocks=True, self_destruct=True, types_mapper=mapper)
    return frame


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


__all__ = ["PREFIX", "PROBE", "About", "SearchResults", "load_search", "plain", "sign_of"]
