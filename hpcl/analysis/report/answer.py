"""The first screen of a report: which configuration, how sure, at what cost, and whether the curves agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from hpcl.analysis.compare import probe_images
from hpcl.analysis.leading import evidence_of, leading
from hpcl.analysis.text import counted
from hpcl.downstream.scores import LABELS_USED, OBJECTIVES
from hpcl.results import SearchResults
from hpcl.results.search import PROBE
from hpcl.search.evidence import Evidence, Standing

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
    labels: str
    """Which labels were used, and for what."""


def answer(search: SearchResults) -> Answer:
    """The first screen's sentences for a search."""
    lead = leading(search)
    if lead is None:
        finished = (search.trials["state"] == "finished").any()
        why = "none that finished has a value" if finished else "no trial finished its schedule"
        return Answer(f"No best configuration: {why}", "", "", _cost(search), "", _labels(search))
    evidence = evidence_of(search)
    if evidence is not None and evidence.best is not None:
        first = search.best
        ahead = first is not None and first["trial_id"] != lead["trial_id"]
        was = f" (in the search itself trial {first['trial_id']} was ahead)" if ahead and first is not None else ""
        base = next((s for s in evidence.standings if s.trial_id == evidence.base), None)
        return Answer(
            headline=f"Trial {lead['trial_id']}: {evidence.chosen_by} {evidence.best.text()}{was}",
            versus=f"the base: {base.text()}" if base is not None and base is not evidence.best else "",
            sure=" ".join(
                [
                    *([_sentence(over)] if (over := evidence.over_base()) else []),
                    *([] if over and _next_is_base(evidence) else [_sentence(evidence.lead())]),
                    *(_left_out(s) for s in evidence.left_out),
                ]
            ),
            cost=f"{_cost(search)}; retraining {counted(len(search.retrain), 'run')}, "
            f"{float(search.retrain[search.cost_column].sum()):.3g} {search.cost_unit}",
            agree=_agree(search, str(lead["trial_id"])),
            labels=_labels(search),
        )
    headline = f"Trial {lead['trial_id']}: {search.chosen_by} {lead['objective']:.4f}"
    agree = _agree(search, str(lead["trial_id"]))
    return Answer(headline, _versus(search), _sure(search), _cost(search), agree, _labels(search))


def _next_is_base(evidence: Evidence) -> bool:
    return len(evidence.candidates) > 1 and evidence.candidates[1].trial_id == evidence.base


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _left_out(standing: Standing) -> str:
    return f"Trial {standing.trial_id} is left out, though ahead: {'; '.join(standing.lost)}."


def _versus(search: SearchResults) -> str:
    base, best = search.base_trial, search.best
    if base is None or best is None:
        return ""
    if base["trial_id"] == best["trial_id"]:
        others = "nothing that was tried came out better" if len(search.trials) > 1 else "nothing else was tried"
        return f"which is the base itself: {others}"
    if base["state"] != "finished" or not math.isfinite(base["objective"]):
        return f"the base (trial {base['trial_id']}) did not finish: {base['state']}"
    gain = best["objective"] - base["objective"]
    return f"the base (trial {base['trial_id']}): {base['objective']:.4f}, a difference of {gain:+.4f}"


def _sure(search: SearchResults) -> str:
    """How far one run each can be trusted."""
    best, base, n = search.best, search.base_trial, len(search.finished)
    assert best is not None
    then = "hpcl retrain trains the best and the base with several seeds."
    if search.about.kind == "tune":
        then = "Train the best ones again with several seeds."
    lucky = f" The best of {n} is also the luckiest of {n}: expect it worse the next time." if n > 2 else ""
    p, q = float(best["objective"]), math.nan if base is None else float(base["objective"])
    images = None
    if search.chosen_by == PROBE and 0 <= p <= 1 and 0 <= q <= 1 and p != q:
        images = search.about.val_images or probe_images(search.finished["objective"].tolist())
    if not images:
        return f"One run each: the spread over seeds is not known.{lucky} {then}"
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / images)
    times = abs(p - q) / error if error > 0 else math.inf
    # The best was picked: of n - 1 equally good ones the luckiest lies so far above with 2.5 % (Bonferroni).
    told = times > norm.isf(0.025 / max(1, n - 1))
    chance = "more than the luckiest of so many equally good ones would show" if told else "as chance alone can make it"
    return (
        f"One run each, scored on {images:,} validation images: the difference is {times:.1f} of its standard errors "
        f"({error:.4f}, of the images alone), {chance}.{lucky} {then}"
    )


def _labels(search: SearchResults) -> str:
    """What labels were used for; nothing is known of a search that was not this project's."""
    if search.about.kind == "tune":
        return ""
    chosen, metric = search.chosen_by, search.about.metric
    task = (
        "linear" if chosen == PROBE else chosen.partition("@")[0] if chosen in OBJECTIVES or chosen == "knn" else None
    )
    stops = "Trials were stopped by kNN accuracy on validation images, which uses labels." if metric == "knn" else ""
    if task is None:
        return stops or "None: no label was used to train, to stop trials or to choose the best one."
    if task == "clusters":  # the one task that looks at training images alone
        used = f"The best trial was chosen on training images: {LABELS_USED[task]}."
    else:
        used = f"The best trial was chosen on validation images, whose labels score it; {LABELS_USED[task]}."
    return f"{used} {stops or 'Training and stopping used none.'} Test images chose nothing."


def _cost(search: SearchResults) -> str:
    trials = search.trials
    counts = ", ".join(f"{n} {state}" for state, n in trials["state"].value_counts().items())
    trained = int((~search.epochs["shared"].fillna(False).astype(bool)).sum()) if len(search.epochs) else 0
    parts = [f"{search.cost:.3g} {search.cost_unit}"]
    if search.about.seconds:
        parts.append(f"{search.about.seconds / 3600:.3g} h on the clock")
    parts.append(f"{counted(len(trials), 'trial')} ({counts}), {counted(trained, 'epoch')}")
    length = {state: trials.loc[trials["state"] == state, "epochs"] for state in ("finished", "stopped")}
    if search.about.kind == "hpcl" and len(length["finished"]) and len(length["stopped"]):
        full = float(length["finished"].mean()) * len(length["stopped"])
        rest = full - float(length["stopped"].sum())
        share = rest / (full + float(length["finished"].sum()))
        parts.append(f"early stopping saved {max(0.0, share):.0%} of the epochs of those that finished or were stopped")
    return "; ".join(parts)


def _agree(search: SearchResults, trial_id: str) -> str:
    """How the comparable curves rank a trial among the finished ones at their last epoch."""
    done = search.finished
    place = np.flatnonzero((done["trial_id"] == trial_id).to_numpy())
    if len(done) < 3 or not len(place):
        return ""
    own = int(place[0])
    said, agreeing, asked = [], 0, 0
    objective = search.sign * done["objective"].to_numpy(dtype=np.float64)
    names = dict.fromkeys((search.about.metric or "", *COMPARABLE))
    for name in search.measured([name for name in names if name and name != search.chosen_by]):
        last = final(search, name)[done.index.to_numpy()] * search.sign_of(name)
        known = np.isfinite(last)
        if known.sum() < 3 or not known[own] or np.ptp(last[known]) == 0 or np.ptp(objective[known]) == 0:
            continue
        rank = 1 + int((last[known] > last[own]).sum())
        rho = float(spearmanr(last[known], objective[known]).statistic)
        asked += 1
        agreeing += rank <= max(1, round(0.25 * int(known.sum())))
        said.append(f"{_ordinal(rank)} of {int(known.sum())} by {name} ({rho:.2f})")
    if not said:
        return ""
    if agreeing == asked:
        verdict = "The other curves agree: all have it in their best quarter."
    elif agreeing == 0:
        verdict = "The other curves do not agree: none has it in its best quarter."
    else:
        verdict = f"The other curves agree in part: {agreeing} of {asked} have it in their best quarter."
    return (
        f"{verdict} At the last epoch it is {', '.join(said)}; in brackets: rank correlation with {search.chosen_by}."
    )


def final(search: SearchResults, curve: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The last value of a curve in each trial, float64 (trials,); NaN where it has none."""
    rows = search.epochs[search.epochs[curve].notna()]
    last = rows.sort_values("epoch", kind="stable").groupby("trial_id")[curve].last()
    return np.asarray(search.trials["trial_id"].map(last).to_numpy(dtype=np.float64, na_value=np.nan))


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
