"""Draw the curves of a search: who was stopped where, and how the clusters grew.

    python analysis/curves.py results/<name> [--metric acc_proto] [--out picture.png]

Reads the tables and search.json of the results folder; needs neither ray nor torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hpcl.errors import UserError
from hpcl.files import atomic_path
from hpcl.results import EPOCH_COLUMNS, read_rows

Row = dict[str, Any]
COLOURS = {
    "finished": "#1b6ca8",
    "stopped": "#b0b0b0",
    "diverged": "#c0392b",
    "failed": "#7b2d8b",
    "running": "#6c757d",
}
BEST = "#e07a1f"


def draw(folder: Path, out: Path, metric: str | None = None) -> None:
    """Write the picture of a results folder.

    Raises:
        UserError: the folder is none of a search, or has no such curve.
    """
    trials, epochs, facts = _read(folder)
    metric = metric or facts["metric"]
    if metric not in {c.name for c in EPOCH_COLUMNS if c.type == "float64"}:
        raise UserError(f"--metric is {metric}, but must be a numeric column of {folder / 'epochs.parquet'}")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out is {out}, but must end in .png, .svg or .pdf")
    best = facts.get("best")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for trial in sorted(trials, key=lambda t: (t["trial_id"] == best, t["state"] == "finished")):
        rows = [row for row in epochs if row["trial_id"] == trial["trial_id"]]
        _draw_trial(left, rows, metric, trial, trial["trial_id"] == best)
        _draw_trial(right, rows, "clusters", trial, trial["trial_id"] == best)
    for rung in facts["rungs"]:
        left.axvline(rung, color="#444444", lw=0.8, ls=":")
        left.annotate(
            f"rung {rung:g}", (rung, 0.01), xycoords=("data", "axes fraction"), fontsize=8, ha="right", rotation=90
        )
    states = ", ".join(f"{n} {state}" for state, n in facts["trials"].items() if n)
    left.set(title=f"Which trials were stopped, and where? n = {len(trials)}: {states}", xlabel="epoch", ylabel=metric)
    right.set(
        title=f"How did the clusters grow? n = {len(trials)} trials",
        xlabel="epoch",
        ylabel="clusters of the finest level",
    )
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], color=BEST, lw=2.5, label="best")]
    handles += [plt.Line2D([], [], color=COLOURS[s], label=s) for s, n in facts["trials"].items() if n]
    left.legend(handles=handles, fontsize=8, frameon=False, loc="upper left")
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=130, format=out.suffix.removeprefix("."))
    plt.close(figure)


def _draw_trial(axes: Axes, rows: list[Row], column: str, trial: Row, best: bool) -> None:
    points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
    if not points:
        return
    x, y = zip(*points, strict=True)
    colour = BEST if best else COLOURS[trial["state"]]
    step = {"drawstyle": "steps-mid"} if column == "clusters" else {}
    axes.plot(x, y, color=colour, lw=2.5 if best else 1.1, alpha=1 if best else 0.8, zorder=3 if best else 2, **step)
    if trial["state"] != "finished":
        axes.plot(x[-1], y[-1], marker="x", color=colour, ms=5)


def _read(folder: Path) -> tuple[list[Row], list[Row], Row]:
    needed = [folder / name for name in ("trials.parquet", "epochs.parquet", "search.json")]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise UserError(f"{folder}: not the results of a search that ended; there is no {', '.join(missing)}")
    facts = json.loads(needed[2].read_text(encoding="utf-8"))
    if "trials" not in facts:
        raise UserError(f"{folder}: the search has not come to an end (search.json: {facts['state']})")
    return read_rows(needed[0]), read_rows(needed[1]), facts


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description="Draw the curves of a search.")
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--metric", help="curve to draw; default: the one ASHA watched")
    parser.add_argument("--out", type=Path, help="PNG, SVG or PDF; default: curves.png in the results folder")
    options = parser.parse_args()
    out = options.out or options.folder / "curves.png"
    try:
        draw(options.folder, out, options.metric)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
