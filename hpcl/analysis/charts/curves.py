"""Curves of a search: who was stopped where, and when clusters grew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from hpcl.analysis.charts.look import COLOURS, chart, new_figure, nothing, whole_numbers
from hpcl.analysis.leading import leading
from hpcl.analysis.progress import best_so_far, finishes
from hpcl.results import EPOCH_COLUMNS, SearchResults

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_LINES = 50
"""Trials that are drawn, at most; of more a spread of all final values."""
_UNITS = {column.name: column.unit for column in EPOCH_COLUMNS}


@chart
def curves(search: SearchResults, metrics: list[str]) -> Figure:
    """The curves of all trials over the search's clock, one below the other, with stages, rungs and growth.

    Args:
        search: the trials.
        metrics: columns of `epochs`, one chart each.
    """
    figure, axes = new_figure(7.0, 0.3 + 3.0 * len(metrics), rows=len(metrics), squeeze=False, sharex=True)
    clock = search.curves("clock")
    drawn = chosen(search)
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        values = search.curves(metric) if metric in search.numeric else np.full_like(clock, np.nan)
        if not np.isfinite(values).any():
            nothing(ax, f"{metric} was not measured")
            continue
        stages(ax, search)
        rungs(ax, search)
        for row in drawn:
            _trial(ax, search, row, clock[row], values[row], steps=metric == "clusters")
        some = "" if len(drawn) == len(search.trials) else f" ({len(drawn)} drawn)"
        asked = "how did they grow?" if metric == "clusters" else "who was stopped where?"
        ax.set(title=f"{metric}: {asked}  n = {len(search.trials)}{some}")
        if metric == "clusters":
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel(f"{metric} [{_UNITS[metric]}]" if _UNITS.get(metric) else metric)
        whole_numbers(ax)
    axes[-1, 0].set_xlabel(time_label(search))
    _legend(axes[0, 0], search)
    return figure


@chart
def progress(search: SearchResults) -> Figure:
    """The best objective so far over what was spent, and when each trial finished with which value."""
    found = best_so_far(search)
    figure, ax = new_figure(7.0, 2.8)
    if not len(found.spent):
        nothing(ax, "no trial finished with a value")
        return figure
    spent, value = finishes(search)
    ax.plot(spent, value, ls="", marker="o", ms=3, color=COLOURS["stopped"], label=f"{len(spent)} finished trials")
    ends = np.append(found.spent, max(found.total, float(found.spent[-1])))
    ax.step(ends, np.append(found.best, found.best[-1]), where="post", color=COLOURS["best"], lw=2, label="best so far")
    base = search.base_trial
    if base is not None and np.isfinite(base["objective"]):
        ax.axhline(base["objective"], color=COLOURS["base"], lw=1.2, ls="--", label="base")
    ax.set(title=f"What did the {found.unit} buy?  n = {len(search.trials)}", xlabel=f"{found.unit} spent")
    ax.set(ylabel=search.chosen_by)
    ax.legend(loc="best")
    return figure


def chosen(search: SearchResults) -> NDArray[np.int64]:
    """Rows of the trials to draw, those drawn last (on top) at the end: the others, the base, the best."""
    trials = search.trials
    lead = leading(search)
    best = None if lead is None else lead["trial_id"]
    rank = np.where(trials["trial_id"] == best, 3, np.where(trials["number"] == 0, 2, trials["state"] == "finished"))
    rows = np.argsort(rank, kind="stable")
    if len(rows) > MOST_LINES:
        others, top = rows[:-5], rows[-5:]
        last = trials["metric"].to_numpy(dtype=np.float64)[others]
        by_value = others[np.argsort(last, kind="stable")]
        spread = by_value[np.linspace(0, len(by_value) - 1, MOST_LINES - len(top)).round().astype(int)]
        rows = np.concatenate([spread[np.argsort(rank[spread], kind="stable")], top])
    return rows.astype(np.int64)


def colour(search: SearchResults, row: int) -> str:
    """The colour of a trial: by its role, else by how it ended."""
    trial = search.trials.iloc[row]
    lead = leading(search)
    if lead is not None and trial["trial_id"] == lead["trial_id"]:
        return COLOURS["best"]
    if trial["number"] == 0 and search.base_trial is not None:
        return COLOURS["base"]
    return COLOURS.get(str(trial["state"]), COLOURS["running"])


def stages(ax: Axes, search: SearchResults, *, named: bool = True) -> None:
    """Bands for the stages, as far as the search's clock shows them."""
    if "stage" not in search.numeric or not bool(search.epochs["stage"].notna().any()):
        return
    if search.about.clock == "epoch":  # stages of different lengths: each trial would have bands of its own
        return
    ends = search.epochs.groupby("stage")["clock"].max().sort_index()
    start = 0.0
    for stage, end in ends.items():
        if int(stage) % 2 == 0:
            ax.axvspan(start, float(end), color=COLOURS["band"], lw=0, zorder=0)
        if named and float(end) > start:
            middle = (start + float(end)) / 2
            ax.text(
                middle, 1.0, f"{int(stage)}", transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=7.5,
                color=COLOURS["muted"],
            )  # fmt: skip
        start = max(start, float(end))


def rungs(ax: Axes, search: SearchResults) -> None:
    """A dotted line at each rung."""
    for rung in search.about.rungs:
        ax.axvline(rung, color=COLOURS["muted"], lw=0.9, ls=":", zorder=1)


def time_label(search: SearchResults) -> str:
    """What the search's clock counts."""
    by_stage = search.about.kind == "hpcl" and search.about.clock == "stage"
    known = [*["numbers above: stages"] * by_stage, *["dotted: rungs"] * bool(search.about.rungs)]
    clock = "epoch of the base's schedule" if by_stage else "epoch"
    return f"{clock} ({'; '.join(known)})" if known else clock


def _trial(
    ax: Axes, search: SearchResults, row: int, clock: NDArray[np.float64], values: NDArray[np.float64], *, steps: bool
) -> None:
    there = np.isfinite(values) & np.isfinite(clock)
    if not there.any():
        return
    made, role = colour(search, row), colour(search, row) in (COLOURS["best"], COLOURS["base"])
    x, y = clock[there], values[there]
    look: dict[str, Any] = {"lw": 2.2, "zorder": 4} if role else {"lw": 0.9, "alpha": 0.75, "zorder": 2}
    ax.plot(x, y, color=made, drawstyle="steps-mid" if steps else "default", **look)
    if search.trials["state"].iloc[row] != "finished":
        ax.plot(x[-1], y[-1], marker="x", color=made, ms=4.5, zorder=3)
    if role and "grew" in search.epochs:
        rows = search.epochs[search.epochs["trial_id"] == search.trials["trial_id"].iloc[row]]
        grown = rows.loc[rows["grew"].fillna(False).astype(bool), "epoch"].to_numpy(dtype=int) - 1
        grown = grown[there[grown]]
        ax.plot(clock[grown], values[grown], marker="^", ls="", color=made, ms=5, zorder=5)


def _legend(ax: Axes, search: SearchResults) -> None:
    handles = []
    lead = leading(search)
    if lead is not None:
        handles.append(Line2D([], [], color=COLOURS["best"], lw=2.2, label=f"best ({lead['trial_id']})"))
    if search.base_trial is not None:
        handles.append(Line2D([], [], color=COLOURS["base"], lw=2.2, label="base"))
    for state, count in search.trials["state"].value_counts().items():
        cross = "" if state == "finished" else "x"
        label = f"{count} {state}"
        handles.append(Line2D([], [], color=COLOURS.get(str(state)), lw=0.9, marker=cross, ms=4.5, label=label))
    if "grew" in search.epochs and bool(search.epochs["grew"].any()):
        handles.append(Line2D([], [], color=COLOURS["ink"], ls="", marker="^", ms=5, label="clusters grow"))
    ax.legend(handles=handles, loc="best", fontsize=8)


@chart
def clusters(search: SearchResults, trial_ids: list[str]) -> Figure:
    """The clusters of some trials over their epochs: the finest level's count, its sizes and its churn.

    Args:
        search: the trials.
        trial_ids: the trials, each in a column of its own.
    """
    columns = max(len(trial_ids), 1)
    figure, axes = new_figure(
        7.0 if columns < 3 else 8.4, 4.6, columns=columns, rows=3, squeeze=False, sharex="col", sharey="row",
        height_ratios=(2, 1.4, 1),
    )  # fmt: skip
    for column, trial_id in enumerate(trial_ids):
        rows = search.epochs[(search.epochs["trial_id"] == trial_id) & search.epochs["clusters"].notna()]
        counts, sizes, churn = axes[:, column]
        if rows.empty:
            for ax in axes[:, column]:
                nothing(ax, f"trial {trial_id} has no clusters")
            continue
        x = rows["epoch"].to_numpy(dtype=np.float64)
        row = int(search.trials.index[search.trials["trial_id"] == trial_id][0])
        made = colour(search, row)
        for level in _levels(rows):
            counts.plot(x, level, color=made, lw=0.8, drawstyle="steps-mid", alpha=0.5)
        counts.plot(x, rows["clusters"].to_numpy(dtype=np.float64), color=made, lw=2, drawstyle="steps-mid")
        counts.set_yscale("log", base=2)
        counts.yaxis.set_major_formatter("{x:g}")
        counts.yaxis.set_minor_formatter(NullFormatter())
        counts.set_title(f"trial {trial_id}{' (base)' if search.trials['number'].iloc[row] == 0 else ''}", fontsize=9.5)
        low, high = (rows[name].to_numpy(dtype=np.float64) for name in ("size_min", "size_max"))
        sizes.fill_between(x, low, high, color=made, alpha=0.3, lw=0, step="mid")
        sizes.set_yscale("log")
        sizes.yaxis.set_major_formatter("{x:g}")
        sizes.yaxis.set_minor_formatter(NullFormatter())
        churn.plot(x, 1 - rows["churn_ami"].to_numpy(dtype=np.float64), color=made, lw=1.2, marker=".", ms=3)
        churn.set(xlabel="epoch", ylim=(-0.03, 1.03))
        whole_numbers(churn)
    axes[0, 0].set_ylabel("clusters by level")
    axes[1, 0].set_ylabel("images, least\nto most")
    axes[2, 0].set_ylabel("churn\n(1 - AMI)")
    return figure


def _levels(rows: object) -> NDArray[np.float64]:
    """Counts of all levels, (levels, epochs), NaN where a level was not in use."""
    texts = [str(text).split("/") if isinstance(text, str) else [] for text in rows["level_clusters"]]  # type: ignore[index]
    most = max((len(parts) for parts in texts), default=0)
    grid = np.full((most, len(texts)), np.nan)
    for column, parts in enumerate(texts):
        for level, part in enumerate(parts):
            grid[level, column] = float(part) if part.isdecimal() else np.nan
    return grid
