"""The first screen of a report: which configuration, how sure, at what cost, and whether the curves agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hpcl.analysis.compare import probe_images
from hpcl.results import SearchResults
from hpcl.results.load import PROBE
from hpcl.search.evidence import Evidence

COMPARABLE = ("acc_proto_ref", "inst_ref", "nce_ref", "proto_bits", "knn")
"""Curves that are the same function for every trial, so that their last values can be compared."""


@dataclass(frozen=True)
class Answer:
    """What a search says, in sentences."""

    headline: str
    """The best trial and its value; or that there is none."""
    versus: str
    """The base beside it; empty where there is none to compare with."""
    sure: str
    """How far the difference can be trusted, and what would make it surer."""
    cost: str
    """What was spent, and what early stopping saved."""
    agree: str
    """How the comparable curves rank the best trial."""


def answer(search: SearchResults) -> Answer:
    """The first screen's sentences for a search."""
    best = search.best
    if best is None:
        why = (
            "no trial finished its schedule" if not (search.trials["state"] == "finished").any() else "none has a value"
        )
        return Answer(f"No best configuration: {why}", "", "", _cost(search), "")
    headline = f"Trial {best['trial_id']}: {search.chosen_by} {best['objective']:.4f}"
    if not search.retrain.empty:
        evidence = evidence_of(search)
        if evidence.best is not None:
            kept = evidence.best.trial_id == best["trial_id"]
            was = "" if kept else f" (in the search itself trial {best['trial_id']} was ahead)"
            headline = f"Trial {evidence.best.trial_id}: {evidence.chosen_by} {evidence.best.text()}{was}"
            base = next((s for s in evidence.standings if s.trial_id == evidence.base), None)
            versus = f"the base: {base.text()}" if base is not None and base is not evidence.best else ""
            lead = evidence.lead()
            return Answer(headline, versus, f"{lead[:1].upper()}{lead[1:]}.", _cost(search), _agree(search))
    return Answer(headline, _versus(search), _sure(search), _cost(search), _agree(search))


def evidence_of(search: SearchResults) -> Evidence:
    """What the seeds of a retraining say."""
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


def _versus(search: SearchResults) -> str:
    base, best = search.base_trial, search.best
    if base is None or best is None:
        return ""
    if base["trial_id"] == best["trial_id"]:
        return "which is the base itself: nothing that was tried came out better"
    if base["state"] != "finished" or not math.isfinite(base["objective"]):
        return f"the base (trial {base['trial_id']}) did not finish: {base['state']}"
    gain = best["objective"] - base["objective"]
    return f"the base (trial {base['trial_id']}): {base['objective']:.4f}, a difference of {gain:+.4f}"


def _sure(search: SearchResults) -> str:
    """How far one run each can be trusted."""
    best, base, n = search.best, search.base_trial, len(search.finished)
    assert best is not None
    then = "`hpcl retrain` trains the best and the base with several seeds."
    if search.about.kind == "tune":
        then = "Train the best ones again with several seeds."
    lucky = f" The best of {n} is also the luckiest of {n}: expect it lower the next time." if n > 2 else ""
    images = None
    if search.chosen_by == PROBE:
        images = search.about.val_images or probe_images(search.finished["objective"].tolist())
    if images and base is not None and base["state"] == "finished":
        p, q = float(best["objective"]), float(base["objective"])
        error = math.sqrt((p * (1 - p) + q * (1 - q)) / images)
        times = abs(p - q) / error if error > 0 else math.inf
        told = "more than chance would give" if times > 2 else "which chance alone can give"
        if best["trial_id"] != base["trial_id"]:
            return (
                f"One run each, scored on {images:,} validation images: the difference is {times:.1f} of its standard "
                f"errors ({error:.4f}, of the images alone), {told}.{lucky} {then}"
            )
    return f"One run each: the spread over seeds is not known.{lucky} {then}"


def _cost(search: SearchResults) -> str:
    trials = search.trials
    counts = ", ".join(f"{n} {state}" for state, n in trials["state"].value_counts().items())
    trained = int((~search.epochs["shared"].fillna(False).astype(bool)).sum()) if len(search.epochs) else 0
    longest = trials.loc[trials["state"] == "finished", "epochs"]
    parts = [f"{search.cost:.3g} {search.cost_unit}"]
    if search.about.seconds:
        parts.append(f"{search.about.seconds / 3600:.3g} h on the clock")
    parts.append(f"{len(trials):,} trials ({counts}), {trained:,} epochs")
    if len(longest) and (trials["state"] == "stopped").any():
        full = float(longest.mean()) * len(trials)
        parts.append(f"early stopping saved {max(0.0, 1 - float(trials['epochs'].sum()) / full):.0%} of the epochs")
    return "; ".join(parts)


def _agree(search: SearchResults) -> str:
    """How the comparable curves rank the best trial among the finished ones at their last epoch."""
    done = search.finished
    if len(done) < 3:
        return ""
    said, agreeing, counted = [], 0, 0
    objective = search.sign * done["objective"].to_numpy(dtype=np.float64)
    names = dict.fromkeys((search.about.metric or "", *COMPARABLE))
    for name in search.measured([name for name in names if name and name != search.chosen_by]):
        last = final(search, name)[done.index.to_numpy()] * search.sign_of(name)
        known = np.isfinite(last)
        if known.sum() < 3 or not known[0] or np.ptp(last[known]) == 0 or np.ptp(objective[known]) == 0:
            continue
        rank = 1 + int((last[known] > last[0]).sum())
        rho = float(spearmanr(last[known], objective[known]).statistic)
        counted += 1
        agreeing += rank <= max(1, round(0.25 * int(known.sum())))
        said.append(f"{name} puts it {_ordinal(rank)} of {int(known.sum())} (rank correlation {rho:.2f})")
    if not said:
        return ""
    if agreeing == counted:
        verdict = "The other curves agree: all have it in their best quarter."
    elif agreeing == 0:
        verdict = "The other curves do not agree: none has it in its best quarter."
    else:
        verdict = f"The other curves agree in part: {agreeing} of {counted} have it in their best quarter."
    return f"{verdict} At the last epoch {'; '.join(said)}."


def final(search: SearchResults, curve: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The last value of a curve in each trial, float64 (trials,); NaN where it has none."""
    rows = search.epochs[search.epochs[curve].notna()]
    last = rows.sort_values("epoch", kind="stable").groupby("trial_id")[curve].last()
    return np.asarray(search.trials["trial_id"].map(last).to_numpy(dtype=np.float64, na_value=np.nan))


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
