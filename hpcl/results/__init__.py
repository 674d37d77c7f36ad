"""What a search leaves behind, and how it is read: no torch, ray or optuna here.

`columns` has every column with its unit and meaning, `tables` writes and reads Parquet,
`load` gives a whole results folder (:func:`load_search`), `tune` an experiment folder that Ray Tune left, as a
`search` of pandas frames (`frames`) with its searched `fields` and what else is known `about` it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcl.results.columns import (
    CURVES,
    DOWNSTREAM_COLUMNS,
    EPOCH_COLUMNS,
    LOWER_IS_BETTER,
    RETRAIN_COLUMNS,
    TIME_COLUMNS,
    TRIAL_COLUMNS,
    Column,
    State,
    clean,
    downstream_schema,
    epoch_schema,
    retrain_schema,
    trial_schema,
)
from hpcl.results.tables import read_rows, write_table

if TYPE_CHECKING:
    from hpcl.results.fields import Field
    from hpcl.results.load import load_search
    from hpcl.results.search import SearchResults

__all__ = [
    "CURVES", "DOWNSTREAM_COLUMNS", "EPOCH_COLUMNS", "LOWER_IS_BETTER", "RETRAIN_COLUMNS", "TIME_COLUMNS",
    "TRIAL_COLUMNS", "Column", "Field", "SearchResults", "State", "clean", "downstream_schema", "epoch_schema",
    "load_search", "read_rows", "retrain_schema", "trial_schema", "write_table",
]  # fmt: skip

_LOADED = {"Field": "fields", "SearchResults": "search", "load_search": "load"}


def __getattr__(name: str) -> Any:
    """What reads whole folders comes with pandas (0.7 s), so only where it is asked for."""
    if name in _LOADED:
        from importlib import import_module

        return getattr(import_module(f"hpcl.results.{_LOADED[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
