"""The charts of docs/notes.md, one per question; drawn from the table that notes.py makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from notes_verdict import growths, part, pcl_floor

from hpcl.analysis.charts.look import COLOURS, SERIES, chart, new_figure, whole_numbers
from hpcl.files import atomic_path
from hpcl.losses import pcl_ceiling

OF = {"pcl": SERIES[0], "adjusted": SERIES[1], "unique": SERIES[2], "plateau": SERIES[4], "window": SERIES[0],
      "v1": SERIES[1], "v2": SERIES[0]}  # fmt: skip
"""Colours of targets, growth rules and heads."""


def write(table: pd.DataFrame, batches: tuple[int, int], classes: int, folder: Path, name: str) -> list[Path]:
    """Draw all charts for which the table has runs; gives their files, `<name>_<question>.png`."""
    sets = set(table["set"])
    drawn: dict[str, Figure] = {}
    if "sweep" in sets:
        drawn["ceiling"] = ceiling(table, batches[0])
        drawn["growth"] = growth(table, batches, classes)
        drawn["loss"] = loss(table, batches, classes)
    if "rule" in sets:
        drawn["rules"] = rules(table, batches[0])
    if "head" in sets:
        drawn["heads"] = heads(table, batches[0])
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for question, figure in drawn.items():
        file = folder / f"{name}_{question}.png"
        with atomic_path(file) as unfinished:
            figure.savefig(unfinished, format="png", dpi=110)
        files.append(file)
    return files


@chart
def ceiling(table: pd.DataFrame, batch: int) -> Figure:
    """A: acc_proto over the count with the three kinds of targets, and the ceiling."""
    figure, ax = new_figure(7.0, 3.6)
    counts: list[int] = []
    for targets in ("pcl", "adjusted", "unique"):
        runs = part(table, set="sweep", targets=targets, batch=batch, head="v2")
        counts = _over_counts(ax, runs, "acc_proto", OF[targets], targets) or counts
    line = np.geomspace(counts[0], counts[-1], 200)
    ax.plot(
        line, [pcl_ceiling(k, batch) for k in line], color=COLOURS["muted"], ls="--", lw=1.2, label="ceiling of pcl"
    )
    runs = part(table, set="sweep", targets="adjusted", batch=batch, head="v2")
    right = runs.groupby("clusters")["acc_proto"].mean()
    ax.plot(right.index, right * [pcl_ceiling(int(k), batch) for k in right.index], color=SERIES[3], ls=":", lw=1.6,
            label="ceiling x adjusted")  # fmt: skip
    seeds = table["seed"].nunique()
    ax.set(title=f"A: does acc_proto sit at its ceiling with few clusters?  n = {seeds} seeds, points; batch {batch}")
    ax.set(ylabel="acc_proto, mean at a count [0..1]", ylim=(0, 1.02))
    _count_axis(ax, counts)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8.5)
    return figure


@chart
def growth(table: pd.DataFrame, batches: tuple[int, int], classes: int) -> Figure:
    """B: the change of acc_proto at each growth, and from the first to the second epoch at a count."""
    kinds = [("pcl", batches[0]), ("pcl", batches[1]), ("adjusted", batches[0]), ("unique", batches[0])]
    kinds = [(t, b) for t, b in kinds if len(part(table, set="sweep", targets=t, batch=b))]
    figure, axes = new_figure(7.4, 1.9 * len(kinds) + 0.3, rows=len(kinds), sharex=True, squeeze=False)
    for ax, (targets, batch) in zip(axes[:, 0], kinds, strict=True):
        steps = growths(part(table, set="sweep", targets=targets, batch=batch, head="v2"))
        grew = steps["old"] != steps["new"]
        for of, colour, marker, shift, label in (
            (steps[grew], OF[targets], "o", 1.0, "at a growth, from this count"),
            (steps[~grew], COLOURS["stopped"], "s", 1.09, "within this count"),
        ):
            ax.plot(of["old"] * shift, of["proto"], ls="", marker=marker, ms=4, color=colour, alpha=0.8, label=label)
        ax.axhline(0, color=COLOURS["muted"], lw=0.8)
        _marks(ax, classes, batch)
        ax.set(title=f"{targets}, batch {batch}", ylabel="change [0..1]")
        ax.legend(loc="lower left", ncols=2)
        _room(ax)
    _count_axis(axes[-1, 0], sorted(table[table["set"] == "sweep"]["clusters"].unique()))
    seeds = table["seed"].nunique()
    figure.suptitle(
        f"B: does acc_proto rise or fall where clusters grow?  n = {seeds} seeds, points", x=0.01, ha="left"
    )
    return figure


@chart
def loss(table: pd.DataFrame, batches: tuple[int, int], classes: int) -> Figure:
    """C: loss_proto over the count, in sweeps of two batches and with the count held, and what cannot be less."""
    figure, axes = new_figure(7.4, 3.6, columns=2)
    counts = sorted(table[table["set"] == "sweep"]["clusters"].unique())
    line = np.geomspace(counts[0], counts[-1], 60).round().astype(int)
    for batch, colour in zip(batches, (SERIES[0], SERIES[3]), strict=True):
        runs = part(table, set="sweep", targets="pcl", batch=batch, head="v2")
        if not len(runs):
            continue
        _over_counts(axes[0], runs, "loss_proto", colour, f"pcl, batch {batch}")
        axes[0].plot(line, [pcl_floor(int(k), batch) for k in line], color=colour, ls=":", lw=1.2)
    axes[0].plot([], [], color=COLOURS["muted"], ls=":", label="floor: repeated columns")
    _over_counts(axes[1], part(table, set="held", batch=batches[0]), "loss_proto", SERIES[4], "pcl, count held")
    _over_counts(
        axes[1], part(table, set="sweep", targets="pcl", batch=batches[0]), "loss_proto", SERIES[0], "pcl, growing"
    )
    _over_counts(
        axes[1], part(table, set="sweep", targets="unique", batch=batches[0]), "loss_proto", OF["unique"],
        "unique, growing",
    )  # fmt: skip
    for ax, title in zip(axes, ("two batches", f"batch {batches[0]}"), strict=True):
        _marks(ax, classes)
        _count_axis(ax, counts)
        ax.set(title=title, ylabel="loss_proto [nats]", ylim=(0, 1.4 * ax.get_ylim()[1]))
        ax.legend(loc="upper right")
    seeds = table["seed"].nunique()
    figure.suptitle(f"C: is loss_proto lowest near the class count?  n = {seeds} seeds, points", x=0.01, ha="left")
    return figure


@chart
def rules(table: pd.DataFrame, batch: int) -> Figure:
    """D and F: clusters, acc_inst and acc_proto over the epochs with both growth rules and both kinds of targets."""
    columns = {"clusters": "clusters [count]", "acc_proto": "acc_proto [0..1]", "acc_inst": "acc_inst [0..1]"}
    kinds = ("pcl", "adjusted")
    figure, axes = new_figure(7.4, 6.2, rows=3, columns=2, sharex=True, sharey="row")
    for place, targets in enumerate(kinds):
        for ax, (column, label) in zip(axes[:, place], columns.items(), strict=True):
            for side, policy in ((-1, "plateau"), (1, "window")):
                runs = part(table, set="rule", targets=targets, policy=policy, batch=batch).sort_values("epoch")
                for number, (_, run) in enumerate(runs.groupby("seed")):
                    values = run[column]
                    if column == "clusters":  # beside each other where they are the same
                        values = values * 1.015 ** (3 * side + number - 1)
                    ax.plot(run["epoch"], values, color=OF[policy], lw=1.3, alpha=0.8,
                            drawstyle="steps-mid" if column == "clusters" else "default",
                            label=policy if not number else None)  # fmt: skip
            if column == "clusters":
                ax.set_title(f"{targets} targets")
                ax.set_yscale("log", base=2)
                ax.yaxis.set_major_locator(FixedLocator(sorted(map(float, table["clusters"].unique()))))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.legend(loc="upper left")
            if not place:
                ax.set_ylabel(label)
            whole_numbers(ax)
        axes[-1, place].set_xlabel("epoch")
    seeds = table["seed"].nunique()
    figure.suptitle(
        f"D, F: does the plateau rule stick where the window rule goes on?  n = {seeds} seeds, lines",
        x=0.01, ha="left",
    )  # fmt: skip
    return figure


@chart
def heads(table: pd.DataFrame, batch: int) -> Figure:
    """E: loss_proto and acc_proto over the epochs with both heads at one count."""
    runs = part(table, set="head", batch=batch).sort_values("epoch")
    count = int(runs["clusters"].iloc[0])
    figure, axes = new_figure(7.4, 3.3, columns=2)
    labels = {"loss_proto": "loss_proto [nats]", "acc_proto": "acc_proto [0..1]"}
    limits = {"loss_proto": pcl_floor(count, batch), "acc_proto": pcl_ceiling(count, batch)}
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for head, what in (("v1", "v1, FC-FC-ReLU"), ("v2", "v2, FC-ReLU-FC")):
            for number, (_, run) in enumerate(runs[runs["head"] == head].groupby("seed")):
                ax.plot(run["epoch"], run[column], color=OF[head], lw=1.4, label=what if not number else None)
        ax.axhline(limits[column], color=COLOURS["muted"], lw=1, ls="--", label="floor" if ax is axes[0] else "ceiling")
        ax.set(xlabel="epoch", ylabel=label)
        ax.set_ylim(bottom=0)
        ax.legend()
        whole_numbers(ax)
    seeds = table["seed"].nunique()
    figure.suptitle(
        f"E: is it the head that holds loss_proto up?  n = {seeds} seeds, lines; {count} clusters, batch {batch}",
        x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _over_counts(ax: Axes, runs: pd.DataFrame, column: str, colour: str, label: str) -> list[int]:
    """A line of means over the counts, a point for each seed; gives the counts."""
    if not len(runs):
        return []
    values = runs.pivot_table(index="clusters", columns="seed", values=column, aggfunc="mean")
    ax.plot(values.index, values.mean(axis=1), color=colour, lw=1.4, label=label)
    for seed in values:
        ax.plot(values.index, values[seed], ls="", marker="o", ms=3, color=colour, alpha=0.6)
    return [int(k) for k in values.index]


def _count_axis(ax: Axes, counts: Any) -> None:
    """A logarithmic axis with a tick at each count of the sequence."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([float(k) for k in counts]))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("clusters [count]")
    ax.tick_params(axis="x", labelsize=8)


def _marks(ax: Axes, classes: int, batch: int | None = None) -> None:
    """Where the number of classes and the batch lie."""
    for at, what in ((classes, "classes"), (batch, "batch")):
        if at is not None:
            ax.axvline(at, color=COLOURS["noise"], lw=1, ls="--")
            ax.annotate(what, (at, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                        fontsize=8, color=COLOURS["noise"], va="top")  # fmt: skip


def _room(ax: Axes) -> None:
    """Room above and below the points for the words there."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.28 * (high - low) if low < 0 else low, high + 0.15 * (high - low))
