"""Tables as pandas frames that have every documented column, and no row or value that nothing could be done with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcl.errors import UserError
from hpcl.results.columns import Column, arrow_type
from hpcl.results.fields import Field, shown

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

LARGEST = 1e100
"""Size from which on a number is none: no sum or chart could be made with it."""

MOST_EPOCHS = 100_000
"""Largest number of an epoch that is believed; curves are kept as arrays so wide."""


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


def sound_trials(path: Path, trials: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The trials in the order of drawing, their numbers finite.

    Raises:
        UserError: a trial has no id, or two have the same.
    """
    ids = trials["trial_id"]
    if bool(ids.isna().any()) or bool(ids.duplicated().any()):
        strange = "no id" if bool(ids.isna().any()) else f"the id {ids[ids.duplicated()].iloc[0]} twice"
        raise UserError(f"{path}: has a trial with {strange}, so its rows cannot be told apart; put a copy back")
    trials = trials.sort_values("number", kind="stable", ignore_index=True)
    for name in trials.columns[trials.dtypes == "float64"]:
        wrong = trials[name].abs() >= LARGEST
        if bool(wrong.any()):
            notes.append(f"{int(wrong.sum())} values of {name} are not finite, or too large, and were left out")
            trials[name] = trials[name].mask(wrong)
    return trials


def sound_epochs(epochs: pd.DataFrame, trials: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Rows of known trials with an epoch that can be, each once."""
    known = epochs["trial_id"].isin(trials["trial_id"])
    possible = epochs["epoch"].between(1, MOST_EPOCHS)
    for wrong, why in ((~known, "belong to no trial"), (known & ~possible, f"have no epoch of 1 to {MOST_EPOCHS}")):
        if bool(wrong.any()):
            notes.append(f"{int(wrong.sum())} rows of epochs.parquet {why} and were left out")
    if not bool((known & possible).all()):
        epochs = epochs[known & possible].reset_index(drop=True)
    twice = epochs.duplicated(["trial_id", "epoch"], keep="last")
    if bool(twice.any()):
        notes.append(f"{int(twice.sum())} epochs stand twice in epochs.parquet; the later row counts")
        epochs = epochs[~twice].reset_index(drop=True)
    if epochs["epoch"].dtype.kind != "i":
        epochs["epoch"] = epochs["epoch"].astype("int64")
    return epochs


def sound_fields(trials: pd.DataFrame, fields: Mapping[str, Field], notes: list[str]) -> None:
    """Make each searched field's column of its kind, in place: numbers, or the texts of choices."""
    import numpy as np
    import pandas as pd

    for field in fields.values():
        if field.column not in trials:
            continue
        values = trials[field.column]
        if field.kind == "choice":
            if values.map(lambda value: isinstance(value, (list, tuple, dict, set, np.ndarray))).any():
                trials[field.column] = values.map(lambda value: shown(_plain(value)))
            continue
        numbers = pd.to_numeric(values.map(_plain), errors="coerce") if values.dtype == object else values
        if not pd.api.types.is_numeric_dtype(numbers) or pd.api.types.is_bool_dtype(numbers):
            numbers = pd.to_numeric(numbers, errors="coerce")
        lost = int(numbers.isna().sum() - values.isna().sum())
        if lost:
            notes.append(f"{lost} values of {field.path} are no numbers and were left out")
        trials[field.column] = numbers


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, (str, int, float)) else value
