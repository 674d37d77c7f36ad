"""Searched fields against the objective: their importance, slices, pairs, and all of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hpcl.analysis.charts.look import COLOURS, chart, new_figure, nothing
from hpcl.analysis.leading import leading
from hpcl.results import Field, SearchResults
from hpcl.results.fields import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hpcl.search.importance import Importance

MOST_POINTS = 250
"""Trials that a slice or parallel coordinates show, at most."""
MOST_FIELDS = 12
"""Fields that are drawn, at most: the most important ones."""
_GOOD = LinearSegmentedColormap.from_list("good", ["#dfe8f0", "#1c6da9"])
"""Pale to blue, the better the darker; the same on a light and on a dark page."""


@chart
def importances(found: Sequence[Importance]) -> Figure:
    """Importance of each field by each method, with the noise floor as a line; what is below it is pale."""
    tables = [each.fields.set_index("field")["importance"] for each in found]
    names = list(found[0].fields["field"])[:MOST_FIELDS]
    figure, axes = new_figure(7.0, 0.9 + 0.24 * len(names), columns=len(found), squeeze=False, sharey=True)
    for ax, each, table in zip(axes[0], found, tables, strict=True):
        values = np.array([table.get(name, 0.0) for name in names])
        colours = [COLOURS["finished"] if value > each.floor else COLOURS["stopped"] for value in values]
        ax.barh(range(len(names)), values, color=colours, height=0.65)
        most = max(1.3 * float(values.max()), min(each.floor * 1.05, 1.0))
        inside = each.floor <= most
        if inside:
            ax.axvline(each.floor, color=COLOURS["noise"], lw=1.4, ls="--")
        ax.annotate(
            "noise floor" if inside else "noise floor: beyond this axis",
            (min(each.floor, most), 1.0), xycoords=("data", "axes fraction"), fontsize=8, color=COLOURS["noise"],
            ha="right" if each.floor > 0.5 * most else "left", va="bottom",
        )  # fmt: skip
        ax.set(xlabel=f"share of importance by {each.method}, n = {each.n}", xlim=(0, most))
        ax.xaxis.label.set_fontsize(9)
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return figure


@chart
def slices(search: SearchResults, fields: Sequence[Field]) -> Figure:
    """The objective against each field, a chart each, with the trials behind it; marked are the best and the base."""
    trials = _some(search)
    across = min(3, max(1, len(fields)))
    down = math.ceil(len(fields) / across)
    figure, axes = new_figure(7.0, 0.3 + 1.75 * down, columns=across, rows=down, squeeze=False, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place >= len(fields):
            ax.set_axis_off()
            continue
        f = fields[place]
        acted = trials[f.acts(trials)]
        x, y = f.positions(acted[f.column]), acted["objective"].to_numpy(dtype=np.float64)
        if f.kind == "choice":  # side by side instead of one upon the other
            x = x + 0.3 * (np.arange(len(x)) % 5 - 2) / 2 if len(x) else x
        ax.plot(x, y, ls="", marker="o", ms=3.2, color=COLOURS["finished"], alpha=0.7, mec="none")
        for role, row in (("base", search.base_trial), ("best", leading(search))):
            if row is not None and row["trial_id"] in set(acted["trial_id"]):
                at = int(np.flatnonzero((acted["trial_id"] == row["trial_id"]).to_numpy())[0])
                ax.plot(x[at], y[at], marker="D", ms=5.5, color=COLOURS[role])
        ax.set_title(f"{f.path}  n = {len(acted)}", fontsize=8.5)
        ticks(ax, f)
    for ax in axes[:, 0]:
        ax.set_ylabel(search.chosen_by, fontsize=8.5)
    return figure


@chart
def pair(search: SearchResults, first: Field, second: Field, bins: int = 4) -> Figure:
    """The mean objective over two fields at once, in tiles with the number of trials behind each."""
    trials = search.finished[first.acts(search.finished) & second.acts(search.finished)]
    figure, ax = new_figure(4.6, 3.4)
    y = trials["objective"].to_numpy(dtype=np.float64)
    cells = [_cells(f, trials[f.column], bins) for f in (first, second)]
    (x_cell, width), (y_cell, height) = cells
    known = np.isfinite(x_cell) & np.isfinite(y_cell) & np.isfinite(y)
    if known.sum() < 2:
        nothing(ax, "too few finished trials in which both fields acted")
        return figure
    codes = (y_cell[known] * width + x_cell[known]).astype(int)
    count = np.bincount(codes, minlength=width * height).reshape(height, width)
    sums = np.bincount(codes, weights=y[known], minlength=width * height).reshape(height, width)
    mean = np.where(count > 0, sums / np.maximum(count, 1), np.nan)
    tiles = ax.pcolormesh(mean, cmap=_GOOD if search.sign > 0 else _GOOD.reversed(), edgecolors="none")
    figure.colorbar(tiles, ax=ax, label=f"mean {search.chosen_by}")
    for (row, column), n in np.ndenumerate(count):
        dark = n and tiles.norm(mean[row, column]) * search.sign > 0.5 * search.sign
        on_tile = "#fefefe" if dark else "#101112"  # the same in light and dark, as the tiles are
        label, made = (f"n = {n}", on_tile) if n else ("-", COLOURS["muted"])
        ax.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=8, color=made)
    for f, size, axis in ((first, width, ax.xaxis), (second, height, ax.yaxis)):
        if f.kind == "choice":
            axis.set_ticks(np.arange(size) + 0.5, [shown(value)[:12] for value in f.choices])
        else:
            axis.set_ticks(np.linspace(0, size, 3), [_number(value_at(f, p)) for p in (0, 0.5, 1)])
    ax.set(xlabel=first.path, ylabel=second.path)
    ax.set_title(f"Which pairs did well?  n = {int(known.sum())} finished", fontsize=9.5)
    return figure


@chart
def parallel(search: SearchResults, fields: Sequence[Field]) -> Figure:
    """Parallel coordinates: a line per finished trial, the better the darker; best and base are thick."""
    trials = _some(search)
    figure, ax = new_figure(8.4, 3.6)
    if len(trials) < 2 or not fields:
        nothing(ax, "too few finished trials")
        return figure
    columns = [_place(f, trials) for f in fields]
    y = search.sign * trials["objective"].to_numpy(dtype=np.float64)
    lead = leading(search)
    spread = np.ptp(y) or 1.0
    goodness = (y - y.min()) / spread
    for row in np.argsort(goodness, kind="stable"):
        heights = [column[row] for column in columns]
        trial_id = trials["trial_id"].iloc[row]
        role = next(
            (
                name
                for name, of in (("best", lead), ("base", search.base_trial))
                if of is not None and of["trial_id"] == trial_id
            ),
            None,
        )
        made: Any = COLOURS[role] if role else _GOOD(0.15 + 0.85 * float(goodness[row]))
        look = {"lw": 2.4, "zorder": 3} if role else {"lw": 0.8, "alpha": 0.8, "zorder": 2}
        ax.plot(range(len(fields) + 1), [*heights, goodness[row]], color=made, **look)
    names = [f.path for f in fields] + [search.chosen_by]
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    ends = [(_end(f, 0), _end(f, 1)) for f in fields]
    ends.append((f"{search.sign * y.min():.3g}", f"{search.sign * y.max():.3g}"))
    for place, (low, high) in enumerate(ends):
        ax.axvline(place, color=COLOURS["rule"], lw=0.8, zorder=1)
        ax.text(place, -0.03, low, ha="center", va="top", fontsize=7, color=COLOURS["muted"])
        ax.text(place, 1.02, high, ha="center", va="bottom", fontsize=7, color=COLOURS["muted"])
    ax.set(yticks=[], ylim=(-0.1, 1.1), xlim=(-0.3, len(names) - 0.7))
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0, pad=8)
    ax.set_title(f"What do good trials have in common?  n = {len(trials)} finished", pad=12)
    return figure


def ticks(ax: Axes, f: Field) -> None:
    """Ticks of an x axis that holds positions of a field."""
    if f.kind == "choice":
        ax.set_xticks(range(len(f.choices)), [shown(value)[:10] for value in f.choices], fontsize=7.5)
        ax.set_xlim(-0.6, len(f.choices) - 0.4)
    else:
        ax.set_xticks((0, 0.5, 1), [_number(value_at(f, place)) for place in (0, 0.5, 1)], fontsize=7.5)
        ax.set_xlim(-0.08, 1.08)


def value_at(f: Field, place: float) -> float:
    """The value of a number field at a place of its range, 0 to 1."""
    if f.log:
        return math.exp(math.log(f.low) + place * (math.log(f.high) - math.log(f.low)))
    return f.low + place * (f.high - f.low)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _end(f: Field, place: int) -> str:
    if f.kind == "choice":
        return shown(f.choices[-place])[:10]
    return _number(value_at(f, place))


def _some(search: SearchResults) -> Any:
    """Finished trials, at most so many: the best one, the base and a spread of the others."""
    trials = search.finished
    if len(trials) <= MOST_POINTS:
        return trials
    rows = np.linspace(0, len(trials) - 1, MOST_POINTS).round().astype(int)
    keep = trials.iloc[rows]
    base = trials[trials["number"] == 0]
    import pandas as pd

    return keep if base.empty or 0 in set(keep["number"]) else pd.concat([keep, base])


def _place(f: Field, trials: Any) -> NDArray[np.float64]:
    places = f.positions(trials[f.column])
    if f.kind == "choice":
        places = places / max(1, len(f.choices) - 1)
    return np.where(np.isnan(places), -0.06, places)


def _cells(f: Field, values: Any, bins: int) -> tuple[NDArray[np.float64], int]:
    """The tile of each value, and the number of tiles."""
    places = f.positions(values)
    if f.kind == "choice":
        return places, len(f.choices)
    with np.errstate(invalid="ignore"):
        return np.clip(np.floor(places * bins), 0, bins - 1), bins
