"""``hpcl compare results/a results/b ...``: several searches side by side, and what can be told of their difference.

What each found after the same hours, which values won within which ranges, and how sure a difference is: by seeds
where both were retrained, else by what one run's probe can tell at all.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcl.analysis.pooled import (
    base_differences,
    differences,
    given_twice,
    retrained,
    space_of,
)
from hpcl.analysis.progress import Progress, best_so_far
from hpcl.analysis.text import aligned, counted, one_line
from hpcl.errors import UserError, harmless
from hpcl.results.fields import Field
from hpcl.results.load import load_searches
from hpcl.results.search import PROBE
from hpcl.validation import show

if TYPE_CHECKING:
    from hpcl.analysis.pooled import Retrained
    from hpcl.results import SearchResults
    from hpcl.search.space import Space

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Parts of the hours that all searches spent, at which they are compared."""
EXACT = 12
"""Runs of both sides together up to which all their permutations are looked through."""
_MOST_IMAGES = 20_000


@dataclass(frozen=True)
class Difference:
    """Two searches' best retrained configurations, by their seeds."""

    names: tuple[str, str]
    trials: tuple[str, str]
    n: tuple[int, int]
    """Seeds of each."""
    means: tuple[float, float]
    difference: float
    """Mean of the first less mean of the second, in units of the objective."""
    low: float
    """Low end of Welch's 95 % interval of the difference."""
    high: float
    p: float | None
    """Of the exact permutation test, two-sided; None with more than EXACT runs, where Welch's interval serves."""

    def text(self) -> str:
        """In a sentence, with n."""
        a, b = (f"{self.names[i]} trial {self.trials[i]} {self.means[i]:.4f} (n = {self.n[i]})" for i in range(2))
        told = "is told apart from 0" if self.low > 0 or self.high < 0 else "is not told apart from 0"
        exact = ""
        if self.p is not None:
            least = (
                2 / math.comb(sum(self.n), self.n[0])
                if self.n[0] == self.n[1]
                else 1 / math.comb(sum(self.n), self.n[0])
            )
            exact = f"; exact permutations p = {self.p:.2g} (with so few seeds at least {least:.2g})"
        return (
            f"{a} against {b}: difference {self.difference:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f} "
            f"(Welch), which {told}{exact}"
        )


@dataclass(frozen=True)
class Comparison:
    """Several searches side by side."""

    searches: tuple[SearchResults, ...]
    names: tuple[str, ...]
    """A name for each, no two alike."""
    progress: tuple[Progress, ...]
    """Best so far of each over what it spent."""
    apart: tuple[str, ...]
    """Why their objectives do not compare; empty where they do."""
    winners: tuple[Mapping[str, Any], ...]
    """Searched values of each search's winner that acted, by path; empty where nothing finished."""
    common: float | None
    """What the one that spent least had spent; None where they count different things, such as CPU- and GPU-hours."""
    differences: tuple[Difference, ...]
    """Of each two that were both retrained with two seeds or more."""
    notes: tuple[str, ...]
    """What can be told where seeds are missing, and what else the reader should know."""

    def lines(self) -> list[str]:
        """All of it, as lines for a terminal."""
        lines = [f"not comparable: {why}" for why in self.apart]
        lines += aligned(self._overview())
        if self.common is not None:
            lines += ["", f"best so far after the same {self.progress[0].unit}", *aligned(self._same_hours())]
        lines += ["", "winning values", *aligned(self._winners()), ""]
        lines += [f"seeds  {difference.text()}" for difference in self.differences]
        lines += [f"note   {note}" for note in self.notes]
        return [one_line(line) for line in lines]

    def winning(self, path: str) -> list[Any]:
        """The value of a field in each search's winner; None where it did not act, or nothing finished."""
        return [winner.get(path) for winner in self.winners]

    def fields(self) -> list[str]:
        """Paths that at least one of them searched, in order."""
        return list(dict.fromkeys(path for search in self.searches for path in search.fields))

    def _overview(self) -> list[list[str]]:
        rows = [["search", "trials", "finished", "spent", "chosen by", "best", "base"]]
        if self.common is not None:
            rows[0].append(f"best at {self.common:.3g}")
        for name, search, progress in zip(self.names, self.searches, self.progress, strict=True):
            best, base = search.best, search.base_trial
            row = [
                name, str(len(search.trials)), str(len(search.finished)), f"{progress.total:.3g} {progress.unit}",
                search.chosen_by, "none" if best is None else f"{best['objective']:.4f} (trial {best['trial_id']})",
                "unknown" if base is None
                else _number(float(base["objective"]) if base["state"] == "finished" else None, str(base["state"])),
            ]  # fmt: skip
            rows.append([*row, _number(progress.at(self.common))] if self.common is not None else row)
        return rows

    def _same_hours(self) -> list[list[str]]:
        assert self.common is not None
        rows = [[self.progress[0].unit, *self.names]]
        for part in PARTS:
            spent = part * self.common
            rows.append([f"{spent:.3g}", *(_number(progress.at(spent)) for progress in self.progress)])
        return rows

    def _winners(self) -> list[list[str]]:
        rows = [["field", *itertools.chain.from_iterable((name, "range") for name in self.names)]]
        for path in self.fields():
            row = [path]
            for search, value in zip(self.searches, self.winning(path), strict=True):
                field = search.fields.get(path)
                if field is None:
                    row += [show(_at(search.about.base, path)) if search.about.base else "?", "not searched"]
                else:
                    none = "-" if search.best is None else "did not act"
                    row += [none if value is None and None not in field.choices else show(value), range_text(field)]
            rows.append(row)
        return rows


def compare(searches: Sequence[SearchResults]) -> Comparison:
    """Several searches side by side.

    Args:
        searches: of :func:`hpcl.results.load_search`, at least two. Where their images or objectives differ that is
            said, not refused: hours and values can still be looked at. So where their bases differ in the length of
            training or the split of the images, as far as both have a space.

    Raises:
        UserError: fewer than two, or a folder is given twice.
    """
    if twice := given_twice(searches):
        raise UserError(*map(one_line, twice))
    if len(searches) < 2:
        raise UserError(f"{counted(len(searches), 'search', 'searches')} given, but at least two are needed to compare")
    names = _names(searches)
    progress = tuple(best_so_far(search) for search in searches)
    spaces = [_space(search) for search in searches]
    first = (searches[0], spaces[0])
    apart = [
        why for other in zip(searches, spaces, strict=True) if other[0] is not first[0] for why in _apart(first, other)
    ]
    same_unit = len({each.unit for each in progress}) == 1
    notes = [
        f"{name}: {note}"
        for name, search, each in zip(names, searches, progress, strict=True)
        for note in (*search.about.notes, *each.notes)
    ]
    if not same_unit:
        notes.append(f"spent in {' and '.join(sorted({p.unit for p in progress}))}: no same hours to compare at")
    found: list[Difference] = []
    seeded = []
    for search in searches:
        best, lost = _seeded(search)
        seeded.append(best)
        notes += lost
    for a, b in itertools.combinations(range(len(searches)), 2):
        sides = ((searches[a], spaces[a]), (searches[b], spaces[b]))
        if _apart(*sides, retrained=True):
            continue
        made = _difference((searches[a], searches[b]), (names[a], names[b]), (seeded[a], seeded[b]))
        if isinstance(made, Difference):
            found.append(made)
        elif not _apart(*sides):
            notes.append(made)
    return Comparison(
        searches=tuple(searches),
        names=names,
        progress=progress,
        apart=tuple(apart),
        winners=tuple({} if s.best is None else s.values(str(s.best["trial_id"])) for s in searches),
        common=min(each.total for each in progress) if same_unit else None,
        differences=tuple(found),
        notes=tuple(notes),
    )


def main(folders: Sequence[Path]) -> None:
    """``hpcl compare FOLDER FOLDER ...``: print the searches side by side.

    Raises:
        UserError: fewer than two folders, or some cannot be read, with all reasons.
    """
    if len(folders) < 2:
        raise UserError(f"{counted(len(folders), 'folder')} given, but at least two are needed to compare")
    print(harmless("\n".join(compare(load_searches(folders)).lines())), flush=True)


def probe_images(values: Sequence[float]) -> int | None:
    """Number of images that these accuracies were counted on: the least of which all are whole parts; None if unknown.

    Args:
        values: accuracies, 0..1; at least three different ones tell it. The true number may be a multiple of it,
            where a standard error by it is too large rather than too small.
    """
    import numpy as np

    different = np.unique([value for value in values if 0 < value < 1])
    if len(different) < 3:
        return None
    counts = np.arange(2, _MOST_IMAGES)
    parts = different[:, None] * counts
    whole = (np.abs(parts - parts.round()) < 1e-6).all(axis=0)
    return int(counts[whole.argmax()]) if whole.any() else None


def range_text(field: Field) -> str:
    """A field's range in words."""
    if field.kind == "choice":
        return show(list(field.choices))
    seen = "seen " if field.guessed else ""
    low, high = (show(int(end) if field.kind == "int" else end) for end in (field.low, field.high))
    return f"{seen}[{low}, {high}]{' log' if field.log else ''}"


def _space(search: SearchResults) -> Space | None:
    """The space as it was searched; None where there is none that can be read."""
    with suppress(UserError):
        return space_of(search)
    return None


def _apart(
    first: tuple[SearchResults, Space | None], other: tuple[SearchResults, Space | None], *, retrained: bool = False
) -> list[str]:
    """Why the objectives of two searches, or of their retraining, do not compare."""
    why = differences([first[0], other[0]])
    if first[1] is not None and other[1] is not None:
        why += base_differences((first[0], first[1]), (other[0], other[1]), retrained=retrained)
    return why


def _difference(
    pair: tuple[SearchResults, SearchResults],
    names: tuple[str, str],
    seeded: tuple[Retrained | None, Retrained | None],
) -> Difference | str:
    """What seeds say of two searches, or why they say nothing and what one run can tell."""
    a, b = seeded
    if a is None or b is None:
        return _one_run(pair, names, [n for n, s in zip(names, seeded, strict=True) if s is None])
    if a.epochs != b.epochs:
        length = counted(a.epochs, "epoch")
        return f"{names[0]} was retrained for {length}, {names[1]} for {b.epochs}: their seeds do not compare"
    from scipy.stats import permutation_test, ttest_ind

    x, y = a.objectives, b.objectives
    difference = statistics.fmean(x) - statistics.fmean(y)
    low = high = difference
    if len({*x}) > 1 or len({*y}) > 1:  # else there is no spread at all
        low, high = (float(end) for end in ttest_ind(x, y, equal_var=False).confidence_interval(0.95))
    p = None
    if len(x) + len(y) <= EXACT:
        p = float(permutation_test((x, y), lambda u, v: statistics.fmean(u) - statistics.fmean(v)).pvalue)
    return Difference(
        names,
        (a.trial_id, b.trial_id),
        (len(x), len(y)),
        (statistics.fmean(x), statistics.fmean(y)),
        difference,
        low,
        high,
        p,
    )


def _seeded(search: SearchResults) -> tuple[Retrained | None, list[str]]:
    """The best retrained configuration with two seeds or more and none lost, and notes on those left out."""
    found, notes = retrained(search)
    return max(found, key=lambda each: search.sign * statistics.fmean(each.objectives), default=None), notes


def _one_run(pair: tuple[SearchResults, SearchResults], names: tuple[str, str], lacking: Sequence[str]) -> str:
    text = f"{names[0]} against {names[1]}: one run each cannot tell them apart"
    best = [search.best for search in pair]
    if best[0] is not None and best[1] is not None:
        values = [float(row["objective"]) for row in best if row is not None]
        text += f" ({values[0]:.4f} and {values[1]:.4f})"
        if pair[0].chosen_by == PROBE:
            known = pair[0].about.val_images
            images = known or probe_images([float(v) for search in pair for v in search.finished["objective"]])
            if not all(0 <= value <= 1 for value in values):
                text += "; a probe's accuracy must be from 0 to 1, so these are none"
            elif images is None:
                text += "; on how many validation images the probe was scored is not known here"
            else:
                error = math.sqrt(sum(v * (1 - v) for v in values) / images)
                text += (
                    f"; the probe was scored on {images} validation images{'' if known else ' by its values'}, so the "
                    f"standard error of the difference is {error:.4f} from the drawing of those images alone"
                )
    folders = " and ".join(str(s.folder) for s, name in zip(pair, names, strict=True) if name in lacking)
    return f"{text}; `hpcl retrain` {folders} with two seeds or more can"


def _names(searches: Sequence[SearchResults]) -> tuple[str, ...]:
    short = [one_line(search.about.name) for search in searches]
    names = [
        name if short.count(name) == 1 else one_line(str(s.folder)) for name, s in zip(short, searches, strict=True)
    ]
    return tuple(f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names))


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if hasattr(tree, "get") else None
    return tree


def _number(value: float | None, otherwise: str = "none") -> str:
    return otherwise if value is None or math.isnan(value) else f"{value:.4f}"
