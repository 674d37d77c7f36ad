"""``hpcl best results/...``: the configuration to go on with, by neighbours and seeds rather than by one lucky run.

Of many runs with noise the best value is a lucky one. So a configuration is judged, by what there is:

1. seeds: where configurations were retrained (`hpcl retrain`) with two or more seeds of which none was lost, by the
   median over their seeds;
2. neighbourhood: else by a Gaussian process over all finished trials (:mod:`hpcl.analysis.neighbours`), and the one
   with the best lower end (estimate - standard error) is chosen, so that a good value among bad ones, or far from all
   others, counts little;
3. one run: with fewer than FEW finished trials, by its value alone.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from hpcl.analysis.neighbours import smooth
from hpcl.analysis.notes import differences_from_notes
from hpcl.analysis.pooled import Pool, Run, pool, retrained
from hpcl.analysis.text import counted, one_line
from hpcl.config import Config
from hpcl.errors import UserError, harmless
from hpcl.files import may_write
from hpcl.results.load import load_searches
from hpcl.stages import stage_lengths
from hpcl.validation import show
from hpcl.yamlio import write

if TYPE_CHECKING:
    from hpcl.results import SearchResults

FEW = 6
"""With fewer finished trials neighbours say nothing: a process would be fitted to less than half a dozen values."""

FIRST_LINE = "Robust best of "
"""How the header of a file begins that this command wrote, and may therefore write again."""

By = Literal["seeds", "neighbourhood", "one run"]


MOST_RUNS = 500
"""Runs whose neighbourhoods are looked at; the time grows with the third power of their number."""


@dataclass(frozen=True)
class Candidate:
    """A configuration that was run, and what it is worth."""

    search: str
    """Name of the search."""
    folder: Path
    """Its folder."""
    trial_id: str
    values: Mapping[str, Any]
    """Searched values that acted, by path."""
    objective: float | None
    """Of its one run in the search; None where it did not finish there."""
    estimate: float
    """Median over seeds, estimate by its neighbourhood, or the one value; in units of the objective."""
    low: float
    """Low end of the interval: estimate - standard error, or the least of the seeds."""
    high: float
    """High end: estimate + standard error, or the most of the seeds."""
    neighbours: int = 0
    """Other trials that are near enough to count for it; 0 where neighbours were not asked."""
    own: float = 1.0
    """Weight of its own run in the estimate, 0..1."""
    seeds: tuple[float, ...] = ()
    """Objectives of its seeds in the retraining."""
    epochs: int | None = None
    """Epochs of the retraining; None where there was none."""

    @property
    def name(self) -> str:
        """Trial and search in words."""
        return f"trial {self.trial_id} of {self.search}"


@dataclass(frozen=True)
class Robust:
    """The configuration to go on with, and by what evidence."""

    best: Candidate
    lucky: Candidate
    """The trial of the best value in one run, which `best` may be itself."""
    by: By
    """What evidence chose."""
    chosen_by: str
    """What the objective is: ``linear probe``, or the name of a curve."""
    candidates: tuple[Candidate, ...]
    """All that were compared, the best first."""
    config: Config
    """The chosen configuration, complete: the base with its values, at the length at which it was judged."""
    trials: int
    """Finished trials of all searches together."""
    searches: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was chosen and why, as lines for a terminal."""
        best = self.best
        lines = [
            f"robust best  {best.name}, of {counted(self.trials, 'finished trial')} in "
            f"{counted(len(self.searches), 'search', 'searches')}",
            f"             {self.evidence()}",
        ]
        if self.lucky.trial_id == best.trial_id and self.lucky.folder == best.folder:
            lines.append("best value   the same trial")
        else:
            of = self.lucky
            why = (
                f"; estimated at {of.estimate:.4g} ({of.low:.4g} to {of.high:.4g})"
                if self.by == "neighbourhood"
                else ""
            )
            lines.append(f"best value   {of.name}: {self.chosen_by} {of.objective:.4g} in one run{why}")
        width = max((len(path) for path in best.values), default=0)
        lines.append("values")
        lines += [f"             {path:<{width}}  {show(value)}" for path, value in best.values.items()]
        for title, rows in differences_from_notes(self.config, best.values).items():
            lines += [title, *(f"             {row}" for row in rows)]
        lines += [f"note         {note}" for note in self.notes]
        return [one_line(line) for line in lines]

    def evidence(self) -> str:
        """By what it was chosen, in a sentence with its numbers."""
        best = self.best
        if self.by == "seeds":
            n = len(best.seeds)
            sure = 1 - 2.0 ** (1 - n)
            return (
                f"median {best.estimate:.4g} over {n} seeds at {counted(best.epochs or 0, 'epoch')} ({self.chosen_by} "
                f"{best.low:.4g} to {best.high:.4g}, which holds the true median with {sure:.0%})"
            )
        own = f"{self.chosen_by} {best.objective:.4g} in its one run"
        if self.by == "one run":
            return f"{own}; with fewer than {FEW} finished trials neighbours tell nothing, so this may be luck"
        near = counted(best.neighbours, "trial") if best.neighbours else "no other trial"
        return (
            f"estimate {best.estimate:.4g} ({best.low:.4g} to {best.high:.4g}, one standard error), with {near} near "
            f"it; {own}, which weighs {best.own:.0%} of that"
        )


def robust_best(searches: Sequence[SearchResults]) -> Robust:
    """The configuration to go on with, of one or several searches.

    Args:
        searches: of :func:`hpcl.results.load_search`, at least one.

    Raises:
        UserError: their trials cannot be compared, with all reasons; see :func:`hpcl.analysis.pooled.pool`.
    """
    pooled = pool(searches)
    near, by = _by_neighbours(pooled)
    first = pooled.runs[0]
    lucky = next(c for c in near if c.folder == first.search.folder and c.trial_id == first.trial_id)
    space_at = {search.folder: space for search, space in zip(pooled.searches, pooled.spaces, strict=True)}

    def config_of(candidate: Candidate) -> Config:
        config = space_at[candidate.folder].config_for(dict(candidate.values))
        return config if candidate.epochs is None else _retrained(config, candidate.epochs)

    seeded, notes = _by_seeds(pooled, near)
    candidates, config, refused = _allowed(seeded, config_of)
    if config is not None:
        if near[0].name != candidates[0].name and by == "neighbourhood":
            notes.append(
                f"by neighbours alone it would be {near[0].name} (estimate {near[0].estimate:.4g}, one standard error "
                f"{near[0].low:.4g} to {near[0].high:.4g}); `hpcl retrain` with a larger --top tests it too"
            )
        by = "seeds"
    else:
        candidates, config, more = _allowed(near, config_of)
        refused += more
        if config is None:
            raise UserError(*(one_line(f"{why}; there is no other trial") for why in refused))
        if len(near) > 1:
            notes.append(
                "one run each: the order of the best ones may be luck; hpcl retrain "
                f"{shlex.quote(str(candidates[0].folder))} tells them apart by seeds"
            )
    return Robust(
        best=candidates[0],
        lucky=lucky,
        by=by,
        chosen_by=pooled.chosen_by,
        candidates=tuple(candidates),
        config=config,
        trials=len(pooled.runs),
        searches=tuple(search.about.name for search in searches),
        notes=(*pooled.notes, *refused, *notes),
    )


def main(folders: Sequence[Path], out: Path | None, force: bool) -> None:
    """``hpcl best FOLDER ...``: print the robust best and its differences from the notes, and write it.

    Args:
        folders: of searches, at least one.
        out: YAML file to write; None: only print.
        force: overwrite a file that this command did not write.

    Raises:
        UserError: the searches cannot be taken together, or the file is not to be overwritten.
    """
    if out is not None:
        may_write(out, FIRST_LINE, "hpcl best", "--force overwrites it", force)
    found = robust_best(load_searches(folders))
    print(harmless("\n".join(found.lines())), flush=True)
    if out is not None:
        write(out, found.config, header(found))
        lines = (f"written      {out}", f"then         hpcl train {shlex.quote(str(out))}")
        print(harmless("\n".join(map(one_line, lines))), flush=True)


def header(found: Robust) -> str:
    """The comment on top of a written configuration: by what evidence it was chosen."""
    evidence = found.evidence()
    lines = [
        f"{FIRST_LINE}{counted(found.trials, 'finished trial')} in {', '.join(found.searches)}: {found.best.name}.",
        f"{evidence[:1].upper()}{evidence[1:]}.",
        f"The best value in one run: {found.lucky.name}, {found.chosen_by} {found.lucky.objective:.6g}.",
        *(f"Note: {note}." for note in found.notes),
        f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}. Train it: hpcl train FILE",
    ]
    # A folder's name may hold a line's end, which would end the comment.
    return harmless("\n".join(map(one_line, lines)))


def _by_neighbours(pooled: Pool) -> tuple[list[Candidate], By]:
    """All finished trials, the best first; by their value alone where they are few."""
    if len(pooled.runs) < FEW:
        return [_candidate(run, run.objective, run.objective, run.objective) for run in pooled.runs], "one run"
    pooled = _at_most(pooled, MOST_RUNS)
    worth = smooth(pooled.distances(), pooled.good())
    order = sorted(range(len(pooled.runs)), key=lambda i: worth.sd[i] - worth.mean[i])
    candidates = []
    for i in order:
        estimate, sd = pooled.sign * float(worth.mean[i]), float(worth.sd[i])
        more = {"neighbours": int(worth.neighbours[i]), "own": float(worth.own[i])}
        candidates.append(_candidate(pooled.runs[i], estimate, estimate - sd, estimate + sd, **more))
    return candidates, "neighbourhood"


def _at_most(pooled: Pool, most: int) -> Pool:
    """The pool with so many runs at most: the better half of them, and an even spread of the others."""
    if len(pooled.runs) <= most:
        return pooled
    import numpy as np

    top = most // 2
    spread = np.linspace(top, len(pooled.runs) - 1, most - top).round().astype(int)
    return replace(pooled, runs=(*pooled.runs[:top], *(pooled.runs[i] for i in spread)))


def _allowed(
    candidates: Sequence[Candidate], config_of: Callable[[Candidate], Config]
) -> tuple[list[Candidate], Config | None, list[str]]:
    """The candidates from the first on that the configuration allows, its configuration, and why others are left out.

    Lengths and values come from tables, which another version may have written.
    """
    refused: list[str] = []
    for i, candidate in enumerate(candidates):
        try:
            return list(candidates[i:]), config_of(candidate), refused
        except ValidationError as error:
            length = "" if candidate.epochs is None else f" at {counted(candidate.epochs, 'epoch')}"
            refused.append(f"{candidate.name} is left out, the configuration refuses it{length}: {_first(error)}")
    return [], None, refused


def _first(error: ValidationError) -> str:
    """The first problem in words."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))} {problem['msg']}".strip()


def _by_seeds(pooled: Pool, near: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Configurations with two or more seeds and none lost, the best median first; and what the reader should know."""
    of_folder = {search.folder: search for search in pooled.searches}
    runs = {(candidate.folder, candidate.trial_id): candidate for candidate in near}
    notes: list[str] = []
    seeded: list[Candidate] = []
    for folder, of in of_folder.items():
        found, left_out = retrained(of)
        notes += left_out
        for each in found:
            run = runs.get((folder, each.trial_id))
            seeded.append(
                Candidate(
                    of.about.name, folder, each.trial_id, run.values if run else of.values(each.trial_id),
                    run.objective if run else None, statistics.median(each.objectives), min(each.objectives),
                    max(each.objectives), seeds=each.objectives, epochs=each.epochs,
                )
            )  # fmt: skip
    longest = max((candidate.epochs or 0 for candidate in seeded), default=0)
    notes += [
        f"{candidate.name} was retrained for {counted(candidate.epochs or 0, 'epoch')} only, others for {longest}: it "
        "is left out"
        for candidate in seeded
        if candidate.epochs != longest
    ]
    seeded = [candidate for candidate in seeded if candidate.epochs == longest]
    judged = [of_folder[folder] for folder in {candidate.folder for candidate in seeded}]
    images = {str(_retrained_on(search)) for search in judged}
    if len(images) > 1:
        notes.append(f"retrained on different images ({', '.join(sorted(images))}), so seeds do not compare")
        seeded = []
    without = [search.about.name for search in pooled.searches if search.folder not in {c.folder for c in seeded}]
    if seeded and without:
        notes.append(f"{', '.join(without)}: without two seeds of any trial, so it does not take part in the choice")
    seeded.sort(key=lambda c: (-pooled.sign * c.estimate, -pooled.sign * statistics.fmean(c.seeds)))
    return seeded, notes


def _candidate(run: Run, estimate: float, low: float, high: float, **more: Any) -> Candidate:
    search = run.search
    return Candidate(
        search.about.name, search.folder, run.trial_id, run.values, run.objective, estimate, low, high, **more
    )


def _retrained_on(search: SearchResults) -> Any:
    """Source of the images of a search's retraining, as far as ``search.json`` says."""
    said = search.about.facts.get("retrained")
    return said.get("data", search.about.data) if isinstance(said, dict) else search.about.data


def _retrained(config: Config, epochs: int) -> Config:
    """The configuration as `hpcl retrain` trained it: on all images, and so long."""
    whole = config.with_values({"data.subset": 1.0})
    own = whole.with_values({"stages.total": None})
    return own if sum(stage_lengths(own.stages)) == epochs else whole.with_values({"stages.total": epochs})
