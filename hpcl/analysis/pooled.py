"""Finished trials of several searches as one set: which can be taken together, and how far they lie apart.

And which retrained configurations can be judged: those of which no seed was lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpcl.analysis.text import counted, one_line
from hpcl.config import Config
from hpcl.errors import ConfigError, UserError
from hpcl.results.fields import Field, shown
from hpcl.search import space as spaces
from hpcl.stages import stage_lengths
from hpcl.validation import field_paths, show

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hpcl.results import SearchResults
    from hpcl.search.space import Space

APART = 0.5
"""Distance of two different choices, and of a field that acts from one that does not, in ranges of a number."""
SPACE = "space.yaml"
_SAME_IMAGES = ("data.size", "data.subset", "data.val_fraction", "data.test_fraction", "data.split_seed")
_ASIDE = ("seed", "data", "runtime", "meters")
"""Fields of the base that make no difference between configurations: luck, the same images, where it runs."""


@dataclass(frozen=True)
class Run:
    """A finished trial, and where it was."""

    search: SearchResults
    space: Space
    trial_id: str
    values: Mapping[str, Any]
    """Searched values that acted, by path."""
    objective: float


@dataclass(frozen=True)
class Pool:
    """Finished trials that can be compared with one another."""

    searches: tuple[SearchResults, ...]
    spaces: tuple[Space, ...]
    runs: tuple[Run, ...]
    """The best first; of equals that of the earlier search, and there the earlier one."""
    fields: Mapping[str, Field]
    """What differs between configurations, with ranges that hold the values of all searches."""
    chosen_by: str
    sign: float
    """1 where a larger objective is better, else -1."""
    notes: tuple[str, ...] = ()
    """What is known of the searches besides, such as what of their files was left out."""

    def good(self) -> NDArray[np.float64]:
        """float64 (n,) objectives of `runs`, turned so that larger is better."""
        import numpy as np

        return self.sign * np.array([run.objective for run in self.runs])

    def distances(self) -> NDArray[np.float64]:
        """float64 (d, n, n): how far each two runs lie apart in each of `fields`, in ranges.

        Numbers on the scale that was sampled; different choices are APART, a field that acts in one of two runs at
        least so, and one that acts in neither puts them at no distance.
        """
        import numpy as np

        return np.array([self._distance(field) for field in self.fields.values()])

    def _distance(self, field: Field) -> NDArray[np.float64]:
        import numpy as np
        import pandas as pd

        values = [_value(run, field.path) for run in self.runs]
        kinds = ["nothing" if value is _NOTHING else _kind(value, field) for value in values]
        numbers = np.array([kind == "number" for kind in kinds])
        code = np.unique(np.array(kinds), return_inverse=True)[1]
        column = pd.Series([value if is_number else math.nan for value, is_number in zip(values, numbers, strict=True)])
        places = field.positions(column) if numbers.any() else np.full(len(values), math.nan)
        # What has no place stands in the middle, and APART on an axis of its own: distances of points, of which kernels
        # can be made. With merely APART in between, two ends could lie nearer to it than to one another.
        middle = np.where(np.isfinite(places), places, 0.5)
        return np.asarray(np.sqrt((middle[:, None] - middle) ** 2 + APART**2 * (code[:, None] != code)))


def pool(searches: Sequence[SearchResults]) -> Pool:
    """The finished trials of these searches as one set.

    Raises:
        UserError: they cannot be taken together, with all reasons: different objectives, images, or lengths of
            training, results without a space, no finished trial, or a folder given twice.
    """
    problems = given_twice(searches)
    known: list[tuple[SearchResults, Space]] = []
    for search in searches:
        try:
            known.append((search, space_of(search)))
        except UserError as error:
            problems += error.problems
    problems += differences(searches)
    for other, space in known[1:]:
        problems += base_differences(known[0], (other, space))
    if not problems and not any(len(search.finished) for search in searches):
        names = ", ".join(str(search.folder) for search in searches)
        problems.append(f"{names}: no trial finished its schedule with a value, so there is none to choose")
    if problems:
        raise UserError(*map(one_line, problems))
    sign = searches[0].sign
    runs = [
        Run(search, space, str(trial), search.values(str(trial)), float(objective))
        for search, space in known
        for trial, objective in zip(search.finished["trial_id"], search.finished["objective"], strict=True)
    ]
    runs.sort(key=lambda run: -sign * run.objective)
    fields = _fields(known)
    return Pool(
        searches=tuple(searches),
        spaces=tuple(space for _, space in known),
        runs=tuple(runs),
        fields=fields,
        chosen_by=searches[0].chosen_by,
        sign=sign,
        notes=tuple(f"{search.about.name}: {note}" for search in searches for note in search.about.notes),
    )


def given_twice(searches: Sequence[SearchResults]) -> list[str]:
    """A sentence for each folder that is there already, by whatever name."""
    folders = [search.folder.resolve() for search in searches]
    return [
        f"{search.folder}: is given twice; leave one out"
        for i, search in enumerate(searches)
        if folders[i] in folders[:i]
    ]


@dataclass(frozen=True)
class Retrained:
    """A configuration that was retrained with two seeds or more of which none was lost."""

    trial_id: str
    epochs: int
    objectives: tuple[float, ...]
    """One for each seed."""


def retrained(search: SearchResults) -> tuple[list[Retrained], list[str]]:
    """What of a search's retraining can be judged, in its order, and a note on each that cannot."""
    import numpy as np

    drawn = {str(trial) for trial in search.trials["trial_id"]}
    found, notes = [], []
    for trial, runs in search.retrain.groupby("trial_id", sort=False):
        values = [float(value) for value in runs["objective"].dropna()]
        lost = [str(state) for state in runs["state"] if state in ("failed", "diverged")]
        lost += ["infinite" for value in values if not math.isfinite(value)]
        epochs = runs["epochs"].dropna().to_numpy(dtype=np.float64)
        why = None
        if lost:
            why = f"{counted(len(lost), 'seed')} {lost[0]}"
        elif str(trial) not in drawn:
            why = "the search has no such trial"
        elif values and not len(epochs):
            why = "for how many epochs is not known"
        elif len(values) >= 2:
            found.append(Retrained(str(trial), int(epochs.max()), tuple(values)))
        if why is not None:
            notes.append(f"trial {trial} of {search.about.name} was retrained, but is left out: {why}")
    return found, notes


def space_of(search: SearchResults) -> Space:
    """The space as it was searched.

    Raises:
        UserError: the folder has none that can be read.
    """
    if search.about.kind != "hpcl":
        raise UserError(
            f"{one_line(str(search.folder))}: is Ray Tune's, without a {SPACE} that says the whole configuration; give "
            "a results folder of hpcl"
        )
    try:
        return spaces.load(search.folder / SPACE)
    except ConfigError as error:
        why = "; ".join(error.problems)
        raise UserError(one_line(f"{search.folder}: its {SPACE} is needed: {why}")) from error


def differences(searches: Sequence[SearchResults]) -> list[str]:
    """Why the objectives of these searches are not on one scale, a sentence each; empty where they are."""
    first, problems = searches[0], []
    for other in searches[1:]:
        if first.finished.empty or other.finished.empty:
            pass  # there are no values
        elif other.chosen_by != first.chosen_by:
            problems.append(
                f"{other.folder}: was chosen by {other.chosen_by}, but {first.folder} by {first.chosen_by}: the values "
                "are not on one scale"
            )
        elif other.sign != first.sign:
            problems.append(f"{other.folder}: a better {other.chosen_by} is at the other end than in {first.folder}")
        a, b = _images(first), _images(other)
        hashed = a[1] is not None and b[1] is not None
        if (a[1] != b[1]) if hashed else (a[0] != b[0]):
            problems.append(
                f"{other.folder}: was searched on other images ({b[0]}) than {first.folder} ({a[0]})"
                if a[0] != b[0]
                else f"{other.folder}: the images at {a[0]} had changed since {first.folder} (their hashes differ)"
            )
    return problems


def _images(search: SearchResults) -> tuple[str, str | None]:
    """Source and hash of a search's images; the source tells nothing where a hash does."""
    content = search.about.facts.get("data_hash")
    return str(search.about.data), str(content) if content else None


def base_differences(
    first: tuple[SearchResults, Space], other: tuple[SearchResults, Space], *, retrained: bool = False
) -> list[str]:
    """What in their bases keeps the objectives of two searches from being compared, a sentence each.

    Args:
        first, other: a search and its space.
        retrained: of the retraining, which takes all images and lengths of its own.
    """
    a, b = first[1].base, other[1].base
    paths = [path for path in _SAME_IMAGES if not (retrained and path == "data.subset")]
    if first[0].chosen_by in first[0].numeric:  # a curve is what the meters make it
        paths += [path for path in field_paths(Config) if path.startswith("meters.")]
    problems = [
        f"{other[0].folder}: {path} is {show(b.at(path))}, but {show(a.at(path))} in {first[0].folder}"
        for path in paths
        if a.at(path) != b.at(path)
    ]
    lengths = [sum(stage_lengths(config.stages)) for config in (b, a)]
    if lengths[0] != lengths[1] and not retrained:
        problems.append(
            f"{other[0].folder}: trained {counted(lengths[0], 'epoch')}, but {first[0].folder} {lengths[1]}"
        )
    return problems


def _fields(known: Sequence[tuple[SearchResults, Space]]) -> dict[str, Field]:
    """Searched fields, and those in which the bases differ."""
    made: dict[str, list[Field]] = {}
    for search, _ in known:
        for path, field in search.fields.items():
            made.setdefault(path, []).append(field)
    fixed = [path for path in field_paths(Config) if path.split(".")[0] not in _ASIDE and path not in made]
    apart = {path: Field(path, "choice") for path in fixed if len({str(space.base.at(path)) for _, space in known}) > 1}
    return {path: _joined(fields, known) for path, fields in made.items()} | apart


def _joined(fields: Sequence[Field], known: Iterable[tuple[SearchResults, Space]]) -> Field:
    """A field whose range holds the ranges, and the bases, of all searches."""
    numeric = [field for field in fields if field.kind != "choice"]
    if not numeric:
        return fields[0]
    bases = [space.base.at(fields[0].path) for _, space in known]
    ends = [field.low for field in numeric] + [field.high for field in numeric]
    log = all(field.log for field in numeric)
    ends += [float(base) for base in bases if _is_number(base) and (base > 0 or not log)]
    return replace(numeric[0], low=min(ends), high=max(ends), log=log, step=None)


_NOTHING = object()


def _value(run: Run, path: str) -> Any:
    """A run's value of a field; `_NOTHING` where the field was searched and did not act."""
    if path in run.values:
        return run.values[path]
    return _NOTHING if path in run.space.params else run.space.base.at(path)


def _kind(value: Any, field: Field) -> str:
    """`number`, or the text of a choice, of null, and of what the field's scale does not have."""
    if field.kind == "choice" or not _is_number(value) or (field.log and value <= 0):
        return f"choice {shown(value)}"
    return "number"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
