"""Does a curve, early, rank trials as they will end? For every curve at every rung, and which one to stop on.

    from hpcl.analysis.audit import audit
    print("\\n".join(audit(load_search("results/<name>")).lines()))

Asked are the trials that finished with an objective; of more than 2,000 of them a random 1,000, by a seed. Best is a
search that stopped nothing (``search.grace: null``): where trials were stopped, those that finished are a biased
sample, and the audit says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcl.analysis.replay import Recording, replay
from hpcl.analysis.signals import ENOUGH, FEWEST, PART, SPARE, Resamples, association, design, partial, spearman
from hpcl.analysis.text import aligned, one_line
from hpcl.analysis.verdict import Verdict, judge
from hpcl.results.search import SearchResults
from hpcl.rng import seed_of
from hpcl.search.clock import reached

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

CURVES = (
    "acc_proto_ref", "acc_proto", "proto_bits", "inst_ref", "nce_ref", "acc_inst", "loss", "loss_inst", "loss_proto",
    "knn",
)  # fmt: skip
"""The curves that are asked about, besides the search's own."""

LABELLED = frozenset({"knn"})
"""Curves that need labels: shown beside the others, never named as the one to stop on."""


@dataclass(frozen=True)
class Audit:
    """What the curves of a search say of its trials' ends."""

    name: str
    """Of the search."""
    chosen_by: str
    """What the objective is: `linear probe`, or a curve."""
    in_use: str | None
    """The curve that the search stops on, or would."""
    stops: bool
    """Whether the search stops trials on it."""
    n: int
    """Trials that finished with an objective."""
    asked: int
    """Those of them that `table`, `fields` and `verdict` are of: in large searches a part."""
    diverged: int
    """Trials that diverged; they are in `kept`, not in the correlations."""
    stopped: int
    """Trials that the search stopped; they are nowhere."""
    rungs: tuple[float, ...]
    """Times at which curves are asked, ascending; the end of the schedule comes besides."""
    replayed: tuple[float, ...]
    """Rungs of `kept`, as :meth:`Recording.rungs` has them."""
    factor: float
    """Reduction factor of `kept`."""
    unit: str
    """Of the hours in `kept`."""
    table: pd.DataFrame
    """One row per metric and rung, rank correlations -1..1 of the metric's value there, + is always good:

    metric, rung (time; that of the end in the last one), last (bool), n (trials with a value);
    rho_all, low, high: with the objective, and the 95 % percentile interval of 1,000 paired resamples of trials;
    n_half, rho_half, low_half, high_half: the same within the better half by the objective;
    partial, partial_low, partial_high: given the searched fields (:func:`hpcl.analysis.signals.partial`);
    partial_half: the same within the better half;
    knn, knn_low, knn_high: with the last measured knn;
    clusters: with the number of clusters at that epoch, as the metric is, not turned to + for good;
    field, field_rho: the searched field it goes with most (as the metric is), and how strongly.

    NaN where it cannot be told: fewer than 8 trials, nothing but equal values, too many fields. No rows where no trial
    finished.
    """
    fields: pd.DataFrame
    """metric, rung, last, field, rho, n: how strongly the metric goes with every searched field."""
    kept: pd.DataFrame
    """One row per metric, replayed at the rungs `replayed` with `factor`: metric, kept (trials),
    epochs_share (of full training, 0..1), hours, quarter (trials in the best quarter), lost_of_best_quarter (trials),
    best_rank (of the best kept trial, 1 is the best of all), regret (in units of the objective). No rows where no
    trial finished."""
    verdict: Verdict
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The answer, the tables and the notes, for a terminal: names cannot forge a line or hide one."""
        head = f"{self.name}: {self.n} trials finished" + (f", {self.diverged} diverged" if self.diverged else "")
        head += f", {self.stopped} were stopped" if self.stopped else ""
        text = [one_line(head), one_line(self.verdict.sentence)]
        if self.n >= FEWEST:
            text += ["", one_line(f"rank correlation with {self.chosen_by}, 95 % interval"), *self._ranks()]
        if len(self.kept):
            rungs = ", ".join(f"{rung:g}" for rung in self.replayed) or "none"
            text += [
                "",
                f"what stopping by each would have kept (rungs {rungs}, factor {self.factor:g})",
                *self._kept(),
            ]
        return text + ([""] if self.notes else []) + [one_line(f"note: {note}") for note in self.notes]

    def _ranks(self) -> list[str]:
        cells = [("curve", "epoch", "n", "all trials", "better half", "given fields", "with knn", "clusters", "field")]
        before = ""
        for row in self.table.to_dict("records"):
            cells.append(
                (
                    "" if row["metric"] == before else row["metric"],
                    "end" if row["last"] else f"{row['rung']:g}",
                    str(row["n"]),
                    _with_interval(row["rho_all"], row["low"], row["high"]),
                    _with_interval(row["rho_half"], row["low_half"], row["high_half"]),
                    _with_interval(row["partial"], row["partial_low"], row["partial_high"]),
                    _number(row["knn"]),
                    _number(row["clusters"]),
                    "-" if row["field"] is None else f"{_number(row['field_rho'])} {row['field']}",
                )
            )
            before = row["metric"]
        return aligned(cells, "  ")

    def _kept(self) -> list[str]:
        cells = [("curve", "kept", "epochs", self.unit, "lost of the best quarter", "best kept", "regret")]
        for row in self.kept.to_dict("records"):
            share, rank, regret = row["epochs_share"], row["best_rank"], row["regret"]
            cells.append(
                (
                    row["metric"],
                    str(row["kept"]),
                    "-" if math.isnan(share) else f"{100 * share:.0f} %",
                    f"{row['hours']:.3g}",
                    f"{row['lost_of_best_quarter']} of {row['quarter']}",
                    "-" if math.isnan(rank) else f"rank {rank:.0f}",
                    "-" if math.isnan(regret) else f"{regret:.4f}",
                )
            )
        return aligned(cells, "  ")


def audit(search: SearchResults, *, seed: int = 0) -> Audit:
    """Ask every curve of a search at every rung.

    Args:
        search: of :func:`hpcl.results.load_search`; the rungs are its own, or where it stopped nothing those at a
            quarter, half and three quarters of the way from the fork to the end, in whole epochs.
        seed: of resampling, permutations and the part of a large search that is asked.
    """
    recording = Recording.of(search)
    about = search.about
    stops = bool(about.rungs) or (recording.stopped > 0 and about.kind == "hpcl")
    names = (*CURVES, *([about.metric] if about.metric else []))
    metrics = search.measured(tuple(dict.fromkeys(names))) if recording.n else ()
    rungs = about.rungs or tuple(
        rung for k in (1, 2, 3) if not reached(rung := about.fork + k * recording.grace, recording.total)
    )
    finished = recording.ranking  # the best first, and so in a part of it
    if recording.n > ENOUGH:
        draw = np.random.default_rng(seed_of(seed, "audit", 3))
        finished = finished[np.sort(draw.choice(recording.n, PART, replace=False))]
    good = recording.good[finished]
    asked = {m: _at_rungs(recording, finished, m, rungs) for m in metrics}
    verdict = judge(
        {m: values[:, : len(rungs)] for m, (values, _) in asked.items() if m not in LABELLED},
        good,
        in_use=about.metric,
        chosen_by=search.chosen_by,
        stops=stops,
        stopped=recording.stopped,
        inferred=about.kind == "tune",
        seed=seed,
    )
    cells = _Cells(recording, finished, seed)
    table, fields = [], []
    for metric, (values, epochs) in asked.items():
        for r, rung in enumerate((*rungs, recording.total)):
            place = {"metric": metric, "rung": rung, "last": r == len(rungs)}
            row, of_fields = cells.ask(metric, values[:, r], epochs[:, r])
            table.append(place | row)
            fields += [place | row for row in of_fields]
    notes = list(recording.notes)
    if cells.n < recording.n:
        notes.append(
            f"correlations, their intervals and the verdict are of {cells.n:,} of the {recording.n:,} finished trials, "
            "drawn at random by a seed; what stopping would have kept is of all"
        )
    columns = cells.given.shape[1]
    if cells.n < columns + SPARE and cells.n >= FEWEST:
        notes.append(
            f"given fields: not computed, as the {columns} columns of the searched fields need {columns + SPARE} "
            f"finished trials (n = {cells.n})"
        )
    if cells.n > FEWEST and math.ceil(cells.n / 2) < FEWEST:
        notes.append(f"better half: not computed, as it needs {FEWEST} trials in the half (n = {cells.n})")
    return Audit(
        name=about.name,
        chosen_by=search.chosen_by,
        in_use=about.metric,
        stops=stops,
        n=recording.n,
        asked=cells.n,
        diverged=recording.diverged,
        stopped=recording.stopped,
        rungs=tuple(rungs),
        replayed=recording.rungs(),
        factor=recording.factor,
        unit=search.cost_unit,
        table=_frame(table, _TABLE),
        fields=_frame(fields, _FIELDS),
        kept=_kept(recording, metrics),
        verdict=verdict,
        notes=tuple(notes),
    )


_TABLE = (
    "metric", "rung", "last", "n", "rho_all", "low", "high", "n_half", "rho_half", "low_half", "high_half",
    "partial", "partial_low", "partial_high", "partial_half", "knn", "knn_low", "knn_high", "clusters",
    "field", "field_rho",
)  # fmt: skip
_FIELDS = ("metric", "rung", "last", "field", "rho", "n")
_KEPT = (
    "metric", "kept", "epochs_share", "hours", "quarter", "lost_of_best_quarter", "best_rank", "regret",
)  # fmt: skip


def _at_rungs(
    recording: Recording, finished: NDArray[np.int64], metric: str, rungs: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A curve of these trials at the rungs and at the end, and the columns of these epochs (-1: no value)."""
    values = recording.values(metric)
    epochs = np.column_stack([recording.answers(values, rungs), recording.last])
    every = np.arange(len(values))[:, None]
    found = np.where(epochs >= 0, values[every, epochs], np.nan)
    return found[finished], epochs[finished]


class _Cells:
    """Statistics of a curve at one rung.

    Args:
        recording: of the search.
        finished: places in it of the finished trials to look at, the best first.
        seed: of resampling.
    """

    def __init__(self, recording: Recording, finished: NDArray[np.int64], seed: int) -> None:
        search = self._search = recording.search
        self.n = len(finished)
        trials = search.trials.iloc[recording.rows[finished]]
        self.good = recording.good[finished]
        self.half = np.where(np.arange(self.n) < math.ceil(self.n / 2), self.good, np.nan)
        self.given = design(search.fields, trials)
        self._fields = [f for f in search.fields.values() if f.column in trials]
        self._positions = [np.where(f.acts(trials), f.positions(trials[f.column]), np.nan) for f in self._fields]
        self._clusters = search.curves("clusters")[recording.rows[finished]]
        self._knn = np.full(self.n, np.nan)
        if search.measured(["knn"]):
            for i, curve in enumerate(recording.values("knn")[finished]):
                known = curve[np.isfinite(curve)]
                self._knn[i] = known[-1] if len(known) else np.nan
        self._resamples = Resamples(self.n, seed_of(seed, "audit", 2))

    def ask(
        self, metric: str, values: NDArray[np.float64], epochs: NDArray[np.int64]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a cell, and its rows for the fields.

        Args:
            values: (n,), larger for better ones.
            epochs: (n,) columns of the epochs they are from.
        """
        row: dict[str, Any] = {"n": int(np.isfinite(values).sum()), "rho_all": spearman(values, self.good)}
        row["low"], row["high"] = self._resamples.interval(values, self.good)
        row["n_half"] = int((np.isfinite(values) & np.isfinite(self.half)).sum())
        row["rho_half"] = spearman(values, self.half)
        row["low_half"], row["high_half"] = self._resamples.interval(values, self.half)
        row["partial"], row["partial_low"], row["partial_high"] = partial(values, self.good, self.given)
        row["partial_half"] = partial(values, self.half, self.given)[0]
        row["knn"] = spearman(values, self._knn)
        row["knn_low"], row["knn_high"] = self._resamples.interval(values, self._knn)
        plain = self._search.sign_of(metric) * values
        clusters = np.where(epochs >= 0, self._clusters[np.arange(self.n), epochs], np.nan)
        row["clusters"] = spearman(plain, clusters)
        fields: list[dict[str, Any]] = []
        for field, positions in zip(self._fields, self._positions, strict=True):
            rho, n = association(plain, positions, field)
            fields.append({"field": field.path, "rho": rho, "n": n})
        told = [f for f in fields if not math.isnan(f["rho"])]
        most = max(told, key=lambda f: abs(f["rho"]), default={"field": None, "rho": math.nan})
        row["field"], row["field_rho"] = most["field"], most["rho"]
        return row, fields


def _kept(recording: Recording, metrics: Sequence[str]) -> pd.DataFrame:
    rows = []
    for metric in metrics:
        result = replay(recording, metric)
        rows.append(
            {
                "metric": metric,
                "kept": int(result.kept.sum()),
                "epochs_share": result.epochs_share,
                "hours": result.hours,
                "quarter": result.quarter,
                "lost_of_best_quarter": result.lost,
                "best_rank": math.nan if result.best_rank is None else float(result.best_rank),
                "regret": result.regret,
            }
        )
    return _frame(rows, _KEPT)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(columns))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _with_interval(value: float, low: float, high: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"
