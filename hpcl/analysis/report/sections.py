"""The sections of a report: each a question, what the tables say to it, and the charts that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcl.analysis.audit import Audit, audit
from hpcl.analysis.charts import audit as audit_charts
from hpcl.analysis.charts import curves as curve_charts
from hpcl.analysis.charts import fields as field_charts
from hpcl.analysis.charts.look import listed
from hpcl.analysis.downstream import NOTES, alike, grid, lines, newest
from hpcl.analysis.leading import evidence_of, leading
from hpcl.analysis.report.parts import Grid, Section, draw
from hpcl.errors import UserError, harmless
from hpcl.files import hash_of
from hpcl.results import Field, SearchResults, downstream_schema, read_rows
from hpcl.results.fields import shown
from hpcl.search.importance import LEAST, METHODS, Importance, importance
from hpcl.sections import STAGES

SLICES = 9
"""Fields that have a slice of their own, the most important ones."""
TIMELINES = 2
"""Trials whose clusters are shown, beside the base."""


@dataclass(frozen=True)
class Told:
    """Sentences of the sections that belong on the first screen."""

    robust: str
    by: str
    """What that sentence rests on."""
    verdict: str


def of_search(search: SearchResults, *, galleries: bool = True) -> tuple[Told, list[Section]]:
    """All sections of a search that have something to say, and what of them belongs on the first screen."""
    audited = audit(search)
    matter = [found for method in METHODS if (found := importance(search, method)) is not None]
    fields = _by_importance(search, matter)
    made = [
        _values(search),
        _seeds(search),
        _downstream(search),
        _progress(search),
        _curves(search),
        _clusters(search),
        _importance(search, matter),
        _slices(search, fields),
        _parallel(search, fields),
        _audit(search, audited),
        _gallery(search) if galleries else None,
        _failures(search),
        _record(search),
    ]
    return Told(*_robust(search), harmless(audited.verdict.sentence)), [
        section for section in made if section is not None
    ]


def _by_importance(search: SearchResults, matter: Sequence[Importance]) -> list[Field]:
    """The searched fields, the most important ones first."""
    order = list(matter[0].fields["field"]) if matter else []
    return [search.fields[path] for path in [*order, *(p for p in search.fields if p not in order)]]


def _robust(search: SearchResults) -> tuple[str, str]:
    """What `hpcl best` says of the search, and by what; nothing where it cannot tell."""
    from hpcl.analysis.robust import robust_best

    try:
        found = robust_best([search])
    except UserError:
        return "", ""  # a folder of Tune's has no space in which trials could be near
    lead = leading(search)
    who = "the same trial"
    if lead is not None and found.best.trial_id != lead["trial_id"]:
        who = f"rather trial {found.best.trial_id}"
        other = next((c for c in found.candidates if c.trial_id == lead["trial_id"]), None)
        if other is not None:
            apart = found.best.low > other.high or found.best.high < other.low
            told = "" if apart else ", which is not told apart from it"
            who += f" (trial {other.trial_id}: {other.estimate:.4g}, {other.low:.4g} to {other.high:.4g}{told})"
    by = {"seeds": "By the median over seeds", "neighbourhood": "By its neighbours"}.get(found.by, "By its one run")
    return harmless(f"{who}: {found.evidence()}"), by


def _values(search: SearchResults) -> Section | None:
    """The best trial's configuration as far as it was searched, the values that differ from the base's first."""
    best = leading(search)
    if best is None:
        return None
    rows = []
    for path, value in search.values(str(best["trial_id"])).items():
        f = search.fields[path]
        base = "" if f.base is None else _told(f.base)
        ends = ", ".join(map(_told, f.choices)) if f.kind == "choice" else f"{f.low:g} to {f.high:g}"
        scale = " (log)" if f.log else " (as far as seen)" if f.guessed else ""
        rows.append((path, _told(value), base, ends + scale))
    rows.sort(key=lambda row: row[1] == row[2])
    differ = sum(row[1] != row[2] for row in rows)
    known = search.about.kind == "hpcl"
    text = f"{differ} of the {len(rows)} searched values that acted differ from the base's." if known else ""
    if lengths := _lengths(search, str(best["trial_id"])):
        first = search.base_trial
        of_base = "" if first is None else _lengths(search, str(first["trial_id"]))
        text += f" Its stages were {lengths} epochs long" + (f", the base's {of_base}." if of_base else ".")
    cells = [[harmless(cell) for cell in row] for row in rows]
    columns = ("field", f"trial {best['trial_id']}", "base", "searched")
    return Section("best", "The best configuration", [text] * known, table=Grid(columns, cells))


def _lengths(search: SearchResults, trial_id: str) -> str:
    """The stages' lengths of a trial as it was trained, such as 3/1/6/1/9; nothing where it did not finish."""
    trial = search.trials[search.trials["trial_id"] == trial_id]
    rows = search.epochs[search.epochs["trial_id"] == trial_id]
    if trial.empty or trial["state"].iloc[0] != "finished" or not bool(rows["stage"].notna().any()):
        return ""
    return "/".join(str(int((rows["stage"] == stage).sum())) for stage in STAGES)


def _seeds(search: SearchResults) -> Section | None:
    evidence = evidence_of(search)
    if evidence is None:
        return None
    rows = [
        (s.trial_id + (" (base)" if s.trial_id == evidence.base else ""), s.text(),
         "-" if s.search is None else f"{s.search:.4f}", ", ".join(f"{v:.4f}" for v in s.values), "; ".join(s.lost))
        for s in evidence.standings
    ]  # fmt: skip
    return Section(
        "seeds",
        "What several seeds say",
        [f"{evidence.lead()[:1].upper()}{evidence.lead()[1:]}.", f"Agreement {evidence.agreement_text()}."],
        table=Grid(("trial", evidence.chosen_by, "in the search", "each seed", "lost"), rows),
    )


def _downstream(search: SearchResults) -> Section | None:
    """What `hpcl evaluate` measured of the best trial, if it did."""
    best = leading(search)
    if best is None:
        return None
    trial = search.folder / "trials" / str(best["trial_id"])
    checkpoint = trial / "checkpoint.pt"
    try:
        rows = read_rows(trial / "downstream.parquet", downstream_schema())
        own = hash_of(checkpoint) if checkpoint.is_file() else None
    except (OSError, ValueError):
        return None
    rows = newest(alike(rows, own))
    if not rows:
        return None
    head, cells = grid(lines(rows))
    images = " and of ".join(dict.fromkeys(row["source"] or "" for row in rows))
    text = (
        f"Downstream tasks on trial {best['trial_id']}'s checkpoint, scored on {rows[-1]['split']} images of "
        f"{harmless(images)} ({' '.join(NOTES)})"
    )
    return Section("downstream", "What is it good for?", [text], table=Grid(head, cells))


def _progress(search: SearchResults) -> Section:
    alt = f"Best {search.chosen_by} so far over the {search.cost_unit} spent by {search.about.name}"
    return Section("progress", "What did the hours buy?", figures=[draw(curve_charts.progress(search), alt)])


def _curves(search: SearchResults) -> Section | None:
    names = [n for n in dict.fromkeys((search.about.metric or "", "acc_proto_ref", "acc_proto")) if n in search.numeric]
    names = list(search.measured(names))[:3]
    if not names:
        return None
    texts = []
    if spots := _stopped_at(search):
        texts.append(f"Stopped early: {spots}.")
    if "acc_proto" in names:
        texts.append(
            "acc_proto depends on the number of clusters, so its height does not compare trials; acc_proto_ref is the "
            "same measure for all."
        )
    alt = f"Curves of {' and '.join(names)} of {len(search.trials)} trials with stages and rungs"
    return Section("curves", "Who was stopped where?", texts, [draw(curve_charts.curves(search, names), alt)])


def _stopped_at(search: SearchResults) -> str:
    """How many trials were stopped at which rung, in words."""
    stopped = search.trials[search.trials["state"] == "stopped"]
    if stopped.empty or not search.about.rungs:
        return ""
    last = search.epochs.groupby("trial_id")["clock"].max().reindex(stopped["trial_id"]).dropna()
    rungs = np.array(search.about.rungs)
    place = np.searchsorted(rungs, last.to_numpy() + 1e-6, side="right") - 1
    counts = [(rungs[at], int((place == at).sum())) for at in range(len(rungs)) if (place == at).any()]
    return ", ".join(f"{n} at the rung {rung:g}" for rung, n in counts)


def _clusters(search: SearchResults) -> Section | None:
    if not search.measured(["clusters"]):
        return None
    lead = leading(search)
    first = [] if lead is None else [str(lead["trial_id"])]
    ids = list(dict.fromkeys([*first, *map(str, search.finished["trial_id"])]))[:TIMELINES]
    base = search.base_trial
    if base is not None and base["trial_id"] not in ids:
        ids.append(str(base["trial_id"]))
    if not ids:
        return None
    grew = search.epochs[search.epochs["trial_id"].isin(ids) & search.epochs["grew"].fillna(False).astype(bool)]
    last = search.trials.set_index("trial_id")["epochs"]
    clustered = set(search.epochs.loc[search.epochs["clusters"].notna(), "trial_id"])
    texts = [
        f"Trial {trial} grew {_growths(grew[grew['trial_id'] == trial], int(last[trial]))}."
        if trial in clustered
        else f"Trial {harmless(trial)} has no clusters."
        for trial in ids
    ]
    alt = f"Number, sizes and churn of the clusters of trials {', '.join(ids)} by epoch"
    return Section("clusters", "How did the clusters grow?", texts, [draw(curve_charts.clusters(search, ids), alt)])


def _growths(rows: Any, last: int) -> str:
    if rows.empty:
        return "not at all"
    first = rows.iloc[0]
    reason = f" (the first by rule {first['growth_reason']})" if isinstance(first["growth_reason"], str) else ""
    often = "once, after epoch" if len(rows) == 1 else f"{len(rows)} times, after epochs"
    unused = "; the clusters of the last one were not used any more" if int(rows["epoch"].iloc[-1]) == last else ""
    return harmless(f"{often} {', '.join(str(int(epoch)) for epoch in rows['epoch'])}{reason}{unused}")


def _importance(search: SearchResults, matter: Sequence[Importance]) -> Section:
    title = "Which fields mattered?"
    if not matter:
        why = f"{len(search.finished)} finished trials with a value; {LEAST} are the least that can tell"
        return Section("importance", title, [f"It cannot be told: {why}."])
    texts = [f"{found.sentence()}." for found in matter]
    texts.append(
        "The noise floor is the largest importance that any field reached when the objectives were dealt out at random "
        f"{matter[0].deals} times: chance alone stays below it in {matter[0].deals} of {matter[0].deals + 1} searches."
    )
    alt = "Importance of each field by " + " and ".join(found.method for found in matter) + " with the noise floor"
    return Section("importance", title, texts, [draw(field_charts.importances(matter), alt)])


def _slices(search: SearchResults, fields: Sequence[Field]) -> Section | None:
    if len(search.finished) < 2 or not fields:
        return None
    shown = fields[:SLICES]
    more = f" The {len(shown)} most important of {len(fields)}." if len(fields) > len(shown) else ""
    alt = f"{search.chosen_by} against {listed([f.path for f in shown])}"
    figures = [draw(field_charts.slices(search, shown), alt)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        if second < len(fields):
            pair = fields[first], fields[second]
            alt = f"Mean {search.chosen_by} over {pair[0].path} and {pair[1].path}, with the trials in each tile"
            figures.append(draw(field_charts.pair(search, *pair), alt, small=True))
    text = (
        f"Each point is a finished trial; diamonds are the best and the base.{more} A tile with few trials says little."
    )
    return Section("slices", "Where are the good values?", [text], figures)


def _parallel(search: SearchResults, fields: Sequence[Field]) -> Section | None:
    if len(search.finished) < 2 or not fields:
        return None
    shown = fields[: field_charts.MOST_FIELDS - 2]
    alt = f"Parallel coordinates of {listed([f.path for f in shown])} and {search.chosen_by}"
    return Section("parallel", "What do good trials share?", figures=[draw(field_charts.parallel(search, shown), alt)])


def _audit(search: SearchResults, audited: Audit) -> Section:
    knn = "knn" in set(audited.table["metric"])
    labels = ["knn needs labels: it is shown as a yardstick and never named."] * knn
    texts = [audited.verdict.sentence, *labels, *(f"{note[:1].upper()}{note[1:]}." for note in audited.notes)]
    figures, grid = [], None
    if len(audited.table):
        alt = f"Rank correlation of each curve with {audited.chosen_by} at each rung, with 95 % intervals"
        figures.append(draw(audit_charts.rank_by_rung(audited), alt))
        grid = _audit_grid(audited)
    if len(audited.kept):
        alt = "Trials of the best quarter that stopping by each curve would have lost, against the epochs it would cost"
        figures.append(draw(audit_charts.lost_for_spent(audited), alt))
    return Section("audit", "Which curve tells early what comes of a trial?", texts, figures, grid)


def _audit_grid(audited: Audit) -> Grid:
    """The audit's numbers at the last rung before the end, and what stopping by each curve would have kept."""
    kept = {row["metric"]: row for row in audited.kept.to_dict("records")}
    before_end = audited.table[~audited.table["last"].astype(bool)]
    rungs = before_end["rung"].unique()
    rows = []
    for row in before_end.to_dict("records"):
        if row["rung"] != rungs[len(rungs) // 2]:
            continue
        of = kept.get(row["metric"], {})
        lost = f"{of['lost_of_best_quarter']} of {of['quarter']}" if of else ""
        share = of.get("epochs_share")
        rows.append(
            (
                row["metric"], int(row["n"]), f"{_two(row['rho_all'])} ({_two(row['low'])} to {_two(row['high'])})",
                _two(row["rho_half"]), _two(row["partial"]), _two(row["knn"]), _two(row["clusters"]),
                "" if row["field"] is None else f"{row['field']} {_two(row['field_rho'])}", lost,
                "" if share is None or share != share else f"{share:.0%}",
            )
        )  # fmt: skip
    at = f"{rungs[len(rungs) // 2]:g}" if len(rungs) else ""
    columns = (
        "curve", "n", f"rank correlation at epoch {at} (95 %)", "better half", "given the fields", "with knn",
        "with clusters", "strongest field", "lost of the best quarter", "epochs spent",
    )  # fmt: skip
    return Grid(columns, rows)


def _two(value: float) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"


def _gallery(search: SearchResults) -> Section | None:
    """The prototypes of the best trial, where its checkpoint and its images are there."""
    trial = leading(search)
    if trial is None or search.about.kind != "hpcl":
        return None
    checkpoint = search.folder / "trials" / str(trial["trial_id"]) / "checkpoint.pt"
    title = "What do the prototypes hold?"
    if not checkpoint.is_file():
        return None
    from hpcl.analysis.report.gallery import fragment
    from hpcl.gallery import gallery_of

    try:
        gallery, images = gallery_of(Path(checkpoint))
    except UserError as error:
        return Section("prototypes", title, [f"They cannot be shown: {harmless(str(error))}"])
    text = f"Trial {trial['trial_id']}: the images nearest to each prototype, coarse level to fine."
    return Section("prototypes", title, [text], html=fragment(gallery, images.images))


def _failures(search: SearchResults) -> Section | None:
    bad = search.trials[search.trials["state"].isin(["failed", "diverged"])]
    retried = search.trials[search.trials["retries"].fillna(0) > 0]
    if bad.empty and retried.empty:
        return None
    texts = []
    if len(bad):
        counts = ", ".join(f"{n} {state}" for state, n in bad["state"].value_counts().items())
        texts.append(f"{counts} of {len(search.trials):,} trials. The whole error is in trials/<id>/error.txt.")
    if len(retried):
        texts.append(
            f"{len(retried)} trials were tried again, {int(retried['retries'].sum())} times in all: their process was "
            "lost or raised an error."
        )
    if bad.empty:
        return Section("failures", "What failed?", texts)
    reasons = bad.groupby(["state", bad["stop_reason"].fillna("")], sort=False)["trial_id"].agg(list)
    rows = [
        (state, len(ids), listed(ids), harmless(str(reason)))
        for (state, reason), ids in sorted(reasons.items(), key=lambda item: -len(item[1]))[:30]
    ]
    return Section("failures", "What failed?", texts, table=Grid(("state", "trials", "which", "why"), rows))


def _record(search: SearchResults) -> Section | None:
    facts = search.about.facts
    if not facts:
        return None
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name in ("prefixes", "notes", "trials", "hardware", "versions"):
            continue
        rows.append((name, _told(value)))
    for name in ("versions", "hardware"):
        part = facts.get(name)
        if isinstance(part, dict):
            rows += [(f"{name}: {key}", _told(value)) for key, value in part.items()]
    cells = [(harmless(name), harmless(text)) for name, text in rows]
    return Section("record", "What it ran on", table=Grid(("fact", "value"), cells), folded=True)


def _told(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return shown(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(_told(each) for each in value[:12])
    return f"{value:.4g}" if isinstance(value, float) else str(value)
