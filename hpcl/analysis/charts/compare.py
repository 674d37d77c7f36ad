"""Several searches in one picture: what each had found after the same hours, and where its winner lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from hpcl.analysis.charts.look import COLOURS, SERIES, chart, new_figure, nothing
from hpcl.analysis.text import one_line

if TYPE_CHECKING:
    from hpcl.analysis.compare import Comparison


@chart
def best_over_hours(comparison: Comparison) -> Figure:
    """Which search had found the better configuration after the same hours? Best so far as steps, one line each.

    Where searches count different things (CPU- and GPU-hours), each is drawn over the part of what it spent.
    """
    figure, axes = new_figure()
    progress = comparison.progress
    if not any(len(each.spent) for each in progress):
        nothing(axes, "no trial finished with a value")
        return figure
    same = comparison.common is not None
    for i, (name, each) in enumerate(zip(comparison.names, progress, strict=True)):
        finished = len(comparison.searches[i].finished)
        if not len(each.spent):
            axes.plot([], [], color=SERIES[i % len(SERIES)], label=_label(f"{name}: none finished"))
            continue
        scale = 1.0 if same or not each.total else 1 / each.total
        x = np.append(each.spent, max(each.total, float(each.spent[-1]))) * scale
        axes.step(
            x, np.append(each.best, each.best[-1]), where="post", color=SERIES[i % len(SERIES)], linewidth=1.6,
            label=_label(f"{name} (n = {finished} finished)"),
        )  # fmt: skip
    if same and comparison.common:
        axes.axvline(comparison.common, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    axes.set_title("What had each search found after the same hours?")
    axes.set_xlabel(f"{progress[0].unit} spent" if same else "part of what the search spent")
    curves = list(dict.fromkeys(each.curve for each in progress))
    axes.set_ylabel(f"best {' / '.join(curves)} of a finished trial")
    axes.grid(axis="y")
    axes.legend(loc="best")
    return figure


@chart
def winning_places(comparison: Comparison) -> Figure:
    """Where did the winners lie? The winner's place in each range, 0 at its low end.

    Choices lie at the place of their number among the choices; a field that did not act is left out.
    """
    import pandas as pd

    paths = comparison.fields()
    figure, axes = new_figure(height=max(2.0, 0.9 + 0.28 * len(paths)))
    if not paths or all(search.best is None for search in comparison.searches):
        nothing(axes, "no trial finished with a value")
        return figure
    for i, (name, search) in enumerate(zip(comparison.names, comparison.searches, strict=True)):
        rows, places = [], []
        for row, path in enumerate(paths):
            field, value = search.fields.get(path), comparison.winning(path)[i]
            if field is None or search.best is None or (value is None and None not in field.choices):
                continue
            place = float(field.positions(pd.Series([value], dtype=object if field.kind == "choice" else None))[0])
            if not np.isfinite(place):  # such as the base's 0 on a logarithm
                continue
            if field.kind == "choice":
                place /= max(1, len(field.choices) - 1)
            rows.append(row)
            places.append(place)
        # Beside one another where two winners lie at one place.
        shift = (i - (len(comparison.names) - 1) / 2) * 0.5 / len(comparison.names)
        axes.scatter(places, np.array(rows) + shift, color=SERIES[i % len(SERIES)], s=34, label=_label(name), zorder=3)
    axes.set_yticks(range(len(paths)), list(map(one_line, paths)))
    axes.set_ylim(len(paths) - 0.5, -0.5)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["low end", "middle", "high end"])
    axes.set_xlabel("place in the range of that search, on the scale that was sampled")
    axes.set_title("Where did the winners lie?")
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _label(name: str) -> str:
    """A label that a legend shows: it leaves out what begins with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name
