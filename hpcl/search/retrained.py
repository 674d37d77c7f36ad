"""What a retraining leaves behind, and what is said of it at the end."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

from hpcl.config import Config
from hpcl.files import write_text
from hpcl.search.evidence import Evidence
from hpcl.search.found import Found, first_error
from hpcl.search.listed import Run
from hpcl.search.places import shown
from hpcl.search.plan import duration
from hpcl.search.tables import Row
from hpcl.yamlio import write

FOLDER = "retrain"
"""The folder of the runs, in that of the search."""
BEST, BEST_OF_SEARCH = "best.yaml", "best-search.yaml"
_RETRAINED = "Retrained: "
"""How the header of a ``best.yaml`` begins that is no more what the search chose."""


@dataclass(frozen=True)
class Retrained:
    """What a retraining leaves behind."""

    folder: Path
    """``results/<name>``; where that is a URI, this process's copy of its files."""
    evidence: Evidence
    state: str
    """finished, interrupted (the same command goes on) or failed (the first runs had the same error)."""
    best: Config | None
    """What ``best.yaml`` holds now; None: it was left as it was."""
    found: Found | None
    """What this process trained; None where all runs had ended before."""
    next: str | None
    """The command that comes next, where ``best.yaml`` was written."""


def summary(retrained: Retrained) -> str:
    """What was found, where it lies, and the next command."""
    evidence, found, folder = retrained.evidence, retrained.found, shown(retrained.folder)
    lines = [""]
    if found is not None:
        states = ", ".join(f"{n} {'to come' if s == 'running' else s}" for s, n in found.states.items() if n)
        ended = "done" if found.state == "finished" else found.state
        lines.append(f"{ended} after {duration(found.seconds)}: {len(found.trials)} runs ({states}), {found.cost()}")
        lines += [found.reason] * (found.state == "failed")
    else:
        lines.append("nothing to train: all these runs have ended before; more --seeds or a larger --top add to them")
    lines += evidence.lines()
    lines += [f"left out  trial {s.trial_id}, though ahead: {'; '.join(s.lost)}" for s in evidence.left_out]
    best = evidence.best
    if best is None:
        error = first_error(replace(found, folder=retrained.folder / FOLDER)) if found else None
        lines += ["no run finished, so best.yaml stays as the search wrote it"]
        lines += ["the first failed run:", "", error.rstrip(), ""] if error else []
    elif retrained.best is None:
        lines.append("best.yaml stays as it was: not all runs have ended")
    else:
        lines += [
            f"best      trial {best.trial_id} with {evidence.chosen_by} {best.text()}",
            f"          {evidence.lead()}",
        ]
    lines.append(f"results   {folder}  (retrain.parquet, best.yaml, {BEST_OF_SEARCH}, {FOLDER}/)")
    if found is not None and found.interrupted:
        lines.append(f"resume    {found.command}")
    elif retrained.next:
        lines.append(f"next      {retrained.next}")
    return "\n".join(lines)


def write_best(folder: Path, best: Config, head: str) -> None:
    """Write ``best.yaml``; what the search had written there is kept as ``best-search.yaml``.

    Args:
        folder: ``results/<name>``.
        best: the configuration.
        head: of :func:`header`.
    """
    path = folder / BEST
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before and not before.startswith(f"# {_RETRAINED}"):
        write_text(folder / BEST_OF_SEARCH, before)
    write(path, best, head)


def header(name: str, evidence: Evidence, run: Run, row: Row) -> str:
    """By what evidence a configuration is the best.

    Args:
        name: of the search.
        evidence: with a best configuration.
        run: the run of it with the first seed, which `best.yaml` names.
        row: that run's row in the tables.
    """
    best = evidence.best
    assert best is not None  # else there is nothing to write
    then = "it did not finish" if best.search is None else f"{evidence.searched_by} {best.search:.6g}"
    base = next(s for s in evidence.standings if s.trial_id == evidence.base)
    count, lead = len(evidence.standings), evidence.lead()
    lines = [
        f"{_RETRAINED}trial {best.trial_id} of search {name}, the best mean of {count} configurations.",
        f"{evidence.chosen_by} {best.text()} on all training images, mean ± sd over seeds; in the search: {then}.",
        f"{lead[:1].upper()}{lead[1:]}.",
        *(f"Left out: trial {s.trial_id}, {s.text()}; {'; '.join(s.lost)}." for s in evidence.left_out),
        "It is the base's configuration." if base is best else f"The base (trial {base.trial_id}): {base.text()}.",
        f"Agreement {evidence.agreement_text()}.",
        f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}; all runs: retrain.parquet; before: {BEST_OF_SEARCH}",
    ]
    if row["state"] == "finished":
        lines.append(f"Trained already, through {row['epochs']} epochs: {FOLDER}/trials/{run.name}/")
    return "\n".join(lines)


def next_command(folder: Path, evidence: Evidence, run: Run, row: Row) -> str:
    """What comes next: a look at the run that trained what ``best.yaml`` says, or its training where that was lost."""
    if row["state"] != "finished":
        return f"hpcl train {shlex.quote(shown(folder / BEST))}"
    checkpoint = shlex.quote(shown(folder / FOLDER / "trials" / run.name / "checkpoint.pt"))
    labels = evidence.chosen_by in ("linear probe", "knn")
    return f"hpcl knn {checkpoint}" if labels else f"hpcl export {checkpoint} backbone.pt"
