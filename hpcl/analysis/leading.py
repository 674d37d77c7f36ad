"""The trial that a search is led by: what its page, its charts and its galleries are about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcl.search.evidence import Evidence

if TYPE_CHECKING:
    import pandas as pd

    from hpcl.results import SearchResults


def leading(search: SearchResults) -> pd.Series | None:
    """The row of the trial with the best mean over seeds where there were several, else the best finished one's.

    None where nothing finished. A trial that leads by its seeds may have been stopped in the search.
    """
    evidence = evidence_of(search)
    if evidence is not None and evidence.best is not None:
        rows = search.trials[search.trials["trial_id"] == evidence.best.trial_id]
        if len(rows):
            return rows.iloc[0]
    return search.best


def evidence_of(search: SearchResults) -> Evidence | None:
    """What the seeds of a retraining say; None where there was none."""
    if search.retrain.empty:
        return None
    rows: list[dict[str, Any]] = [
        {name: None if value is None or value != value else value for name, value in row.items()}
        for row in search.retrain.to_dict("records")
    ]
    base = search.base_trial
    return Evidence(
        rows,
        base="" if base is None else str(base["trial_id"]),
        chosen_by=search.chosen_by,
        searched_by=search.chosen_by,
    )
