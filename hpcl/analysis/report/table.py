"""All trials as data in the page: the script in ``table.js`` shows, sorts and filters them without a network."""

from __future__ import annotations

import base64
import gzip
import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hpcl.results import SearchResults
from hpcl.results.fields import PREFIX, shown

STATIC_ROWS = 40
"""Rows that stand in the page itself, for print and where scripts are off."""
MOST_TEXT = 300
"""Letters of a text in the page; the files have it all."""
MOST_DATA = 1_100_000
"""Letters of the packed rows; of a search with more, the page has the first ones."""


@dataclass(frozen=True)
class Table:
    """A table for the page."""

    columns: list[dict[str, str]]
    """`name`, `title` (with unit) and `kind` (number or text) of each column."""
    rows: list[list[str]]
    """The first rows as text, the best trials first."""
    count: int
    """All trials of the search."""
    kept: int
    """Those of them that the page has, the best ones; fewer only where they would make it too large."""
    data: str
    """These rows as base64 of gzip of JSON: a list of lists, a cell a number, text or null."""


def table(search: SearchResults) -> Table:
    """All trials of a search: finished ones by objective, then the others by the epochs they came to."""
    trials = search.trials.assign(_place=_places(search)).sort_values("_place", kind="stable")
    names = ["trial_id", "state", "objective", "metric", "epochs", search.cost_column, "retries"]
    if not (trials["retries"].fillna(0) > 0).any():
        names.remove("retries")
    if not trials["objective"].notna().any():
        names.remove("objective")
    names += [f.column for f in search.fields.values() if f.column in trials] + ["stop_reason"]
    columns = [
        {"name": name, "title": _title(search, name), "kind": "number" if _is_number(trials[name]) else "text"}
        for name in names
    ]
    cells = [[_cell(value) for value in trials[name].tolist()] for name in names]
    rows = [list(row) for row in zip(*cells, strict=True)]
    count, data = len(rows), _packed(rows)
    while len(data) > MOST_DATA and len(rows) > STATIC_ROWS:
        rows = rows[: max(STATIC_ROWS, int(0.95 * len(rows) * MOST_DATA / len(data)))]
        data = _packed(rows)
    return Table(columns, [[_text(value) for value in row] for row in rows[:STATIC_ROWS]], count, len(rows), data)


def _packed(rows: list[list[Any]]) -> str:
    packed = gzip.compress(json.dumps(rows, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    return base64.b64encode(packed).decode()


def _places(search: SearchResults) -> pd.Series:
    """Where each trial stands in the table."""
    ranks = {trial: place for place, trial in enumerate(search.finished["trial_id"])}
    others = search.trials["epochs"].fillna(0).max() - search.trials["epochs"].fillna(0) + len(ranks)
    return search.trials["trial_id"].map(ranks).fillna(others)


def _title(search: SearchResults, name: str) -> str:
    special = {
        "trial_id": "trial", "objective": search.chosen_by, "metric": f"last {search.about.metric}",
        "stop_reason": "why it ended", search.cost_column: search.cost_unit,
    }  # fmt: skip
    return special.get(name, name.removeprefix(PREFIX))


def _is_number(values: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values))


def _cell(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.4g}")
    if isinstance(value, int):
        return value
    text = shown(value)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
