"""Which curves rank trials early, and what stopping by them would have lost and spent."""

from __future__ import annotations

from itertools import cycle

from matplotlib.figure import Figure

from hpcl.analysis.audit import Audit
from hpcl.analysis.charts.look import COLOURS, SERIES, chart, new_figure, nothing
from hpcl.analysis.signals import FEWEST


@chart
def rank_by_rung(audit: Audit) -> Figure:
    """How well does each curve, at each rung, rank the trials as they end? With 95 % bootstrap bars.

    Curves lie side by side at each rung; one that cannot be told at a rung is not there.
    """
    figure, axes = new_figure(7.0, 3.8)
    table = audit.table[audit.table["rho_all"].notna()]
    axes.set_title(f"Which curve ranks trials early as they end? n = {audit.asked} finished trials")
    if audit.n < FEWEST or table.empty:
        nothing(axes, f"{audit.n} trials finished with a {audit.chosen_by}, and {FEWEST} are needed")
        return figure
    places = [*audit.rungs, "end"]
    metrics = list(dict.fromkeys(table["metric"]))
    step = 0.8 / len(metrics)
    axes.axhline(0, color=COLOURS["muted"], lw=0.8)
    for number, (metric, colour) in enumerate(zip(metrics, cycle(SERIES), strict=False)):
        rows = table[table["metric"] == metric]
        where = [
            len(places) - 1 if last else places.index(rung)
            for rung, last in zip(rows["rung"], rows["last"], strict=True)
        ]
        x = [place + (number - (len(metrics) - 1) / 2) * step for place in where]
        rho = rows["rho_all"]
        bars = [(rho - rows["low"]).clip(lower=0), (rows["high"] - rho).clip(lower=0)]
        marker = "o" if number < len(SERIES) else "s"
        axes.errorbar(x, rho, yerr=bars, fmt=marker, ms=4, lw=1.1, color=colour, label=_label(audit, metric))
    axes.set_xticks(range(len(places)), [p if isinstance(p, str) else f"{p:g}" for p in places])
    axes.set(xlabel="epoch of the rung", ylabel=f"rank correlation with {audit.chosen_by}", ylim=(-1.02, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@chart
def lost_for_spent(audit: Audit) -> Figure:
    """What would stopping by each curve have lost of the best quarter, and what would it have spent?"""
    figure, axes = new_figure(7.0, 3.6)
    axes.set_title(f"How many of the best would stopping by each curve have lost? n = {audit.n} finished trials")
    kept = audit.kept
    if kept.empty or not audit.n:
        nothing(axes, "no trial finished with an objective: nothing can be lost")
        return figure
    rungs = ", ".join(f"{rung:g}" for rung in audit.replayed) or "none"
    quarter = int(kept["quarter"].iloc[0])
    for number, (row, colour) in enumerate(zip(kept.to_dict("records"), cycle(SERIES), strict=False)):
        marker = "o" if number < len(SERIES) else "s"
        x, y = 100 * row["epochs_share"], row["lost_of_best_quarter"]
        axes.plot(x, y, marker, ms=7, color=colour, label=_label(audit, row["metric"]))
    axes.set(
        xlabel=f"epochs spent, % of training all to their end (rungs {rungs}, factor {audit.factor:g})",
        ylabel=f"stopped of the best {quarter}",
        xlim=(0, 103),
        ylim=(-0.05 * quarter - 0.1, 1.05 * quarter + 0.1),
    )
    axes.grid(visible=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _label(audit: Audit, metric: str) -> str:
    role = "in use" if audit.stops else "the search's"
    return f"{metric} ({role})" if metric == audit.in_use else metric
