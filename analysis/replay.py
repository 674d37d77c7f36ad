"""What other curves, graces and factors would have stopped, lost and spent in a search that is done.

    python analysis/replay.py results/<name> [--metric M ...] [--grace G ...] [--factor F ...] [--min-peers N]

A row for each combination. Only trials whose outcome is known are replayed: best on a search that stopped nothing
(``grace: null``). Needs neither ray nor torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import product
from pathlib import Path

from hpcl.analysis.replay import Recording, replay
from hpcl.analysis.text import aligned, one_line
from hpcl.errors import UserError
from hpcl.results import load_search


def lines(
    recording: Recording, metrics: list[str], graces: list[float], factors: list[float], min_peers: int
) -> list[str]:
    """The table, and what it is about; no table where no trial finished.

    Raises:
        UserError: there is no such curve, or a grace or factor is out of range.
    """
    about, unit = recording.search.about, recording.search.cost_unit
    cells = [("metric", "grace", "factor", "rungs", "epochs", unit, "lost of the best quarter", "best kept", "regret")]
    for metric, grace, factor in product(metrics, graces, factors):
        result = replay(recording, metric, grace=grace, factor=factor, min_peers=min_peers)
        cells.append(
            (
                metric,
                f"{grace:g}",
                f"{factor:g}",
                ", ".join(f"{rung:g}" for rung in result.rungs) or "none",
                "-" if math.isnan(result.epochs_share) else f"{100 * result.epochs_share:.0f} %",
                f"{result.hours:.3g}",
                f"{result.lost} of {result.quarter}",
                "-" if result.best_rank is None else f"rank {result.best_rank}",
                "-" if math.isnan(result.regret) else f"{result.regret:.4f}",
            )
        )
    head = f"{about.name}: {recording.n} trials finished and {recording.diverged} diverged, "
    head += f"{recording.at_a_time} at a time; best by {recording.search.chosen_by}"
    table = aligned(cells, "  ") if recording.n else ["no trial finished with an objective: nothing can be lost"]
    return [one_line(head), *table, *(one_line(f"note: {note}") for note in recording.notes)]


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description="Replay other stopping rules on the curves of a search.")
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--metric", nargs="+", help="curves to stop on; default: the search's own")
    parser.add_argument(
        "--grace", nargs="+", type=float, help="from the fork to the first rung; default: the search's, half and twice"
    )
    parser.add_argument("--factor", nargs="+", type=float, help="default: 2, 3, 4 and the search's own")
    parser.add_argument("--min-peers", type=int, default=1, help="values at a rung that a decision needs; default: 1")
    options = parser.parse_args()
    try:
        recording = Recording.of(load_search(options.folder))
        own = recording.grace
        graces = options.grace or sorted({max(1.0, float(round(own / 2))), own, 2 * own})
        factors = options.factor or sorted({2.0, 3.0, 4.0, recording.factor})
        metrics = options.metric or [recording.search.about.metric or "acc_proto_ref"]
        print("\n".join(lines(recording, metrics, graces, factors, options.min_peers)))
    except UserError as error:
        print("\n".join(one_line(problem) for problem in error.problems), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
